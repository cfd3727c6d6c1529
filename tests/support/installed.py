# Imports every module of the standard library, and checks every file that a package installed.
import hashlib, importlib, io, sys, glob, contextlib

missing = []
for name in sorted(sys.stdlib_module_names):
    # One opens a browser, one prints a poem.
    if name in ("antigravity", "this"):
        continue
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module(name)
    except ImportError as error:
        missing.append(name)
print("modules", len(sys.stdlib_module_names), "missing", *missing)

files = bytes_ = 0
for sums in sorted(glob.glob("/var/lib/dpkg/info/*.md5sums")):
    for line in open(sums):
        expected, path = line.rstrip("\n").split("  ", 1)
        if path.startswith(("usr/share/doc/", "usr/share/man/", "usr/share/lintian/")):
            continue
        with open("/" + path, "rb") as file:
            content = file.read()
        if hashlib.md5(content).hexdigest() != expected:
            print("WRONG", path)
        files += 1
        bytes_ += len(content)
print("files", files, "bytes", bytes_)

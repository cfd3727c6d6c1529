# Prints what is under a folder, one JSON line for each name: what the kernel says, nothing interpreted.
import hashlib, json, os, stat, sys

root = sys.argv[1].encode()


def line(path):
    s = os.lstat(path)
    entry = {
        "path": os.path.relpath(path, root).hex(),
        "mode": s.st_mode, "uid": s.st_uid, "gid": s.st_gid, "mtime": s.st_mtime_ns, "nlink": s.st_nlink, "size": s.st_size,
        "rdev": [os.major(s.st_rdev), os.minor(s.st_rdev)], "ino": s.st_ino,
        "xattrs": {name: os.getxattr(path, name, follow_symlinks=False).hex() for name in os.listxattr(path, follow_symlinks=False)},
    }
    if stat.S_ISLNK(s.st_mode):
        entry["target"] = os.readlink(path).hex()
    if stat.S_ISREG(s.st_mode):
        with open(path, "rb") as file:
            entry["sha256"] = hashlib.sha256(file.read()).hexdigest()
    print(json.dumps(entry))


line(root)
for folder, folders, files in os.walk(root):
    for name in folders + files:
        line(os.path.join(folder, name))

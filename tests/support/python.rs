//! An image with Debian's `python3`, made of the distribution's packages and not of anything of ours: unpacked
//! by `dpkg`, made an OCI image by `umoci`. Made once and kept in the user's cache.

#![allow(unreachable_pub, reason = "a part of a test binary")]

use std::fs;
use std::fs::File;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use kiln::image::Digest;
use kiln::vm::Assets;

use crate::guest::host;
use crate::image_support::run;

/// Python 3.11 with its standard library, and the libraries of both: Debian 12.
const PACKAGES: &[&str] = &[
    "base-files",
    "base-passwd",
    "libbz2-1.0",
    "libc6",
    "libcrypt1",
    "libexpat1",
    "libffi8",
    "libgcc-s1",
    "liblzma5",
    "libncursesw6",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "libreadline8",
    "libsqlite3-0",
    "libssl3",
    "libtinfo6",
    "libuuid1",
    "python3-minimal",
    "python3.11",
    "python3.11-minimal",
    "zlib1g",
];

/// Where the image and the folder that it was made of lie.
pub struct PythonImage {
    dir: PathBuf,
}

impl PythonImage {
    /// Makes the image, or finds the one made earlier.
    pub fn ensure() -> Self {
        let images = Assets::user().expect("a home folder").dir().join("test-images");
        fs::create_dir_all(&images).unwrap();
        let lock = File::create(images.join(".lock")).unwrap();
        lock.lock().unwrap();
        // Made anew when this file, which is its recipe, changes.
        let dir = images.join(format!("python-{}", &Digest::of(include_bytes!("python.rs")).hex()[..16]));
        if !dir.exists() {
            let scratch = tempfile::tempdir_in(&images).unwrap();
            build(scratch.path());
            fs::rename(scratch.keep(), &dir).unwrap();
        }
        Self { dir }
    }

    /// The OCI layout; the image is tagged "latest".
    pub fn layout(&self) -> PathBuf {
        self.dir.join("layout")
    }

    /// Runs the image's own python on this machine, with its own libraries, and returns what it printed.
    pub fn run_here(&self, program: &str) -> String {
        let root = self.dir.join("root");
        let libraries = ["lib", "usr/lib"].map(|dir| root.join(dir).join("x86_64-linux-gnu").display().to_string());
        let mut python = Command::new(root.join("lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"));
        python.args(["--library-path", &libraries.join(":")]).arg(root.join("usr/bin/python3.11"));
        python
            .args(["-c", program])
            .env_clear()
            .env("PYTHONHOME", root.join("usr"))
            .env("PYTHONDONTWRITEBYTECODE", "1");
        // The C library picks its mathematics by processor, and with fused multiply-add the last digit may differ.
        python.env("GLIBC_TUNABLES", "glibc.cpu.hwcaps=-AVX2,-AVX,-FMA,-FMA4,-AVX512F,-SSE4_1");
        host(&mut python)
    }
}

fn build(dir: &Path) {
    let (packages, root, layout) = (dir.join("packages"), dir.join("root"), dir.join("layout"));
    fs::create_dir(&packages).unwrap();
    // Not the system's package state: only files, into this folder.
    host(Command::new("apt-get").args(["--quiet", "download"]).args(PACKAGES).current_dir(&packages));
    for package in fs::read_dir(&packages).unwrap() {
        let package = package.unwrap().path();
        run("dpkg-deb", &["--extract", package.to_str().unwrap(), root.to_str().unwrap()]);
    }
    fs::remove_dir_all(&packages).unwrap();
    for unneeded in ["usr/share/doc", "usr/share/man", "usr/share/lintian"] {
        let _ = fs::remove_dir_all(root.join(unneeded));
    }
    // What base-passwd's installation script does.
    for name in ["passwd", "group"] {
        let master = root.join("usr/share/base-passwd").join(format!("{name}.master"));
        fs::copy(master, root.join("etc").join(name)).unwrap();
    }
    let image = format!("{}:latest", layout.display());
    run("umoci", &["init", "--layout", layout.to_str().unwrap()]);
    run("umoci", &["new", "--image", &image]);
    let bundle = dir.join("bundle");
    let bundle = bundle.to_str().unwrap();
    run("umoci", &["unpack", "--rootless", "--image", &image, bundle]);
    run("cp", &["--archive", "--reflink=auto", &format!("{}/.", root.display()), &format!("{bundle}/rootfs")]);
    run("umoci", &["repack", "--image", &image, bundle]);
    fs::remove_dir_all(bundle).unwrap();
    run(
        "umoci",
        &[
            "config",
            "--image",
            &image,
            "--config.env",
            "PYTHONDONTWRITEBYTECODE=1",
            "--config.env",
            "LANG=C.UTF-8",
            "--config.workingdir",
            "/tmp",
            "--config.cmd",
            "python3",
        ],
    );
}

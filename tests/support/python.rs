//! An image with Debian's `python3`, and the same interpreter on this machine.

#![allow(dead_code, unreachable_pub, reason = "each test binary includes this file and uses its part")]

use std::path::PathBuf;
use std::process::Command;

use crate::debian::DebianImage;
use crate::debian::Recipe;
use crate::guest::host;

/// Python 3.11 with its standard library, and the libraries of both: Debian 12.
const RECIPE: Recipe = Recipe {
    name: "python",
    packages: &[
        "base-files",
        "base-passwd",
        "libbz2-1.0",
        "libc6",
        "libcrypt1",
        "libdb5.3",
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
        "media-types",
        "python3-minimal",
        "python3.11",
        "python3.11-minimal",
        "zlib1g",
    ],
    config: &[
        "--config.env",
        "PYTHONDONTWRITEBYTECODE=1",
        "--config.env",
        "LANG=C.UTF-8",
        "--config.workingdir",
        "/tmp",
        "--config.cmd",
        "python3",
    ],
    finish: |_| (),
};

/// The image.
pub struct PythonImage(DebianImage);

impl PythonImage {
    /// Makes the image, or finds the one made earlier.
    pub fn ensure() -> Self {
        Self(DebianImage::ensure(&RECIPE, include_str!("python.rs")))
    }

    /// The OCI layout; the image is tagged "latest".
    pub fn layout(&self) -> PathBuf {
        self.0.layout()
    }

    /// Runs the image's own python on this machine, with its own libraries, and returns what it printed.
    pub fn run_here(&self, program: &str) -> String {
        let root = self.0.root();
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

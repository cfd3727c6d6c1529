//! Images of the distribution's packages and of nothing of ours: unpacked by `dpkg-deb`, made OCI images by `umoci`. Made
//! once and kept in the user's cache.
#![allow(dead_code, unreachable_pub, reason = "each test binary includes this file and uses its part")]

use std::fs;
use std::fs::File;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use kiln::image::Digest;
use kiln::vm::Assets;

use crate::guest::host;
use crate::image_support::run;

/// An image to be made.
pub struct Recipe {
    pub name: &'static str,
    pub packages: &'static [&'static str],
    /// What `umoci config` is told.
    pub config: &'static [&'static str],
    /// More to do to the root folder before it becomes the only layer.
    pub finish: fn(&Path),
}

/// Where an image and the folder that it was made of lie.
pub struct DebianImage {
    dir: PathBuf,
}

impl DebianImage {
    /// Makes the image, or finds the one made earlier with the same `recipe` out of the same source.
    pub fn ensure(recipe: &Recipe, source: &str) -> Self {
        let images = Assets::user().expect("a home folder").dir().join("test-images");
        fs::create_dir_all(&images).unwrap();
        let lock = File::create(images.join(".lock")).unwrap();
        lock.lock().unwrap();
        // Made anew when one of the files that say how changes.
        let version = Digest::of([include_str!("debian.rs"), source].concat().as_bytes()).hex();
        let dir = images.join(format!("{}-{}", recipe.name, &version[..16]));
        if !dir.exists() {
            let scratch = tempfile::tempdir_in(&images).unwrap();
            build(recipe, scratch.path());
            fs::rename(scratch.keep(), &dir).unwrap();
        }
        Self { dir }
    }

    /// The OCI layout; the image is tagged "latest".
    pub fn layout(&self) -> PathBuf {
        self.dir.join("layout")
    }

    /// The folder that the image was made of.
    pub fn root(&self) -> PathBuf {
        self.dir.join("root")
    }
}

fn build(recipe: &Recipe, dir: &Path) {
    let (packages, root, layout) = (dir.join("packages"), dir.join("root"), dir.join("layout"));
    fs::create_dir(&packages).unwrap();
    download(recipe.packages, &packages);
    let info = root.join("var/lib/dpkg/info");
    fs::create_dir_all(&info).unwrap();
    for package in fs::read_dir(&packages).unwrap() {
        unpack(&package.unwrap().path(), &root, &info);
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
    (recipe.finish)(&root);
    let image = format!("{}:latest", layout.display());
    run("umoci", &["init", "--layout", layout.to_str().unwrap()]);
    run("umoci", &["new", "--image", &image]);
    run("umoci", &["insert", "--rootless", "--image", &image, root.to_str().unwrap(), "/"]);
    run("umoci", &[&["config", "--image", &image][..], recipe.config].concat());
}

/// Not the system's package state: only files, into this folder.
fn download(packages: &[&str], to: &Path) {
    let download = || {
        let mut apt = Command::new("apt-get");
        apt.args(["--quiet", "download"]).args(packages).current_dir(to);
        apt
    };
    if !download().output().is_ok_and(|output| output.status.success()) {
        // A machine whose lists of packages are old, or were never fetched.
        run("apt-get", &["--quiet", "update"]);
        host(&mut download());
    }
}

/// Unpacks a package, and keeps the checksums that it came with where `dpkg` keeps them.
fn unpack(package: &Path, root: &Path, info: &Path) {
    let file = package.to_str().unwrap();
    run("dpkg-deb", &["--extract", file, root.to_str().unwrap()]);
    let control = tempfile::tempdir().unwrap();
    run("dpkg-deb", &["--control", file, control.path().to_str().unwrap()]);
    let name = package.file_name().unwrap().to_str().unwrap().split('_').next().unwrap();
    let sums = control.path().join("md5sums");
    if sums.exists() {
        fs::copy(sums, info.join(format!("{name}.md5sums"))).unwrap();
    }
}

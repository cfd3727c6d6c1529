//! Images made by other people's tools, run for what they are for: a web server, and layers that change one another.

#[path = "support/debian.rs"]
mod debian;
#[path = "support/guest.rs"]
mod guest;
mod image_support;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use debian::DebianImage;
use debian::Recipe;
use futures::TryStreamExt;
use guest::BUSYBOX;
use guest::config;
use guest::sh;
use guest::until;
use image_support::Place;
use image_support::registry::Registry;
use image_support::run;
use image_support::scratch;
use kiln::Image;
use kiln::Vm;
use kiln::WorkloadLog;
use kiln::image::ImageChanges;
use kiln::image::ImageFile;
use kiln::units::Bytes;
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

/// Debian's web server, as its packages put it: its own configuration, master and workers as `www-data`.
const NGINX: Recipe = Recipe {
    name: "nginx",
    packages: &[
        "base-files",
        "base-passwd",
        "libc6",
        "libcrypt1",
        "libpcre2-8-0",
        "libssl3",
        "nginx",
        "nginx-common",
        "zlib1g",
    ],
    config: &[
        "--config.entrypoint",
        "/usr/sbin/nginx",
        "--config.cmd",
        "-g",
        "--config.cmd",
        "daemon off;",
        "--config.stopsignal",
        "SIGQUIT",
    ],
    finish: |root| {
        // What the packages' installation scripts do.
        let enabled = root.join("etc/nginx/sites-enabled");
        fs::create_dir_all(&enabled).unwrap();
        symlink("/etc/nginx/sites-available/default", enabled.join("default")).unwrap();
        fs::create_dir_all(root.join("var/www/html")).unwrap();
        fs::copy(root.join("usr/share/nginx/html/index.html"), root.join("var/www/html/index.html")).unwrap();
        // For this test's own questions to the guest.
        fs::copy(BUSYBOX, root.join("bin/busybox")).unwrap();
        symlink("busybox", root.join("bin/sh")).unwrap();
    },
};

/// Pushes the image of a layout to a registry and pulls it from there.
async fn pull(layout: &Path) -> (Place, Image) {
    let registry = Registry::open();
    registry.push(layout, "latest", "debian/image:1", &[]);
    let place = Place::new().await;
    let builder = Image::builder(format!("{}/debian/image:1", registry.address)).store(place.store.clone());
    let image = builder.pull().await.unwrap();
    (place, image)
}

async fn boot(image: &Image) -> Vm {
    image.start(config().memory(Bytes::mib(384))).await.unwrap_or_else(|error| panic!("{error:?}"))
}

#[tokio::test]
async fn nginx_serves_its_page() {
    let nginx = tokio::task::spawn_blocking(|| DebianImage::ensure(&NGINX, include_str!("guest_images.rs"))).await;
    let (_place, image) = pull(&nginx.unwrap().layout()).await;
    let vm = boot(&image).await;
    let server = vm.workload().start().await.expect("starts");
    until(&vm, "busybox netstat -ltn | busybox grep -c '0.0.0.0:80 '", "1\n").await;
    let forwarder = vm.expose_tcp(0, 80).await.expect("listens");
    let mut client = TcpStream::connect(forwarder.local_addr()).await.expect("connects");
    client.write_all(b"GET / HTTP/1.0\r\nHost: kiln\r\n\r\n").await.expect("sent");
    let mut page = String::new();
    client.read_to_string(&mut page).await.expect("answered");
    assert!(page.starts_with("HTTP/1.1 200 OK\r\nServer: nginx/"), "{page}");
    assert!(page.contains("<title>Welcome to nginx!</title>"), "{page}");
    // Its master process ends by itself on the image's own stop signal.
    let exit = server.stop(guest::DEADLINE).await.expect("stops");
    assert_eq!(exit.status.code(), Some(0), "{exit:?}");
}

/// Three layers by `umoci repack`: the second changes, removes and replaces, the third puts some of it back.
fn layered(folder: &Path) {
    let (layout, bundle) = (folder.join("layout"), folder.join("bundle"));
    let image = format!("{}:latest", layout.display());
    let (image, bundle_text) = (image.as_str(), bundle.to_str().unwrap());
    let root = bundle.join("rootfs");
    let write = |path: &str, content: &str| {
        fs::create_dir_all(root.join(path).parent().unwrap()).unwrap();
        fs::write(root.join(path), content).unwrap();
    };
    run("umoci", &["init", "--layout", layout.to_str().unwrap()]);
    run("umoci", &["new", "--image", image]);
    let change = |change: &dyn Fn()| {
        let _ = fs::remove_dir_all(&bundle);
        run("umoci", &["unpack", "--image", image, bundle_text]);
        change();
        run("umoci", &["repack", "--image", image, bundle_text]);
    };
    change(&|| {
        fs::create_dir_all(root.join("bin")).unwrap();
        fs::copy(BUSYBOX, root.join("bin/busybox")).unwrap();
        symlink("busybox", root.join("bin/sh")).unwrap();
        for name in ["kept", "changed", "removed", "dir/one", "dir/two", "was-file", "was-dir/inner"] {
            write(&format!("data/{name}"), "first\n");
        }
        fs::hard_link(root.join("data/kept"), root.join("data/kept-too")).unwrap();
    });
    change(&|| {
        write("data/changed", "second\n");
        fs::remove_file(root.join("data/removed")).unwrap();
        fs::remove_dir_all(root.join("data/dir")).unwrap();
        fs::remove_file(root.join("data/was-file")).unwrap();
        write("data/was-file/now-dir", "second\n");
        fs::remove_dir_all(root.join("data/was-dir")).unwrap();
        write("data/was-dir", "second\n");
        run("chown", &["1234567:7654321", root.join("data/changed").to_str().unwrap()]);
        run("chmod", &["4711", root.join("data/changed").to_str().unwrap()]);
    });
    change(&|| {
        write("data/removed", "third\n");
        write("data/dir/three", "third\n");
        fs::hard_link(root.join("data/kept"), root.join("data/kept-third")).unwrap();
    });
}

#[tokio::test]
async fn what_a_caller_changes_holds_in_the_guest() {
    let (_place, image) = guest::busybox_image(json!({ "Cmd": ["old"], "User": "guest" })).await;
    let changes = ImageChanges::new()
        .file(ImageFile::new("/etc/group", "root:x:0:\nwheel:x:10:root\n"))
        .file(ImageFile::new("/etc/passwd", "root:x:0:0::/var/root:/bin/sh\n"))
        .file(ImageFile::new("/usr/bin/greet", "#!/bin/sh\necho $GREETING from $PWD\n").mode(0o755))
        .env("GREETING", "hello")
        .user("")
        .workdir("/made/here")
        .hostname("box")
        .entrypoint(["greet"]);
    let vm = boot(&image.changed(changes).await.unwrap()).await;
    // No USER is root, with the groups and the home that the image's files give it.
    assert_eq!(sh(&vm, "id -G; echo $HOME; hostname").await, "0 10\n/var/root\nbox\n");
    let workload = vm.workload().start().await.expect("starts");
    let logs: Vec<_> = workload.logs().try_collect().await.expect("to its end");
    let text: Vec<u8> = logs
        .into_iter()
        .flat_map(|log| match log {
            WorkloadLog::Stdout(bytes) => bytes.to_vec(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(String::from_utf8_lossy(&text), "hello from /made/here\n");
}

#[tokio::test]
async fn layers_of_another_tool_are_one_tree() {
    let folder = scratch();
    layered(folder.path());
    let (_place, image) = pull(&folder.path().join("layout")).await;
    assert_eq!(image.layers().len(), 3);
    let vm = boot(&image).await;
    let files = sh(
        &vm,
        "cd /data; busybox find . -type f | busybox sort | while read f; do echo \"$f $(busybox cat $f)\"; done",
    )
    .await;
    let expected = "./changed second\n./dir/three third\n./kept first\n./kept-third first\n./kept-too first\n\
                    ./removed third\n./was-dir second\n./was-file/now-dir second\n";
    assert_eq!(files, expected);
    assert_eq!(sh(&vm, "busybox stat -c '%u %g %a' /data/changed").await, "1234567 7654321 4711\n");
    let links = sh(&vm, "cd /data; busybox stat -c %i kept kept-too kept-third | busybox uniq | busybox wc -l").await;
    assert_eq!(links, "1\n");
}

//! A root filesystem as the guest kernel's own driver sees it: everything that a layer can say, read back by Python's
//! system calls in the guest, from the image itself and not through the overlay that lies over it.

#[path = "support/debian.rs"]
mod debian;
#[path = "support/guest.rs"]
mod guest;
mod image_support;
#[path = "support/python.rs"]
mod python;

use std::collections::BTreeMap;
use std::fs;

use guest::config;
use guest::show;
use image_support::Entry;
use image_support::LayerBlob;
use image_support::Layout;
use image_support::Place;
use image_support::Tar;
use kiln::image::Digest;
use kiln::units::Bytes;
use serde_json::Value;
use serde_json::json;

const TREE: &str = include_str!("support/tree.py");

/// `cap_net_raw=ep`, as `setcap` writes it (linux/capability.h, revision 2).
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Names for the long ones of the archive.
fn long(letter: &str, length: usize) -> String {
    letter.repeat(length)
}

fn lower() -> Tar {
    let dot = |name: &str| format!("t/{name}");
    let mut tar = Tar::new()
        .entry(&Entry { name: b"t/", kind: b'5', mode: 0o1777, uid: 7, gid: 8, ..Entry::default() })
        .file(&dot("empty"), b"")
        .file(&dot("inline"), &[1; 1024])
        .file(&dot("block-1"), &[2; 4095])
        .file(&dot("block"), &[3; 4096])
        .file(&dot("block+1"), &[4; 4097])
        .file(&dot("large"), &[5; 300_000])
        .file(&dot("hidden"), &[6; 300_000])
        .file(&dot("replaced"), &[7; 9000])
        .folder(&dot("opaque"))
        .file(&dot("opaque/old"), b"old")
        .symlink(&dot("relative"), "block")
        .symlink(&dot("absolute"), "/nowhere/at all")
        .symlink(&dot("long-link"), &long("l", 4095))
        .hard_link(&dot("block-too"), &dot("block"))
        .entry(&Entry { name: b"t/null", kind: b'3', mode: 0o666, device: (1, 3), ..Entry::default() })
        .entry(&Entry { name: b"t/disk", kind: b'4', mode: 0o660, device: (259, 70_000), ..Entry::default() })
        .entry(&Entry { name: b"t/pipe", kind: b'6', mode: 0o600, ..Entry::default() })
        .entry(&Entry {
            name: b"t/setuid",
            mode: 0o6755,
            uid: 4_000_000_000,
            gid: 3_000_000,
            content: b"x",
            ..Entry::default()
        })
        .file(&dot(&long("n", 255)), b"a long name")
        .entry(&Entry { name: b"t/not\xffutf\xfe8", content: b"bytes", ..Entry::default() })
        .pax(&[("mtime", b"1234567890.123456789")])
        .file(&dot("nanoseconds"), b"")
        .pax(&[("mtime", b"-86400.5")])
        .file(&dot("before-1970"), b"")
        .pax(&[("SCHILY.xattr.security.capability", &CAPABILITY), ("SCHILY.xattr.user.note", b"a\nb\0=")])
        .file(&dot("ping"), &[8; 5000])
        .pax(&[("SCHILY.xattr.trusted.of-a-folder", b"")])
        .folder(&dot("attributes"));
    for number in 0..400 {
        tar = tar.file(&format!("t/many/{number}-{}", long("m", 40)), number.to_string().as_bytes());
    }
    tar
}

fn upper() -> Tar {
    Tar::new()
        .file("t/.wh.hidden", b"")
        .file("t/opaque/.wh..wh..opq", b"")
        .file("t/opaque/new", b"new")
        .folder("t/replaced")
        .file("t/replaced/inner", b"inner")
        .hard_link("t/third-name", "t/block")
}

/// An image of Debian's python with these layers over it.
async fn image(python: &python::PythonImage, layers: &[LayerBlob], place: &Place) -> kiln::Image {
    let read = |path: &std::path::Path| -> Value { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
    let layout = Layout::new();
    let blob = |digest: &Value| {
        let digest: Digest = digest.as_str().unwrap().parse().unwrap();
        python.layout().join("blobs/sha256").join(digest.hex())
    };
    let index = read(&python.layout().join("index.json"));
    let manifest = read(&blob(&index["manifests"][0]["digest"]));
    let mut config = read(&blob(&manifest["config"]["digest"]));
    let mut descriptors = Vec::new();
    for descriptor in manifest["layers"].as_array().unwrap() {
        layout.blob(descriptor["mediaType"].as_str().unwrap(), &fs::read(blob(&descriptor["digest"])).unwrap());
        descriptors.push(descriptor.clone());
    }
    for layer in layers {
        descriptors.push(layout.blob(layer.media_type, &layer.blob));
        config["rootfs"]["diff_ids"].as_array_mut().unwrap().push(json!(layer.diff_id));
    }
    let manifest = layout.manifest_of(&config, &descriptors);
    let layout = layout.tag("latest", manifest);
    place.store.import_oci_layout(layout.folder.path(), None).await.unwrap()
}

fn sha256(bytes: &[u8]) -> Value {
    json!(Digest::of(bytes).hex())
}

#[tokio::test]
async fn the_guests_kernel_reads_back_what_the_layers_say() {
    let python = tokio::task::spawn_blocking(python::PythonImage::ensure).await.unwrap();
    let place = Place::new().await;
    let layers = [LayerBlob::gzip(&lower().finish()), LayerBlob::zstd(&upper().finish())];
    let vm = image(&python, &layers, &place).await.start(config().memory(Bytes::mib(384))).await.unwrap();
    let program = format!(
        "import ctypes, os, sys; os.mkdir('/tmp/root'); libc = ctypes.CDLL(None, use_errno=True)\n\
         if libc.mount(b'/dev/vda', b'/tmp/root', b'erofs', 1, None): raise OSError(ctypes.get_errno(), 'mount')\n\
         sys.argv = ['', '/tmp/root/t']\n{TREE}"
    );
    let out = vm.exec_builder().argv(["python3", "-c", &program]).timeout(guest::DEADLINE).output().await.unwrap();
    assert!(out.success() && out.stderr.is_empty(), "{}", show(&out));
    let text = String::from_utf8(out.stdout).unwrap();
    let mut seen: BTreeMap<Vec<u8>, Value> = BTreeMap::new();
    for line in text.lines() {
        let entry: Value = serde_json::from_str(line).unwrap();
        seen.insert(hex::decode(entry["path"].as_str().unwrap()).unwrap(), entry);
    }
    check(&seen);
}

/// Every name, and everything about it that a layer above says or implies.
fn check(seen: &BTreeMap<Vec<u8>, Value>) {
    let expect = |path: &str, fields: Value| {
        let entry = seen.get(path.as_bytes()).unwrap_or_else(|| panic!("no {path}"));
        for (field, value) in fields.as_object().unwrap() {
            assert_eq!(entry[field], *value, "{field} of {path}");
        }
    };
    let plain = |content: &[u8]| {
        json!({
            "mode": 0o100_644, "uid": 0, "gid": 0, "mtime": 1_700_000_000_000_000_000_u64, "nlink": 1, "xattrs": {},
            "size": content.len(), "sha256": sha256(content),
        })
    };
    expect(".", json!({ "mode": 0o041_777, "uid": 7, "gid": 8, "nlink": 6 }));
    for (name, byte, size) in [("inline", 1, 1024), ("block-1", 2, 4095), ("block+1", 4, 4097), ("large", 5, 300_000)] {
        expect(name, plain(&vec![byte; size]));
    }
    expect("empty", plain(b""));
    for name in ["block", "block-too", "third-name"] {
        expect(name, json!({ "nlink": 3, "sha256": sha256(&[3; 4096]), "ino": seen[&b"block"[..]]["ino"] }));
    }
    let link = |target: &str| json!({ "mode": 0o120_777, "size": target.len(), "target": hex::encode(target) });
    expect("relative", link("block"));
    expect("absolute", link("/nowhere/at all"));
    expect("long-link", link(&long("l", 4095)));
    expect("null", json!({ "mode": 0o020_666, "rdev": [1, 3] }));
    expect("disk", json!({ "mode": 0o060_660, "rdev": [259, 70_000] }));
    expect("pipe", json!({ "mode": 0o010_600 }));
    expect("setuid", json!({ "mode": 0o106_755, "uid": 4_000_000_000_u32, "gid": 3_000_000 }));
    expect(&long("n", 255), plain(b"a long name"));
    assert_eq!(seen[&b"not\xffutf\xfe8"[..]]["sha256"], sha256(b"bytes"));
    expect("nanoseconds", json!({ "mtime": 1_234_567_890_123_456_789_u64 }));
    expect("before-1970", json!({ "mtime": -86_400_500_000_000_i64 }));
    let attributes = json!({ "security.capability": hex::encode(CAPABILITY), "user.note": hex::encode(b"a\nb\0=") });
    expect("ping", json!({ "xattrs": attributes, "sha256": sha256(&[8; 5000]) }));
    expect("attributes", json!({ "xattrs": { "trusted.of-a-folder": "" } }));
    expect("replaced/inner", plain(b"inner"));
    expect("opaque/new", plain(b"new"));
    for number in 0..400 {
        expect(&format!("many/{number}-{}", long("m", 40)), plain(number.to_string().as_bytes()));
    }
    // And nothing else, so what the upper layer hides is gone.
    let others: Vec<_> =
        seen.keys().filter(|path| !path.starts_with(b"many/")).map(|path| String::from_utf8_lossy(path)).collect();
    assert_eq!(others.len(), 27, "{others:?}");
}

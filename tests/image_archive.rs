//! Images out of archives: made by `skopeo`, in Docker's older form made here, and bad ones.

mod image_support;

use std::fs;
use std::future::Future;
use std::io::Cursor;
use std::path::Path;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use futures::StreamExt;
use image_support::Entry;
use image_support::LayerBlob;
use image_support::Layout;
use image_support::Place;
use image_support::Tar;
use image_support::extract;
use image_support::flat;
use image_support::gzip;
use image_support::run;
use image_support::source::Source;
use image_support::source::Step;
use image_support::zstd;
use kiln::ImportError;
use kiln::image::Digest;
use kiln::image::Image;
use kiln::image::ImportOptions;
use kiln::image::LayoutError;
use kiln::image::ManifestError;
use kiln::image::Progress;
use kiln::image::ProgressEvent;
use kiln::image::PullPolicy;
use serde_json::Value;
use serde_json::json;
use tokio::sync::Notify;

/// More than is held in memory.
const LARGE: usize = 200 << 10;

/// Bytes that no compression makes fewer.
fn large() -> Vec<u8> {
    (0..LARGE as u64 / 32).flat_map(|at| *Digest::of(&at.to_le_bytes()).as_bytes()).collect()
}

fn lower() -> Vec<u8> {
    Tar::new().folder("etc").file("etc/a", b"lower").file("large", &large()).finish()
}

fn upper() -> Vec<u8> {
    Tar::new().file("etc/a", b"upper").symlink("link", "etc/a").finish()
}

fn layout() -> Layout {
    Layout::of(&[LayerBlob::gzip(&lower()), LayerBlob::gzip(&upper())])
}

/// The files of a layout as one archive.
fn oci_archive(layout: &Layout) -> Vec<u8> {
    oci_files(layout).iter().fold(Tar::new().folder("blobs/"), |tar, (name, bytes)| tar.file(name, bytes)).finish()
}

fn oci_files(layout: &Layout) -> Vec<(String, Vec<u8>)> {
    let read = |name: &str| (name.to_owned(), fs::read(layout.folder.path().join(name)).unwrap());
    let mut files = vec![read("oci-layout"), read("index.json")];
    for entry in fs::read_dir(layout.folder.path().join("blobs/sha256")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        files.push(read(&format!("blobs/sha256/{name}")));
    }
    files[2..].sort();
    files
}

fn config_of(layers: &[&[u8]]) -> Vec<u8> {
    let diff_ids: Vec<_> = layers.iter().map(|layer| Digest::of(layer).to_string()).collect();
    let rootfs = json!({ "type": "layers", "diff_ids": diff_ids });
    json!({ "architecture": "amd64", "os": "linux", "config": {}, "rootfs": rootfs }).to_string().into_bytes()
}

fn manifest_json(tags: &[&str], layers: &[&str]) -> Value {
    json!({ "Config": "config.json", "RepoTags": tags, "Layers": layers })
}

/// An archive in Docker's older form, of these layers in files of these names.
fn docker_archive(layers: &[(&str, &[u8])]) -> Vec<u8> {
    let names: Vec<_> = layers.iter().map(|(name, _)| *name).collect();
    let contents: Vec<_> = layers.iter().map(|(_, content)| *content).collect();
    let tar = layers.iter().fold(Tar::new(), |tar, (name, content)| tar.file(name, content));
    docker_documents(tar, json!([manifest_json(&["app:1"], &names)]), &config_of(&contents)).finish()
}

fn docker_documents(tar: Tar, manifest: Value, config: &[u8]) -> Tar {
    tar.file("config.json", config).file("manifest.json", manifest.to_string().as_bytes())
}

async fn import(place: &Place, archive: &[u8]) -> Result<Image, ImportError> {
    place.store.import_archive_from(Cursor::new(archive.to_vec()), &ImportOptions::new()).await
}

async fn refused(archive: &[u8]) -> ImportError {
    refused_with(archive, &ImportOptions::new()).await
}

async fn refused_with(archive: &[u8], options: &ImportOptions) -> ImportError {
    let place = Place::new().await;
    let reader = Cursor::new(archive.to_vec());
    let error = place.store.import_archive_from(reader, options).await.expect_err("must be refused");
    assert_eq!(place.debris(), [""; 0]);
    error
}

/// Whether the image is what [`lower`] and [`upper`] make.
async fn check_files(image: &Image) {
    let root = flat(image).await.unwrap();
    let (_folder, files) = extract(&root.path);
    assert_eq!(files[Path::new("etc/a").as_os_str()].bytes, b"upper");
    assert_eq!(files[Path::new("link").as_os_str()].bytes, b"etc/a");
    assert_eq!(files[Path::new("large").as_os_str()].bytes, large());
}

#[tokio::test]
async fn one_image_as_a_layout_and_as_each_archive_that_skopeo_makes() {
    let layout = layout();
    let folder = image_support::scratch();
    let path = |name: &str| folder.path().join(name);
    let source = format!("oci:{}:latest", layout.folder.path().display());
    let copy = |target: String| run("skopeo", &["--insecure-policy", "copy", "--quiet", &source, &target]);
    copy(format!("oci-archive:{}:app", path("oci").display()));
    copy(format!("docker-archive:{}:quay.io/team/app:1.2", path("docker").display()));
    let reference = Place::new().await.store.import_oci_layout(layout.folder.path(), None).await.unwrap();
    for (archive, tags) in [("oci", ["app"].as_slice()), ("docker", &["quay.io/team/app:1.2"])] {
        let plain = fs::read(path(archive)).unwrap();
        for bytes in [gzip(&plain), zstd(&plain), plain] {
            let file = path("archive");
            fs::write(&file, &bytes).unwrap();
            let place = Place::new().await;
            let image = place.store.import_archive(&file, &ImportOptions::new()).await.unwrap();
            assert_eq!(image.chain_id(), reference.chain_id(), "{archive}");
            assert_eq!(image.config(), reference.config(), "{archive}");
            for tag in tags {
                let options = ImportOptions::new().tag(*tag);
                let again = place.store.import_archive_from(Cursor::new(bytes.clone()), &options).await.unwrap();
                assert_eq!((again.digest(), again.layers()), (image.digest(), image.layers()), "{archive}");
            }
            assert_eq!(place.debris(), [""; 0]);
            if archive == "oci" {
                assert_eq!(image.digest(), reference.digest());
            }
            check_files(&image).await;
        }
    }
}

#[tokio::test]
async fn the_image_is_found_by_the_name_it_was_given() {
    for archive in [oci_archive(&layout()), docker_archive(&[("a/layer.tar", &lower()), ("b/layer.tar", &upper())])] {
        let place = Place::new().await;
        let options = ImportOptions::new().name("localhost/app:1");
        let image = place.store.import_archive_from(Cursor::new(archive), &options).await.unwrap();
        let named = Image::builder("localhost/app:1")
            .store(place.store.clone())
            .policy(PullPolicy::Never)
            .pull()
            .await
            .unwrap();
        assert_eq!((named.digest(), named.layers()), (image.digest(), image.layers()));
        check_files(&named).await;
    }
    let options = ImportOptions::new().name("Not A Name");
    assert!(matches!(refused_with(b"", &options).await, ImportError::Name(_)));
}

#[tokio::test]
async fn layers_of_docker_that_are_links_and_layers_that_are_listed_twice() {
    let (one, two) = (lower(), upper());
    let names = ["a/layer.tar", "b/layer.tar", "c/layer.tar", "d/layer.tar", "a/layer.tar"];
    let config = config_of(&[&one, &two, &one, &two, &one]);
    let tar = Tar::new()
        .folder("a/")
        .file("a/VERSION", b"1.0")
        .file("a/json", b"{}")
        .file("repositories", br#"{"app":{"1":"a"}}"#)
        // Before the file that it leads to, as the order is nobody's promise.
        .symlink("c/layer.tar", "../a/layer.tar")
        .file("a/layer.tar", &one)
        .file("./b/layer.tar", &two)
        .hard_link("d/layer.tar", "b/layer.tar")
        .symlink("junk", "/etc/passwd");
    let archive = docker_documents(tar, json!([manifest_json(&["app:1"], &names)]), &config).finish();
    let place = Place::new().await;
    let image = import(&place, &archive).await.unwrap();
    let digests: Vec<_> = image.layers().iter().map(|layer| *layer.digest()).collect();
    assert_eq!(digests, [&one, &two, &one, &two, &one].map(|layer| Digest::of(layer)));
    // Two layers, a configuration, a manifest.
    assert_eq!(fs::read_dir(place.store.root().join("blobs/sha256")).unwrap().count(), 4);
    assert_eq!(place.debris(), [""; 0]);
    let again = import(&Place::new().await, &archive).await.unwrap();
    assert_eq!(again.digest(), image.digest(), "the same archive, the same image");
}

#[tokio::test]
async fn compressed_layers_in_a_docker_archive() {
    let place = Place::new().await;
    let (one, two) = (lower(), upper());
    let tar = Tar::new().file("1", &gzip(&one)).file("2", &zstd(&two));
    let manifest = json!([{ "Config": "config.json", "RepoTags": null, "Layers": ["1", "2"] }]);
    let archive = docker_documents(tar, manifest, &config_of(&[&one, &two])).finish();
    check_files(&import(&place, &archive).await.unwrap()).await;
}

#[tokio::test]
async fn the_newer_docker_form_is_known_by_the_names_of_either_list() {
    let layout = layout();
    let index: Value = serde_json::from_slice(&fs::read(layout.folder.path().join("index.json")).unwrap()).unwrap();
    let manifest: Digest = index["manifests"][0]["digest"].as_str().unwrap().parse().unwrap();
    let parsed: Value = serde_json::from_slice(&fs::read(layout.blob_path(&manifest)).unwrap()).unwrap();
    let path_of = |descriptor: &Value| descriptor["digest"].as_str().unwrap().replace("sha256:", "blobs/sha256/");
    let layers: Vec<_> = parsed["layers"].as_array().unwrap().iter().map(path_of).collect();
    let list = json!([{ "Config": path_of(&parsed["config"]), "RepoTags": ["app:1"], "Layers": layers }]);
    let mut index = index;
    index["manifests"][0]["annotations"]["io.containerd.image.name"] = json!("docker.io/library/other:2");
    fs::write(layout.folder.path().join("index.json"), index.to_string()).unwrap();
    let files = oci_files(&layout);
    let tar = files.iter().fold(Tar::new(), |tar, (name, bytes)| tar.file(name, bytes));
    let archive = tar.file("manifest.json", list.to_string().as_bytes()).finish();
    let place = Place::new().await;
    for tag in ["latest", "other:2", "docker.io/library/other:2", "app:1", "docker.io/library/app:1"] {
        let options = ImportOptions::new().tag(tag);
        let image = place.store.import_archive_from(Cursor::new(archive.clone()), &options).await.unwrap();
        assert_eq!(image.digest(), &manifest, "{tag}");
    }
}

#[tokio::test]
async fn entries_come_in_any_order_and_the_last_of_a_name_counts() {
    let mut files = oci_files(&layout());
    files.reverse();
    let tar = Tar::new().file("index.json", b"overtaken");
    let archive = files.iter().fold(tar, |tar, (name, bytes)| tar.file(name, bytes)).finish();
    check_files(&import(&Place::new().await, &archive).await.unwrap()).await;
}

#[tokio::test]
async fn a_reader_that_gives_a_byte_at_a_time() {
    for archive in [oci_archive(&layout()), gzip(&oci_archive(&layout()))] {
        let place = Place::new().await;
        let reader = Source::in_pieces(&archive, 1);
        let image = place.store.import_archive_from(reader, &ImportOptions::new()).await.unwrap();
        check_files(&image).await;
    }
}

#[tokio::test]
async fn a_path_is_a_layout_or_an_archive() {
    let (layout, place) = (layout(), Place::new().await);
    let file = place.folder.path().join("archive");
    fs::write(&file, oci_archive(&layout)).unwrap();
    let options = ImportOptions::new().tag("latest").name("localhost/x");
    let from_file = place.store.import_path(&file, &options).await.unwrap();
    let from_folder = place.store.import_path(layout.folder.path(), &options).await.unwrap();
    assert_eq!(from_file.digest(), from_folder.digest());

    let error = |path: PathBuf| {
        let store = place.store.clone();
        async move { store.import_path(path, &ImportOptions::new()).await.unwrap_err() }
    };
    let missing = error("/nonexistent".into()).await;
    assert!(matches!(&missing, ImportError::Open { path, .. } if path == Path::new("/nonexistent")), "{missing:?}");
    let empty = error(place.folder.path().to_owned()).await;
    assert!(matches!(empty, ImportError::Layout(LayoutError::NotALayout { .. })), "{empty:?}");
    let fifo = place.folder.path().join("fifo");
    run("mkfifo", &[fifo.to_str().unwrap()]);
    assert!(matches!(error(fifo).await, ImportError::Open { .. }));
    assert!(matches!(Image::from_path("/nonexistent").await, Err(ImportError::Open { .. })));
    assert!(matches!(Image::from_archive("/nonexistent").await, Err(ImportError::Open { .. })));
    assert!(matches!(Image::from_archive_reader(&b""[..]).await, Err(ImportError::Truncated { .. })));
}

#[tokio::test]
async fn what_happens_is_reported() {
    let (layout, place) = (layout(), Place::new().await);
    let file = place.folder.path().join("archive");
    fs::write(&file, oci_archive(&layout)).unwrap();
    for path in [file.as_path(), layout.folder.path()] {
        let (progress, events) = Progress::channel();
        let image = place.store.import_path(path, &ImportOptions::new().progress(progress)).await.unwrap();
        let events: Vec<_> = events.collect().await;
        let reference = path.display().to_string();
        assert_eq!(events[0], ProgressEvent::Resolving { reference });
        let layers = image.layers().iter().map(|layer| (*layer.digest(), layer.size())).collect();
        assert!(events.contains(&ProgressEvent::Resolved { image: *image.digest(), layers }), "{events:?}");
        for layer in image.layers() {
            let (layer, total) = (*layer.digest(), layer.size());
            assert!(events.contains(&ProgressEvent::Fetching { layer, done: total, total }), "{events:?}");
        }
    }
}

/// Two images, of which Docker's list knows the names, and one without.
fn several() -> Vec<u8> {
    let one = lower();
    let tar = Tar::new().file("layer", &one).file("second", &config_of(&[&one, &one])).file("third", b"never read");
    let list = json!([
        manifest_json(&["app:1", "app:latest"], &["layer"]),
        { "Config": "second", "RepoTags": ["app:2"], "Layers": ["layer", "layer"] },
        { "Config": "third", "RepoTags": null, "Layers": [] },
    ]);
    docker_documents(tar, list, &config_of(&[&one])).finish()
}

#[tokio::test]
async fn one_of_several_images_is_chosen_by_its_tag() {
    let place = Place::new().await;
    for (tag, layers) in [("app:1", 1), ("app:latest", 1), ("app", 1), ("docker.io/library/app:2", 2)] {
        let options = ImportOptions::new().tag(tag);
        let result = place.store.import_archive_from(Cursor::new(several()), &options).await;
        match tag {
            // Not a full name: a tag must be meant, and there is none.
            "app" => assert!(matches!(result, Err(ImportError::UnknownImage { .. }))),
            _ => assert_eq!(result.unwrap().layers().len(), layers, "{tag}"),
        }
    }
    let error = refused(&several()).await;
    let names = ["app:1", "app:2", "app:latest", "third"];
    assert!(matches!(&error, ImportError::Ambiguous { names: found } if *found == names), "{error:?}");
    let error = refused_with(&several(), &ImportOptions::new().tag("app:3")).await;
    assert!(
        matches!(&error, ImportError::UnknownImage { tag, names: found } if tag == "app:3" && *found == names),
        "{error:?}"
    );
}

#[tokio::test]
async fn several_images_in_a_layout() {
    let layout = Layout::new();
    let one = layout.manifest(&[LayerBlob::plain(lower())]);
    let two = layout.manifest(&[LayerBlob::plain(upper())]);
    let archive = oci_archive(&layout.tag("one", one).tag("two", two));
    let error = refused(&archive).await;
    assert!(matches!(&error, ImportError::Ambiguous { names } if *names == ["one", "two"]), "{error:?}");
    let place = Place::new().await;
    let image = place.store.import_archive_from(Cursor::new(archive), &ImportOptions::new().tag("two")).await.unwrap();
    assert_eq!(image.layers()[0].digest(), &Digest::of(&upper()));
}

#[tokio::test]
async fn archives_that_hold_no_image() {
    let nothing = Tar::new().file("a", b"b").finish();
    assert!(matches!(refused(&nothing).await, ImportError::NotAnImage { .. }));
    let marker = Tar::new().file("oci-layout", br#"{"imageLayoutVersion":"2"}"#).file("index.json", b"{}").finish();
    assert!(matches!(refused(&marker).await, ImportError::NotAnImage { reason } if reason.contains("version")));
    let empty = Tar::new().file("manifest.json", b"[]").finish();
    assert!(matches!(refused(&empty).await, ImportError::NotAnImage { .. }));
    assert!(matches!(refused(&[1; 1024]).await, ImportError::Malformed { entry: None, .. }));
    let damaged = [&Tar::new().file("a", b"b").finish()[..1024], &[1; 1024]].concat();
    assert!(matches!(refused(&damaged).await, ImportError::Malformed { entry: Some(name), .. } if name == "a"));
    let bad = Tar::new().file("manifest.json", b"{").finish();
    assert!(matches!(refused(&bad).await, ImportError::Json { name: "manifest.json", .. }));
}

#[tokio::test]
async fn archives_for_others_and_documents_that_disagree() {
    let arm = json!({ "architecture": "arm64", "os": "linux", "rootfs": { "diff_ids": [] } }).to_string();
    let archive = docker_documents(Tar::new(), json!([manifest_json(&[], &[])]), arm.as_bytes()).finish();
    assert!(matches!(refused(&archive).await, ImportError::Manifest(ManifestError::Config(_))));

    let layout = Layout::new();
    let mut manifest = layout.manifest(&[LayerBlob::plain(lower())]);
    manifest["platform"] = json!({ "architecture": "arm64", "os": "linux" });
    let error = refused(&oci_archive(&layout.tag("arm", manifest))).await;
    assert!(matches!(error, ImportError::Manifest(ManifestError::NoPlatform { .. })), "{error:?}");

    let tar = Tar::new().file("layer", &lower());
    let archive = docker_documents(tar, json!([manifest_json(&[], &["layer"])]), &config_of(&[])).finish();
    let error = refused(&archive).await;
    let counts = ManifestError::LayerCount { manifest: 1, config: 0 };
    assert!(matches!(&error, ImportError::Manifest(found) if found.to_string() == counts.to_string()), "{error:?}");
}

#[tokio::test]
async fn content_that_is_not_what_a_digest_says() {
    let tar = Tar::new().file("layer", &upper());
    let archive = docker_documents(tar, json!([manifest_json(&[], &["layer"])]), &config_of(&[&lower()])).finish();
    let error = refused(&archive).await;
    assert!(
        matches!(&error, ImportError::DigestMismatch { what, expected, found }
            if what == "layer 0" && *expected == Digest::of(&lower()) && *found == Digest::of(&upper())),
        "{error:?}"
    );
    // Nobody refers to it; it lies all the same.
    for content in [vec![1], vec![1; LARGE]] {
        let name = format!("blobs/sha256/{}", Digest::of(b"other").hex());
        let error = refused(&Tar::new().file(&name, &content).finish()).await;
        assert!(matches!(&error, ImportError::DigestMismatch { what, .. } if *what == name), "{error:?}");
    }
    let layout = Layout::new();
    let mut layer = layout.blob("application/vnd.oci.image.layer.v1.tar", &lower());
    layer["size"] = json!(7);
    let manifest = layout.manifest_of(&serde_json::from_slice(&config_of(&[&lower()])).unwrap(), &[layer]);
    let error = refused(&oci_archive(&layout.tag("latest", manifest))).await;
    assert!(matches!(&error, ImportError::SizeMismatch { what, expected: 7, .. } if what == "layer 0"), "{error:?}");
}

#[tokio::test]
async fn files_that_are_not_there() {
    let missing =
        |error: &ImportError, expected: &str| matches!(error, ImportError::Missing { what, .. } if what == expected);
    let archive =
        docker_documents(Tar::new(), json!([manifest_json(&[], &["layer"])]), &config_of(&[&lower()])).finish();
    assert!(missing(&refused(&archive).await, "layer 0"));
    let list = json!([manifest_json(&[], &[])]).to_string();
    assert!(missing(&refused(&Tar::new().file("manifest.json", list.as_bytes()).finish()).await, "configuration"));
    let layout = layout();
    let digest = Digest::of(&gzip(&upper()));
    fs::remove_file(layout.blob_path(&digest)).unwrap();
    let error = refused(&oci_archive(&layout)).await;
    assert!(matches!(&error, ImportError::Missing { what, name } if what == "layer 1" && *name == digest.to_string()));
    // An archive may leave out what the store has.
    let place = Place::new().await;
    place.import(&[LayerBlob::gzip(&upper())]).await;
    check_files(&import(&place, &oci_archive(&layout)).await.unwrap()).await;
}

#[tokio::test]
async fn names_and_links_that_lead_out_or_in_circles() {
    let absolute = Entry { name: b"/etc/passwd", ..Entry::default() };
    for tar in [Tar::new().file("../x", b""), Tar::new().file("a/../../x", b""), Tar::new().entry(&absolute)] {
        assert!(matches!(refused(&tar.finish()).await, ImportError::Escape { .. }));
    }
    for target in ["/etc/passwd", "../../../etc/passwd"] {
        let tar = Tar::new().symlink("a/layer", target);
        let archive = docker_documents(tar, json!([manifest_json(&[], &["a/layer"])]), &config_of(&[&lower()]));
        let error = refused(&archive.finish()).await;
        assert!(matches!(&error, ImportError::Escape { name } if name == "a/layer"), "{error:?}");
    }
    let tar = Tar::new().symlink("a", "b").symlink("b", "a");
    let archive = docker_documents(tar, json!([manifest_json(&[], &["a"])]), &config_of(&[&lower()])).finish();
    assert!(matches!(refused(&archive).await, ImportError::LinkLoop { name, .. } if name == "a"));
    let archive =
        docker_documents(Tar::new(), json!([manifest_json(&[], &["../x"])]), &config_of(&[&lower()])).finish();
    assert!(matches!(refused(&archive).await, ImportError::Escape { name } if name == "../x"));
}

#[tokio::test]
async fn more_than_an_archive_may_have() {
    let archive = oci_archive(&layout());
    let error = refused_with(&archive, &ImportOptions::new().max_entries(3)).await;
    assert!(matches!(error, ImportError::Limit { limit: 3, .. }), "{error:?}");
    let limit = archive.len() as u64 - 1;
    let error = refused_with(&archive, &ImportOptions::new().max_bytes(limit)).await;
    assert!(matches!(error, ImportError::Limit { limit: found, .. } if found == limit), "{error:?}");
    assert!(refused_with(&archive, &ImportOptions::new().max_bytes(0)).await.to_string().contains("more than 0 bytes"));

    let bomb = Tar::new().file("zeros", &vec![0; 8 << 20]).finish();
    for bomb in [gzip(&bomb), zstd(&bomb)] {
        assert!(bomb.len() < 1 << 20);
        let error = refused_with(&bomb, &ImportOptions::new().max_bytes(4 << 20)).await;
        assert!(matches!(error, ImportError::Limit { .. }), "{error:?}");
    }
    let long = Tar::new().file(&"x".repeat(600), b"").finish();
    assert!(matches!(refused(&long).await, ImportError::Limit { .. }));
    let document = Tar::new().file("manifest.json", &vec![b' '; (4 << 20) + 1]).finish();
    assert!(matches!(refused(&document).await, ImportError::TooLarge { what, .. } if what == "manifest.json"));
    let map = [("GNU.sparse.size", &b"1099511627776"[..]), ("GNU.sparse.map", b"0,1")];
    let sparse = Tar::new().pax(&map).file("x", b"1").finish();
    assert!(matches!(refused(&sparse).await, ImportError::Unsupported { entry, .. } if entry == "x"));
}

#[tokio::test]
async fn a_long_document_is_spooled_and_read_back() {
    let one = lower();
    let mut config: Value = serde_json::from_slice(&config_of(&[&one])).unwrap();
    config["padding"] = json!("x".repeat(LARGE));
    let tar = Tar::new().file("layer", &one);
    let list = json!([manifest_json(&["app:1"], &["layer"])]);
    let archive = docker_documents(tar, list, config.to_string().as_bytes()).finish();
    let place = Place::new().await;
    assert_eq!(import(&place, &archive).await.unwrap().layers().len(), 1);
    assert_eq!(place.debris(), [""; 0]);
}

#[tokio::test]
async fn an_archive_cut_anywhere() {
    let archive = oci_archive(&layout());
    // The end mark is two blocks, of which one is enough.
    for at in (0..archive.len() - 512).step_by(4001) {
        let error = refused(&archive[..at]).await;
        assert!(matches!(error, ImportError::Truncated { .. }), "{at}: {error:?}");
    }
    for compressed in [gzip(&archive), zstd(&archive)] {
        // From where on its kind can be told.
        for at in (4..compressed.len()).step_by(4001) {
            let error = refused(&compressed[..at]).await;
            assert!(matches!(error, ImportError::Truncated { .. }), "{at}: {error:?}");
        }
        let mut damaged = compressed.clone();
        let middle = damaged.len() / 2;
        damaged[middle..middle + 16].iter_mut().for_each(|byte| *byte ^= 0x55);
        let error = refused(&damaged).await;
        assert!(!matches!(error, ImportError::Store(_)), "{error:?}");
    }
}

#[tokio::test]
async fn a_source_that_breaks() {
    let archive = oci_archive(&layout());
    let place = Place::new().await;
    let steps = [Step::Bytes(archive[..archive.len() / 2].to_vec()), Step::Fail(std::io::ErrorKind::ConnectionReset)];
    let error = place.store.import_archive_from(Source::new(steps), &ImportOptions::new()).await.unwrap_err();
    assert!(
        matches!(&error, ImportError::Read(source) if source.kind() == std::io::ErrorKind::ConnectionReset),
        "{error:?}"
    );
    assert_eq!(place.debris(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_source_that_goes_silent() {
    let archive = oci_archive(&layout());
    let place = Place::new().await;
    let asked = Arc::new(Notify::new());
    let steps = [Step::Bytes(archive[..archive.len() / 2].to_vec()), Step::Stall(Arc::clone(&asked))];
    let store = place.store.clone();
    let limit = Duration::from_secs(20);
    let task = tokio::spawn(async move {
        store.import_archive_from(Source::new(steps), &ImportOptions::new().step_timeout(limit)).await
    });
    asked.notified().await;
    tokio::time::advance(limit - Duration::from_millis(1)).await;
    assert!(!task.is_finished());
    tokio::time::advance(Duration::from_millis(2)).await;
    let error = task.await.unwrap().unwrap_err();
    assert!(matches!(error, ImportError::Timeout { limit: found } if found == limit), "{error:?}");
    assert_eq!(place.debris(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_source_that_is_slow_and_never_silent_for_too_long() {
    let archive = oci_archive(&layout());
    let place = Place::new().await;
    let pieces =
        archive.chunks(50_000).flat_map(|piece| [Step::Wait(Duration::from_secs(20)), Step::Bytes(piece.to_vec())]);
    let source = Source::new(pieces);
    let store = place.store.clone();
    let task = tokio::spawn(async move { store.import_archive_from(source, &ImportOptions::new()).await });
    while !task.is_finished() {
        tokio::time::advance(Duration::from_secs(5)).await;
    }
    assert!(task.await.unwrap().is_ok());
}

/// A source that nobody needs to read on in must not keep anyone waiting.
#[tokio::test]
async fn a_refusal_does_not_wait_for_the_source() {
    let place = Place::new().await;
    let steps = [Step::Bytes(vec![1; 1024]), Step::Bytes(vec![1; 1 << 20]), Step::Stall(Arc::default())];
    let error = place.store.import_archive_from(Source::new(steps), &ImportOptions::new()).await.unwrap_err();
    assert!(matches!(error, ImportError::Malformed { .. }), "{error:?}");
}

/// Polls `future` at most `polls` times and drops it then; its output if it came to one.
async fn polled<T>(future: impl Future<Output = T>, polls: usize) -> Option<T> {
    let mut future = pin!(future);
    let mut left = polls;
    std::future::poll_fn(|cx| match left.checked_sub(1) {
        None => Poll::Ready(None),
        Some(rest) => {
            left = rest;
            let result = future.as_mut().poll(cx).map(Some);
            if left == 0 && result.is_pending() { Poll::Ready(None) } else { result }
        }
    })
    .await
}

#[test]
fn a_future_dropped_at_any_poll_leaves_no_debris() {
    let archive = oci_archive(&layout());
    for from_file in [false, true] {
        // Now and then a thread is done before it is waited for.
        let waits = (0..10).any(|_| polls_until_done(&archive, from_file) > 2);
        assert!(waits, "it never waits");
    }
}

/// Imports the archive, dropped at the first poll, at the second and so on, until one is done before that.
fn polls_until_done(archive: &[u8], from_file: bool) -> usize {
    let mut polls = 1;
    loop {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let place = runtime.block_on(Place::new());
        let file = place.folder.path().join("archive");
        fs::write(&file, archive).unwrap();
        let options = ImportOptions::new().name("localhost/app");
        let result = runtime.block_on(async {
            if from_file {
                return polled(place.store.import_archive(&file, &options), polls).await;
            }
            polled(place.store.import_archive_from(Source::hesitant(archive, 16 << 10), &options), polls).await
        });
        // Waits for the threads that still do something.
        drop(runtime);
        assert_eq!(place.debris(), [""; 0], "dropped at poll {polls}");
        if let Some(image) = result {
            image.unwrap();
            return polls;
        }
        polls += 1;
    }
}

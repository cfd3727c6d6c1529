//! OCI layout folders: good ones made by `umoci` and by kiln, and bad ones.

mod image_support;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;

use image_support::LayerBlob;
use image_support::Layout;
use image_support::Place;
use image_support::Tar;
use image_support::run;
use kiln::image::Digest;
use kiln::image::Image;
use kiln::image::ImageConfig;
use kiln::image::LayoutError;
use kiln::image::ManifestError;
use kiln::image::write_single_layer;
use serde_json::json;

fn layer() -> LayerBlob {
    LayerBlob::gzip(&Tar::new().file("f", b"content").finish())
}

async fn refused(layout: &Layout, tag: Option<&str>) -> LayoutError {
    let place = Place::new().await;
    let error = place.store.import_oci_layout(layout.folder.path(), tag).await.expect_err("must be refused");
    assert_eq!(place.debris(), [""; 0]);
    error
}

#[tokio::test]
async fn an_image_of_several_layers_made_by_umoci_unpacks_as_umoci_unpacks_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (layout, tagged) = (path("layout"), format!("{}:app", path("layout")));
    run("umoci", &["init", "--layout", &layout]);
    run("umoci", &["new", "--image", &tagged]);
    let change = |bundle: &str, script: &str| {
        run("umoci", &["unpack", "--image", &tagged, &path(bundle)]);
        run("sh", &["-ec", &format!("umask 022; cd {}/rootfs; {script}", path(bundle))]);
        run("umoci", &["repack", "--image", &tagged, &path(bundle)]);
    };
    change(
        "one",
        "mkdir -p etc usr/bin a/b opaque run; ln -s usr/bin bin; echo one >etc/one; echo x >a/b/gone; echo y >a/kept; \
         cp /bin/busybox usr/bin/; ln usr/bin/busybox usr/bin/sh; chmod 4711 usr/bin/busybox; chown 12:34 a/kept; \
         mknod run/null c 1 3; mkfifo run/fifo; ln -s /nowhere a/dangling; echo f >swap; mkdir swap2; echo z >swap2/in",
    );
    change(
        "two",
        "rm -r a/b; echo two >etc/two; echo changed >etc/one; rm swap; mkdir swap; echo in >swap/in; rm -r swap2; \
         echo file >swap2; chmod 700 opaque; ln usr/bin/busybox usr/bin/cat",
    );
    run(
        "umoci",
        &[
            "config",
            "--image",
            &tagged,
            "--config.entrypoint",
            "/bin/sh",
            "--config.cmd",
            "-c",
            "--config.cmd",
            "id",
            "--config.env",
            "A=1",
            "--config.env",
            "B=x=y",
            "--config.workingdir",
            "/a",
            "--config.user",
            "12:34",
        ],
    );
    let place = Place::new().await;
    let image = place.store.import_oci_layout(&layout, Some("app")).await.unwrap();
    let config = image.config();
    assert_eq!(config.command(), ["/bin/sh", "-c", "id"]);
    assert!(config.env.ends_with(&["A=1".to_owned(), "B=x=y".to_owned()]), "{:?}", config.env);
    assert_eq!((config.working_dir.as_deref(), config.user.as_deref()), (Some("/a"), Some("12:34")));
    assert_eq!(image.layers().len(), 2);

    let root = image_support::flat(&image).await.unwrap();
    run("umoci", &["unpack", "--image", &tagged, &path("reference")]);
    let reference = image_support::list(&folder.path().join("reference/rootfs"));
    run("fsck.erofs", &[root.path.to_str().unwrap()]);
    match image_support::Mounted::new(&root.path) {
        Some(mounted) => assert_eq!(image_support::list(mounted.path()), reference),
        None => {
            // Without the kernel's driver: names and contents; fsck.erofs loses links and setuid.
            let (_folder, found) = image_support::extract(&root.path);
            for (name, seen) in &reference {
                assert_eq!(found[name].bytes, seen.bytes, "{name:?}");
            }
        }
    }
    assert!(reference.contains_key(OsStr::new("swap/in")), "the reference itself has been through both layers");
    assert_eq!(root.root, kiln::rootfs::build(&image).await.unwrap());
}

#[tokio::test]
async fn a_layout_written_here_is_read_here_and_by_umoci() {
    let folder = tempfile::tempdir().unwrap();
    let layout = folder.path().join("layout");
    let tar = Tar::new().folder("bin/").file("bin/sh", b"#!").finish();
    let mut config = ImageConfig::default();
    config.cmd = vec!["/bin/sh".into()];
    config.env = vec!["PATH=/bin".into()];
    config.exposed_ports = vec!["80/tcp".into()];
    config.labels.insert("made".into(), "here".into());
    let digest = write_single_layer(&layout, "one", tar.clone(), &config).await.unwrap();
    assert_eq!(write_single_layer(&layout, "one", tar, &config).await.unwrap(), digest, "same input, same image");
    let other = Tar::new().file("other", b"x").finish();
    let second = write_single_layer(&layout, "two", other, &config).await.unwrap();

    let place = Place::new().await;
    let image = place.store.import_oci_layout(&layout, Some("one")).await.unwrap();
    assert_eq!((image.digest(), image.config()), (&digest, &config));
    let image = place.store.import_oci_layout(&layout, Some("two")).await.unwrap();
    assert_eq!(image.digest(), &second);
    let ambiguous = place.store.import_oci_layout(&layout, None).await.unwrap_err();
    assert!(matches!(ambiguous, LayoutError::Ambiguous { count: 2 }));

    let bundle = folder.path().join("bundle");
    let tagged = format!("{}:one", layout.display());
    run("umoci", &["unpack", "--image", &tagged, bundle.to_str().unwrap()]);
    assert_eq!(fs::read(bundle.join("rootfs/bin/sh")).unwrap(), b"#!");
    assert_eq!(fs::metadata(bundle.join("rootfs/bin/sh")).unwrap().permissions().mode() & 0o777, 0o644);
}

#[tokio::test]
async fn an_index_is_followed_to_the_guests_platform() {
    let layout = Layout::new();
    let mut entries = Vec::new();
    for (architecture, content) in [("arm64", &b"arm"[..]), ("amd64", b"amd")] {
        let mut manifest = layout.manifest(&[LayerBlob::gzip(&Tar::new().file("f", content).finish())]);
        manifest["platform"] = json!({ "architecture": architecture, "os": "linux" });
        entries.push(manifest);
    }
    let media_type = "application/vnd.oci.image.index.v1+json";
    let index = json!({ "schemaVersion": 2, "mediaType": media_type, "manifests": entries });
    let nested = layout.blob(media_type, index.to_string().as_bytes());
    let layout = layout.tag("multi", nested);
    let place = Place::new().await;
    let image = place.store.import_oci_layout(layout.folder.path(), Some("multi")).await.unwrap();
    assert_eq!(image.digest().to_string(), entries[1]["digest"]);
}

#[tokio::test]
async fn an_image_for_another_platform() {
    let layout = Layout::new();
    let mut manifest = layout.manifest(&[layer()]);
    manifest["platform"] = json!({ "architecture": "arm64", "os": "linux" });
    let layout = layout.tag("arm", manifest);
    let error = refused(&layout, None).await;
    assert!(matches!(error, LayoutError::Manifest(ManifestError::NoPlatform { .. })), "{error:?}");

    let layout = Layout::new();
    let config = json!({ "architecture": "arm64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": [] } });
    let manifest = layout.manifest_of(&config, &[]);
    let layout = layout.tag("arm", manifest);
    let error = refused(&layout, None).await;
    assert!(matches!(error, LayoutError::Manifest(ManifestError::Config(_))), "{error:?}");
}

#[tokio::test]
async fn unknown_tag_no_layout_and_missing_blob() {
    let layout = Layout::of(&[layer()]);
    assert!(matches!(refused(&layout, Some("nope")).await, LayoutError::UnknownImage { tag } if tag == "nope"));
    let blob = layer().blob;
    fs::remove_file(layout.blob_path(&Digest::of(&blob))).unwrap();
    let error = refused(&layout, None).await;
    assert!(matches!(&error, LayoutError::MissingBlob { what, .. } if what == "layer 0"), "{error:?}");
    fs::remove_file(layout.folder.path().join("oci-layout")).unwrap();
    assert!(matches!(refused(&layout, None).await, LayoutError::NotALayout { .. }));
}

#[tokio::test]
async fn a_layer_with_another_digest_a_short_one_and_a_long_one() {
    let layout = Layout::of(&[layer()]);
    let digest = Digest::of(&layer().blob);
    let path = layout.blob_path(&digest);
    let good = fs::read(&path).unwrap();
    let mut wrong = good.clone();
    wrong[20] ^= 1;
    fs::write(&path, &wrong).unwrap();
    let error = refused(&layout, None).await;
    assert!(
        matches!(&error, LayoutError::DigestMismatch { what, expected, found }
            if what == "layer 0" && *expected == digest && *found == Digest::of(&wrong)),
        "{error:?}"
    );
    fs::write(&path, &good[..good.len() - 7]).unwrap();
    let size = good.len() as u64;
    let error = refused(&layout, None).await;
    assert!(matches!(error, LayoutError::Truncated { expected, found, .. } if expected == size && found == size - 7));
    fs::write(&path, [&good[..], b"more"].concat()).unwrap();
    let error = refused(&layout, None).await;
    assert!(matches!(error, LayoutError::TooLarge { limit, .. } if limit == size), "{error:?}");
}

#[tokio::test]
async fn a_manifest_with_another_digest() {
    let layout = Layout::new();
    let manifest = layout.manifest(&[layer()]);
    let digest: Digest = manifest["digest"].as_str().unwrap().parse().unwrap();
    let path = layout.blob_path(&digest);
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] = b' ';
    fs::write(&path, bytes).unwrap();
    let error = refused(&layout.tag("latest", manifest), None).await;
    assert!(matches!(&error, LayoutError::DigestMismatch { what, .. } if what == "manifest"), "{error:?}");
}

#[tokio::test]
async fn names_in_a_manifest_never_become_paths() {
    let layout = Layout::new();
    let media_type = "application/vnd.oci.image.layer.v1.tar";
    let config = json!({ "architecture": "amd64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": [] } });
    let evil = json!({ "mediaType": media_type, "digest": "sha256:../../../../etc/passwd", "size": 1 });
    let manifest = layout.manifest_of(&config, &[evil]);
    let error = refused(&layout.tag("latest", manifest), None).await;
    assert!(matches!(error, LayoutError::Manifest(ManifestError::Json(_))), "{error:?}");
}

#[tokio::test]
async fn layer_types_and_counts_that_make_no_sense() {
    let layout = Layout::new();
    let blob = layout.blob("application/vnd.oci.image.layer.v1.tar+encrypted", b"x");
    let config = json!({ "architecture": "amd64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": [] } });
    let manifest = layout.manifest_of(&config, &[blob]);
    let error = refused(&layout.tag("latest", manifest), None).await;
    assert!(matches!(error, LayoutError::Manifest(ManifestError::LayerMediaType(_))), "{error:?}");

    let layout = Layout::new();
    let blob = layout.blob("application/vnd.oci.image.layer.v1.tar", &Tar::new().finish());
    let manifest = layout.manifest_of(&config, &[blob]);
    let error = refused(&layout.tag("latest", manifest), None).await;
    assert!(matches!(error, LayoutError::Manifest(ManifestError::LayerCount { manifest: 1, config: 0 })), "{error:?}");
}

#[tokio::test]
async fn layers_that_would_fill_the_disk_are_refused_before_a_byte_is_copied() {
    let config = json!({ "architecture": "amd64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": [] } });
    for sizes in [vec![u64::MAX], vec![u64::MAX, u64::MAX], vec![40 << 30, 40 << 30]] {
        let layout = Layout::new();
        let layers: Vec<_> = sizes
            .iter()
            .map(|size| {
                let mut blob = layout.blob("application/vnd.oci.image.layer.v1.tar", b"x");
                blob["size"] = json!(size);
                blob
            })
            .collect();
        let manifest = layout.manifest_of(&config, &layers);
        let error = refused(&layout.tag("latest", manifest), None).await;
        let too_large = matches!(error, LayoutError::Manifest(ManifestError::LayersTooLarge { .. }));
        assert!(too_large, "{sizes:?}: {error:?}");
    }
}

#[tokio::test]
async fn a_fifo_in_place_of_a_blob_does_not_hang() {
    let layout = Layout::of(&[layer()]);
    let path = layout.blob_path(&Digest::of(&layer().blob));
    fs::remove_file(&path).unwrap();
    run("mkfifo", &[path.to_str().unwrap()]);
    assert!(matches!(refused(&layout, None).await, LayoutError::Io { .. }));
}

#[tokio::test]
async fn from_a_path_that_is_nothing() {
    let missing = Image::from_oci_layout("/nonexistent").await;
    assert!(matches!(missing, Err(LayoutError::NotALayout { .. })), "{missing:?}");
}

//! Images made from others: configuration and files changed by the caller.

mod image_support;

use std::fs;

use image_support::LayerBlob;
use image_support::Layout;
use image_support::Place;
use image_support::Tar;
use image_support::extract;
use kiln::image::CustomizeError;
use kiln::image::Image;
use kiln::image::ImageChanges;
use kiln::image::ImageFile;
use kiln::image::PullError;
use kiln::image::PullPolicy;
use kiln::image::write_single_layer;
use serde_json::Value;
use serde_json::json;

/// An image with every field that a change can meet, and some that none knows.
async fn base(place: &Place) -> Image {
    let layout = Layout::new();
    let layer = LayerBlob::gzip(&Tar::new().folder("etc").file("etc/old", b"old").file("kept", b"kept").finish());
    let config = json!({
        "architecture": "amd64", "os": "linux", "created": "2024-01-01T00:00:00Z", "novel": { "field": 7 },
        "config": {
            "Entrypoint": ["/entry"], "Cmd": ["one", "two"], "Env": ["PATH=/bin", "A=1"], "User": "app",
            "WorkingDir": "/srv", "StopSignal": "SIGQUIT", "Labels": { "a": "b" }, "Volumes": { "/data": {} },
        },
        "history": [{ "created_by": "somebody" }],
        "rootfs": { "type": "layers", "diff_ids": [layer.diff_id.to_string()] },
    });
    let descriptor = layout.blob(layer.media_type, &layer.blob);
    let manifest = layout.manifest_of(&config, &[descriptor]);
    let layout = layout.tag("base", manifest);
    place.store.import_oci_layout(layout.folder.path(), None).await.unwrap()
}

#[tokio::test]
async fn what_is_not_changed_stays() {
    let place = Place::new().await;
    let image = base(&place).await;
    let changed = image.changed(ImageChanges::new().env("B", "2")).await.unwrap();
    assert_ne!(changed.digest(), image.digest());
    assert_eq!(changed.layers(), image.layers());
    let mut expected = image.config().clone();
    expected.env.push("B=2".to_owned());
    assert_eq!(*changed.config(), expected);
}

#[tokio::test]
async fn fields_that_nobody_here_knows_survive() {
    let place = Place::new().await;
    let image = base(&place).await;
    let changed = image.changed(ImageChanges::new().user("root")).await.unwrap();
    let blob = |hex: &str| -> Value {
        let bytes = fs::read(place.store.root().join("blobs/sha256").join(hex)).unwrap();
        serde_json::from_slice(&bytes).unwrap()
    };
    let manifest = blob(&changed.digest().hex());
    let config = blob(manifest["config"]["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap());
    assert_eq!(config["novel"]["field"], 7);
    assert_eq!(config["config"]["Volumes"], json!({ "/data": {} }));
    assert_eq!(config["history"].as_array().unwrap().len(), 2);
    assert_eq!(config["history"][1]["empty_layer"], true);
}

#[tokio::test]
async fn an_entrypoint_drops_the_arguments_of_the_old_one() {
    let place = Place::new().await;
    let image = base(&place).await;
    let command = |changes: ImageChanges| async { image.changed(changes).await.unwrap().config().command() };
    assert_eq!(command(ImageChanges::new().command(["three"])).await, ["/entry", "three"]);
    assert_eq!(command(ImageChanges::new().entrypoint(["/new"])).await, ["/new"]);
    assert_eq!(command(ImageChanges::new().command(["x"]).entrypoint(["/new"])).await, ["/new", "x"]);
    assert_eq!(command(ImageChanges::new().entrypoint([""; 0]).command(["/only"])).await, ["/only"]);
}

#[tokio::test]
async fn a_variable_replaces_the_one_of_its_name() {
    let place = Place::new().await;
    let image = base(&place).await;
    let changes = ImageChanges::new().env("A", "x=y").env("C", "").env("C", "last");
    assert_eq!(image.changed(changes).await.unwrap().config().env, ["PATH=/bin", "A=x=y", "C=last"]);
}

#[tokio::test]
async fn files_lie_over_the_layers() {
    let place = Place::new().await;
    let image = base(&place).await;
    let host = place.folder.path().join("host-file");
    let large = vec![7; 3 << 20];
    fs::write(&host, &large).unwrap();
    let long = format!("/deep/{}/name", "d".repeat(200));
    let changes = ImageChanges::new()
        .file(ImageFile::new("/etc/old", "new").mode(0o750).owner(70_000, 5))
        .file(ImageFile::new(&long, ""))
        .file(ImageFile::from_host("/from/host", &host));
    let changed = image.changed(changes).await.unwrap();
    assert_eq!(changed.layers().len(), 2);
    let flat = image_support::flat(&changed).await.unwrap();
    let (_folder, listing) = extract(&flat.path);
    let seen = |path: &str| &listing[std::ffi::OsStr::new(path.trim_start_matches('/'))];
    assert_eq!(seen("kept").bytes, b"kept");
    let old = seen("etc/old");
    assert_eq!((&*old.bytes, old.mode, old.uid, old.gid, old.mtime), (&b"new"[..], 0o750, 70_000, 5, (0, 0)));
    assert_eq!(seen(&long).bytes, b"");
    assert_eq!(seen("from/host").bytes, large);
    assert_eq!((seen("from").mode, seen("from").uid), (0o755, 0));
}

#[tokio::test]
async fn the_same_changes_give_the_same_image() {
    let (one, two) = (Place::new().await, Place::new().await);
    let changes = || ImageChanges::new().workdir("/w").hostname("h1").file(ImageFile::new("/f", "f"));
    let first = base(&one).await.changed(changes()).await.unwrap();
    let second = base(&two).await.changed(changes()).await.unwrap();
    assert_eq!(first.digest(), second.digest());
    assert_eq!(first.config().hostname(), Some("h1"));
    assert_eq!(first.config().working_dir.as_deref(), Some("/w"));
}

#[tokio::test]
async fn what_cannot_be_is_refused_and_leaves_nothing() {
    let place = Place::new().await;
    let image = base(&place).await;
    let before = fs::read_dir(place.store.root().join("blobs/sha256")).unwrap().count();
    let refused = |changes: ImageChanges| async { image.changed(changes).await.expect_err("must be refused") };
    assert!(matches!(refused(ImageChanges::new().workdir("w")).await, CustomizeError::Workdir(_)));
    assert!(matches!(refused(ImageChanges::new().env("", "x")).await, CustomizeError::Variable(_)));
    assert!(matches!(refused(ImageChanges::new().env("A=B", "x")).await, CustomizeError::Variable(_)));
    assert!(matches!(refused(ImageChanges::new().env("A", "x\0y")).await, CustomizeError::Config(_)));
    for name in ["", "-a", "a..b", "a_b", "ä", &"x".repeat(65)] {
        assert!(matches!(refused(ImageChanges::new().hostname(name)).await, CustomizeError::Hostname(_)), "{name:?}");
    }
    for path in ["", "/", "relative", "/a/../b", "/a/", "/a//b", "/a\0", &format!("/{}", "x".repeat(256))] {
        let error = refused(ImageChanges::new().file(ImageFile::new(path, ""))).await;
        assert!(matches!(error, CustomizeError::FilePath(_)), "{path:?}");
    }
    for host in ["/nonexistent/file", "/dev/null", "/tmp"] {
        let error = refused(ImageChanges::new().file(ImageFile::from_host("/f", host))).await;
        assert!(matches!(error, CustomizeError::Read { .. }), "{host:?}: {error:?}");
    }
    assert_eq!(place.debris(), [""; 0]);
    assert_eq!(fs::read_dir(place.store.root().join("blobs/sha256")).unwrap().count(), before);
}

#[tokio::test]
async fn a_name_finds_the_changed_image_without_a_network() {
    let place = Place::new().await;
    let layout = place.folder.path().join("layout");
    write_single_layer(&layout, "latest", Tar::new().finish(), &kiln::image::ImageConfig::default()).await.unwrap();
    let image = place.store.import_oci_layout(&layout, None).await.unwrap();
    let changed = image.changed(ImageChanges::new().command(["/x"])).await.unwrap();
    place.store.name(&"team/app:dev".parse().unwrap(), &changed).await.unwrap();
    let find = |name: &str| Image::builder(name).store(place.store.clone()).policy(PullPolicy::Never);
    assert_eq!(find("team/app:dev").pull().await.unwrap().digest(), changed.digest());
    // Changes of changes, under another name.
    let again = find("team/app:dev").env("X", "1").name("team/app:env").pull().await.unwrap();
    assert_eq!(again.config().command(), ["/x"]);
    assert_eq!(find("team/app:env").pull().await.unwrap().digest(), again.digest());
    let bad = find("team/app:dev").workdir("relative").pull().await;
    assert!(matches!(bad, Err(PullError::Customize(CustomizeError::Workdir(_)))));
}

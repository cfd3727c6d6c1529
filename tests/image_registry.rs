//! Pulling from a real registry, Debian's `docker-registry`, filled by `skopeo`.

mod image_support;

use std::ffi::OsStr;
use std::fs;

use futures::StreamExt;
use image_support::LayerBlob;
use image_support::Layout;
use image_support::Place;
use image_support::Tar;
use image_support::registry::Registry;
use image_support::registry::USER;
use kiln::StartError;
use kiln::VmConfig;
use kiln::image::ConfigError;
use kiln::image::Digest;
use kiln::image::Image;
use kiln::image::ImageStore;
use kiln::image::ManifestError;
use kiln::image::Platform;
use kiln::image::Progress;
use kiln::image::ProgressEvent;
use kiln::image::PullError;
use kiln::image::PullPolicy;
use kiln::image::RegistryAuth;
use kiln::image::StoreError;
use kiln::units::Bytes;
use serde_json::Value;
use serde_json::json;

const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";

fn layers() -> [LayerBlob; 2] {
    let lower = Tar::new().folder("etc/").file("etc/a", b"lower").file("big", &[7; 3_000_000]).finish();
    let upper = Tar::new().file("etc/a", b"upper").finish();
    [LayerBlob::gzip(&lower), LayerBlob::gzip(&upper)]
}

async fn pull(place: &Place, reference: &str) -> Result<Image, PullError> {
    Image::builder(reference).store(place.store.clone()).pull().await
}

async fn refused(place: &Place, reference: &str) -> PullError {
    let error = pull(place, reference).await.expect_err("the pull must fail");
    assert_eq!(place.debris(), [""; 0]);
    error
}

#[tokio::test]
async fn anonymous_pull_by_tag_and_by_digest() {
    let registry = Registry::open();
    let layout = Layout::of(&layers());
    registry.push(layout.folder.path(), "latest", "team/app:1.0", &[]);
    let place = Place::new().await;
    let image = pull(&place, &format!("{}/team/app:1.0", registry.address)).await.unwrap();
    assert_eq!(image.layers().len(), 2);
    let root = image_support::flat(&image).await.unwrap();
    let (_folder, tree) = image_support::extract(&root.path);
    assert_eq!(tree[OsStr::new("etc/a")].bytes, b"upper");
    assert_eq!(tree[OsStr::new("big")].bytes, vec![7; 3_000_000]);

    let pinned = format!("{}/team/app@{}", registry.address, image.digest());
    let other = Place::new().await;
    assert_eq!(pull(&other, &pinned).await.unwrap().digest(), image.digest());
}

#[tokio::test]
async fn basic_auth_right_wrong_and_none() {
    let registry = Registry::with_auth();
    let layout = Layout::of(&layers());
    let credentials = format!("{}:{}", USER.0, USER.1);
    registry.push(layout.folder.path(), "latest", "private:1", &["--dest-creds", &credentials]);
    let reference = format!("{}/private:1", registry.address);
    let place = Place::new().await;
    let builder = || Image::builder(&reference).store(place.store.clone());
    for auth in [RegistryAuth::Anonymous, RegistryAuth::basic(USER.0, "wrong")] {
        let error = builder().auth(auth).pull().await.unwrap_err();
        assert!(matches!(error, PullError::Unauthorized { .. }), "{error:?}");
    }
    let image = builder().auth(RegistryAuth::basic(USER.0, USER.1)).pull().await.unwrap();
    assert_eq!(image.layers().len(), 2);
}

#[tokio::test]
async fn unknown_repository_tag_and_digest() {
    let registry = Registry::open();
    let layout = Layout::of(&layers());
    registry.push(layout.folder.path(), "latest", "app:1", &[]);
    let place = Place::new().await;
    for name in ["nothing:1".to_owned(), "app:2".to_owned(), format!("app@{}", Digest::of(b"nothing"))] {
        let error = refused(&place, &format!("{}/{name}", registry.address)).await;
        assert!(matches!(error, PullError::UnknownImage { .. }), "{name}: {error:?}");
    }
}

#[tokio::test]
async fn a_layer_changed_in_the_registry() {
    let registry = Registry::open();
    let layout = Layout::of(&layers());
    registry.push(layout.folder.path(), "latest", "app:1", &[]);
    let reference = format!("{}/app:1", registry.address);
    let digest = Digest::of(&layers()[1].blob);
    let path = registry.blob_path(&digest);
    let good = fs::read(&path).unwrap();
    let mut wrong = good.clone();
    wrong[30] ^= 0xff;
    fs::write(&path, &wrong).unwrap();
    let place = Place::new().await;
    let error = refused(&place, &reference).await;
    assert!(
        matches!(&error, PullError::DigestMismatch { what, expected, found }
            if what == "layer 1" && *expected == digest && *found == Digest::of(&wrong)),
        "{error:?}"
    );
    fs::write(&path, &good[..good.len() - 10]).unwrap();
    let error = refused(&place, &reference).await;
    let size = good.len() as u64;
    assert!(
        matches!(&error, PullError::Truncated { what, expected, found }
            if what == "layer 1" && *expected == size && *found == size - 10),
        "{error:?}"
    );
    fs::write(&path, [&good[..], b"more"].concat()).unwrap();
    assert!(matches!(refused(&place, &reference).await, PullError::TooLarge { .. }));
    fs::write(&path, &good).unwrap();
    assert_eq!(pull(&place, &reference).await.unwrap().layers().len(), 2);
}

#[tokio::test]
async fn a_manifest_changed_in_the_registry() {
    let registry = Registry::open();
    let layout = Layout::of(&layers());
    registry.push(layout.folder.path(), "latest", "app:1", &[]);
    let place = Place::new().await;
    let image = pull(&place, &format!("{}/app:1", registry.address)).await.unwrap();
    let path = registry.blob_path(image.digest());
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes.insert(last, b' ');
    fs::write(&path, &bytes).unwrap();
    let pinned = format!("{}/app@{}", registry.address, image.digest());
    let other = Place::new().await;
    let error = refused(&other, &pinned).await;
    // The registry itself may notice first, and then calls the manifest unknown or invalid.
    assert!(
        matches!(error, PullError::DigestMismatch { .. } | PullError::UnknownImage { .. } | PullError::Registry { .. }),
        "{error:?}"
    );
}

#[tokio::test]
async fn policies_never_and_missing_do_without_the_registry() {
    let registry = Registry::open();
    let layout = Layout::of(&layers());
    registry.push(layout.folder.path(), "latest", "app:1", &[]);
    let reference = format!("{}/app:1", registry.address);
    let place = Place::new().await;
    let builder = || Image::builder(&reference).store(place.store.clone());
    let error = builder().policy(PullPolicy::Never).pull().await.unwrap_err();
    assert!(matches!(error, PullError::UnknownImage { .. }));
    let pulled = builder().policy(PullPolicy::Missing).pull().await.unwrap();
    drop(registry);
    for policy in [PullPolicy::Missing, PullPolicy::Never] {
        assert_eq!(builder().policy(policy).pull().await.unwrap().digest(), pulled.digest());
    }
    let error = builder().retries(0).pull().await.unwrap_err();
    assert!(matches!(error, PullError::Network { .. }), "{error:?}");
}

#[tokio::test]
async fn a_name_that_is_no_reference() {
    let place = Place::new().await;
    for name in ["", "UPPER", "a b", "x@sha256:12", "x@sha512:"] {
        assert!(matches!(refused(&place, name).await, PullError::Reference(_)), "{name}");
    }
}

/// Layers of an image that says what it is for.
fn content(platform: &str) -> LayerBlob {
    LayerBlob::gzip(&Tar::new().file("platform", platform.as_bytes()).finish())
}

/// An image for `platform`, as an entry of an index.
fn entry(layout: &Layout, platform: &str) -> Value {
    let (os, architecture) = platform.split_once('/').unwrap();
    let layer = content(platform);
    let config = json!({
        "architecture": architecture, "os": os, "config": {},
        "rootfs": { "type": "layers", "diff_ids": [layer.diff_id.to_string()] },
    });
    let mut entry = layout.manifest_of(&config, &[layout.blob(layer.media_type, &layer.blob)]);
    entry["platform"] = json!({ "os": os, "architecture": architecture });
    entry
}

fn index(entries: &[Value]) -> Vec<u8> {
    json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries }).to_string().into_bytes()
}

/// A registry with "multi:1", an index of images for these platforms; and their entries.
fn multi(platforms: &[&str]) -> (Registry, Vec<Value>) {
    let registry = Registry::open();
    let layout = Layout::new();
    let entries: Vec<_> = platforms.iter().map(|platform| entry(&layout, platform)).collect();
    let whole = layout.blob(OCI_INDEX, &index(&entries));
    let layout = layout.tag("multi", whole);
    registry.push(layout.folder.path(), "multi", "multi:1", &["--all"]);
    (registry, entries)
}

fn platform(text: &str) -> Platform {
    text.parse().unwrap()
}

#[tokio::test]
async fn an_index_is_followed_to_the_wanted_platform() {
    let (registry, entries) = multi(&["linux/arm64", "linux/amd64", "unknown/unknown"]);
    let reference = format!("{}/multi:1", registry.address);
    let place = Place::new().await;
    let builder =
        |text: &str| Image::builder(&reference).store(place.store.clone()).platform(platform(text)).retries(0);
    let error = builder("linux/s390x").pull().await.unwrap_err();
    match error {
        PullError::Manifest(ManifestError::NoPlatform { wanted, available }) => {
            assert_eq!(*wanted, platform("linux/s390x"));
            assert_eq!(available, [platform("linux/arm64"), platform("linux/amd64")]);
        }
        other => panic!("{other:?}"),
    }
    for (text, entry) in [("linux/arm64", &entries[0]), ("linux/amd64", &entries[1])] {
        let image = builder(text).pull().await.unwrap();
        assert_eq!(image.digest().to_string(), entry["digest"]);
        assert_eq!(image.config().platform, platform(text));
    }
    // Without a word it is the guest's, and no other can be started.
    assert_eq!(pull(&place, &reference).await.unwrap().config().platform, Platform::default());
    let image = builder("linux/arm64/v8").pull().await.unwrap();
    let error = image.start(VmConfig::new()).await.unwrap_err();
    assert!(matches!(&error, StartError::Platform { image, .. } if **image == platform("linux/arm64")), "{error:?}");
    // The store knows them apart.
    drop(registry);
    for text in ["linux/arm64", "linux/amd64"] {
        for policy in [PullPolicy::Missing, PullPolicy::Never] {
            assert_eq!(builder(text).policy(policy).pull().await.unwrap().config().platform, platform(text));
        }
    }
    let error = builder("linux/s390x").policy(PullPolicy::Never).pull().await.unwrap_err();
    assert!(matches!(error, PullError::UnknownImage { .. }), "{error:?}");
}

#[tokio::test]
async fn indexes_in_an_index_are_searched() {
    let (registry, entries) = multi(&["linux/arm64", "linux/amd64"]);
    let nested = |entries: &[Value]| {
        let bytes = index(entries);
        registry.put_manifest("multi", &Digest::of(&bytes).to_string(), OCI_INDEX, &bytes);
        json!({ "mediaType": OCI_INDEX, "digest": Digest::of(&bytes).to_string(), "size": bytes.len() })
    };
    let (arm, amd) = (nested(&entries[..1]), nested(&entries[1..]));
    registry.put_manifest("multi", "nested", OCI_INDEX, &index(&[arm, amd.clone()]));
    let place = Place::new().await;
    let image = pull(&place, &format!("{}/multi:nested", registry.address)).await.unwrap();
    assert_eq!(image.digest().to_string(), entries[1]["digest"]);
    let mut deep = amd;
    for _ in 0..3 {
        deep = nested(&[deep]);
    }
    registry.put_manifest("multi", "deep", OCI_INDEX, &index(&[deep]));
    let error = refused(&place, &format!("{}/multi:deep", registry.address)).await;
    assert!(matches!(error, PullError::Manifest(ManifestError::IndexDepth(_))), "{error:?}");
}

#[tokio::test]
async fn an_image_that_is_not_what_its_index_says() {
    let (registry, entries) = multi(&["linux/arm64"]);
    let mut liar = entries[0].clone();
    liar["platform"]["architecture"] = json!("amd64");
    registry.put_manifest("multi", "liar", OCI_INDEX, &index(&[liar]));
    let place = Place::new().await;
    let error = refused(&place, &format!("{}/multi:liar", registry.address)).await;
    let is_right = matches!(
        &error,
        PullError::Manifest(ManifestError::Config(ConfigError::Platform { found, wanted }))
            if **found == platform("linux/arm64") && **wanted == platform("linux/amd64")
    );
    assert!(is_right, "{error:?}");
    let layer = Digest::of(&content("linux/arm64").blob);
    assert!(!place.store.root().join("blobs/sha256").join(layer.hex()).exists(), "its layers were not worth fetching");
}

#[tokio::test]
async fn pins_by_digest_with_and_without_a_tag() {
    let (registry, entries) = multi(&["linux/arm64", "linux/amd64"]);
    let whole = Digest::of(&index(&entries));
    let image: Digest = entries[1]["digest"].as_str().unwrap().parse().unwrap();
    let place = Place::new().await;
    let names = [format!("multi@{whole}"), format!("multi:1@{whole}"), format!("multi:other@{image}")];
    let builder =
        |name: &str| Image::builder(format!("{}/{name}", registry.address)).store(place.store.clone()).retries(0);
    for name in &names {
        assert_eq!(*builder(name).pull().await.unwrap().digest(), image, "{name}");
    }
    let unknown = format!("multi:1@{}", Digest::of(b"nothing"));
    assert!(matches!(builder(&unknown).pull().await, Err(PullError::UnknownImage { .. })));
    let address = registry.address.clone();
    drop(registry);
    // The last one was never pulled under that name.
    for name in names.iter().chain([&format!("elsewhere@{image}")]) {
        let again = Image::builder(format!("{address}/{name}")).store(place.store.clone());
        assert_eq!(*again.policy(PullPolicy::Missing).pull().await.unwrap().digest(), image, "{name}");
    }
}

#[tokio::test]
async fn what_is_lost_in_the_store_needs_the_registry() {
    let registry = Registry::open();
    registry.push(Layout::of(&layers()).folder.path(), "latest", "app:1", &[]);
    let place = Place::new().await;
    let builder = || Image::builder(format!("{}/app:1", registry.address)).store(place.store.clone()).retries(0);
    let image = builder().pull().await.unwrap();
    let blobs = place.store.root().join("blobs/sha256");
    let (config, manifest) = {
        let manifest = fs::read(blobs.join(image.digest().hex())).unwrap();
        let parsed: Value = serde_json::from_slice(&manifest).unwrap();
        let config: Digest = parsed["config"]["digest"].as_str().unwrap().parse().unwrap();
        (config, *image.digest())
    };
    let lost = [*image.layers()[1].digest(), config, manifest];
    for digest in lost {
        fs::remove_file(blobs.join(digest.hex())).unwrap();
        let error = builder().policy(PullPolicy::Never).pull().await.unwrap_err();
        assert!(matches!(error, PullError::Incomplete { .. }), "{error:?}");
        assert_eq!(builder().policy(PullPolicy::Missing).pull().await.unwrap().digest(), image.digest());
        assert!(blobs.join(digest.hex()).exists());
    }
    // A configuration of the right size and the wrong content.
    fs::write(blobs.join(config.hex()), vec![b' '; fs::read(blobs.join(config.hex())).unwrap().len()]).unwrap();
    let error = builder().policy(PullPolicy::Never).pull().await.unwrap_err();
    assert!(matches!(error, PullError::Incomplete { .. }), "{error:?}");
    builder().policy(PullPolicy::Missing).pull().await.unwrap();
    fs::remove_file(blobs.join(lost[0].hex())).unwrap();
    let address = registry.address.clone();
    let builder = || Image::builder(format!("{address}/app:1")).store(place.store.clone()).retries(0);
    drop(registry);
    for policy in [PullPolicy::Always, PullPolicy::Missing] {
        let error = builder().policy(policy).pull().await.unwrap_err();
        assert!(matches!(error, PullError::Network { .. }), "{error:?}");
    }
    let error = builder().policy(PullPolicy::Never).pull().await.unwrap_err();
    assert!(matches!(error, PullError::Incomplete { .. }), "{error:?}");
}

#[tokio::test]
async fn layers_that_are_here_are_reported_as_arrived() {
    let registry = Registry::open();
    registry.push(Layout::of(&layers()).folder.path(), "latest", "app:1", &[]);
    let place = Place::new().await;
    let reference = format!("{}/app:1", registry.address);
    let image = pull(&place, &reference).await.unwrap();
    let (progress, events) = Progress::channel();
    Image::builder(&reference).store(place.store.clone()).progress(progress).pull().await.unwrap();
    let events: Vec<_> = events.collect().await;
    let layers: Vec<_> = image.layers().iter().map(|layer| (*layer.digest(), layer.size())).collect();
    assert_eq!(events[0], ProgressEvent::Resolving { reference });
    assert_eq!(events[1], ProgressEvent::Resolved { image: *image.digest(), layers: layers.clone() });
    for (layer, size) in layers {
        assert!(events[2..].contains(&ProgressEvent::Fetching { layer, done: size, total: size }), "{events:?}");
    }
    assert_eq!(events.len(), 4);
}

#[tokio::test]
async fn a_quota_holds_for_all_layers_of_a_pull_together() {
    let registry = Registry::open();
    // What no compressor makes smaller: the registry's client compresses.
    let noise = |seed: u64| -> Vec<u8> {
        let mut state = seed;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        };
        (0..300_000).map(|_| next()).collect()
    };
    let layers = [1, 2].map(|seed| LayerBlob::plain(Tar::new().file("f", &noise(seed)).finish()));
    registry.push(Layout::of(&layers).folder.path(), "latest", "two:1", &[]);
    let place = Place::new().await;
    let store = ImageStore::options().quota(Bytes::kib(450)).open(place.store.root()).await.unwrap();
    let error = Image::builder(format!("{}/two:1", registry.address)).store(store).pull().await.unwrap_err();
    let PullError::Store(StoreError::Quota { needed, .. }) = error else { panic!("{error:?}") };
    assert!(needed.0 > 400_000, "{needed:?}");
    assert_eq!(place.debris(), [""; 0]);
}

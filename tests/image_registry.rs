//! Pulling from a real registry, Debian's `docker-registry`, filled by `skopeo`; and from servers
//! that misbehave.

mod image_support;

use std::ffi::OsStr;
use std::fs;
use std::time::Duration;

use image_support::LayerBlob;
use image_support::Layout;
use image_support::Place;
use image_support::Tar;
use image_support::registry::Registry;
use image_support::registry::USER;
use kiln::image::Digest;
use kiln::image::Image;
use kiln::image::PullError;
use kiln::image::PullPolicy;
use kiln::image::RegistryAuth;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;

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
    let error = builder().pull().await.unwrap_err();
    assert!(matches!(error, PullError::Network { .. }), "{error:?}");
}

#[tokio::test]
async fn a_name_that_is_no_reference() {
    let place = Place::new().await;
    for name in ["", "UPPER", "a b", "x@sha256:12", "x@sha512:"] {
        assert!(matches!(refused(&place, name).await, PullError::Reference(_)), "{name}");
    }
}

/// A server that answers requests for blobs by `blob`, and serves `layout`'s manifest.
async fn serve(layout: &Layout, tag_manifest: Digest, fault: Fault) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let folder = layout.folder.path().join("blobs/sha256");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let folder = folder.clone();
            tokio::spawn(async move {
                let mut request = vec![0; 8192];
                let length = stream.read(&mut request).await.unwrap_or(0);
                let request = String::from_utf8_lossy(&request[..length]).into_owned();
                let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
                let hex = match path.rsplit_once("sha256:") {
                    Some((_, hex)) => hex.to_owned(),
                    None if path.contains("/manifests/") => tag_manifest.hex(),
                    None => {
                        let _ = stream
                            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
                            .await;
                        return;
                    }
                };
                let body = fs::read(folder.join(hex)).unwrap_or_default();
                fault.answer(&mut stream, path.contains("/blobs/"), &body).await;
            });
        }
    });
    address
}

#[derive(Clone, Copy)]
enum Fault {
    /// Closes the connection in the middle of a blob.
    Break,
    /// Sends half of a blob and then nothing.
    Stall,
    /// Answers every blob with 503.
    Unavailable,
    /// Answers a manifest with another one.
    WrongManifest,
}

impl Fault {
    async fn answer(self, stream: &mut tokio::net::TcpStream, is_blob: bool, body: &[u8]) {
        let head = |length: usize| format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n");
        let half = &body[..body.len() / 2];
        let send = match (self, is_blob) {
            (Self::Break | Self::Stall, true) => [head(body.len()).as_bytes(), half].concat(),
            (Self::Unavailable, true) => {
                b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".to_vec()
            }
            (Self::WrongManifest, false) => [head(body.len() + 1).as_bytes(), body, b"\n"].concat(),
            _ => [head(body.len()).as_bytes(), body].concat(),
        };
        let _ = stream.write_all(&send).await;
        if matches!(self, Self::Stall) && is_blob {
            // Until the client gives up and closes.
            let _ = stream.read(&mut [0; 16]).await;
        }
    }
}

async fn pull_from(fault: Fault, pinned: bool) -> (Place, PullError) {
    let layout = Layout::new();
    let manifest = layout.manifest(&layers());
    let digest: Digest = manifest["digest"].as_str().unwrap().parse().unwrap();
    let address = serve(&layout, digest, fault).await;
    let name = if pinned { format!("{address}/app@{digest}") } else { format!("{address}/app:1") };
    let place = Place::new().await;
    let pull = Image::builder(name).store(place.store.clone()).step_timeout(Duration::from_millis(500)).pull();
    let error = pull.await.expect_err("the pull must fail");
    (place, error)
}

#[tokio::test]
async fn a_connection_that_breaks() {
    let (place, error) = pull_from(Fault::Break, false).await;
    assert!(matches!(error, PullError::Network { .. }), "{error:?}");
    assert_eq!(place.debris(), [""; 0]);
}

#[tokio::test]
async fn a_registry_that_goes_silent() {
    let (place, error) = pull_from(Fault::Stall, false).await;
    // Whichever of the two equal deadlines is noticed first: the transport's or the step's.
    assert!(matches!(error, PullError::Timeout { .. } | PullError::Network { .. }), "{error:?}");
    assert_eq!(place.debris(), [""; 0]);
}

#[tokio::test]
async fn a_registry_that_is_unavailable() {
    let (place, error) = pull_from(Fault::Unavailable, false).await;
    assert!(matches!(error, PullError::Registry { .. }), "{error:?}");
    assert_eq!(place.debris(), [""; 0]);
}

#[tokio::test]
async fn a_pinned_manifest_that_is_another() {
    let (place, error) = pull_from(Fault::WrongManifest, true).await;
    assert!(matches!(error, PullError::DigestMismatch { .. }), "{error:?}");
    assert_eq!(place.debris(), [""; 0]);
}

#[test]
fn a_dropped_pull_leaves_nothing_half_written() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let place = runtime.block_on(async {
        let layout = Layout::new();
        let manifest = layout.manifest(&layers());
        let digest: Digest = manifest["digest"].as_str().unwrap().parse().unwrap();
        let address = serve(&layout, digest, Fault::Stall).await;
        let place = Place::new().await;
        let pull = Image::builder(format!("{address}/app:1")).store(place.store.clone()).pull();
        let abandoned = tokio::time::timeout(Duration::from_millis(300), pull).await;
        assert!(abandoned.is_err(), "the server never finishes a blob: {abandoned:?}");
        place
    });
    // Waits for the file work that was under way.
    drop(runtime);
    assert_eq!(place.debris(), [""; 0]);
}

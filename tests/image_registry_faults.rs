//! Pulling through a network that breaks: what is tried again and how, what is given up, and that nothing half-written
//! stays. A real registry answers; a proxy before it spoils the answers.

mod image_support;

use std::time::Duration;

use futures::StreamExt;
use image_support::LayerBlob;
use image_support::Layout;
use image_support::Place;
use image_support::Tar;
use image_support::proxy::Fault;
use image_support::proxy::Proxy;
use image_support::registry::Registry;
use kiln::image::Digest;
use kiln::image::Image;
use kiln::image::OciImageBuilder;
use kiln::image::Progress;
use kiln::image::ProgressEvent;
use kiln::image::PullError;
use kiln::image::RegistryAuth;

/// A registry with one image of one layer, and the proxy before it.
struct Scene {
    _registry: Registry,
    proxy: Proxy,
    place: Place,
    layer: Digest,
    size: u64,
}

impl Scene {
    async fn new() -> Self {
        // Bytes that do not compress, so that the blob is long and every part of it unlike the others.
        let mut noise = vec![0; 300_000];
        getrandom::fill(&mut noise).unwrap();
        let layer = LayerBlob::gzip(&Tar::new().file("noise", &noise).finish());
        let registry = Registry::open();
        let (digest, size) = (Digest::of(&layer.blob), layer.blob.len() as u64);
        registry.push(Layout::of(&[layer]).folder.path(), "latest", "app:1", &[]);
        let proxy = Proxy::before(&registry.address).await;
        Self { _registry: registry, proxy, place: Place::new().await, layer: digest, size }
    }

    fn builder(&self) -> OciImageBuilder {
        Image::builder(format!("{}/app:1", self.proxy.address))
            .store(self.place.store.clone())
            .auth(RegistryAuth::Anonymous)
            .step_timeout(Duration::from_secs(20))
    }

    /// The part of the layer's path that no other has.
    fn blob(&self) -> String {
        format!("/blobs/{}", self.layer)
    }

    async fn pulls(&self, builder: OciImageBuilder) {
        let image = builder.pull().await.unwrap();
        assert_eq!(image.layers()[0].digest(), &self.layer);
        let path = self.place.store.root().join("blobs/sha256").join(self.layer.hex());
        assert_eq!(Digest::of(&std::fs::read(path).unwrap()), self.layer);
        assert_eq!(self.place.debris(), [""; 0]);
    }

    async fn fails(&self, builder: OciImageBuilder) -> PullError {
        let error = builder.pull().await.expect_err("the pull must fail");
        assert_eq!(self.place.debris(), [""; 0]);
        let mut text = error.to_string();
        let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(&error);
        while let Some(error) = cause {
            text.push_str(&error.to_string());
            cause = error.source();
        }
        assert!(!text.contains("http://"), "addresses may carry signatures: {text}");
        error
    }
}

#[tokio::test]
async fn a_broken_blob_goes_on_where_it_broke_off() {
    let scene = Scene::new().await;
    scene.proxy.fault(&scene.blob(), &[Fault::Cut(100_000), Fault::Cut(50_000)]);
    scene.pulls(scene.builder()).await;
    assert_eq!(scene.proxy.ranges(&scene.blob()), ["", "bytes=100000-", "bytes=150000-"]);
}

#[tokio::test]
async fn progress_never_claims_bytes_that_are_not_here() {
    let scene = Scene::new().await;
    scene.proxy.fault(&scene.blob(), &[Fault::Cut(100_000)]);
    let (progress, mut events) = Progress::channel();
    let watch = async {
        let mut seen = Vec::new();
        while let Some(event) = events.next().await {
            seen.push(event);
        }
        seen
    };
    let ((), seen) = tokio::join!(scene.pulls(scene.builder().progress(progress)), watch);
    assert!(matches!(&seen[0], ProgressEvent::Resolving { reference } if reference.ends_with("/app:1")), "{seen:?}");
    let layers = vec![(scene.layer, scene.size)];
    assert!(matches!(&seen[1], ProgressEvent::Resolved { layers: found, .. } if *found == layers), "{seen:?}");
    let counts = seen.iter().filter_map(|event| match event {
        ProgressEvent::Fetching { layer, done, total } if *layer == scene.layer && *total == scene.size => Some(*done),
        _ => None,
    });
    let counts: Vec<_> = counts.collect();
    assert!(counts.is_sorted() && counts.last() == Some(&scene.size), "{counts:?}");
}

#[tokio::test]
async fn a_registry_that_cannot_continue_starts_over() {
    let scene = Scene::new().await;
    scene.proxy.fault(&scene.blob(), &[Fault::Cut(100_000), Fault::IgnoreRange]);
    scene.pulls(scene.builder()).await;
    assert_eq!(scene.proxy.ranges(&scene.blob()), ["", "bytes=100000-"]);
}

#[tokio::test]
async fn a_part_that_is_another_is_not_believed() {
    // Told by its length at once, by the digest in the end, or refused by the registry itself.
    let others = [
        Fault::Shift { earlier: 1000, same_length: false },
        Fault::Shift { earlier: 1000, same_length: true },
        Fault::Status(416, ""),
    ];
    for other in others {
        let scene = Scene::new().await;
        scene.proxy.fault(&scene.blob(), &[Fault::Cut(100_000), other.clone()]);
        scene.pulls(scene.builder()).await;
        assert_eq!(scene.proxy.ranges(&scene.blob()), ["", "bytes=100000-", ""], "{other:?}");
    }
}

#[tokio::test]
async fn a_part_that_is_always_another_is_given_up() {
    for same_length in [true, false] {
        let scene = Scene::new().await;
        let shift = Fault::Shift { earlier: 1000, same_length };
        scene.proxy.fault(&scene.blob(), &[Fault::Cut(9000), shift.clone(), Fault::Cut(9000), shift]);
        let error = scene.fails(scene.builder()).await;
        assert!(matches!(error, PullError::DigestMismatch { .. } | PullError::Registry { .. }), "{error:?}");
        assert_eq!(scene.proxy.ranges(&scene.blob()), ["", "bytes=9000-", "", "bytes=9000-"]);
    }
}

#[tokio::test]
async fn a_connection_that_always_breaks_is_given_up() {
    let scene = Scene::new().await;
    scene.proxy.always(&scene.blob(), Fault::Cut(1000));
    let error = scene.fails(scene.builder().retries(2)).await;
    assert!(
        matches!(&error, PullError::Network { registry, what, .. } if *registry == scene.proxy.address && what == "layer 0"),
        "{error:?}"
    );
    assert_eq!(scene.proxy.ranges(&scene.blob()), ["", "bytes=1000-", "bytes=2000-"]);
}

#[tokio::test]
async fn silence_is_a_broken_connection() {
    let scene = Scene::new().await;
    scene.proxy.fault(&scene.blob(), &[Fault::Stall(1000)]);
    scene.pulls(scene.builder().step_timeout(Duration::from_secs(1))).await;
    assert_eq!(scene.proxy.ranges(&scene.blob()), ["", "bytes=1000-"]);

    let scene = Scene::new().await;
    scene.proxy.always("/manifests/", Fault::Stall(10));
    let error = scene.fails(scene.builder().step_timeout(Duration::from_millis(300)).retries(1)).await;
    assert!(matches!(error, PullError::Timeout { .. }), "{error:?}");
    assert_eq!(scene.proxy.seen("/manifests/").len(), 2);
}

#[tokio::test]
async fn a_blob_that_trickles_has_a_deadline_as_a_whole() {
    let registry = Registry::open();
    let layer = LayerBlob::gzip(&Tar::new().file("a", b"small").finish());
    let part = Digest::of(&layer.blob).to_string();
    registry.push(Layout::of(&[layer]).folder.path(), "latest", "app:1", &[]);
    let proxy = Proxy::before(&registry.address).await;
    proxy.always(&part, Fault::Drip(Duration::from_millis(100)));
    let place = Place::new().await;
    let limit = Duration::from_secs(1);
    let pull = Image::builder(format!("{}/app:1", proxy.address)).store(place.store.clone()).step_timeout(limit);
    let error = pull.retries(0).pull().await.unwrap_err();
    assert!(matches!(error, PullError::Timeout { limit: named, .. } if named == limit), "{error:?}");
    assert_eq!(place.debris(), [""; 0]);
}

#[tokio::test]
async fn statuses_that_pass_are_waited_for() {
    let scene = Scene::new().await;
    scene.proxy.fault("/manifests/", &[Fault::Status(429, "retry-after: 1\r\n"), Fault::Status(500, "")]);
    scene.proxy.fault(&scene.blob(), &[Fault::Status(503, ""), Fault::Status(502, ""), Fault::Status(504, "")]);
    scene.pulls(scene.builder()).await;
    assert_eq!(scene.proxy.seen("/manifests/").len(), 3);
    assert_eq!(scene.proxy.seen(&scene.blob()).len(), 4);
}

#[tokio::test]
async fn statuses_that_stay_are_told_apart() {
    let scene = Scene::new().await;
    let address = &scene.proxy.address;
    scene.proxy.always(&scene.blob(), Fault::Status(429, "retry-after: 1\r\n"));
    let error = scene.fails(scene.builder().retries(1)).await;
    assert!(matches!(&error, PullError::RateLimited { registry, .. } if registry == address), "{error:?}");
    assert_eq!(scene.proxy.seen(&scene.blob()).len(), 2);

    let scene = Scene::new().await;
    scene.proxy.always("/manifests/", Fault::Status(503, ""));
    let error = scene.fails(scene.builder().retries(1)).await;
    assert!(matches!(error, PullError::Server { status: 503, .. }), "{error:?}");
    assert_eq!(scene.proxy.seen("/manifests/").len(), 2);
}

#[tokio::test]
async fn refusals_are_not_repeated() {
    for status in [400, 403, 404, 418] {
        let scene = Scene::new().await;
        scene.proxy.always("/manifests/", Fault::Status(status, ""));
        let error = scene.fails(scene.builder()).await;
        let is_right = match status {
            403 => matches!(error, PullError::Unauthorized { .. }),
            404 => matches!(error, PullError::UnknownImage { .. }),
            _ => matches!(error, PullError::Registry { .. }),
        };
        assert!(is_right, "{status}: {error:?}");
        assert_eq!(scene.proxy.seen("/manifests/").len(), 1, "{status}");
    }
}

#[tokio::test]
async fn a_whole_blob_of_other_bytes_is_refused_at_once() {
    let scene = Scene::new().await;
    scene.proxy.always(&scene.blob(), Fault::Flip(5000));
    let error = scene.fails(scene.builder()).await;
    assert!(matches!(&error, PullError::DigestMismatch { expected, .. } if *expected == scene.layer), "{error:?}");
    assert_eq!(scene.proxy.ranges(&scene.blob()), [""]);
}

#[tokio::test]
async fn lengths_that_are_not_the_promised_one() {
    let scene = Scene::new().await;
    scene.proxy.always(&scene.blob(), Fault::Length(-10));
    let error = scene.fails(scene.builder()).await;
    assert!(matches!(error, PullError::Truncated { found, .. } if found == scene.size - 10), "{error:?}");
    // All bytes come, and then the connection ends before the length that was said: the bytes are what counts.
    let scene = Scene::new().await;
    scene.proxy.always(&scene.blob(), Fault::Length(10));
    scene.pulls(scene.builder()).await;
    assert_eq!(scene.proxy.ranges(&scene.blob()), [""]);
}

#[tokio::test]
async fn a_blob_that_is_elsewhere() {
    let scene = Scene::new().await;
    scene.proxy.fault(&scene.blob(), &[Fault::Redirect, Fault::Cut(1000), Fault::Redirect]);
    scene.pulls(scene.builder()).await;
    assert_eq!(scene.proxy.ranges("/moved"), ["", "bytes=1000-"]);
    // What is for the registry is not shown to where it sends us.
    let place = Place::new().await;
    scene.proxy.fault(&scene.blob(), &[Fault::Redirect]);
    scene.builder().store(place.store.clone()).auth(RegistryAuth::bearer("secret")).pull().await.unwrap();
    let shown = |part: &str| scene.proxy.seen(part).pop().unwrap().authorization;
    assert_eq!(shown("/manifests/").as_deref(), Some("Bearer secret"));
    assert_eq!(shown("/moved"), None);
}

#[tokio::test]
async fn a_manifest_that_breaks_or_is_another() {
    let scene = Scene::new().await;
    scene.proxy.fault("/manifests/", &[Fault::Cut(10)]);
    scene.pulls(scene.builder()).await;
    assert_eq!(scene.proxy.seen("/manifests/").len(), 2);
    let scene = Scene::new().await;
    scene.proxy.always("/manifests/", Fault::Flip(1));
    let error = scene.fails(scene.builder()).await;
    assert!(matches!(error, PullError::DigestMismatch { .. } | PullError::Manifest(_)), "{error:?}");
    let scene = Scene::new().await;
    let image = scene.builder().pull().await.unwrap();
    scene.proxy.always("/manifests/", Fault::Flip(1));
    let pinned =
        Image::builder(format!("{}/app@{}", scene.proxy.address, image.digest())).store(scene.place.store.clone());
    let error = scene.fails(pinned).await;
    assert!(matches!(&error, PullError::DigestMismatch { expected, .. } if expected == image.digest()), "{error:?}");
}

#[tokio::test]
async fn a_registry_that_is_not_there() {
    let nobody = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let place = Place::new().await;
    let pull = Image::builder(format!("{nobody}/app:1")).store(place.store.clone()).retries(1).pull();
    let error = pull.await.unwrap_err();
    assert!(matches!(&error, PullError::Network { registry, .. } if *registry == nobody.to_string()), "{error:?}");
}

#[tokio::test]
async fn mirrors_are_asked_in_turn_and_passed_over_when_they_fail() {
    let scene = Scene::new().await;
    let nobody = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
    let empty = Registry::open();
    let liar = Proxy::before(&scene._registry.address).await;
    liar.always(&scene.blob(), Fault::Flip(77));
    let builder = scene.builder().mirror(nobody).mirror(empty.address.as_str()).mirror(liar.address.as_str());
    scene.pulls(builder).await;
    assert_eq!(liar.seen(&scene.blob()).len(), 1, "it was asked");
    assert_eq!(scene.proxy.seen(&scene.blob()).len(), 1, "and so was the origin");
}

#[tokio::test]
async fn a_mirror_that_has_the_image_spares_the_origin() {
    let scene = Scene::new().await;
    let mirror = Proxy::before(&scene._registry.address).await;
    let image =
        scene.builder().mirror(mirror.address.as_str()).auth(RegistryAuth::basic("u", "p")).pull().await.unwrap();
    assert!(scene.proxy.seen("").is_empty(), "{:?}", scene.proxy.seen(""));
    assert!(mirror.seen("").iter().all(|seen| seen.authorization.is_none()), "credentials are the origin's");
    // By its digest, under which nobody pulled it, the store has it too.
    let pinned =
        Image::builder(format!("{}/app@{}", scene.proxy.address, image.digest())).store(scene.place.store.clone());
    assert_eq!(pinned.policy(kiln::PullPolicy::Missing).pull().await.unwrap().digest(), image.digest());
    assert!(scene.proxy.seen("").is_empty());
    let error = scene.fails(scene.builder().mirror("mirror.example/path")).await;
    assert!(matches!(error, PullError::Reference(_)), "{error:?}");
}

#[tokio::test]
async fn as_many_blobs_at_once_as_allowed_and_each_once() {
    let registry = Registry::open();
    let tar = |name: &str| LayerBlob::gzip(&Tar::new().file(name, name.as_bytes()).finish());
    let layers = [tar("a"), tar("b"), tar("a"), tar("c")];
    registry.push(Layout::of(&layers).folder.path(), "latest", "app:1", &[]);
    let proxy = Proxy::before(&registry.address).await;
    let place = Place::new().await;
    let pull = |limit| {
        Image::builder(format!("{}/app:1", proxy.address)).store(place.store.clone()).parallel_blobs(limit).pull()
    };
    assert_eq!(pull(0).await.unwrap().layers().len(), 4);
    for layer in &layers {
        assert_eq!(proxy.seen(&Digest::of(&layer.blob).to_string()).len(), 1);
    }
    assert_eq!(place.debris(), [""; 0]);
    // One that is lost is fetched again, and no other.
    let lost = Digest::of(&layers[3].blob);
    std::fs::remove_file(place.store.root().join("blobs/sha256").join(lost.hex())).unwrap();
    let before = proxy.seen("/blobs/").len();
    let missing = Image::builder(format!("{}/app:1", proxy.address)).store(place.store.clone());
    let never = missing.clone().policy(kiln::PullPolicy::Never).pull().await.unwrap_err();
    assert!(matches!(never, PullError::Incomplete { .. }), "{never:?}");
    missing.policy(kiln::PullPolicy::Missing).pull().await.unwrap();
    let asked: Vec<_> = proxy.seen("/blobs/").split_off(before).into_iter().map(|seen| seen.path).collect();
    assert!(asked.len() == 1 && asked[0].contains(&lost.to_string()), "{asked:?}");
}

#[tokio::test]
async fn no_more_blobs_at_once_than_allowed_and_one_failure_ends_them_all() {
    let registry = Registry::open();
    let tar = |name: &str| LayerBlob::gzip(&Tar::new().file(name, name.as_bytes()).finish());
    let layers = ["a", "b", "c", "d", "e"].map(tar);
    registry.push(Layout::of(&layers).folder.path(), "latest", "app:1", &[]);
    for limit in [1, 2, 4] {
        let proxy = Proxy::before(&registry.address).await;
        for layer in &layers {
            proxy.always(&Digest::of(&layer.blob).to_string(), Fault::Stall(5));
        }
        let place = Place::new().await;
        let pull = Image::builder(format!("{}/app:1", proxy.address)).store(place.store.clone()).parallel_blobs(limit);
        let error = pull.retries(0).step_timeout(Duration::from_secs(1)).pull().await.unwrap_err();
        assert!(matches!(error, PullError::Timeout { .. }), "{error:?}");
        assert_eq!(place.debris(), [""; 0]);
        // And the configuration.
        assert_eq!(proxy.seen("/blobs/").len(), limit + 1);
    }
}

/// Polls `future` at most `polls` times, each when it asks for it; `None` if that was not enough.
async fn within<F: Future>(future: F, polls: usize) -> Option<F::Output> {
    let mut future = Box::pin(future);
    let mut left = polls;
    std::future::poll_fn(move |context| {
        if left == 0 {
            return std::task::Poll::Ready(None);
        }
        left -= 1;
        match future.as_mut().poll(context) {
            std::task::Poll::Ready(output) => std::task::Poll::Ready(Some(output)),
            std::task::Poll::Pending if left == 0 => std::task::Poll::Ready(None),
            std::task::Poll::Pending => std::task::Poll::Pending,
        }
    })
    .await
}

#[test]
fn a_pull_that_is_dropped_at_any_of_its_awaits_leaves_nothing_half_written() {
    let outer = tokio::runtime::Runtime::new().unwrap();
    let registry = Registry::open();
    let tar = |name: &str| LayerBlob::gzip(&Tar::new().file(name, name.as_bytes()).finish());
    registry.push(Layout::of(&[tar("a"), tar("b")]).folder.path(), "latest", "app:1", &[]);
    let proxy = outer.block_on(Proxy::before(&registry.address));
    let part = format!("/blobs/{}", Digest::of(&tar("b").blob));
    for polls in 0..1000 {
        proxy.fault(&part, &[Fault::Cut(20)]);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (place, done) = runtime.block_on(async {
            let place = Place::new().await;
            let pull = Image::builder(format!("{}/app:1", proxy.address)).store(place.store.clone()).pull();
            let done = within(pull, polls).await;
            (place, done)
        });
        // Waits for the file work that was under way.
        drop(runtime);
        assert_eq!(place.debris(), [""; 0], "after {polls} polls");
        if let Some(image) = done {
            image.unwrap();
            assert!(polls > 10, "{polls} are few");
            return;
        }
    }
    panic!("the pull never ends");
}

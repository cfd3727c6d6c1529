//! `examples/pull.rs` with a real registry.

#[path = "../examples/pull.rs"]
#[allow(dead_code, reason = "its `main` is not run here")]
mod example;
mod image_support;

use image_support::LayerBlob;
use image_support::Layout;
use image_support::Tar;
use image_support::registry::Registry;
use indicatif::ProgressDrawTarget;
use kiln::image::Progress;

async fn run(line: &str) -> Result<String, String> {
    let builder = example::parse(line.split(' ').map(str::to_owned)).await.map_err(|error| error.to_string())?;
    let (progress, events) = Progress::channel();
    let pull = example::pull(builder.retries(0).progress(progress), events, ProgressDrawTarget::hidden());
    pull.await.map(|image| example::describe(&image)).map_err(|error| error.to_string())
}

#[tokio::test]
async fn an_image_is_pulled_and_described() {
    let registry = Registry::open();
    let layer = LayerBlob::gzip(&Tar::new().file("a", b"content").finish());
    registry.push(Layout::of(&[layer]).folder.path(), "latest", "app:1", &[]);
    let folder = image_support::scratch();
    let reference = format!("{}/app:1", registry.address);
    let store = folder.path().display();
    let text = run(&format!("--plain-http --store {store} {reference}")).await.unwrap();
    assert!(text.starts_with("digest    sha256:") && text.contains("\nplatform  linux/amd64\n"), "{text}");
    drop(registry);
    assert_eq!(run(&format!("--policy never --store {store} {reference}")).await.unwrap(), text);
    let error = run(&format!("--policy always --store {store} {reference}")).await.unwrap_err();
    assert!(error.contains("connection to 127.0.0.1"), "{error}");
    let error = run(&format!("--platform linux/arm64 --policy never --store {store} {reference}")).await.unwrap_err();
    assert!(error.contains("no image"), "{error}");
    for wrong in ["", "--policy", "--policy perhaps x", "--unknown 1 x", "x y"] {
        assert!(run(wrong).await.is_err(), "{wrong}");
    }
}

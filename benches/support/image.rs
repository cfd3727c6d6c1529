//! An image of some 585 MB in 45,000 files, the same each time, and what it takes to make filesystems of it.

use std::fs;
use std::io::BufRead;
use std::io::BufReader;
use std::io::Write;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

use futures::StreamExt;
use kiln::image::Digest;
use kiln::image::ImageStore;
use kiln::image::Progress;
use kiln::image::ProgressEvent;
use kiln::rootfs::Builder;
use serde_json::Value;
use serde_json::json;

const LAYERS: usize = 4;
const FILES: usize = 11_250;

/// Raised when the image changes.
const VERSION: u32 = 1;

/// The layout folder of the image, made once.
pub(crate) fn layout() -> PathBuf {
    let folder = scratch().join(format!("image-{VERSION}"));
    if !folder.join("index.json").is_file() {
        println!("making an image in {}", folder.display());
        write_layout(&folder);
    }
    folder
}

/// Where benchmarks leave files: on a disk, as a store would be.
pub(crate) fn scratch() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
}

fn write_layout(folder: &Path) {
    fs::create_dir_all(folder.join("blobs/sha256")).expect("created");
    let blob = |media_type: &str, bytes: &[u8]| {
        let digest = Digest::of(bytes);
        fs::write(folder.join("blobs/sha256").join(digest.hex()), bytes).expect("written");
        json!({ "mediaType": media_type, "digest": digest.to_string(), "size": bytes.len() })
    };
    let (mut layers, mut diff_ids) = (Vec::<Value>::new(), Vec::new());
    for number in 0..LAYERS {
        let archive = archive(number);
        diff_ids.push(Digest::of(&archive).to_string());
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        gzip.write_all(&archive).expect("compressed");
        layers.push(blob("application/vnd.oci.image.layer.v1.tar+gzip", &gzip.finish().expect("compressed")));
    }
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": {}, "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let config = blob("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes());
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({ "schemaVersion": 2, "mediaType": media_type, "config": config, "layers": layers });
    let mut manifest = blob(media_type, manifest.to_string().as_bytes());
    manifest["annotations"] = json!({ "org.opencontainers.image.ref.name": "latest" });
    let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
    fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("written");
    fs::write(folder.join("index.json"), index.to_string()).expect("written");
}

fn archive(layer: usize) -> Vec<u8> {
    let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ (layer as u64 + 1));
    let mut tar = Vec::new();
    let words: Vec<Vec<u8>> = (0..2000).map(|_| random.word()).collect();
    for number in 0..FILES {
        let (folder, sub) = (number / 500, number / 25);
        if number % 500 == 0 {
            header(&mut tar, &format!("usr/lib/part-{folder}/"), b'5', 0);
        }
        if number % 25 == 0 {
            header(&mut tar, &format!("usr/lib/part-{folder}/package-{layer}-{sub}/"), b'5', 0);
        }
        // One in fifty replaces a file of the layer below.
        let owner = if number % 50 == 49 { layer.saturating_sub(1) } else { layer };
        let name = format!("usr/lib/part-{folder}/package-{owner}-{sub}/module-{number}.py");
        let content = random.content(&words);
        header(&mut tar, &name, b'0', content.len());
        tar.extend_from_slice(&content);
        tar.resize(tar.len().next_multiple_of(512), 0);
    }
    tar.resize(tar.len() + 1024, 0);
    tar
}

fn header(tar: &mut Vec<u8>, name: &str, kind: u8, size: usize) {
    let mut header = [0; 512];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, name.as_bytes());
    put(100, if kind == b'5' { b"0000755\0" } else { b"0000644\0" });
    put(108, b"0000000\x000000000\0");
    put(124, format!("{size:011o}\0").as_bytes());
    put(136, b"14524770400\0        ");
    put(156, &[kind]);
    put(257, b"ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    tar.extend_from_slice(&header);
}

/// xorshift64: the image is to be the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn word(&mut self) -> Vec<u8> {
        let length = 2 + self.below(9);
        (0..length).map(|_| b'a' + self.below(26) as u8).collect()
    }

    /// In bytes: much like a tree of a distribution's packages.
    fn size(&mut self) -> usize {
        let (from, to) = match self.below(100) {
            0..45 => (0, 1 << 10),
            45..85 => (1 << 10, 8 << 10),
            85..97 => (8 << 10, 64 << 10),
            _ => (64 << 10, 300 << 10),
        };
        (from + self.below(to - from)) as usize
    }

    /// Text in two files of three, else bytes of which one in four is random: both compress as programs do, to a third or so.
    fn content(&mut self, words: &[Vec<u8>]) -> Vec<u8> {
        let size = self.size();
        let mut content = Vec::with_capacity(size + 16);
        let is_text = self.below(3) > 0;
        while content.len() < size {
            if is_text {
                content.extend_from_slice(&words[self.below(words.len() as u64) as usize]);
                content.push(if self.below(10) == 0 { b'\n' } else { b' ' });
            } else {
                let value = self.next();
                content.extend_from_slice(&(value as u32 & 0x00ff_ff0f).to_le_bytes());
                content.extend_from_slice(&[0x48, 0x8b, (value >> 40) as u8 & 3, 0]);
            }
        }
        content.truncate(size);
        content
    }
}

/// What a step took.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cost {
    pub(crate) time: Duration,
    /// Resident memory at its peak, in KiB.
    pub(crate) peak: u64,
}

/// Builds in a process of its own, whose first argument [`run_if_child`] knows. Costs of converting, joining and both.
pub(crate) fn kiln(store: &Path, layout: &Path) -> [Cost; 3] {
    rustix::fs::sync();
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.arg(CHILD).arg(store).arg(layout).stdout(Stdio::piped());
    let mut child = command.spawn().expect("started");
    let mut line = String::new();
    BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("read");
    assert!(child.wait().expect("waited for").success());
    let numbers: Vec<u64> = line.split_whitespace().map(|number| number.parse().expect("a number")).collect();
    let time = |micros| Duration::from_micros(micros);
    [numbers[0], numbers[1], numbers[0] + numbers[1]].map(|micros| Cost { time: time(micros), peak: numbers[2] })
}

const CHILD: &str = "--build";

/// In the process that [`kiln`] starts, builds and does not return.
pub(crate) fn run_if_child() {
    let arguments: Vec<_> = std::env::args_os().collect();
    let [_, child, store, layout] = &arguments[..] else { return };
    if child != CHILD {
        return;
    }
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let (convert, join) = runtime.block_on(async {
        let store = ImageStore::open(store).await.expect("a store");
        let image = store.import_oci_layout(layout, None).await.expect("the layout is ours");
        let (progress, mut events) = Progress::channel();
        let building = tokio::spawn(async move {
            while let Some(event) = events.next().await {
                if matches!(event, ProgressEvent::Building { .. }) {
                    return Some(Instant::now());
                }
            }
            None
        });
        let started = Instant::now();
        Builder::new(&image).progress(progress).build().await.expect("the image is sound");
        let done = Instant::now();
        let between = building.await.expect("no panic").expect("an event");
        (between - started, done - between)
    });
    println!("{} {} {}", convert.as_micros(), join.as_micros(), peak("self"));
    std::process::exit(0);
}

/// Runs a yardstick.
pub(crate) fn run(program: &str, arguments: &[&str]) -> Cost {
    rustix::fs::sync();
    let started = Instant::now();
    let mut child = Command::new(program).args(arguments).stdout(Stdio::null()).spawn();
    let child = child.as_mut().unwrap_or_else(|error| panic!("{program} cannot be started: {error}"));
    let peak = watch(child);
    Cost { time: started.elapsed(), peak }
}

/// Waits for the child; its peak is that of the last look before it ended.
fn watch(child: &mut Child) -> u64 {
    let mut last = 0;
    loop {
        if let Some(status) = child.try_wait().expect("waited for") {
            assert!(status.success(), "{status}");
            return last;
        }
        last = last.max(peak(&child.id().to_string()));
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn peak(process: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or_default()
}

/// Removes files made from layers whose names end so.
pub(crate) fn remove_derived(store: &Path, end: &str) {
    let Ok(files) = fs::read_dir(store.join("derived")) else { return };
    for file in files.map(|file| file.expect("readable").path()) {
        if file.to_string_lossy().ends_with(end) {
            fs::remove_file(file).expect("removed");
        }
    }
}

//! Layers that are damaged or mean harm, one for each rule: each a typed error, and nothing is left behind.

use kiln::image::Digest;
use kiln::rootfs;
use kiln::rootfs::LayerErrorKind as Kind;
use kiln::rootfs::Limits;
use kiln::rootfs::RootfsError;

use crate::image_support::Entry;
use crate::image_support::LayerBlob;
use crate::image_support::Place;
use crate::image_support::Tar;
use crate::image_support::gzip;

/// Layers of which the last is refused, and why.
struct Hostile {
    name: &'static str,
    layers: Vec<LayerBlob>,
    limits: Limits,
    expected: fn(&Kind) -> bool,
    /// The entry that the error names.
    entry: Option<String>,
}

fn hostile(name: &'static str, tar: Tar, expected: fn(&Kind) -> bool) -> Hostile {
    stored(name, LayerBlob::plain(tar.finish()), expected)
}

fn stored(name: &'static str, layer: LayerBlob, expected: fn(&Kind) -> bool) -> Hostile {
    Hostile { name, layers: vec![layer], limits: Limits::default(), expected, entry: None }
}

impl Hostile {
    fn over(mut self, lower: Tar) -> Self {
        self.layers.insert(0, LayerBlob::plain(lower.finish()));
        self
    }

    fn at(mut self, entry: impl Into<String>) -> Self {
        self.entry = Some(entry.into());
        self
    }

    fn limit(mut self, set: fn(&mut Limits)) -> Self {
        set(&mut self.limits);
        self
    }

    async fn check(&self) -> Result<(), String> {
        let place = Place::new().await;
        let image = place.import(&self.layers).await;
        let error = match rootfs::Builder::new(&image).limits(self.limits).build().await {
            Err(RootfsError::Layer(error)) => error,
            other => return Err(format!("{}: {other:?}", self.name)),
        };
        let last = Digest::of(&self.layers.last().expect("one at least").blob);
        let is_named = self.entry.is_none() || self.entry == error.entry;
        // Layers that could be converted by themselves stay converted.
        let joined =
            std::fs::read_dir(place.derived()).expect("the store's").map(|file| file.expect("readable").path());
        let left = joined.filter(|path| path.extension() == Some("erofs".as_ref())).count() + place.debris().len();
        let is_as_expected = (self.expected)(&error.kind) && is_named && error.layer == last && left == 0;
        if is_as_expected { Ok(()) } else { Err(format!("{}: {error:?}, {left} files left", self.name)) }
    }
}

#[tokio::test]
async fn hostile_layers_are_refused() {
    let cases = [names(), links(), archives(), sparse(), compression(), limits()].concat_all();
    let mut failures = Vec::new();
    for case in &cases {
        failures.extend(case.check().await.err());
    }
    assert!(failures.is_empty(), "{} of {} failed\n{}", failures.len(), cases.len(), failures.join("\n"));
    assert_eq!(cases.len(), super::HOSTILE, "the number of cases");
}

trait ConcatAll<T> {
    fn concat_all(self) -> Vec<T>;
}

impl<T, const N: usize> ConcatAll<T> for [Vec<T>; N] {
    fn concat_all(self) -> Vec<T> {
        self.into_iter().flatten().collect()
    }
}

fn is_malformed(kind: &Kind) -> bool {
    matches!(kind, Kind::Malformed(_))
}

fn is_truncated(kind: &Kind) -> bool {
    matches!(kind, Kind::Truncated)
}

fn is_parent(kind: &Kind) -> bool {
    matches!(kind, Kind::ParentComponent)
}

fn is_absolute(kind: &Kind) -> bool {
    matches!(kind, Kind::AbsoluteName)
}

fn is_escape(kind: &Kind) -> bool {
    matches!(kind, Kind::SymlinkEscape)
}

fn is_loop(kind: &Kind) -> bool {
    matches!(kind, Kind::SymlinkLoop)
}

fn is_not_a_folder(kind: &Kind) -> bool {
    matches!(kind, Kind::NotAFolder)
}

fn is_hard_link_target(kind: &Kind) -> bool {
    matches!(kind, Kind::HardLinkTarget(_))
}

fn is_bad_whiteout(kind: &Kind) -> bool {
    matches!(kind, Kind::BadWhiteout)
}

fn is_too_long(kind: &Kind) -> bool {
    matches!(kind, Kind::TooLong { .. })
}

fn is_unsupported(kind: &Kind) -> bool {
    matches!(kind, Kind::Unsupported(_))
}

fn is_limit(kind: &Kind) -> bool {
    matches!(kind, Kind::Limit { .. })
}

fn names() -> Vec<Hostile> {
    let file = |name: &str| Tar::new().file(name, b"x");
    let path = |path: &[u8]| Tar::new().pax(&[("path", path)]).file("ok", b"x");
    vec![
        hostile("up", file("../evil"), is_parent).at("../evil"),
        hostile("up and down again", file("a/../../evil"), is_parent).at("a/../../evil"),
        hostile("up, inside", file("a/.."), is_parent).at("a/.."),
        hostile("nothing but up", file(".."), is_parent).at(".."),
        hostile("a folder up", Tar::new().folder("../evil/"), is_parent),
        hostile("a link by a name that leads up", Tar::new().symlink("../evil", "x"), is_parent),
        hostile("up by a pax record", path(b"ok/../../evil"), is_parent),
        hostile("up by a long name of GNU tar", file(&format!("{}/../../evil", "n".repeat(120))), is_parent),
        hostile(
            "up by the prefix of ustar",
            Tar::new().patched(&Entry { name: b"evil", ..Entry::default() }, &[(345, b"a/../..")]),
            is_parent,
        ),
        hostile("up, of a whiteout", file("../.wh.evil"), is_parent),
        hostile("up, of an opaque mark", file("a/../../.wh..wh..opq"), is_parent),
        hostile("absolute", file("/etc/passwd"), is_absolute).at("/etc/passwd"),
        hostile("absolute, with two slashes", file("//x"), is_absolute).at("//x"),
        hostile("absolute, a dot", file("/."), is_absolute).at("/."),
        hostile("absolute by a pax record", path(b"/etc/passwd"), is_absolute),
        hostile("absolute, of a whiteout", file("/.wh.etc"), is_absolute),
        hostile("a NUL by a pax record", path(b"a\0b"), is_malformed),
        hostile("a NUL in a link target", Tar::new().pax(&[("linkpath", b"a\0b")]).symlink("l", "x"), is_malformed),
        hostile("a name of 256 bytes", file(&"n".repeat(256)), is_too_long),
        hostile("a folder on the way of 256 bytes", file(&format!("{}/x", "n".repeat(256))), is_too_long),
        hostile("a path longer than PATH_MAX", file(&"/n".repeat(2500)[1..]), is_too_long),
        hostile("a link target longer than PATH_MAX", Tar::new().symlink("a", &"t".repeat(4096)), is_too_long),
        hostile("a link without a target", Tar::new().symlink("a", ""), is_malformed),
        hostile("folders deeper than any path", deeper_than_any_path(), |kind| {
            matches!(kind, Kind::TooLong { what: "nesting of folders", .. })
        }),
        hostile("through a file", Tar::new().file("f", b"x").file("f/inside", b"y"), is_not_a_folder).at("f/inside"),
        hostile("through a file of a lower layer", file("f/inside"), is_not_a_folder).over(file("f")),
        hostile("the root as a file", file("."), is_not_a_folder),
        hostile("the root as a link", Tar::new().symlink("./", "/etc"), is_not_a_folder),
        hostile("a whiteout of nothing", file(".wh."), is_bad_whiteout),
        hostile("a whiteout of the folder that it is in", file("d/.wh.."), is_bad_whiteout),
        hostile("a whiteout of the folder above", file("d/.wh..."), is_bad_whiteout),
    ]
}

/// Each round goes through a link to the deepest folder so far, so no single name is long.
fn deeper_than_any_path() -> Tar {
    let step = "d/".repeat(1000);
    (0..3).fold(Tar::new().folder(&step), |tar, round| {
        let before = if round == 0 { step.clone() } else { format!("link{}/{step}", round - 1) };
        tar.symlink(&format!("link{round}"), &before).folder(&format!("link{round}/{step}"))
    })
}

fn links() -> Vec<Hostile> {
    let out = |target: &str| Tar::new().folder("sub/").symlink("out", target).file("out/passwd", b"x");
    vec![
        hostile("a link up", out(".."), is_escape).at("out/passwd"),
        hostile("a link up and further", out("../../etc"), is_escape).at("out/passwd"),
        hostile("a link down and further up", out("sub/../../../etc"), is_escape).at("out/passwd"),
        hostile("an absolute link up", out("/../etc"), is_escape).at("out/passwd"),
        hostile("a link up, of a lower layer", Tar::new().file("out/passwd", b"x"), is_escape)
            .over(Tar::new().symlink("out", "../../etc")),
        hostile("a link up, for a whiteout", Tar::new().symlink("out", "..").file("out/.wh.etc", b""), is_escape),
        hostile(
            "a link up, for an opaque mark",
            Tar::new().symlink("out", "..").file("out/.wh..wh..opq", b""),
            is_escape,
        ),
        hostile("links in a circle", Tar::new().symlink("a", "b").symlink("b", "a").file("a/x", b""), is_loop)
            .at("a/x"),
        hostile("a link to itself", Tar::new().symlink("a", "a/a").file("a/x", b""), is_loop),
        hostile("more links than Linux follows", chain(41), is_loop),
        hostile("long chains of links, walked again and again", long_chains(), |kind| {
            matches!(kind, Kind::Limit { what: "components of link targets", .. })
        }),
        hostile(
            "a hard link to nothing",
            Tar::new().hard_link("a", "missing"),
            |kind| matches!(kind, Kind::HardLinkTarget(target) if target == "missing"),
        )
        .at("a"),
        hostile("a hard link to itself", Tar::new().hard_link("a", "a"), is_hard_link_target),
        hostile("a hard link to what comes later", Tar::new().hard_link("a", "b").file("b", b"x"), is_hard_link_target),
        hostile("a hard link to what is gone", Tar::new().file(".wh.b", b"").hard_link("a", "b"), is_hard_link_target)
            .over(Tar::new().file("b", b"x")),
        hostile("a hard link to a folder", Tar::new().folder("d/").hard_link("a", "d"), is_hard_link_target),
        hostile("a hard link to the root", Tar::new().hard_link("a", "./"), is_hard_link_target),
        hostile("a hard link without a target", Tar::new().hard_link("a", ""), is_hard_link_target),
        hostile("a hard link out", Tar::new().hard_link("a", "../../etc/passwd"), is_parent),
        hostile(
            "a hard link out through a link",
            Tar::new().symlink("out", "../..").hard_link("a", "out/etc"),
            is_escape,
        ),
        hostile("a hard link through a file", Tar::new().file("f", b"x").hard_link("a", "f/b"), is_hard_link_target),
    ]
}

/// A file below the first of so many links, each to the next.
fn chain(links: usize) -> Tar {
    let tar = (1..=links)
        .fold(Tar::new().folder("l0/"), |tar, link| tar.symlink(&format!("l{link}"), &format!("l{}", link - 1)));
    tar.file(&format!("l{links}/x"), b"")
}

/// Every name goes through 39 links whose targets have 512 components each, 20,000 steps: a thousand names are too many,
/// long before the archive is.
fn long_chains() -> Tar {
    let dots = "./".repeat(511);
    let tar = (0..39).fold(Tar::new().folder("d/"), |tar, link| {
        let next = if link == 38 { "d".to_owned() } else { format!("l{}", link + 1) };
        tar.symlink(&format!("l{link}"), &format!("{dots}{next}"))
    });
    (0..1000).fold(tar, |tar, name| tar.file(&format!("l0/{name}"), b""))
}

fn archives() -> Vec<Hostile> {
    let whole = || Tar::new().file("a", b"x").file("b", &[1; 3000]).finish();
    let cut = |length: usize| LayerBlob::plain(whole()[..length].to_vec());
    let pax = |records: &[(&str, &[u8])]| Tar::new().pax(records).file("a", b"x");
    let raw = |content: &[u8]| Tar::new().raw(b'x', b"pax", content).file("a", b"x");
    let field =
        |at: usize, bytes: &[u8]| Tar::new().patched(&Entry { content: b"x", ..Entry::default() }, &[(at, bytes)]);
    let mut damaged = whole();
    damaged[3] ^= 1;
    let no_archive = LayerBlob::plain(vec![b'z'; 4096]);
    let device = |device| Tar::new().entry(&Entry { kind: b'3', device, ..Entry::default() });
    vec![
        stored("cut in a header", cut(1124), is_truncated),
        stored("cut in content", cut(3000), is_truncated).at("b"),
        stored("cut in the end mark", cut(whole().len() - 600), is_truncated),
        stored("less than a block of zeros", LayerBlob::plain(vec![0; 100]), is_truncated),
        stored("a damaged header", LayerBlob::plain(damaged), is_malformed),
        stored("no archive", no_archive, |kind| matches!(kind, Kind::Malformed("header checksum"))),
        hostile("a size that is no number", field(124, b"999999999999"), is_malformed),
        hostile("a size below zero", field(124, &[0xff; 12]), |kind| {
            is_malformed(kind) || is_truncated(kind) || is_limit(kind)
        }),
        hostile("a mode that is no number", field(100, b"rwxr-xr"), is_malformed),
        hostile("an owner that is no number", field(108, b"root\0\0\0"), is_malformed),
        hostile("an owner beyond 32 bits", pax(&[("uid", b"4294967296")]), is_malformed),
        hostile("a size that overflows with its padding", pax(&[("size", b"18446744073709551615")]), |kind| {
            matches!(kind, Kind::Malformed("entry size"))
        }),
        hostile("a size beyond any archive", pax(&[("size", b"9223372036854775807")]), is_limit),
        hostile("a size beyond this archive", pax(&[("size", b"1000000")]), is_truncated),
        hostile("a pax record longer than its header", raw(b"30 path=x\n"), is_malformed),
        hostile("a pax record shorter than it says", raw(b"5 path=x\n"), is_malformed),
        hostile("a pax record without a length", raw(b"path=x\n"), is_malformed),
        hostile("a pax record without a value", raw(b"7 path\n"), is_malformed),
        hostile("a pax record without an end", raw(b"9 path=x"), is_malformed),
        hostile("a pax record of length 0", raw(b"0 path=x\n"), is_malformed),
        hostile("a pax record whose length overflows", raw(b"99999999999999999999 path=x\n"), is_malformed),
        hostile("a pax time that is none", pax(&[("mtime", b"yesterday")]), is_malformed),
        hostile("a pax owner that is none", pax(&[("uid", b"-1")]), is_malformed),
        hostile("a pax header that does not end", Tar::new().raw(b'x', b"pax", &vec![b' '; 1 << 20]), is_limit),
        hostile("a long name that does not end", Tar::new().raw(b'L', b"long", &vec![b'a'; 1 << 20]), is_limit),
        hostile("an attribute too long for Linux", pax(&[("SCHILY.xattr.user.a", &[7; 65_536])]), is_too_long),
        hostile("attributes too long for an inode", many_attributes(), is_too_long),
        hostile("a major number beyond the kernel's", device((1 << 12, 0)), is_malformed),
        hostile("a minor number beyond the kernel's", device((0, 1 << 20)), is_malformed),
        hostile("a volume label", Tar::new().entry(&Entry { kind: b'V', ..Entry::default() }), is_unsupported),
        hostile(
            "a type that nobody knows",
            Tar::new().entry(&Entry { kind: b'?', ..Entry::default() }),
            is_unsupported,
        ),
        stored(
            "another archive than the configuration names",
            LayerBlob { diff_id: Digest::of(b"something else"), ..LayerBlob::gzip(&whole()) },
            |kind| matches!(kind, Kind::DiffIdMismatch { .. }),
        ),
        stored(
            "bytes after the end mark that the configuration does not know of",
            LayerBlob { diff_id: Digest::of(&whole()), ..LayerBlob::plain([whole(), vec![1]].concat()) },
            |kind| matches!(kind, Kind::DiffIdMismatch { .. }),
        ),
    ]
}

fn many_attributes() -> Tar {
    let names: Vec<_> = (0..10).map(|n| format!("SCHILY.xattr.user.{n}")).collect();
    let records: Vec<_> = names.iter().map(|name| (&name[..], &[7; 40_000][..])).collect();
    Tar::new().pax(&records).file("a", b"x")
}

fn sparse() -> Vec<Hostile> {
    let map = |size: &str, map: &str| {
        Tar::new().pax(&[("GNU.sparse.size", size.as_bytes()), ("GNU.sparse.map", map.as_bytes())]).file("a", b"abc")
    };
    let in_content = |size: &str, map: &[u8]| {
        let version =
            [("GNU.sparse.major", &b"1"[..]), ("GNU.sparse.minor", b"0"), ("GNU.sparse.realsize", size.as_bytes())];
        let mut content = map.to_vec();
        content.resize(512, 0);
        Tar::new().pax(&version).file("a", &[&content[..], b"abc"].concat())
    };
    let old = |runs: &[(usize, &[u8])]| {
        let gnu = [(257, &b"ustar  \0"[..]), (483, b"00000000012\0")];
        Tar::new().patched(&Entry { kind: b'S', content: b"abc", ..Entry::default() }, &[&gnu[..], runs].concat())
    };
    vec![
        hostile("runs that overlap", map("10", "0,2,1,1"), is_malformed),
        hostile("runs that descend", map("10", "5,2,0,1"), is_malformed),
        hostile("a run beyond the end", map("10", "8,3"), is_malformed),
        hostile("a run beyond 64 bits", map("10", "18446744073709551615,3"), is_malformed),
        hostile("less than the archive has", map("10", "0,2"), is_malformed),
        hostile("more than the archive has", map("10", "0,4"), is_malformed),
        hostile("half a run", map("10", "0,3,5"), is_malformed),
        hostile("no numbers", map("10", "zero,three"), is_malformed),
        hostile("no size", Tar::new().pax(&[("GNU.sparse.map", b"0,3")]).file("a", b"abc"), is_malformed),
        hostile("a number of runs that is not theirs", map_of_two(), is_malformed),
        hostile("a size of the content below the runs", map("2", "0,3"), is_malformed),
        hostile("in the content: more runs than there are", in_content("10", b"2\n0\n3\n"), is_malformed),
        hostile("in the content: no numbers", in_content("10", b"1\nzero\n3\n"), is_malformed),
        hostile("in the content: runs that overlap", in_content("10", b"2\n0\n2\n1\n1\n"), is_malformed),
        hostile(
            "old: runs that overlap",
            old(&[(386, b"00000000000\x0000000000002\x0000000000001\x0000000000001\0")]),
            is_malformed,
        ),
        hostile("old: a run beyond the end", old(&[(386, b"00000000010\x0000000000003\0")]), is_malformed),
        hostile("old: a number that is none", old(&[(386, b"99999999999\x0000000000003\0")]), is_malformed),
        hostile("old: a map that goes on in content", old(&[(482, b"\x01")]), |kind| {
            is_malformed(kind) || is_truncated(kind)
        }),
        hostile(
            "old: a header that is not GNU tar's",
            Tar::new().entry(&Entry { kind: b'S', ..Entry::default() }),
            is_malformed,
        ),
        hostile("a format that nobody knows", map_of_version_2(), is_unsupported),
    ]
}

fn map_of_two() -> Tar {
    let records = [("GNU.sparse.size", &b"10"[..]), ("GNU.sparse.numblocks", b"2"), ("GNU.sparse.map", b"0,3")];
    Tar::new().pax(&records).file("a", b"abc")
}

fn map_of_version_2() -> Tar {
    let records = [("GNU.sparse.major", &b"2"[..]), ("GNU.sparse.minor", b"0"), ("GNU.sparse.realsize", b"10")];
    Tar::new().pax(&records).file("a", b"abc")
}

fn compression() -> Vec<Hostile> {
    let tar = || Tar::new().file("a", &[3; 3000]).file("b", &pseudo_random(90_000)).finish();
    let half = |whole: LayerBlob| LayerBlob { blob: whole.blob[..whole.blob.len() / 2].to_vec(), ..whole };
    let with = |mut whole: LayerBlob, change: fn(&mut Vec<u8>)| {
        change(&mut whole.blob);
        whole
    };
    let is_damaged = |kind: &Kind| matches!(kind, Kind::Read(_) | Kind::Malformed(_) | Kind::DiffIdMismatch { .. });
    let middle = |blob: &mut Vec<u8>| {
        let middle = blob.len() / 2;
        blob[middle..middle + 64].fill(0xff);
    };
    vec![
        stored("half of a gzip", half(LayerBlob::gzip(&tar())), is_truncated),
        stored("half of a zstd", half(LayerBlob::zstd(&tar())), is_truncated),
        stored("half of an archive", half(LayerBlob::plain(tar())), is_truncated),
        stored(
            "a gzip without its last byte",
            with(LayerBlob::gzip(&tar()), |blob| blob.truncate(blob.len() - 1)),
            is_truncated,
        ),
        stored(
            "a zstd without its last byte",
            with(LayerBlob::zstd(&tar()), |blob| blob.truncate(blob.len() - 1)),
            is_truncated,
        ),
        stored("a damaged gzip", with(LayerBlob::gzip(&tar()), middle), is_damaged),
        stored("a damaged zstd", with(LayerBlob::zstd(&tar()), middle), is_damaged),
        stored(
            "a gzip whose checksum is wrong",
            with(LayerBlob::gzip(&tar()), |blob| {
                let crc = blob.len() - 8;
                blob[crc] ^= 1;
            }),
            |kind| matches!(kind, Kind::Read(_)),
        ),
        stored(
            "the first bytes of a gzip alone",
            LayerBlob { blob: vec![0x1f, 0x8b], ..LayerBlob::gzip(b"") },
            is_truncated,
        ),
        stored(
            "a second member that is cut",
            with(LayerBlob::gzip(&tar()), |blob| {
                let second = gzip(b"more");
                blob.extend_from_slice(&second[..second.len() / 2]);
            }),
            is_truncated,
        ),
    ]
}

fn limits() -> Vec<Hostile> {
    let files = |names: &[String]| names.iter().fold(Tar::new(), |tar, name| tar.file(name, b""));
    let long_names: Vec<_> = ["a", "b", "c"].map(|name| name.repeat(200)).into();
    let numbers = |count: u32| -> Vec<_> { (0..count).map(|n| n.to_string()).collect() };
    let bomb = Tar::new().file("zeros", &vec![0; 4 << 20]).finish();
    let tail = [Tar::new().file("a", b"x").finish(), vec![0; 4 << 20]].concat();
    let hole = |size: &str| {
        Tar::new().pax(&[("GNU.sparse.size", size.as_bytes()), ("GNU.sparse.map", b"0,1")]).file("a", b"x")
    };
    let archive_bytes = |limits: &mut Limits| limits.archive_bytes = 1 << 20;
    let is_archive_bytes = |kind: &Kind| matches!(kind, Kind::Limit { limit: 1_048_576, .. });
    let is_content = |kind: &Kind| matches!(kind, Kind::Limit { what: "bytes of files' content", .. });
    let attributes: &[(&str, &[u8])] = &[("SCHILY.xattr.user.a", &[7; 2000])];
    vec![
        stored("a bomb in gzip", LayerBlob::gzip(&bomb), is_archive_bytes).limit(archive_bytes),
        stored("a bomb in zstd", LayerBlob::zstd(&bomb), is_archive_bytes).limit(archive_bytes),
        stored("a bomb behind the end mark", LayerBlob::gzip(&tail), is_archive_bytes).limit(archive_bytes),
        stored("two layers that are a bomb together", LayerBlob::gzip(&bomb), is_archive_bytes)
            .over(Tar::new().file("a", b"x"))
            .limit(archive_bytes),
        hostile("entries", files(&numbers(4)), |kind| matches!(kind, Kind::Limit { what: "entries", limit: 3 }))
            .limit(|limits| limits.entries = 3)
            .at("3"),
        hostile("entries of two layers together", files(&numbers(2)), |kind| {
            matches!(kind, Kind::Limit { what: "entries", limit: 3 })
        })
        .over(files(&numbers(2)))
        .limit(|limits| limits.entries = 3),
        hostile("names", files(&long_names), |kind| matches!(kind, Kind::Limit { what: "bytes of metadata", .. }))
            .limit(|limits| limits.metadata_bytes = 1000),
        hostile("attributes", Tar::new().pax(attributes).file("a", b"x"), |kind| {
            matches!(kind, Kind::Limit { what: "bytes of metadata", .. })
        })
        .limit(|limits| limits.metadata_bytes = 1000),
        hostile("a hole, by the default limit", hole("1099511627776"), is_content).at("a"),
        hostile("a hole beyond 63 bits", hole("18446744073709551615"), is_content),
        hostile("holes together", hole("700000").append_raw(&hole("700000").into_entries()), is_content)
            .limit(|limits| limits.content_bytes = 1 << 20),
        hostile("a file that is no hole", Tar::new().file("a", &[1; 5000]), is_content)
            .limit(|limits| limits.content_bytes = 4999),
    ]
}

/// Bytes that do not compress.
fn pseudo_random(count: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    })
    .take(count)
    .collect()
}

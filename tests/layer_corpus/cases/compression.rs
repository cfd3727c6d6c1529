//! How a layer is stored: the first bytes of the blob say it, as with Docker, whatever the media type.

use crate::case::Case;
use crate::case::Second;
use crate::case::case;
use crate::case::file;
use crate::case::folder;
use crate::image_support::LayerBlob;
use crate::image_support::Tar;
use crate::image_support::gzip;
use crate::image_support::zstd;

const OCI: &str = "application/vnd.oci.image.layer.v1.tar";
const OCI_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const OCI_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
const DOCKER: &str = "application/vnd.docker.image.rootfs.diff.tar";
const DOCKER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
const DOCKER_ZSTD: &str = "application/vnd.docker.image.rootfs.diff.tar.zstd";

const NO_ZSTD: Second = Second::SameRepacked("it knows no zstd");
const NO_DOCKER: Second = Second::SameRepacked("it knows the media types of OCI only");
const NO_GUESS: Second = Second::SameRepacked("it believes the media type");

type Pack = fn(&[u8]) -> Vec<u8>;

const FORMS: [(&str, &str, Pack, Second); 18] = [
    ("plain", OCI, <[u8]>::to_vec, Second::Same),
    ("gzip", OCI_GZIP, gzip, Second::Same),
    ("gzip in several members", OCI_GZIP, in_gzip_members, Second::Same),
    ("gzip with a name, a comment and an extra field", OCI_GZIP, gzip_with_fields, Second::Same),
    ("zstd", OCI_ZSTD, zstd, NO_ZSTD),
    ("zstd in several frames", OCI_ZSTD, in_zstd_frames, NO_ZSTD),
    ("zstd with a skippable frame first", OCI_ZSTD, zstd_after_skippable, NO_ZSTD),
    ("zstd with skippable frames between and last", OCI_ZSTD, zstd_among_skippables, NO_ZSTD),
    ("plain under Docker's media type", DOCKER, <[u8]>::to_vec, NO_DOCKER),
    ("gzip under Docker's media type", DOCKER_GZIP, gzip, NO_DOCKER),
    ("zstd under Docker's media type, which no document names", DOCKER_ZSTD, zstd, NO_DOCKER),
    ("gzip labelled plain", OCI, gzip, NO_GUESS),
    ("zstd labelled plain", OCI, zstd, NO_GUESS),
    ("plain labelled gzip", OCI_GZIP, <[u8]>::to_vec, NO_GUESS),
    ("zstd labelled gzip", OCI_GZIP, zstd, NO_GUESS),
    ("gzip labelled zstd", OCI_ZSTD, gzip, NO_GUESS),
    ("plain labelled zstd", OCI_ZSTD, <[u8]>::to_vec, NO_GUESS),
    ("zstd labelled gzip under Docker's media type", DOCKER_GZIP, zstd, NO_DOCKER),
];

pub(super) fn cases() -> Vec<Case> {
    let single = FORMS.map(|(name, media_type, pack, second)| {
        let tar = archive();
        let layer = LayerBlob { blob: pack(&tar), media_type, ..LayerBlob::plain(tar.clone()) };
        case(name).blob(tar, layer).tree(tree()).second(second)
    });
    let (lower, upper) = (archive(), Tar::new().file("etc/new", b"2").finish());
    let layer = LayerBlob::zstd(&upper);
    let mixed =
        case("layers in different compressions").blob(lower.clone(), LayerBlob::gzip(&lower)).blob(upper, layer);
    let mixed = mixed.tree(tree()).tree([file("etc/new", "2")]).second(NO_ZSTD);
    single.into_iter().chain([mixed]).collect()
}

fn archive() -> Vec<u8> {
    Tar::new().folder("etc/").file("etc/motd", b"hello").file("large", &large()).finish()
}

fn tree() -> [crate::case::Node; 3] {
    [folder("etc"), file("etc/motd", "hello"), file("large", large())]
}

fn large() -> Vec<u8> {
    (0..20_000_u32).flat_map(u32::to_le_bytes).collect()
}

/// Cut in places that have nothing to do with the archive's blocks.
fn pieces(tar: &[u8]) -> [&[u8]; 3] {
    [&tar[..700], &tar[700..50_001], &tar[50_001..]]
}

fn in_gzip_members(tar: &[u8]) -> Vec<u8> {
    pieces(tar).map(gzip).concat()
}

fn in_zstd_frames(tar: &[u8]) -> Vec<u8> {
    pieces(tar).map(zstd).concat()
}

/// As eStargz and the like write them.
fn gzip_with_fields(tar: &[u8]) -> Vec<u8> {
    let builder = flate2::GzBuilder::new().filename("layer.tar").comment("a comment").extra(*b"ex\x02\x00tr");
    let mut encoder = builder.write(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut encoder, tar).expect("to memory");
    encoder.finish().expect("to memory")
}

/// RFC 8878, 3.1.2.
fn skippable(magic: u8, content: &[u8]) -> Vec<u8> {
    let length = (content.len() as u32).to_le_bytes();
    [&[magic, 0x2a, 0x4d, 0x18], &length[..], content].concat()
}

fn zstd_after_skippable(tar: &[u8]) -> Vec<u8> {
    [skippable(0x50, b"an index"), zstd(tar)].concat()
}

fn zstd_among_skippables(tar: &[u8]) -> Vec<u8> {
    let [first, second, third] = pieces(tar).map(zstd);
    [first, skippable(0x5f, b""), second, skippable(0x57, &[1; 1000]), third, skippable(0x5e, b"a table")].concat()
}

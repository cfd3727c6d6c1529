//! Converted layers to the root filesystem of one image.

use std::fs::File;
use std::io;
use std::path::Path;

use tokio_util::sync::CancellationToken;

use crate::image::AtomicFile;
use crate::image::Digest;
use crate::image::Image;
use crate::image::Layer;
use crate::rootfs::convert;
use crate::rootfs::derived::Derived;
use crate::rootfs::derived::VERSION;
use crate::rootfs::erofs;
use crate::rootfs::erofs::BLOCK;
use crate::rootfs::erofs::Plan;
use crate::rootfs::erofs::Surroundings;
use crate::rootfs::erofs::WriteError;
use crate::rootfs::error::LayerError;
use crate::rootfs::error::LayerErrorKind;
use crate::rootfs::error::RootfsError;
use crate::rootfs::index::Index;
use crate::rootfs::index::IndexError;
use crate::rootfs::layer::Applier;
use crate::rootfs::limits::Limits;
use crate::rootfs::record;
use crate::rootfs::record::Content;
use crate::rootfs::record::Joined;
use crate::rootfs::root_image::RootImage;

/// The layers of an image, each once however often the image has it.
#[derive(Debug)]
pub(super) struct Distinct {
    pub(super) layers: Vec<Layer>,
    /// For each layer of the image its place in `layers`.
    order: Vec<usize>,
}

impl Distinct {
    pub(super) fn of(image: &Image) -> Self {
        let mut distinct = Self { layers: Vec::new(), order: Vec::new() };
        for layer in image.layers() {
            let known = distinct.layers.iter().position(|known| known.diff_id() == layer.diff_id());
            distinct.order.push(known.unwrap_or(distinct.layers.len()));
            if known.is_none() {
                distinct.layers.push(layer.clone());
            }
        }
        distinct
    }
}

/// Finds an image's filesystem, if it was joined before and all its files are whole. Blocking.
pub(super) fn find(image: &Image) -> Result<Option<RootImage>, RootfsError> {
    let derived = Derived::of(image.store());
    let path = derived.joined(&image.chain_id());
    let mut file = match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        result => result.map_err(RootfsError::io(&path))?,
    };
    let Some(joined) = record::read(&mut file).map_err(RootfsError::io(&path))? else { return Ok(None) };
    let root = root_image(image, &derived, &joined);
    for (path, length) in root.parts().skip(1) {
        if !convert::has_length(path, length).map_err(RootfsError::io(path))? {
            return Ok(None);
        }
    }
    Ok(Some(root))
}

fn root_image(image: &Image, derived: &Derived, joined: &Joined) -> RootImage {
    let contents = joined.contents.iter().map(|content| (derived.content(&content.diff_id), content.blocks));
    let parts = std::iter::once((derived.joined(&image.chain_id()), joined.blocks)).chain(contents);
    RootImage::new(parts.map(|(path, blocks)| (path, u64::from(blocks) * BLOCK as u64)), digest(image))
}

/// Names what the files hold together.
fn digest(image: &Image) -> Digest {
    Digest::of(format!("kiln erofs {VERSION}\n{}", image.chain_id()).as_bytes())
}

/// Joins the converted layers. `None` if an index turned out not to be one that was made here; it is gone then, and the
/// layer is to be converted again. Blocking.
pub(super) fn join(
    image: &Image,
    distinct: &Distinct,
    mut indexes: Vec<Index>,
    limits: Limits,
    abandoned: &CancellationToken,
) -> Result<Option<RootImage>, RootfsError> {
    let mut applier = Applier::new(limits);
    for (layer, &number) in image.layers().iter().zip(&distinct.order) {
        match apply(&mut applier, layer, number as u32, &mut indexes[number], abandoned) {
            Ok(()) => {}
            Err(ApplyError::Rootfs(error)) => return Err(error),
            Err(ApplyError::Index(IndexError::Io(error))) => {
                return Err(RootfsError::io(&Derived::of(image.store()).index(layer.diff_id()))(error));
            }
            Err(ApplyError::Index(IndexError::Damaged)) => {
                return convert::forget(&Derived::of(image.store()), layer).map(|()| None);
            }
        }
    }
    let contents = |number: u32| Content {
        diff_id: *distinct.layers[number as usize].diff_id(),
        blocks: indexes[number as usize].totals().content_blocks,
    };
    write(image, &applier, contents).map(Some)
}

enum ApplyError {
    Rootfs(RootfsError),
    Index(IndexError),
}

impl From<IndexError> for ApplyError {
    fn from(error: IndexError) -> Self {
        Self::Index(error)
    }
}

impl From<LayerError> for ApplyError {
    fn from(error: LayerError) -> Self {
        Self::Rootfs(error.into())
    }
}

fn apply(
    applier: &mut Applier,
    layer: &Layer,
    number: u32,
    index: &mut Index,
    abandoned: &CancellationToken,
) -> Result<(), ApplyError> {
    index.rewind().map_err(IndexError::Io)?;
    applier.begin(layer, index.totals().archive_bytes, number)?;
    while let Some(entry) = index.next_entry()? {
        if abandoned.is_cancelled() {
            let kind = LayerErrorKind::Abandoned;
            return Err(LayerError { layer: *layer.digest(), entry: None, kind }.into());
        }
        applier.apply(layer, entry)?;
    }
    applier.end();
    Ok(())
}

fn write(image: &Image, applier: &Applier, content: impl Fn(u32) -> Content) -> Result<RootImage, RootfsError> {
    let derived = Derived::of(image.store());
    let path = derived.joined(&image.chain_id());
    let plan = Plan::new(&applier.tree).map_err(failed(&path))?;
    let numbered: Vec<_> = plan.contents().map(|number| (number, content(number))).collect();
    let contents: Vec<_> = numbered.iter().map(|(_, content)| *content).collect();
    let record = record::encode(&contents, plan.blocks()).ok_or(RootfsError::FormatLimit)?;
    let root = root_image(image, &derived, &Joined { contents, blocks: plan.blocks() + (record.len() / BLOCK) as u32 });
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&root.digest().as_bytes()[..16]);
    let lengths: Vec<_> = numbered.iter().map(|(number, content)| (*number, content.blocks)).collect();
    let file = AtomicFile::create(derived.folder()).map_err(RootfsError::io(derived.folder()))?;
    let around = Surroundings { uuid, record: &record, contents: &lengths };
    if let Err(error) = erofs::write(&applier.tree, &plan, file.file(), &around) {
        file.discard();
        return Err(failed(&path)(error));
    }
    // What is written counts as used already.
    if let Err(error) = image.store().reserve(0) {
        file.discard();
        return Err(error.into());
    }
    file.commit(&path).map_err(RootfsError::io(&path))?;
    tracing::debug!(image = %image.digest(), path = %path.display(), "root filesystem joined");
    Ok(root)
}

fn failed(path: &Path) -> impl FnOnce(WriteError) -> RootfsError + '_ {
    move |error| match error {
        WriteError::Io(source) => RootfsError::io(path)(source),
        WriteError::FormatLimit => RootfsError::FormatLimit,
    }
}

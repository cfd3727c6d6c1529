//! The structures on disk, byte for byte (erofs_fs.h). All little-endian.

use crate::rootfs::erofs::BLOCK;
use crate::rootfs::tree::Meta;
use crate::rootfs::tree::Xattr;

const MAGIC: u32 = 0xe0f5_e1e2;
const FEATURE_COMPAT_SB_CHKSUM: u32 = 1;
const FEATURE_COMPAT_MTIME: u32 = 2;
const BLOCK_BITS: u8 = BLOCK.trailing_zeros() as u8;

/// Where the superblock starts, in bytes.
const SUPER_OFFSET: usize = 1024;

/// `struct erofs_inode_extended`, in bytes.
pub(super) const INODE_SIZE: usize = 64;

/// Inodes are addressed in units of this size: a number (nid) times this is the position.
pub(super) const SLOT: u64 = 32;

/// `struct erofs_xattr_ibody_header`, in bytes.
pub(super) const XATTR_HEADER: usize = 12;

/// `EROFS_INODE_*` data layouts.
const FLAT_PLAIN: u16 = 0;
const FLAT_INLINE: u16 = 2;

/// File type bits of a mode (`S_IF*`).
pub(super) const S_IFREG: u16 = 0o100_000;
pub(super) const S_IFDIR: u16 = 0o040_000;
pub(super) const S_IFLNK: u16 = 0o120_000;
pub(super) const S_IFCHR: u16 = 0o020_000;
pub(super) const S_IFBLK: u16 = 0o060_000;
pub(super) const S_IFIFO: u16 = 0o010_000;

/// What the superblock says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Superblock {
    pub(super) blocks: u32,
    pub(super) inodes: u64,
    pub(super) meta_start: u32,
    pub(super) root_nid: u16,
    pub(super) uuid: [u8; 16],
}

impl Superblock {
    /// The rest of block 0 from the superblock's offset on, as its checksum covers all of it.
    pub(super) fn encode(&self) -> [u8; BLOCK - SUPER_OFFSET] {
        let mut bytes = [0; BLOCK - SUPER_OFFSET];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &MAGIC.to_le_bytes());
        put(8, &(FEATURE_COMPAT_SB_CHKSUM | FEATURE_COMPAT_MTIME).to_le_bytes());
        put(12, &[BLOCK_BITS]);
        put(14, &self.root_nid.to_le_bytes());
        put(16, &self.inodes.to_le_bytes());
        put(36, &self.blocks.to_le_bytes());
        put(40, &self.meta_start.to_le_bytes());
        put(48, &self.uuid);
        let checksum = crc32c(&bytes);
        bytes[4..8].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }
}

/// The number of blocks that the superblock in `block0` promises; `None` if it is not one of ours
/// or is damaged.
pub(in crate::rootfs) fn superblock_blocks(block0: &[u8; BLOCK]) -> Option<u32> {
    let mut bytes: [u8; BLOCK - SUPER_OFFSET] = block0[SUPER_OFFSET..].try_into().ok()?;
    let word = |at: usize| Some(u32::from_le_bytes(block0[SUPER_OFFSET + at..][..4].try_into().ok()?));
    bytes[4..8].fill(0);
    (word(0)? == MAGIC && word(4)? == crc32c(&bytes)).then_some(())?;
    word(36)
}

/// CRC-32C without the final inversion, as the kernel's `crc32c(~0, ...)`. Bit by bit: it runs over
/// three kilobytes once an image.
fn crc32c(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (POLYNOMIAL & (crc & 1).wrapping_neg()))
    })
}

/// What an inode says beside its metadata.
#[derive(Clone, Copy, Debug)]
pub(super) struct InodeFields {
    /// `S_IF*`.
    pub(super) file_type: u16,
    pub(super) size: u64,
    /// First block, or the device number.
    pub(super) union: u32,
    pub(super) has_inline: bool,
    pub(super) ino: u32,
    pub(super) nlink: u32,
}

/// An extended inode and its attributes. The attributes must fit, which the planner has checked.
pub(super) fn encode_inode(meta: &Meta, fields: InodeFields) -> Vec<u8> {
    let xattr_size = xattr_size(meta);
    // A count of 0 is no attributes, of n a header and n - 1 words.
    let xattr_count = if xattr_size == 0 { 0 } else { (xattr_size - XATTR_HEADER) / 4 + 1 } as u16;
    let layout = if fields.has_inline { FLAT_INLINE } else { FLAT_PLAIN };
    let mut bytes = Vec::with_capacity(INODE_SIZE + xattr_size);
    bytes.extend_from_slice(&(1 | layout << 1).to_le_bytes());
    bytes.extend_from_slice(&xattr_count.to_le_bytes());
    bytes.extend_from_slice(&(fields.file_type | meta.mode).to_le_bytes());
    bytes.extend_from_slice(&[0; 2]);
    bytes.extend_from_slice(&fields.size.to_le_bytes());
    bytes.extend_from_slice(&fields.union.to_le_bytes());
    bytes.extend_from_slice(&fields.ino.to_le_bytes());
    bytes.extend_from_slice(&meta.uid.to_le_bytes());
    bytes.extend_from_slice(&meta.gid.to_le_bytes());
    bytes.extend_from_slice(&meta.mtime.seconds.to_le_bytes());
    bytes.extend_from_slice(&meta.mtime.nanoseconds.to_le_bytes());
    bytes.extend_from_slice(&fields.nlink.to_le_bytes());
    bytes.extend_from_slice(&[0; 16]);
    if xattr_size > 0 {
        // Name filter (unused without its feature bit), no shared attributes, reserved.
        bytes.extend_from_slice(&[0; XATTR_HEADER]);
        meta.xattrs.iter().for_each(|xattr| encode_xattr(&mut bytes, xattr));
    }
    bytes
}

fn encode_xattr(bytes: &mut Vec<u8>, xattr: &Xattr) {
    // Name and value are within 8 and 16 bits: `Xattr::new` and the pax parser see to it.
    bytes.extend_from_slice(&[xattr.suffix.len() as u8, xattr.index]);
    bytes.extend_from_slice(&(xattr.value.len() as u16).to_le_bytes());
    bytes.extend_from_slice(&xattr.suffix);
    bytes.extend_from_slice(&xattr.value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// Bytes that a node's attributes take beside its inode.
pub(super) fn xattr_size(meta: &Meta) -> usize {
    let entries: usize = meta.xattrs.iter().map(Xattr::stored_size).sum();
    if entries == 0 { 0 } else { XATTR_HEADER + entries }
}

/// Linux's 32-bit form of a device number (`new_encode_dev`).
pub(super) const fn device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_matches_the_published_check_value() {
        // The catalogue's check value for "123456789" is after the final inversion.
        assert_eq!(!crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn a_damaged_superblock_is_noticed() {
        let superblock = Superblock { blocks: 77, inodes: 1, meta_start: 1, root_nid: 0, uuid: [5; 16] };
        let mut block = [0; BLOCK];
        block[SUPER_OFFSET..].copy_from_slice(&superblock.encode());
        assert_eq!(superblock_blocks(&block), Some(77));
        block[SUPER_OFFSET + 36] ^= 1;
        assert_eq!(superblock_blocks(&block), None);
    }
}

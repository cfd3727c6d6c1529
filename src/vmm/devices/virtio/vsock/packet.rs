//! The header of a vsock packet (section 5.10.6).

/// Bytes of a header on a queue.
pub(super) const HEADER_LEN: usize = 44;
/// The only socket type we have: a stream.
pub(super) const TYPE_STREAM: u16 = 1;

/// Bits of a SHUTDOWN packet's flags.
pub(super) mod shutdown {
    /// The sender receives no more.
    pub(in super::super) const RECEIVE: u32 = 1;
    /// The sender sends no more.
    pub(in super::super) const SEND: u32 = 2;
    /// Both.
    pub(in super::super) const BOTH: u32 = RECEIVE | SEND;
}

/// What a packet is for.
pub(super) mod op {
    pub(in super::super) const REQUEST: u16 = 1;
    pub(in super::super) const RESPONSE: u16 = 2;
    pub(in super::super) const RST: u16 = 3;
    pub(in super::super) const SHUTDOWN: u16 = 4;
    pub(in super::super) const RW: u16 = 5;
    pub(in super::super) const CREDIT_UPDATE: u16 = 6;
    pub(in super::super) const CREDIT_REQUEST: u16 = 7;
}

/// `struct virtio_vsock_hdr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    /// The sender's whole receive buffer, in bytes.
    pub(super) buf_alloc: u32,
    /// Bytes that the sender has taken out of it so far, wrapping.
    pub(super) fwd_cnt: u32,
}

impl Header {
    pub(super) fn parse(raw: &[u8; HEADER_LEN]) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes([raw[at], raw[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            kind: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    pub(super) fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut raw = [0; HEADER_LEN];
        let mut set = |at: usize, bytes: &[u8]| raw[at..at + bytes.len()].copy_from_slice(bytes);
        set(0, &self.src_cid.to_le_bytes());
        set(8, &self.dst_cid.to_le_bytes());
        set(16, &self.src_port.to_le_bytes());
        set(20, &self.dst_port.to_le_bytes());
        set(24, &self.len.to_le_bytes());
        set(28, &self.kind.to_le_bytes());
        set(30, &self.op.to_le_bytes());
        set(32, &self.flags.to_le_bytes());
        set(36, &self.buf_alloc.to_le_bytes());
        set(40, &self.fwd_cnt.to_le_bytes());
        raw
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_header_survives_the_way_there_and_back(raw in any::<[u8; 32]>(), tail in any::<[u8; 12]>()) {
            let mut bytes = [0; HEADER_LEN];
            bytes[..32].copy_from_slice(&raw);
            bytes[32..].copy_from_slice(&tail);
            prop_assert_eq!(Header::parse(&bytes).to_bytes(), bytes);
        }
    }
}

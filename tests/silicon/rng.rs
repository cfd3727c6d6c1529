//! Reproducible random values, mixed with those that arithmetic goes wrong on.

use iced_x86::Register;

/// SplitMix64: one seed, one sequence, on every host.
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In `0..bound`.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// An integer: often near a boundary of some size.
    pub(crate) fn integer(&mut self) -> u64 {
        const EDGES: [u64; 20] = [
            0,
            1,
            2,
            3,
            0x7f,
            0x80,
            0xff,
            0x7fff,
            0x8000,
            0xffff,
            0x7fff_ffff,
            0x8000_0000,
            0xffff_ffff,
            0x1_0000_0000,
            0x7fff_ffff_ffff_ffff,
            0x8000_0000_0000_0000,
            0xffff_ffff_0000_0000,
            0xffff_ffff_ffff_fffe,
            0xffff_ffff_ffff_ffff,
            0x5555_5555_aaaa_aaaa,
        ];
        match self.below(4) {
            0 => self.pick(&EDGES),
            1 => self.below(256),
            2 => self.next() >> self.below(64),
            _ => self.next(),
        }
    }

    /// Bits of a `f64`: zeros, denormals, infinities, NaNs of both kinds, small integers, neighbours.
    pub(crate) fn double(&mut self) -> u64 {
        const EDGES: [u64; 14] = [
            0,
            1 << 63,
            1,
            0x000f_ffff_ffff_ffff,
            0x0010_0000_0000_0000,
            0x7fef_ffff_ffff_ffff,
            0x7ff0_0000_0000_0000,
            0xfff0_0000_0000_0000,
            0x7ff8_0000_0000_0000,
            0xfff8_0000_0000_0000,
            0x7ff0_0000_0000_0001,
            0x7ff4_dead_beef_0001,
            0xfff8_1234_5678_9abc,
            0x43e0_0000_0000_0000,
        ];
        match self.below(6) {
            0 => self.pick(&EDGES),
            1 => ((self.below(2000) as f64) - 1000.0).to_bits(),
            2 => ((self.below(2000) as f64) / 8.0 - 125.0).to_bits(),
            // Exponents near one, so that sums cancel and products round.
            3 => self.next() & 0x800f_ffff_ffff_ffff | (0x3fe + self.below(4)) << 52,
            4 => {
                self.next() & 0x800f_ffff_ffff_ffff | self.pick(&[0u64, 1, 2, 0x7fe, 0x380, 0x47e, 0x41e, 0x43e]) << 52
            }
            _ => self.next(),
        }
    }

    /// Bits of a `f32`, likewise.
    pub(crate) fn single(&mut self) -> u32 {
        const EDGES: [u32; 12] = [
            0,
            1 << 31,
            1,
            0x007f_ffff,
            0x0080_0000,
            0x7f7f_ffff,
            0x7f80_0000,
            0xff80_0000,
            0x7fc0_0000,
            0x7f80_0001,
            0xffc1_2345,
            0x4f00_0000,
        ];
        match self.below(6) {
            0 => self.pick(&EDGES),
            1 => ((self.below(2000) as f32) - 1000.0).to_bits(),
            2 => ((self.below(2000) as f32) / 8.0 - 125.0).to_bits(),
            3 => self.next() as u32 & 0x807f_ffff | (0x7e + self.below(4) as u32) << 23,
            4 => self.next() as u32 & 0x807f_ffff | self.pick(&[0u32, 1, 2, 0xfe, 0x9e, 0x96]) << 23,
            _ => self.next() as u32,
        }
    }

    /// 64 bits that some instruction may read as an integer, two singles or a double.
    pub(crate) fn quad(&mut self) -> u64 {
        match self.below(3) {
            0 => self.integer(),
            1 => self.double(),
            _ => u64::from(self.single()) | u64::from(self.single()) << 32,
        }
    }

    /// An x87 register: mostly values that a load can leave there, sometimes one of the odd encodings.
    pub(crate) fn extended(&mut self) -> (u64, u16) {
        let sign = (self.below(2) as u16) << 15;
        const ONE: u64 = 1 << 63;
        match self.below(12) {
            0 => (0, sign),
            1 => (ONE, sign | 0x7fff),
            2 => (self.next() | ONE | 1 << 62, sign | 0x7fff),
            3 => ((self.next() | ONE | 1) & !(1 << 62), sign | 0x7fff),
            4 => (self.next() >> 1 >> self.below(63), sign),
            // Pseudo-denormals, unnormals, pseudo-infinities and pseudo-NaNs.
            5 => (self.next(), sign | self.pick(&[0, 1, 0x3fff, 0x7fff])),
            6 => (ONE | self.next(), sign | self.pick(&[1, 2, 0x7ffe, 0x7ffd, 0x3c01, 0x43fe, 0x3f81, 0x407e])),
            7 | 8 => {
                let integer = self.below(4000) + 1;
                let shift = integer.leading_zeros();
                (integer << shift, sign | (0x3fff + 63 - shift as u16))
            }
            9 => (ONE | self.next() & !0xffff_ffff, sign | (0x3ff0 + self.below(32) as u16)),
            10 => (ONE | self.next(), sign | (0x3ffd + self.below(4) as u16)),
            _ => (ONE | self.next(), sign | self.below(0x7fff) as u16),
        }
    }

    /// A general register of 64 bits, the stack pointer only when `rsp`.
    pub(crate) fn gpr64(&mut self, rsp: bool) -> Register {
        loop {
            let register = Register::RAX + self.below(16) as u32;
            if rsp || register != Register::RSP {
                return register;
            }
        }
    }
}

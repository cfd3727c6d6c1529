//! The arithmetic flags, kept lazily: what an operation produced, from which each flag follows when asked.
//!
//! Three words hold the six flags (Intel SDM volume 1, section 3.4.3.1):
//!
//! ```text
//!   res   the result, sign-extended to 64 bits        ZF: res == 0     SF: bit 63 of res ^ aux
//!   cv    the carry vector, top bit of the operand    CF: bit 63       OF: bit 63 ^ bit 62
//!         size moved to bit 63
//!   aux   bit 4: AF; bits 8..16: flips of res's low   PF: even parity of (res ^ aux >> 8) & 0xff
//!         byte for PF; bit 63: flips SF
//! ```
//!
//! An addition or subtraction costs a few logic operations and three stores, and no reader needs to know
//! which operation wrote them. The flips make every combination of flags representable, for POPF and SAHF.

/// Carry flag.
pub(super) const CF: u64 = 1 << 0;
/// Parity flag.
pub(super) const PF: u64 = 1 << 2;
/// Auxiliary carry flag.
pub(super) const AF: u64 = 1 << 4;
/// Zero flag.
pub(super) const ZF: u64 = 1 << 6;
/// Sign flag.
pub(super) const SF: u64 = 1 << 7;
/// Trap flag.
pub(super) const TF: u64 = 1 << 8;
/// Interrupt enable flag.
pub(super) const IF: u64 = 1 << 9;
/// Direction flag.
pub(super) const DF: u64 = 1 << 10;
/// Overflow flag.
pub(super) const OF: u64 = 1 << 11;
/// I/O privilege level.
pub(super) const IOPL: u64 = 3 << 12;
/// Nested task.
pub(super) const NT: u64 = 1 << 14;
/// Resume flag.
pub(super) const RF: u64 = 1 << 16;
/// Virtual-8086 mode.
pub(super) const VM: u64 = 1 << 17;
/// Alignment check.
pub(super) const AC: u64 = 1 << 18;
/// CPUID can be toggled.
pub(super) const ID: u64 = 1 << 21;
/// The six arithmetic flags.
pub(super) const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;

/// The arithmetic flags in lazy form; see the module's table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flags {
    pub(super) res: u64,
    pub(super) cv: u64,
    pub(super) aux: u64,
}

/// Sign-extends the low `BITS` bits.
#[inline(always)]
pub(super) const fn sext(value: u64, bits: u32) -> u64 {
    (((value << (64 - bits)) as i64) >> (64 - bits)) as u64
}

impl Flags {
    pub(super) const fn new() -> Self {
        Self { res: 1, cv: 0, aux: 1 << 8 }
    }

    /// The flags of `a + b` (with a carry in, if `res` includes it), for operands of `bits` bits;
    /// bits of the arguments above that do not matter.
    #[inline(always)]
    pub(super) fn add(&mut self, a: u64, b: u64, res: u64, bits: u32) {
        self.res = sext(res, bits);
        self.cv = ((a & b) | ((a | b) & !res)) << (64 - bits);
        self.aux = (a ^ b ^ res) & AF;
    }

    /// The flags of `a - b` (with a borrow in, if `res` includes it).
    #[inline(always)]
    pub(super) fn sub(&mut self, a: u64, b: u64, res: u64, bits: u32) {
        self.res = sext(res, bits);
        self.cv = ((!a & b) | ((!a | b) & res)) << (64 - bits);
        self.aux = (a ^ b ^ res) & AF;
    }

    /// The flags of AND, OR, XOR and TEST; AF, undefined, reads as clear as silicon has it.
    #[inline(always)]
    pub(super) fn logic(&mut self, res: u64, bits: u32) {
        self.res = sext(res, bits);
        self.cv = 0;
        self.aux = 0;
    }

    /// The flags of INC: an addition of one that keeps CF.
    #[inline(always)]
    pub(super) fn inc(&mut self, a: u64, res: u64, bits: u32) {
        let cf = self.cf_bit();
        // Overflow only from the largest positive value.
        let of = u64::from(sext(res, bits) == sext(1 << (bits - 1), bits));
        self.res = sext(res, bits);
        self.cv = (cf << 63) | ((cf ^ of) << 62);
        self.aux = (a ^ 1 ^ res) & AF;
    }

    /// The flags of DEC: a subtraction of one that keeps CF.
    #[inline(always)]
    pub(super) fn dec(&mut self, a: u64, res: u64, bits: u32) {
        let cf = self.cf_bit();
        let of = u64::from(sext(a, bits) == sext(1 << (bits - 1), bits));
        self.res = sext(res, bits);
        self.cv = (cf << 63) | ((cf ^ of) << 62);
        self.aux = (a ^ 1 ^ res) & AF;
    }

    /// Sets ZF, SF and PF from a result of `bits` bits, CF and OF as given: a shift. AF, undefined, reads as set, as
    /// AMD's silicon has it.
    #[inline(always)]
    pub(super) fn result_cf_of(&mut self, res: u64, bits: u32, cf: bool, of: bool) {
        self.res = sext(res, bits);
        self.cv = (u64::from(cf) << 63) | (u64::from(cf ^ of) << 62);
        self.aux = AF;
    }

    #[inline(always)]
    fn cf_bit(&self) -> u64 {
        self.cv >> 63
    }
    #[inline(always)]
    pub(super) fn cf(&self) -> bool {
        (self.cv as i64) < 0
    }
    #[inline(always)]
    pub(super) fn of(&self) -> bool {
        ((self.cv ^ (self.cv << 1)) as i64) < 0
    }
    #[inline(always)]
    pub(super) fn zf(&self) -> bool {
        self.res == 0
    }
    #[inline(always)]
    pub(super) fn sf(&self) -> bool {
        ((self.res ^ self.aux) as i64) < 0
    }
    #[inline(always)]
    pub(super) fn pf(&self) -> bool {
        ((self.res ^ (self.aux >> 8)) as u8).count_ones().is_multiple_of(2)
    }
    #[inline(always)]
    pub(super) fn af(&self) -> bool {
        self.aux & AF != 0
    }

    /// Replaces CF and keeps the others.
    #[inline(always)]
    pub(super) fn set_cf(&mut self, cf: bool) {
        let of = self.of();
        self.cv = (u64::from(cf) << 63) | (u64::from(cf ^ of) << 62);
    }

    /// Replaces OF and keeps the others.
    pub(super) fn set_of(&mut self, of: bool) {
        let cf = self.cf();
        self.cv = (u64::from(cf) << 63) | (u64::from(cf ^ of) << 62);
    }

    /// Replaces ZF and keeps the others (BSF, CMPXCHG8B, VERR and the like write it alone).
    pub(super) fn set_zf(&mut self, zf: bool) {
        let rflags = self.rflags() & !ZF;
        self.set_rflags(if zf { rflags | ZF } else { rflags });
    }

    /// The six flags in their RFLAGS positions; all other bits are clear.
    pub(super) fn rflags(&self) -> u64 {
        let bit = |set: bool, mask: u64| if set { mask } else { 0 };
        bit(self.cf(), CF)
            | bit(self.pf(), PF)
            | bit(self.af(), AF)
            | bit(self.zf(), ZF)
            | bit(self.sf(), SF)
            | bit(self.of(), OF)
    }

    /// Takes the six flags from an RFLAGS value.
    pub(super) fn set_rflags(&mut self, rflags: u64) {
        let (cf, of) = (rflags & CF != 0, rflags & OF != 0);
        let zf = rflags & ZF != 0;
        // A zero or one result; the flips then give SF and PF independently of it.
        self.res = u64::from(!zf);
        self.cv = (u64::from(cf) << 63) | (u64::from(cf ^ of) << 62);
        // Parity of 0 is even (PF set), of 1 odd (PF clear): flip one bit where that is not what is asked.
        let flip = u64::from((rflags & PF != 0) != zf);
        self.aux = (rflags & AF) | (flip << 8) | (((rflags & SF) >> 7) << 63);
    }

    /// Condition code `cc` of Jcc, SETcc and CMOVcc: the low four bits of their opcode.
    #[inline(always)]
    pub(super) fn condition(&self, cc: u8) -> bool {
        let positive = match cc >> 1 {
            0 => self.of(),
            1 => self.cf(),
            2 => self.zf(),
            3 => self.cf() | self.zf(),
            4 => self.sf(),
            5 => self.pf(),
            6 => self.sf() != self.of(),
            _ => self.zf() | (self.sf() != self.of()),
        };
        positive != (cc & 1 != 0)
    }
}

/// SHL of an operand of `bits` by 1 to 63; what lies above the operand size in `a` does not matter.
#[inline(always)]
pub(super) fn shl(flags: &mut Flags, a: u64, count: u32, bits: u32, want: bool) -> u64 {
    let res = a << count;
    if want {
        // The last bit moved out of the operand.
        let cf = count <= bits && a >> (bits - count) & 1 != 0;
        flags.result_cf_of(res, bits, cf, cf != (res >> (bits - 1) & 1 != 0));
    }
    res
}

/// SHR of an operand of `bits` by 1 to 63.
#[inline(always)]
pub(super) fn shr(flags: &mut Flags, a: u64, count: u32, bits: u32, want: bool) -> u64 {
    let a = a & (u64::MAX >> (64 - bits));
    let res = a >> count;
    if want {
        // Overflow is the operand's sign for a shift by one; by more it is undefined and reads as clear.
        flags.result_cf_of(res, bits, a >> (count - 1) & 1 != 0, res >> (bits - 2) & 1 != 0);
    }
    res
}

/// SAR of an operand of `bits` by 1 to 63.
#[inline(always)]
pub(super) fn sar(flags: &mut Flags, a: u64, count: u32, bits: u32, want: bool) -> u64 {
    let a = sext(a, bits) as i64;
    let res = (a >> count) as u64;
    if want {
        flags.result_cf_of(res, bits, a >> (count - 1) & 1 != 0, false);
    }
    res
}

/// ROL of an operand of `bits` by 1 to 63; writes CF and OF only.
#[inline(always)]
pub(super) fn rol(flags: &mut Flags, a: u64, count: u32, bits: u32, want: bool) -> u64 {
    let a = a & (u64::MAX >> (64 - bits));
    let count = count % bits;
    let res = if count == 0 { a } else { a << count | a >> (bits - count) };
    if want {
        let cf = res & 1 != 0;
        let of = cf != (res >> (bits - 1) & 1 != 0);
        flags.cv = (u64::from(cf) << 63) | (u64::from(cf ^ of) << 62);
    }
    res
}

/// ROR of an operand of `bits` by 1 to 63; writes CF and OF only.
#[inline(always)]
pub(super) fn ror(flags: &mut Flags, a: u64, count: u32, bits: u32, want: bool) -> u64 {
    let a = a & (u64::MAX >> (64 - bits));
    let count = count % bits;
    let res = if count == 0 { a } else { a >> count | a << (bits - count) };
    if want {
        let cf = res >> (bits - 1) & 1 != 0;
        let of = cf != (res >> (bits - 2) & 1 != 0);
        flags.cv = (u64::from(cf) << 63) | (u64::from(cf ^ of) << 62);
    }
    res
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_combination_is_representable() {
        for n in 0..64u64 {
            let pick = |bit: u64, mask: u64| if n >> bit & 1 == 1 { mask } else { 0 };
            let rflags = pick(0, CF) | pick(1, PF) | pick(2, AF) | pick(3, ZF) | pick(4, SF) | pick(5, OF);
            let mut flags = Flags::new();
            flags.set_rflags(rflags);
            assert_eq!(flags.rflags(), rflags);
        }
    }

    proptest! {
        #[test]
        fn add_and_sub_agree_with_wide_arithmetic(a: u64, b: u64, size in 0u32..4) {
            let bits = 8 << size;
            let mask = u64::MAX >> (64 - bits);
            let mut flags = Flags::new();
            flags.add(a, b, a.wrapping_add(b), bits);
            let (ua, ub) = (u128::from(a & mask), u128::from(b & mask));
            prop_assert_eq!(flags.cf(), ua + ub > u128::from(mask));
            let (sa, sb) = (i128::from(sext(a, bits) as i64), i128::from(sext(b, bits) as i64));
            let fits = |v: i128| v >= -(1 << (bits - 1)) && v < 1 << (bits - 1);
            prop_assert_eq!(flags.of(), !fits(sa + sb));
            prop_assert_eq!(flags.af(), (a & 15) + (b & 15) > 15);
            flags.sub(a, b, a.wrapping_sub(b), bits);
            prop_assert_eq!(flags.cf(), ua < ub);
            prop_assert_eq!(flags.of(), !fits(sa - sb));
            prop_assert_eq!(flags.zf(), ua == ub);
            prop_assert_eq!(flags.condition(0xc), sa < sb);
            prop_assert_eq!(flags.af(), (a & 15) < (b & 15));
        }
    }
}

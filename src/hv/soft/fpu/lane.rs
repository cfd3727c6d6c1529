//! The two formats of SSE arithmetic, and a 128-bit register as lanes of them and of integers.

use super::real::Number;
use super::real::Real;

/// A binary interchange format (IEEE 754-2019, section 3.4); values travel as bit patterns in a `u64`, because
/// moving NaNs through host floating point could change them.
pub(super) trait Lane {
    const BITS: u32;
    /// Significand bits with the implicit one.
    const PRECISION: u32;
    const EMAX: i32;
    const EMIN: i32 = 1 - Self::EMAX;
    const FRACTION: u64 = (1 << (Self::PRECISION - 1)) - 1;
    const SIGN: u64 = 1 << (Self::BITS - 1);
    const EXPONENT: u64 = Self::SIGN - 1 - Self::FRACTION;
    const QUIET: u64 = 1 << (Self::PRECISION - 2);
    /// The NaN that an invalid operation gives.
    const INDEFINITE: u64 = Self::SIGN | Self::EXPONENT | Self::QUIET;

    fn host_add(a: u64, b: u64) -> u64;
    fn host_sub(a: u64, b: u64) -> u64;
    fn host_mul(a: u64, b: u64) -> u64;
    fn host_div(a: u64, b: u64) -> u64;
    fn host_sqrt(a: u64) -> u64;
    fn host_lt(a: u64, b: u64) -> bool;

    #[inline(always)]
    fn is_nan(bits: u64) -> bool {
        bits & !Self::SIGN > Self::EXPONENT
    }
    fn is_signaling(bits: u64) -> bool {
        Self::is_nan(bits) && bits & Self::QUIET == 0
    }
    fn is_denormal(bits: u64) -> bool {
        bits & Self::EXPONENT == 0 && bits & Self::FRACTION != 0
    }
    /// A zero or a normal number.
    #[inline(always)]
    fn is_plain(bits: u64) -> bool {
        let exponent = bits & Self::EXPONENT;
        exponent != Self::EXPONENT && (exponent != 0 || bits & Self::FRACTION == 0)
    }
    /// A normal number with room below it: it did not come from rounding up a tiny one.
    #[inline(always)]
    fn is_safely_normal(bits: u64) -> bool {
        let exponent = bits & Self::EXPONENT;
        exponent > Self::FRACTION + 1 && exponent != Self::EXPONENT
    }
    fn zero(sign: bool) -> u64 {
        u64::from(sign) << (Self::BITS - 1)
    }
    fn infinity(sign: bool) -> u64 {
        Self::zero(sign) | Self::EXPONENT
    }
    /// A rounded significand (integer bit at bit 63; clear below the normal range) with its exponent.
    fn encode(sign: bool, exp: i32, sig: u64) -> u64 {
        let biased = if sig >> 63 == 1 { (exp + Self::EMAX) as u64 } else { 0 };
        Self::zero(sign) | biased << (Self::PRECISION - 1) | sig >> (64 - Self::PRECISION) & Self::FRACTION
    }
    /// Anything but a NaN.
    fn number(bits: u64) -> Number {
        let sign = bits & Self::SIGN != 0;
        let fraction = bits & Self::FRACTION;
        let biased = (bits & Self::EXPONENT) >> (Self::PRECISION - 1);
        let align = 128 - Self::PRECISION;
        match biased {
            0 if fraction == 0 => Number::Zero(sign),
            0 => Number::Finite(Real::new(sign, Self::EMIN, u128::from(fraction) << align)),
            _ if bits & Self::EXPONENT == Self::EXPONENT => Number::Infinity(sign),
            _ => Number::Finite(Real {
                sign,
                exp: biased as i32 - Self::EMAX,
                sig: u128::from(fraction | (Self::FRACTION + 1)) << align,
            }),
        }
    }
}

/// Single precision.
#[derive(Clone, Copy, Debug)]
pub(super) struct Single;
/// Double precision.
#[derive(Clone, Copy, Debug)]
pub(super) struct Double;

macro_rules! host {
    ($float:ty, $bits:ty) => {
        #[inline(always)]
        fn host_add(a: u64, b: u64) -> u64 {
            (<$float>::from_bits(a as $bits) + <$float>::from_bits(b as $bits)).to_bits() as u64
        }
        #[inline(always)]
        fn host_sub(a: u64, b: u64) -> u64 {
            (<$float>::from_bits(a as $bits) - <$float>::from_bits(b as $bits)).to_bits() as u64
        }
        #[inline(always)]
        fn host_mul(a: u64, b: u64) -> u64 {
            (<$float>::from_bits(a as $bits) * <$float>::from_bits(b as $bits)).to_bits() as u64
        }
        #[inline(always)]
        fn host_div(a: u64, b: u64) -> u64 {
            (<$float>::from_bits(a as $bits) / <$float>::from_bits(b as $bits)).to_bits() as u64
        }
        #[inline(always)]
        fn host_sqrt(a: u64) -> u64 {
            <$float>::from_bits(a as $bits).sqrt().to_bits() as u64
        }
        #[inline(always)]
        fn host_lt(a: u64, b: u64) -> bool {
            <$float>::from_bits(a as $bits) < <$float>::from_bits(b as $bits)
        }
    };
}

impl Lane for Single {
    const BITS: u32 = 32;
    const PRECISION: u32 = 24;
    const EMAX: i32 = 127;
    host!(f32, u32);
}

impl Lane for Double {
    const BITS: u32 = 64;
    const PRECISION: u32 = 53;
    const EMAX: i32 = 1023;
    host!(f64, u64);
}

pub(super) const fn bytes(value: u128) -> [u8; 16] {
    value.to_le_bytes()
}

pub(super) const fn from_bytes(lanes: [u8; 16]) -> u128 {
    u128::from_le_bytes(lanes)
}

#[inline(always)]
pub(super) fn words(value: u128) -> [u16; 8] {
    std::array::from_fn(|n| (value >> (16 * n)) as u16)
}

#[inline(always)]
pub(super) fn from_words(lanes: [u16; 8]) -> u128 {
    lanes.iter().rev().fold(0, |value, &lane| value << 16 | u128::from(lane))
}

#[inline(always)]
pub(super) const fn dwords(value: u128) -> [u32; 4] {
    [value as u32, (value >> 32) as u32, (value >> 64) as u32, (value >> 96) as u32]
}

#[inline(always)]
pub(super) const fn from_dwords([a, b, c, d]: [u32; 4]) -> u128 {
    a as u128 | (b as u128) << 32 | (c as u128) << 64 | (d as u128) << 96
}

#[inline(always)]
pub(super) const fn qwords(value: u128) -> [u64; 2] {
    [value as u64, (value >> 64) as u64]
}

#[inline(always)]
pub(super) const fn from_qwords([low, high]: [u64; 2]) -> u128 {
    low as u128 | (high as u128) << 64
}

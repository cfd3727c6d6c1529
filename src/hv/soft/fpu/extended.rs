//! x87's 80-bit format (Intel SDM volume 1, section 4.2.2 and table 8-3), and what the memory formats become in it.

use super::lane::Lane;
use super::real::Number;
use super::real::Real;

pub(super) const BIAS: i32 = 16383;
pub(super) const EMAX: i32 = 16383;
pub(super) const EMIN: i32 = -16382;
const EXPONENT: u16 = 0x7fff;
const SIGN: u16 = 0x8000;
pub(super) const INTEGER: u64 = 1 << 63;
pub(super) const QUIET: u64 = 1 << 62;

/// A register's 80 bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Extended {
    pub(super) sig: u64,
    /// Sign and biased exponent.
    pub(super) se: u16,
}

/// What the bits stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    Zero,
    Normal,
    /// Pseudo-denormals included: their set integer bit counts.
    Denormal,
    Infinity,
    Quiet,
    Signaling,
    /// Unnormals, pseudo-NaNs and pseudo-infinities, which the 8087 knew: invalid as operands.
    Unsupported,
}

/// The NaN that an invalid operation gives.
pub(super) const INDEFINITE: Extended = Extended { sig: INTEGER | QUIET, se: SIGN | EXPONENT };

impl Extended {
    pub(super) const fn sign(self) -> bool {
        self.se & SIGN != 0
    }

    pub(super) const fn biased(self) -> u16 {
        self.se & EXPONENT
    }

    pub(super) const fn with_sign(self, sign: bool) -> Self {
        Self { se: self.se & EXPONENT | (sign as u16) << 15, ..self }
    }

    pub(super) const fn quieted(self) -> Self {
        Self { sig: self.sig | QUIET, ..self }
    }

    pub(super) const fn zero(sign: bool) -> Self {
        Self { sig: 0, se: (sign as u16) << 15 }
    }

    pub(super) const fn infinity(sign: bool) -> Self {
        Self { sig: INTEGER, se: (sign as u16) << 15 | EXPONENT }
    }

    pub(super) const fn class(self) -> Class {
        match self.biased() {
            0 if self.sig == 0 => Class::Zero,
            0 => Class::Denormal,
            _ if self.sig & INTEGER == 0 => Class::Unsupported,
            EXPONENT if self.sig == INTEGER => Class::Infinity,
            EXPONENT if self.sig & QUIET != 0 => Class::Quiet,
            EXPONENT => Class::Signaling,
            _ => Class::Normal,
        }
    }

    pub(super) const fn is_nan(self) -> bool {
        matches!(self.class(), Class::Quiet | Class::Signaling)
    }

    /// The value; NaNs and unsupported encodings have none.
    pub(super) const fn number(self) -> Option<Number> {
        let sign = self.sign();
        Some(match self.class() {
            Class::Zero => Number::Zero(sign),
            Class::Infinity => Number::Infinity(sign),
            Class::Denormal => Number::Finite(Real::new(sign, EMIN, (self.sig as u128) << 64)),
            Class::Normal => {
                Number::Finite(Real { sign, exp: self.biased() as i32 - BIAS, sig: (self.sig as u128) << 64 })
            }
            Class::Quiet | Class::Signaling | Class::Unsupported => return None,
        })
    }

    /// A rounded significand (integer bit at bit 63; clear below the normal range) with its exponent.
    pub(super) const fn encode(sign: bool, exp: i32, sig: u64) -> Self {
        let biased = if sig & INTEGER != 0 { (exp + BIAS) as u16 } else { 0 };
        Self { sig, se: (sign as u16) << 15 | biased }
    }

    pub(super) const fn from_int(value: i64) -> Self {
        if value == 0 {
            return Self::zero(false);
        }
        let magnitude = value.unsigned_abs();
        let shift = magnitude.leading_zeros();
        Self::encode(value < 0, 63 - shift as i32, magnitude << shift)
    }

    /// A single or a double: always exact, and a NaN stays as quiet as it was.
    pub(super) fn from_lane<L: Lane>(bits: u64) -> Self {
        if L::is_nan(bits) {
            let sig = INTEGER | (bits & L::FRACTION) << (64 - L::PRECISION);
            return Self { sig, se: EXPONENT }.with_sign(bits & L::SIGN != 0);
        }
        match L::number(bits) {
            Number::Zero(sign) => Self::zero(sign),
            Number::Infinity(sign) => Self::infinity(sign),
            Number::Finite(real) => Self::encode(real.sign, real.exp, (real.sig >> 64) as u64),
        }
    }
}

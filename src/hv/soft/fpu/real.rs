//! Exact binary arithmetic with one correct rounding: what SSE and x87 arithmetic are both made of.
//!
//! A [`Real`] is a finite, non-zero number with a 128-bit significand whose lowest bit is sticky: it is set when
//! anything below it was lost. Operands have at most 64 significant bits, so sums, products, quotients and roots
//! carry at least 62 bits beyond them, and rounding a result once gives what infinite precision would give
//! (IEEE 754-2019, section 4). Formats, exceptions and what an overflow or underflow becomes are the callers'.

/// Rounding direction, as the RC fields of MXCSR and the x87 control word encode it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Nearest,
    Down,
    Up,
    Zero,
}

impl Mode {
    pub(super) const fn from_bits(rc: u32) -> Self {
        match rc & 3 {
            0 => Self::Nearest,
            1 => Self::Down,
            2 => Self::Up,
            _ => Self::Zero,
        }
    }

    /// Whether a magnitude too large for the format becomes infinity, and not the largest finite number.
    pub(super) fn overflows_to_infinity(self, sign: bool) -> bool {
        match self {
            Self::Nearest => true,
            Self::Down => sign,
            Self::Up => !sign,
            Self::Zero => false,
        }
    }
}

/// `(-1)^sign * sig / 2^127 * 2^exp`, with bit 127 of `sig` set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Real {
    pub(super) sign: bool,
    pub(super) exp: i32,
    pub(super) sig: u128,
}

/// A [`Real`] cut to a precision: `sig / 2^63 * 2^exp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rounded {
    pub(super) exp: i32,
    pub(super) sig: u64,
    pub(super) inexact: bool,
    /// The magnitude grew.
    pub(super) up: bool,
}

/// Shifts right; what falls out is remembered in bit 0.
pub(super) const fn shift_right_sticky(sig: u128, by: u32) -> u128 {
    match by {
        0 => sig,
        1..=127 => sig >> by | (sig << (128 - by) != 0) as u128,
        _ => (sig != 0) as u128,
    }
}

impl Real {
    /// Normalises; `sig` must not be zero.
    pub(super) const fn new(sign: bool, exp: i32, sig: u128) -> Self {
        let shift = sig.leading_zeros();
        Self { sign, exp: exp - shift as i32, sig: sig << shift }
    }

    /// A non-zero integer.
    pub(super) const fn from_magnitude(sign: bool, magnitude: u64) -> Self {
        Self::new(sign, 63, (magnitude as u128) << 64)
    }

    pub(super) const fn negate_if(self, negate: bool) -> Self {
        Self { sign: self.sign ^ negate, ..self }
    }

    /// Order of magnitudes.
    pub(super) fn cmp_magnitude(&self, other: &Self) -> std::cmp::Ordering {
        self.exp.cmp(&other.exp).then(self.sig.cmp(&other.sig))
    }

    /// The sum; `None` when it is exactly zero.
    pub(super) fn add(self, other: Self) -> Option<Self> {
        let (large, small) = if self.cmp_magnitude(&other).is_ge() { (self, other) } else { (other, self) };
        let apart = large.exp.abs_diff(small.exp);
        let (high, low) = (shift_right_sticky(large.sig, 1), shift_right_sticky(small.sig, apart.saturating_add(1)));
        let sum = if large.sign == small.sign { high + low } else { high - low };
        (sum != 0).then(|| Self::new(large.sign, large.exp + 1, sum))
    }

    /// The product of operands with at most 64 significant bits.
    pub(super) fn mul(self, other: Self) -> Self {
        let product = (self.sig >> 64) * (other.sig >> 64);
        Self::new(self.sign ^ other.sign, self.exp + other.exp + 1, product)
    }

    /// The quotient of operands with at most 64 significant bits.
    pub(super) fn div(self, other: Self) -> Self {
        let divisor = other.sig >> 64;
        let dividend = self.sig >> 1;
        let (first, rest) = (dividend / divisor, dividend % divisor);
        let rest = rest << 64;
        let (second, rest) = (rest / divisor, rest % divisor);
        let quotient = first << 64 | second | u128::from(rest != 0);
        Self::new(self.sign ^ other.sign, self.exp - other.exp, quotient)
    }

    /// The square root of the magnitude of an operand with at most 64 significant bits.
    pub(super) fn sqrt(self) -> Self {
        // In [1, 4) with an even exponent, two bits below the top: the root's integer bit is bit 63.
        let odd = self.exp & 1;
        let scaled = if odd == 1 { self.sig } else { self.sig >> 1 };
        let root = scaled.isqrt();
        let rest = scaled - root * root;
        // (root + 1/2)^2 = root^2 + root + 1/4.
        let half = u128::from(rest > root);
        Self::new(false, (self.exp - odd) / 2, root << 64 | half << 63 | u128::from(rest != 0))
    }

    /// Rounds to `precision` bits, with no limit to the exponent.
    pub(super) fn round(self, precision: u32, mode: Mode) -> Rounded {
        let mut rounded = round_sig(self.sign, self.sig, precision, mode);
        rounded.exp += self.exp;
        rounded
    }

    /// Rounds a number below the format's normal range at the position that `emin` fixes; the result's integer bit
    /// is set only if rounding carried into the normal range.
    pub(super) fn round_subnormal(self, precision: u32, emin: i32, mode: Mode) -> Rounded {
        let sig = shift_right_sticky(self.sig, emin.abs_diff(self.exp));
        let mut rounded = round_sig(self.sign, sig, precision, mode);
        rounded.exp = emin;
        rounded
    }

    /// Rounds to an integer's magnitude; `None` when it has more than 64 bits.
    pub(super) fn round_to_integer(self, mode: Mode) -> Option<(u64, bool, bool)> {
        if self.exp > 63 {
            return None;
        }
        // Units at bit 64 now, fraction below.
        let (sig, lost) = match 63 - self.exp {
            by @ 0..=127 => (self.sig >> by, by != 0 && self.sig << (128 - by) != 0),
            _ => (0, true),
        };
        let (units, fraction) = ((sig >> 64) as u64, sig as u64);
        let inexact = fraction != 0 || lost;
        let half = 1 << 63;
        let up = match mode {
            Mode::Nearest => fraction > half || fraction == half && (lost || units & 1 == 1),
            Mode::Down => self.sign && inexact,
            Mode::Up => !self.sign && inexact,
            Mode::Zero => false,
        };
        Some((units.checked_add(u64::from(up))?, inexact, up))
    }
}

fn round_sig(sign: bool, sig: u128, precision: u32, mode: Mode) -> Rounded {
    let rest = sig << precision;
    let kept = (sig >> (128 - precision)) as u64;
    let half = 1u128 << 127;
    let up = match mode {
        Mode::Nearest => rest > half || rest == half && kept & 1 == 1,
        Mode::Down => sign && rest != 0,
        Mode::Up => !sign && rest != 0,
        Mode::Zero => false,
    };
    let align = 64 - precision;
    let (sum, carry) = (kept << align).overflowing_add(u64::from(up) << align);
    let (sig, exp) = if carry { (1 << 63, 1) } else { (sum, 0) };
    Rounded { exp, sig, inexact: rest != 0, up }
}

/// A number as an operand of arithmetic; NaNs are dealt with before.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Number {
    Zero(bool),
    Finite(Real),
    Infinity(bool),
}

/// What arithmetic gives.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Outcome {
    Number(Number),
    Invalid,
    DivideByZero(bool),
}

impl Number {
    pub(super) fn sign(self) -> bool {
        match self {
            Self::Zero(sign) | Self::Infinity(sign) => sign,
            Self::Finite(real) => real.sign,
        }
    }

    pub(super) fn negate(self) -> Self {
        match self {
            Self::Zero(sign) => Self::Zero(!sign),
            Self::Infinity(sign) => Self::Infinity(!sign),
            Self::Finite(real) => Self::Finite(real.negate_if(true)),
        }
    }

    /// `mode` decides the sign of an exact zero (IEEE 754-2019, section 6.3).
    pub(super) fn add(self, other: Self, mode: Mode) -> Outcome {
        let zero = mode == Mode::Down;
        Outcome::Number(match (self, other) {
            (Self::Infinity(a), Self::Infinity(b)) if a != b => return Outcome::Invalid,
            (Self::Infinity(sign), _) | (_, Self::Infinity(sign)) => Self::Infinity(sign),
            (Self::Zero(a), Self::Zero(b)) => Self::Zero(if a == b { a } else { zero }),
            (Self::Zero(_), finite) | (finite, Self::Zero(_)) => finite,
            (Self::Finite(a), Self::Finite(b)) => a.add(b).map_or(Self::Zero(zero), Self::Finite),
        })
    }

    pub(super) fn mul(self, other: Self) -> Outcome {
        let sign = self.sign() ^ other.sign();
        Outcome::Number(match (self, other) {
            (Self::Infinity(_), Self::Zero(_)) | (Self::Zero(_), Self::Infinity(_)) => return Outcome::Invalid,
            (Self::Infinity(_), _) | (_, Self::Infinity(_)) => Self::Infinity(sign),
            (Self::Zero(_), _) | (_, Self::Zero(_)) => Self::Zero(sign),
            (Self::Finite(a), Self::Finite(b)) => Self::Finite(a.mul(b)),
        })
    }

    pub(super) fn div(self, other: Self) -> Outcome {
        let sign = self.sign() ^ other.sign();
        Outcome::Number(match (self, other) {
            (Self::Infinity(_), Self::Infinity(_)) | (Self::Zero(_), Self::Zero(_)) => return Outcome::Invalid,
            (Self::Infinity(_), _) => Self::Infinity(sign),
            (Self::Zero(_), _) | (_, Self::Infinity(_)) => Self::Zero(sign),
            (Self::Finite(_), Self::Zero(_)) => return Outcome::DivideByZero(sign),
            (Self::Finite(a), Self::Finite(b)) => Self::Finite(a.div(b)),
        })
    }

    pub(super) fn sqrt(self) -> Outcome {
        Outcome::Number(match self {
            Self::Zero(sign) => Self::Zero(sign),
            Self::Infinity(true) => return Outcome::Invalid,
            Self::Infinity(false) => self,
            Self::Finite(real) if real.sign => return Outcome::Invalid,
            Self::Finite(real) => Self::Finite(real.sqrt()),
        })
    }

    /// Order of values; zeros are equal.
    pub(super) fn compare(self, other: Self) -> std::cmp::Ordering {
        use std::cmp::Ordering;
        let rank = |number: Self| match number {
            Self::Zero(_) => 0,
            Self::Finite(real) => 1 - 2 * i32::from(real.sign),
            Self::Infinity(sign) => 2 - 4 * i32::from(sign),
        };
        match (self, other) {
            (Self::Finite(a), Self::Finite(b)) if a.sign == b.sign => {
                let order = a.cmp_magnitude(&b);
                if a.sign { order.reverse() } else { order }
            }
            _ => rank(self).cmp(&rank(other)).then(Ordering::Equal),
        }
    }
}

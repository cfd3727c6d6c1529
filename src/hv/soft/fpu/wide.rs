//! Elementary functions to about 120 bits, for x87's transcendental instructions.
//!
//! Arguments are reduced until a Taylor series converges in a few tens of terms, which is summed by Horner's rule on
//! 128-bit significands. The error stays below 2^-115 of the value, so that rounding to 64 bits once gives the
//! correctly rounded result but where the exact one is closer than that to a rounding boundary.

use super::real::Real;

const ONE: Real = Real { sign: false, exp: 0, sig: 1 << 127 };
const TWO: Real = Real { exp: 1, ..ONE };
pub(super) const PI: Real = Real { sign: false, exp: 1, sig: 0xc90f_daa2_2168_c234_c4c6_628b_80dc_1cd1 };
const LN_2: Real = Real { sign: false, exp: -1, sig: 0xb172_17f7_d1cf_79ab_c9e3_b398_03f2_f6af };
const LOG2_E: Real = Real { sign: false, exp: 0, sig: 0xb8aa_3b29_5c17_f0bb_be87_fed0_691d_3e88 };
/// The significand of the square root of two.
const ROOT_2: u128 = 0xb504_f333_f9de_6484_597d_89b3_754a_be9f;

/// Pi over two as silicon has it: in units of 2^-67, of which the lowest two are zero. It makes large arguments
/// wrong in the same way as on silicon.
const HALF_PI: u128 = 0xc_90fd_aa22_168c_234c;

/// The high half of a product of 128-bit significands.
fn mul_high(a: u128, b: u128) -> u128 {
    let mask = u128::from(u64::MAX);
    let (ah, al, bh, bl) = (a >> 64, a & mask, b >> 64, b & mask);
    let (mid1, mid2) = (ah * bl, al * bh);
    let carry = (((al * bl) >> 64) + (mid1 & mask) + (mid2 & mask)) >> 64;
    ah * bh + (mid1 >> 64) + (mid2 >> 64) + carry
}

pub(super) fn mul(a: Real, b: Real) -> Real {
    Real::new(a.sign ^ b.sign, a.exp + b.exp + 1, mul_high(a.sig, b.sig))
}

pub(super) fn div(a: Real, b: Real) -> Real {
    let (mut rest, below) = if a.sig >= b.sig { (a.sig - b.sig, false) } else { (a.sig, true) };
    let mut quotient = u128::from(!below);
    for _ in 0..127 + u32::from(below) {
        let carry = rest >> 127 == 1;
        rest <<= 1;
        quotient <<= 1;
        if carry || rest >= b.sig {
            rest = rest.wrapping_sub(b.sig);
            quotient |= 1;
        }
    }
    Real::new(a.sign ^ b.sign, a.exp - b.exp - i32::from(below), quotient)
}

fn div_small(a: Real, by: u64) -> Real {
    Real::new(a.sign, a.exp, a.sig / u128::from(by))
}

/// The sum where it cannot be zero.
fn add(a: Real, b: Real) -> Real {
    a.add(b).unwrap_or(Real { exp: a.exp - 127, ..ONE })
}

fn sub(a: Real, b: Real) -> Real {
    add(a, b.negate_if(true))
}

/// One Newton step from the root's first 66 bits.
fn sqrt(a: Real) -> Real {
    let root = a.sqrt();
    let sum = add(root, div(a, root));
    Real { exp: sum.exp - 1, ..sum }
}

/// An argument less the nearest multiple of pi / 2, and that multiple's number.
pub(super) fn reduce(x: Real) -> (Option<Real>, u64) {
    if x.exp < -1 {
        return (Some(x), 0);
    }
    let steps = x.exp + 4;
    let first = steps.min(60);
    let start = (x.sig >> 64) << first;
    let (mut quotient, mut rest) = ((start / HALF_PI) as u64, start % HALF_PI);
    for _ in first..steps {
        rest <<= 1;
        quotient = quotient.wrapping_shl(1);
        if rest >= HALF_PI {
            rest -= HALF_PI;
            quotient |= 1;
        }
    }
    let past = 2 * rest > HALF_PI;
    if past {
        rest = HALF_PI - rest;
        quotient = quotient.wrapping_add(1);
    }
    let quotient = if x.sign { quotient.wrapping_neg() } else { quotient };
    ((rest != 0).then(|| Real::new(x.sign ^ past, 60, rest)), quotient)
}

/// The sum 1 - r^2 / d(1) * (1 - r^2 / d(2) * ...), with the factors of factorials in `d`.
fn alternating(r: Real, d: impl Fn(u64) -> u64) -> Real {
    let square = mul(r, r).negate_if(true);
    (1..=17).rev().fold(ONE, |sum, k| add(ONE, div_small(mul(square, sum), d(k))))
}

/// The sine of an argument of at most pi / 4.
pub(super) fn sin(r: Real) -> Real {
    mul(r, alternating(r, |k| 2 * k * (2 * k + 1)))
}

/// The cosine of an argument of at most pi / 4.
pub(super) fn cos(r: Real) -> Real {
    alternating(r, |k| (2 * k - 1) * 2 * k)
}

/// The sum 1 + z / 3 + z^2 / 5 + ..., for |z| below 0.04.
fn odd_reciprocals(z: Real) -> Real {
    (0..=29).rev().fold(div_small(ONE, 61), |sum, k| add(div_small(ONE, 2 * k + 1), mul(z, sum)))
}

/// The arc tangent of a positive argument of at most one.
fn atan_small(t: Real) -> Real {
    let mut t = t;
    let mut doublings = 0;
    while t.exp >= -3 {
        // tan(a / 2) = tan a / (1 + sqrt(1 + tan^2 a))
        t = div(t, add(ONE, sqrt(add(ONE, mul(t, t)))));
        doublings += 1;
    }
    let angle = mul(t, odd_reciprocals(mul(t, t).negate_if(true)));
    Real { exp: angle.exp + doublings, ..angle }
}

/// The angle of the point (x, y), in the open range from -pi to pi.
pub(super) fn atan2(y: Real, x: Real) -> Real {
    let (up, right) = (Real { sign: false, ..y }, Real { sign: false, ..x });
    let half = Real { exp: 0, ..PI };
    let angle = if up.cmp_magnitude(&right).is_le() {
        let angle = atan_small(div(up, right));
        if x.sign { sub(PI, angle) } else { angle }
    } else {
        let angle = atan_small(div(right, up));
        if x.sign { add(half, angle) } else { sub(half, angle) }
    };
    Real { sign: y.sign, ..angle }
}

/// 2^x - 1, for |x| of at most one.
pub(super) fn exp2_minus_1(x: Real) -> Real {
    let y = mul(x, LN_2);
    mul(y, (2..=34).rev().fold(ONE, |sum, k| add(ONE, div_small(mul(y, sum), k))))
}

/// Binary logarithm of a positive number that is not a power of two.
pub(super) fn log2(x: Real) -> Real {
    let (exp, scaled) = if x.sig > ROOT_2 { (x.exp + 1, -1) } else { (x.exp, 0) };
    let m = Real { sign: false, exp: scaled, sig: x.sig };
    let fraction = log2_ratio(div(sub(m, ONE), add(m, ONE)));
    match exp {
        0 => fraction,
        _ => add(Real::from_magnitude(exp < 0, exp.unsigned_abs().into()), fraction),
    }
}

/// Binary logarithm of 1 + x, for x above -1.
pub(super) fn log2_1p(x: Real) -> Real {
    if x.exp >= -2 {
        let sum = add(ONE, x);
        return if sum.sig == 1 << 127 {
            Real::from_magnitude(sum.exp < 0, sum.exp.unsigned_abs().into())
        } else {
            log2(sum)
        };
    }
    log2_ratio(div(x, add(TWO, x)))
}

/// log2((1 + z) / (1 - z)).
fn log2_ratio(z: Real) -> Real {
    let sum = mul(z, odd_reciprocals(mul(z, z)));
    let product = mul(sum, LOG2_E);
    Real { exp: product.exp + 1, ..product }
}

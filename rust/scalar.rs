//! Element types: what is computed with ([`Real`]) and what is stored ([`Element`]).

use crate::isa::{Level, Simd};
use half::{bf16, f16};

/// Storage type of a view.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// IEEE double precision.
    F64,
    /// bfloat16: storage only, arithmetic is at least single precision.
    Bf16,
    /// IEEE half precision: storage only.
    F16,
}

impl Dtype {
    /// Size of one element in bytes; also its required alignment.
    pub fn size(self) -> usize {
        match self {
            Dtype::F64 => 8,
            Dtype::F32 => 4,
            Dtype::Bf16 | Dtype::F16 => 2,
        }
    }
}

/// Working precision of products and factors: `f32` or `f64`.
pub trait Real:
    Copy
    + crate::scratch::Plain
    + PartialOrd
    + Default
    + Send
    + Sync
    + Element
    + std::fmt::Debug
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::AddAssign
    + 'static
{
    /// Vectors of this type at an instruction-set level.
    type Simd<L: Level>: Simd<Self>;
    /// Unit roundoff, half the distance from 1 to the next number.
    const UNIT: f64;
    /// Rows of reduction that one packed block spans.
    const KC: usize;
    /// Largest absolute value at which squares and products of factors still have room to spare.
    const SAFE_MAX: f64;
    /// The largest number.
    const MAX: f64;
    /// Powers of two up to this one, times a hyperparameter, stay finite; larger than the reach of subnormals.
    const SAFE_EXPONENT: f64;
    /// Exact widening.
    fn f64(self) -> f64;
    /// Rounds to nearest.
    fn of(x: f64) -> Self;
    /// Neither infinite nor NaN.
    fn finite(self) -> bool;
    /// Absolute value.
    fn abs(self) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;
}

macro_rules! real {
    ($t:ty, $simd:ident, $unit:expr, $kc:expr, $max:expr, $exponent:expr) => {
        impl Real for $t {
            type Simd<L: Level> = L::$simd;
            const UNIT: f64 = $unit;
            const KC: usize = $kc;
            const SAFE_MAX: f64 = $max;
            const MAX: f64 = <$t>::MAX as f64;
            const SAFE_EXPONENT: f64 = $exponent;
            #[inline(always)]
            fn f64(self) -> f64 {
                self.into()
            }
            #[inline(always)]
            fn of(x: f64) -> Self {
                x as $t
            }
            #[inline(always)]
            fn finite(self) -> bool {
                self.is_finite()
            }
            #[inline(always)]
            fn abs(self) -> Self {
                <$t>::abs(self)
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                <$t>::sqrt(self)
            }
        }
    };
}
real!(f32, F32, 1.0 / (1u64 << 24) as f64, 256, 1e12, 120.0);
real!(f64, F64, 1.0 / (1u64 << 53) as f64, 192, 1e100, 1000.0);

/// A type that weights, gradients and states may be stored in.
///
/// # Safety
/// `DTYPE` has the size and the alignment of the type, and every bit pattern is a value.
pub unsafe trait Element: Copy + 'static {
    /// Its tag.
    const DTYPE: Dtype;
    /// Value in working precision.
    fn load<W: Real>(self) -> W;
    /// Rounds a working-precision value to nearest; to two bytes by way of single precision. What is beyond IEEE half's
    /// range becomes its largest number: an infinite state would stop its matrix for ever.
    fn store<W: Real>(w: W) -> Self;
    /// Rounds a number to one of its two neighbours, up with the probability that `word`, uniform, is right on average;
    /// a neighbour beyond the range is the largest number. Formats of four bytes and more are rounded to nearest.
    #[inline(always)]
    fn store_drawn<W: Real>(w: W, _word: u32) -> Self {
        Self::store(w)
    }
}

// SAFETY: a number, and its own tag.
unsafe impl Element for f32 {
    const DTYPE: Dtype = Dtype::F32;
    #[inline(always)]
    fn load<W: Real>(self) -> W {
        W::of(f64::from(self))
    }
    #[inline(always)]
    fn store<W: Real>(w: W) -> Self {
        w.f64() as f32
    }
}

// SAFETY: a number, and its own tag.
unsafe impl Element for f64 {
    const DTYPE: Dtype = Dtype::F64;
    #[inline(always)]
    fn load<W: Real>(self) -> W {
        W::of(self)
    }
    #[inline(always)]
    fn store<W: Real>(w: W) -> Self {
        w.f64()
    }
}

// SAFETY: a number, and its own tag.
unsafe impl Element for bf16 {
    const DTYPE: Dtype = Dtype::Bf16;
    #[inline(always)]
    fn load<W: Real>(self) -> W {
        W::of(f64::from(f32::from_bits(u32::from(self.to_bits()) << 16)))
    }
    // Written out, not `bf16::from_f32`: without its early return for NaN the loop vectorises.
    #[inline(always)]
    fn store<W: Real>(w: W) -> Self {
        let bits = (w.f64() as f32).to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let nan = (bits >> 16) | 0x40;
        let is_nan = bits & 0x7fff_ffff > 0x7f80_0000;
        bf16::from_bits((if is_nan { nan } else { rounded }) as u16)
    }
    #[inline(always)]
    fn store_drawn<W: Real>(w: W, word: u32) -> Self {
        let bits = (w.f64() as f32).to_bits();
        let size = bits & 0x7fff_ffff;
        let drawn = (size.min(0x7f7f_0000) + (word >> 16)) >> 16;
        let rounded = if size > 0x7f80_0000 { (size >> 16) | 0x40 } else { drawn };
        bf16::from_bits(((bits >> 16) & 0x8000 | rounded) as u16)
    }
}

// SAFETY: a number, and its own tag.
unsafe impl Element for f16 {
    const DTYPE: Dtype = Dtype::F16;
    #[inline(always)]
    fn load<W: Real>(self) -> W {
        W::of(f64::from(self.to_f32_const()))
    }
    #[inline(always)]
    fn store<W: Real>(w: W) -> Self {
        let x = w.f64() as f32;
        let x = if x > 65504.0 { 65504.0 } else { x };
        f16::from_f32_const(if x < -65504.0 { -65504.0 } else { x })
    }
    #[inline(always)]
    fn store_drawn<W: Real>(w: W, word: u32) -> Self {
        const MOST: u32 = 65504.0f32.to_bits();
        const NORMAL: u32 = 113; // exponent of the smallest normal number
        let bits = (w.f64() as f32).to_bits();
        let (size, exponent) = ((bits & 0x7fff_ffff).min(MOST), (bits >> 23) & 0xff);
        let rounded = if bits & 0x7fff_ffff > 0x7f80_0000 {
            0x7e00
        } else if exponent >= NORMAL {
            ((size + (word >> 19)) >> 13) - ((NORMAL - 1) << 10)
        } else {
            // Multiples of 2⁻²⁴: `drop` bits of the significand go.
            let drop = 13 + NORMAL - exponent;
            let significand = u64::from(size & 0x7f_ffff | 0x80_0000);
            if drop > 32 { 0 } else { ((significand + u64::from(word >> (32 - drop))) >> drop) as u32 }
        };
        f16::from_bits(((bits >> 16) & 0x8000 | rounded) as u16)
    }
}

/// Runs `$body` with `$E` bound to the element type that `$dtype` names.
macro_rules! with_element {
    ($dtype:expr, $E:ident => $body:expr) => {
        match $dtype {
            $crate::scalar::Dtype::F32 => {
                type $E = f32;
                $body
            }
            $crate::scalar::Dtype::F64 => {
                type $E = f64;
                $body
            }
            $crate::scalar::Dtype::Bf16 => {
                type $E = half::bf16;
                $body
            }
            $crate::scalar::Dtype::F16 => {
                type $E = half::f16;
                $body
            }
        }
    };
}
pub(crate) use with_element;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_beyond_half_precision_becomes_its_largest_number() {
        assert_eq!(<f16 as Element>::store(1e6f32), f16::MAX);
        assert_eq!(<f16 as Element>::store(f64::NEG_INFINITY), f16::MIN);
        assert_eq!(<f16 as Element>::store(65504.0f32), f16::MAX);
        assert!(<f16 as Element>::store(f32::NAN).is_nan());
    }

    #[test]
    fn drawn_neighbours_come_as_often_as_is_right_on_average() {
        fn check<E: Element>(x: f32, exact: f64, words: u32) {
            let shift = 32 - words.ilog2();
            let each = |k: u32| E::store_drawn::<f32>(x, k << shift).load::<f64>();
            let mean = (0..words).map(each).sum::<f64>() / f64::from(words);
            let gap = each(words - 1) - each(0);
            assert!((mean - exact).abs() <= gap.abs() / f64::from(words), "{x:e}: {mean:e}");
        }
        for x in
            [1.0f32, 1.003_456, -3.241_592_7, 1.999_999_9, 7.3e-6, -6.1e-5, 3.3e-8, 1e-9, 0.0, 65503.0, 0.1]
        {
            check::<bf16>(x, f64::from(x), 1 << 16);
            check::<f16>(x, f64::from(x), 1 << 16);
        }
        for x in [f32::MAX, f32::INFINITY] {
            assert_eq!(<bf16 as Element>::store_drawn(x, u32::MAX), bf16::MAX);
            assert_eq!(<f16 as Element>::store_drawn(-x, u32::MAX), f16::MIN);
        }
        assert!(<bf16 as Element>::store_drawn(f32::NAN, u32::MAX).is_nan());
        assert!(<f16 as Element>::store_drawn(f32::NAN, u32::MAX).is_nan());
        assert_eq!(<f32 as Element>::store_drawn(0.1f64, u32::MAX), 0.1f32);
    }

    #[test]
    fn bf16_rounds_to_nearest_even_like_half() {
        for hi in 0..=u16::MAX {
            for lo in [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let x = f32::from_bits((u32::from(hi) << 16) | lo);
                let ours = <bf16 as Element>::store(x);
                let theirs = bf16::from_f32(x);
                assert!(ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()), "{x:e}");
            }
        }
    }
}

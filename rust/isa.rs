//! Instruction sets: one generic algorithm over a small vector trait, one `impl` a level, chosen at run time.
//!
//! A piece of work is a [`Kernel`]. [`Isa::run`] enters it through a function compiled for the level, and
//! everything inlined below (`#[inline(always)]`) is compiled with that level's instructions, hand-written vectors and
//! plain loops alike. `ORTHDION_ISA` (`portable`, `avx2`, `avx512`, `neon`) pins a level; one that the processor lacks
//! is ignored.

use crate::scalar::Real;
use std::sync::OnceLock;

/// Vectors of `T`.
pub trait Simd<T: Copy>: Copy {
    /// One register.
    type V: Copy;
    /// Elements in a register.
    const LANES: usize;
    /// All lanes zero.
    fn zero() -> Self::V;
    /// Every lane `x`.
    fn splat(x: T) -> Self::V;
    /// `LANES` elements from `p`, unaligned.
    ///
    /// # Safety
    /// `p` is readable for `LANES` elements, and the processor has the level's instructions.
    unsafe fn load(p: *const T) -> Self::V;
    /// `LANES` elements to `p`, unaligned.
    ///
    /// # Safety
    /// `p` is writable for `LANES` elements, and the processor has the level's instructions.
    unsafe fn store(p: *mut T, v: Self::V);
    /// `a·b + c`
    fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
}

/// An instruction-set level. A product's register tile is up to `MV` vectors by `NR` scalars.
pub trait Level: Copy + 'static {
    /// Single-precision vectors.
    type F32: Simd<f32>;
    /// Double-precision vectors.
    type F64: Simd<f64>;
    /// Most vectors along the contiguous side of a tile.
    const MV: usize;
    /// Width of a tile.
    const NR: usize;
    /// Computes a tile of `mv` vectors; see [`crate::gemm::tile`].
    ///
    /// # Safety
    /// As [`crate::gemm::tile`].
    unsafe fn tile<T: Real>(mv: usize, t: crate::gemm::Tile<T>);
}

/// Work to be compiled once a level. `run` must be `#[inline(always)]`.
pub(crate) trait Kernel {
    type Out;
    fn run<L: Level>(self) -> Self::Out;
}

/// An available level.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Isa {
    /// Whatever the target guarantees.
    Portable,
    /// AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    #[non_exhaustive]
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    #[cfg(target_arch = "x86_64")]
    #[non_exhaustive]
    Avx512,
    /// Armv8 Advanced SIMD.
    #[cfg(target_arch = "aarch64")]
    #[non_exhaustive]
    Neon,
}

impl Isa {
    /// The levels that this processor has, worst first.
    pub fn available() -> Vec<Isa> {
        #[allow(unused_mut)]
        let mut levels = vec![Isa::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            if avx2 {
                levels.push(Isa::Avx2);
            }
            if avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                levels.push(Isa::Avx512);
            }
        }
        #[cfg(target_arch = "aarch64")]
        if std::arch::is_aarch64_feature_detected!("neon") {
            levels.push(Isa::Neon);
        }
        levels
    }

    /// Lower-case name, as `ORTHDION_ISA` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => "avx512",
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => "neon",
        }
    }

    /// The level in use: the best available one, unless `ORTHDION_ISA` names another. Read once.
    pub fn current() -> Isa {
        static CURRENT: OnceLock<Isa> = OnceLock::new();
        *CURRENT.get_or_init(|| {
            let levels = Isa::available();
            let pinned = std::env::var("ORTHDION_ISA").unwrap_or_default();
            let found = levels.iter().find(|l| l.name() == pinned);
            *found.unwrap_or(&levels[levels.len() - 1])
        })
    }

    /// Runs `kernel` compiled for this level.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Out {
        match self {
            Isa::Portable => kernel.run::<Portable>(),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: an `Isa` of that name is only made by `available`, after detection.
            Isa::Avx2 => unsafe { x86::enter_avx2(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx512 => unsafe { x86::enter_avx512(kernel) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above.
            Isa::Neon => unsafe { arm::enter_neon(kernel) },
        }
    }
}

/// Asks for `bytes` bytes from `p` on to be brought into the second-level cache. Only a hint: any address will do.
#[inline(always)]
pub(crate) fn prefetch(p: *const u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in 0..bytes.div_ceil(64) {
        // SAFETY: SSE is part of x86-64, and a prefetch never faults.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T1>(p.wrapping_add(64 * line).cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (p, bytes);
}

/// Implements `Level::tile` by a match over the vectors of a tile.
macro_rules! tiles {
    ($nr:literal: $($mv:literal)+) => {
        #[inline(always)]
        unsafe fn tile<T: Real>(mv: usize, t: crate::gemm::Tile<T>) {
            // SAFETY: the caller's contract is that of `gemm::tile`.
            unsafe {
                match mv {
                    $($mv => crate::gemm::tile::<T, T::Simd<Self>, $mv, $nr>(t),)+
                    _ => unreachable!("a tile has at most MV vectors"),
                }
            }
        }
    };
}

/// The level that every processor has: arrays that the compiler may vectorise.
#[derive(Clone, Copy)]
pub struct Portable;

impl Level for Portable {
    type F32 = Portable;
    type F64 = Portable;
    const MV: usize = 2;
    const NR: usize = 4;
    tiles!(4: 1 2);
}

macro_rules! portable {
    ($t:ty, $n:literal) => {
        impl Simd<$t> for Portable {
            type V = [$t; $n];
            const LANES: usize = $n;
            #[inline(always)]
            fn zero() -> Self::V {
                [0.0; $n]
            }
            #[inline(always)]
            fn splat(x: $t) -> Self::V {
                [x; $n]
            }
            #[inline(always)]
            unsafe fn load(p: *const $t) -> Self::V {
                // SAFETY: the caller's; arrays of scalars need no more alignment than `read_unaligned` assumes.
                unsafe { p.cast::<Self::V>().read_unaligned() }
            }
            #[inline(always)]
            unsafe fn store(p: *mut $t, v: Self::V) {
                // SAFETY: the caller's.
                unsafe { p.cast::<Self::V>().write_unaligned(v) }
            }
            #[inline(always)]
            fn fma(a: Self::V, b: Self::V, mut c: Self::V) -> Self::V {
                for l in 0..$n {
                    c[l] += a[l] * b[l]; // two roundings: a fused one would be a library call here
                }
                c
            }
        }
    };
}
portable!(f32, 4);
portable!(f64, 2);

/// One `impl Simd` from a family of intrinsics.
#[allow(unused_macros)]
macro_rules! intrinsics {
    (
        $level:ident, $t:ty, $v:ty, $n:literal, $zero:expr, $splat:ident, $load:ident, $store:ident,
        |$a:ident, $b:ident, $c:ident| $fma:expr
    ) => {
        impl Simd<$t> for $level {
            type V = $v;
            const LANES: usize = $n;
            #[inline(always)]
            fn zero() -> Self::V {
                // SAFETY: only reached through `Isa::run`, which has proven the level.
                #[allow(unused_unsafe)]
                unsafe {
                    $zero
                }
            }
            #[inline(always)]
            fn splat(x: $t) -> Self::V {
                // SAFETY: as in `zero`.
                unsafe { $splat(x) }
            }
            #[inline(always)]
            unsafe fn load(p: *const $t) -> Self::V {
                // SAFETY: the caller's.
                unsafe { $load(p) }
            }
            #[inline(always)]
            unsafe fn store(p: *mut $t, v: Self::V) {
                // SAFETY: the caller's.
                unsafe { $store(p, v) }
            }
            #[inline(always)]
            fn fma($a: Self::V, $b: Self::V, $c: Self::V) -> Self::V {
                // SAFETY: as in `zero`.
                unsafe { $fma }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Kernel, Level, Simd};
    use crate::scalar::Real;
    use std::arch::x86_64::*;

    /// AVX2 with FMA: 16 registers, 12 of them accumulators.
    #[derive(Clone, Copy)]
    pub struct Avx2;
    /// AVX-512: 32 registers, 24 of them accumulators.
    #[derive(Clone, Copy)]
    pub struct Avx512;

    impl Level for Avx2 {
        type F32 = Avx2;
        type F64 = Avx2;
        const MV: usize = 2;
        const NR: usize = 6;
        tiles!(6: 1 2);
    }

    impl Level for Avx512 {
        type F32 = Avx512;
        type F64 = Avx512;
        const MV: usize = 3;
        const NR: usize = 8;
        tiles!(8: 1 2 3);
    }

    intrinsics!(
        Avx2,
        f32,
        __m256,
        8,
        _mm256_setzero_ps(),
        _mm256_set1_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        |a, b, c| _mm256_fmadd_ps(a, b, c)
    );
    intrinsics!(
        Avx2,
        f64,
        __m256d,
        4,
        _mm256_setzero_pd(),
        _mm256_set1_pd,
        _mm256_loadu_pd,
        _mm256_storeu_pd,
        |a, b, c| _mm256_fmadd_pd(a, b, c)
    );
    intrinsics!(
        Avx512,
        f32,
        __m512,
        16,
        _mm512_setzero_ps(),
        _mm512_set1_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        |a, b, c| _mm512_fmadd_ps(a, b, c)
    );
    intrinsics!(
        Avx512,
        f64,
        __m512d,
        8,
        _mm512_setzero_pd(),
        _mm512_set1_pd,
        _mm512_loadu_pd,
        _mm512_storeu_pd,
        |a, b, c| _mm512_fmadd_pd(a, b, c)
    );

    /// # Safety
    /// The processor has AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn enter_avx2<K: Kernel>(kernel: K) -> K::Out {
        kernel.run::<Avx2>()
    }

    /// # Safety
    /// The processor has AVX2, FMA and AVX-512 F, BW, DQ, VL.
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
    pub unsafe fn enter_avx512<K: Kernel>(kernel: K) -> K::Out {
        kernel.run::<Avx512>()
    }
}

#[cfg(target_arch = "aarch64")]
mod arm {
    use super::{Kernel, Level, Simd};
    use crate::scalar::Real;
    use std::arch::aarch64::*;

    /// Advanced SIMD: 32 registers of 128 bits.
    #[derive(Clone, Copy)]
    pub struct Neon;

    impl Level for Neon {
        type F32 = Neon;
        type F64 = Neon;
        const MV: usize = 3;
        const NR: usize = 8;
        tiles!(8: 1 2 3);
    }

    intrinsics!(Neon, f32, float32x4_t, 4, vdupq_n_f32(0.0), vdupq_n_f32, vld1q_f32, vst1q_f32, |a, b, c| {
        vfmaq_f32(c, a, b)
    });
    intrinsics!(Neon, f64, float64x2_t, 2, vdupq_n_f64(0.0), vdupq_n_f64, vld1q_f64, vst1q_f64, |a, b, c| {
        vfmaq_f64(c, a, b)
    });

    /// # Safety
    /// The processor has Advanced SIMD.
    #[target_feature(enable = "neon")]
    pub unsafe fn enter_neon<K: Kernel>(kernel: K) -> K::Out {
        kernel.run::<Neon>()
    }
}

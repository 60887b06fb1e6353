//! Products of strided matrices with a general epilogue.
//!
//! One driver computes every large product of the library:
//!
//! ```text
//! out ← β·out + α·(lhs · rhs) + Σ cₜ·plusₜ          lhs I×K, rhs K×J, out I×J
//! ```
//!
//! `rhs` is a linear combination of up to two views, formed while it is packed. So `M + G`, or Nesterov's `κM + G`,
//! is projected without ever being stored, whatever the two are stored in. `lhs` is packed once and serves all threads.
//! Callers put their *large* operand on the right: the left one stays in cache while panels of the right one pass by.
//!
//! The layout follows Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (2008): blocks of
//! `KC` in the reduction, panels of `MV` vectors on the left, of `NR` columns on the right. Each element of `out` is
//! summed in one fixed order, so results are the same bits for any number of threads.

mod block;
mod driver;
mod epilogue;
pub(crate) mod line;
mod pack;
pub(crate) mod pairs;

pub(crate) use driver::{Product, Region};
pub(crate) use pack::{Packed, SendPtr, Terms};

use crate::isa::{Isa, Simd};
use crate::scalar::Real;
use crate::view::{Mat, MatMut};

/// Where work runs: the instruction set and how many threads it may use.
#[derive(Clone, Copy, Debug)]
pub struct Context {
    /// Instruction-set level.
    pub isa: Isa,
    /// Threads, at least 1.
    pub threads: usize,
    /// Round the operands of single-precision products to bfloat16; their sums stay in single precision.
    pub half: bool,
}

impl Context {
    /// The best level, `threads` threads (1 to 1024).
    pub fn new(threads: usize) -> Self {
        Context { isa: Isa::current(), threads: threads.clamp(1, 1024), half: false }
    }

    /// The same without rounding to bfloat16.
    pub(crate) fn unrounded(self) -> Self {
        Context { half: false, ..self }
    }

    /// The same level on the calling thread alone.
    pub fn serial(self) -> Self {
        Context { threads: 1, ..self }
    }
}

/// One register tile: `acc[j·ld + i] (+)= Σ_k lhs[k·rows + i] · rhs(k, j)`.
pub struct Tile<T> {
    /// Length of the reduction.
    pub(crate) kc: usize,
    /// Panel of `kc` lines of `MV·LANES` elements.
    pub(crate) lhs: *const T,
    /// Panel of `NR` columns: `rhs[j·KC + k]` if `k_major`, else `rhs[k·NR + j]`.
    pub(crate) rhs: *const T,
    pub(crate) k_major: bool,
    /// `NR` lines of the result, `ld` apart.
    pub(crate) acc: *mut T,
    pub(crate) ld: usize,
    /// Overwrite `acc` rather than add to it.
    pub(crate) first: bool,
}

/// Computes `t` in `MV·NR` registers.
///
/// # Safety
/// `lhs` is readable for `kc·MV·LANES` elements, `rhs` for its layout's, `acc` writable for `NR` lines of
/// `MV·LANES` at distance `ld`; the processor has the level of `S`.
#[inline(always)]
pub(crate) unsafe fn tile<T: Real, S: Simd<T>, const MV: usize, const NR: usize>(t: Tile<T>) {
    // SAFETY: all addresses are inside the panels that the contract names.
    unsafe {
        let mut c = [[S::zero(); MV]; NR];
        if !t.first {
            for (j, cj) in c.iter_mut().enumerate() {
                for (v, cjv) in cj.iter_mut().enumerate() {
                    *cjv = S::load(t.acc.add(j * t.ld + v * S::LANES));
                }
            }
        }
        let mut lhs = t.lhs;
        let mut rhs = t.rhs;
        if t.k_major {
            for _ in 0..t.kc {
                rank_one::<T, S, MV, NR>(&mut c, lhs, rhs, T::KC);
                lhs = lhs.add(MV * S::LANES);
                rhs = rhs.add(1);
            }
        } else {
            for _ in 0..t.kc {
                rank_one::<T, S, MV, NR>(&mut c, lhs, rhs, 1);
                lhs = lhs.add(MV * S::LANES);
                rhs = rhs.add(NR);
            }
        }
        for (j, cj) in c.iter().enumerate() {
            for (v, cjv) in cj.iter().enumerate() {
                S::store(t.acc.add(j * t.ld + v * S::LANES), *cjv);
            }
        }
    }
}

/// `c[j] += lhs · rhs[j·step]`, one step of the reduction.
///
/// # Safety
/// As [`tile`].
#[inline(always)]
unsafe fn rank_one<T: Real, S: Simd<T>, const MV: usize, const NR: usize>(
    c: &mut [[S::V; MV]; NR],
    lhs: *const T,
    rhs: *const T,
    step: usize,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut a = [S::zero(); MV];
        for (v, av) in a.iter_mut().enumerate() {
            *av = S::load(lhs.add(v * S::LANES));
        }
        for (j, cj) in c.iter_mut().enumerate() {
            let b = S::splat(*rhs.add(j * step));
            for (cjv, av) in cj.iter_mut().zip(a) {
                *cjv = S::fma(av, b, *cjv);
            }
        }
    }
}

/// `C ← β·C + α·A·B` in working precision `T`.
///
/// Shapes: A m×k, B k×n, C m×n, any strides and element types. `C` is not read when `beta` is 0.
///
/// # Panics
/// If the shapes do not fit.
pub fn gemm<T: Real>(cx: Context, alpha: f64, a: Mat<'_>, b: Mat<'_>, beta: f64, c: MatMut<'_>) {
    let shape = (c.as_ref().rows, c.as_ref().cols);
    assert_eq!((a.rows, b.cols, a.cols), (shape.0, shape.1, b.rows), "C is A's rows by B's columns");
    // The driver's vectors run along `out`'s rows: hand it the transpose of a row-major C.
    let along_rows = c.as_ref().rs == 1 && (c.as_ref().cs != 1 || shape.0 >= shape.1);
    let (lhs, rhs, out) = if along_rows { (a, b, c) } else { (b.t(), a.t(), c.t()) };
    let lhs = Packed::<T>::new(cx, lhs);
    Product { alpha, beta, ..Product::new(&lhs, Terms::one(rhs), out) }.run(cx);
}

#[cfg(test)]
pub(crate) mod tests;

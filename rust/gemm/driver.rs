//! The loops around the register tile.

use super::Context;
use super::block::{Ahead, Buffers, SUMS, block, emit};
use super::epilogue::Epilogue;
use super::pack::{Packed, SendPtr, Terms};
use super::pairs::{self, Rounding};
use crate::isa::{Kernel, Level, Simd};
use crate::pool;
use crate::scalar::Real;
use crate::scratch::Scratch;
use crate::view::MatMut;
use std::ops::Range;

/// Which part of a product is wanted or known to be zero.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Region {
    /// All of it.
    All,
    /// Only `i ≤ j`; the other elements keep what they had.
    Upper,
    /// Only `i ≥ j`.
    Lower,
    /// `lhs[i, k]` is zero for `k > i`; whole tiles of these zeros are left out.
    LowerLhs,
    /// `rhs[k, j]` is zero for `k < j`, likewise.
    LowerRhs,
    /// `rhs[k, j]` is zero for `k > j`, likewise.
    UpperRhs,
}

/// `out ← β·out + α·(lhs·rhs) + plus`; see the module.
pub(crate) struct Product<'a, 'b, T> {
    pub(crate) lhs: &'b Packed<T>,
    pub(crate) rhs: Terms<'a>,
    pub(crate) out: MatMut<'a>,
    pub(crate) alpha: f64,
    pub(crate) beta: f64,
    pub(crate) plus: Terms<'a>,
    /// β only where what is added goes against `out`'s sign: elsewhere 1.
    pub(crate) cautious: bool,
    /// Receives Σ_k rhs[k, j]², one number a column.
    pub(crate) sums: Option<&'a mut [f64]>,
    pub(crate) region: Region,
    /// Sums of `SHORT` terms are formed in `T` and joined in double; `out` is then the plain product.
    pub(crate) joined: bool,
}

/// Elements of the accumulator block (half of a common L2 in float32).
const ACC: usize = 64 * 1024;

impl<'a, 'b, T: Real> Product<'a, 'b, T> {
    /// `out ← lhs·rhs`, for what else is wanted to be added.
    pub(crate) fn new(lhs: &'b Packed<T>, rhs: Terms<'a>, out: MatMut<'a>) -> Self {
        Product {
            lhs,
            rhs,
            out,
            alpha: 1.0,
            beta: 0.0,
            plus: Terms::none(),
            cautious: false,
            sums: None,
            region: Region::All,
            joined: false,
        }
    }

    pub(crate) fn run(self, cx: Context) {
        let (i, j) = (self.out.as_ref().rows, self.out.as_ref().cols);
        assert_eq!(self.lhs.rows, i, "lhs has out's rows");
        assert_eq!(self.rhs.shape(), Some((self.lhs.depth, j)), "rhs is depth by out's columns");
        assert!(self.plus.shape().is_none_or(|s| s == (i, j)), "added views have out's shape");
        let sums = self.sums.map(|s| {
            assert_eq!(s.len(), j, "one sum a column");
            s.fill(0.0);
            SendPtr(s.as_mut_ptr())
        });
        if i == 0 || j == 0 {
            return;
        }
        let plain = self.alpha == 1.0 && self.beta == 0.0 && self.plus.shape().is_none();
        let whole = matches!(self.region, Region::All | Region::Upper | Region::Lower);
        let exact = matches!(self.lhs.rounding, Rounding::None);
        assert!(!self.joined || (plain && whole && exact), "joined sums are of plain products");
        assert!(sums.is_none() || self.region == Region::All, "sums need every block of the right side");
        let body = Body {
            lhs: self.lhs,
            rhs: self.rhs,
            k_major: self.rhs.contiguous_down(),
            epilogue: Epilogue {
                // SAFETY: each thread reads and writes the columns of its own share alone.
                out: unsafe { self.out.raw() },
                alpha: T::of(self.alpha),
                beta: T::of(self.beta),
                plus: self.plus,
                cautious: self.cautious,
            },
            sums,
            region: self.region,
            joined: self.joined,
        };
        // Columns are independent, so any split gives the same bits; 24 is a multiple of every NR.
        let work = i as f64 * j as f64 * (self.lhs.depth + 8) as f64;
        let threads = cx.threads.min(1 + (work / 1e6) as usize);
        // A triangle's columns cost unequally: smaller shares, taken as threads become free.
        let shares = if matches!(self.region, Region::Upper | Region::Lower) { 4 * threads } else { threads };
        let share = j.div_ceil(if threads > 1 { shares } else { 1 }).next_multiple_of(24);
        pool::for_each(threads, j.div_ceil(share), &|t| {
            cx.isa.run(Columns { body: &body, range: t * share..j.min((t + 1) * share) });
        });
    }
}

/// A product, as its threads share it.
pub(super) struct Body<'a, 'b, T> {
    pub(super) lhs: &'b Packed<T>,
    pub(super) rhs: Terms<'a>,
    /// The right side's columns are its contiguous direction.
    pub(super) k_major: bool,
    pub(super) epilogue: Epilogue<'a, T>,
    sums: Option<SendPtr<f64>>,
    pub(super) region: Region,
    pub(super) joined: bool,
}

/// The columns `range` of a product, on one thread.
struct Columns<'a, 'b, 'c, T> {
    body: &'c Body<'a, 'b, T>,
    range: Range<usize>,
}

impl<T: Real> Kernel for Columns<'_, '_, '_, T> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let b = self.body;
        let mr = L::MV * <T::Simd<L> as Simd<T>>::LANES;
        let mc = b.lhs.padded.min(mr * (768 / mr).max(1));
        // A reduction of one block is finished strip by strip, while its sums are in the first-level cache; a longer one
        // revisits its accumulator, which then should cover long lines of the right side.
        let rounding = b.lhs.rounding;
        let pairs = matches!(rounding, Rounding::Pairs(_));
        let nc = match b.lhs.depth <= T::KC {
            true if pairs => 2 * pairs::COLUMNS,
            true if b.k_major => L::NR,
            // A line along the right side's rows that is one tile long would cost more to begin than to read.
            true => 8 * L::NR,
            // A multiple of every tile's width. What is asked for ahead must fit into the second-level cache beside the
            // block itself, which in single precision has at most 100 KB; pairs ask for nothing and want long lines.
            false => (ACC / mc / 48 * 48).clamp(48, if pairs { 384 } else { 96 }),
        };
        let mut buffers = Buffers {
            packed: Scratch::new(nc * T::KC),
            line: Scratch::new(2 * nc),
            words: Scratch::new(if pairs { nc * T::KC / 2 } else { 0 }),
            acc: Scratch::new(if b.joined { SUMS * mr * L::NR } else { mc * nc }),
            joined: Scratch::new(if b.joined { mc * nc } else { 0 }),
        };
        if let Rounding::Pairs(kernel) = rounding {
            // SAFETY: the kernel is this processor's; `leave` follows below.
            unsafe { (kernel.enter)() };
        }
        let mut i0 = 0;
        while i0 < b.lhs.padded {
            let mi = mc.min(b.lhs.padded - i0);
            let mut j0 = self.range.start;
            while j0 < self.range.end {
                let nj = nc.min(self.range.end - j0);
                if b.wants((i0, mi), (j0, nj)) {
                    // SAFETY: block (i0, j0) lies inside the operands; the scratch buffers have the sizes that the
                    // block needs; this thread alone writes columns j0.. of `out` and of `sums`.
                    unsafe {
                        let sums = b.sums.filter(|_| i0 == 0).map(|s| s.0.add(j0));
                        let mut k0 = 0;
                        while k0 < b.lhs.depth {
                            let kc = T::KC.min(b.lhs.depth - k0);
                            buffers.fill::<L>(b, (j0, nj), (k0, kc), sums);
                            let mut ahead = if k0 + kc < b.lhs.depth {
                                Ahead::new(b, (k0 + kc, j0), nj)
                            } else {
                                Ahead::new(b, (0, j0 + nj), nc.min(self.range.end - (j0 + nj)))
                            };
                            block::<T, L>(b, ((i0, mi), (j0, nj), (k0, kc)), &mut ahead, &mut buffers);
                            k0 += kc;
                        }
                        if b.lhs.depth == 0 {
                            buffers.acc.fill(T::default());
                            buffers.joined.fill(0.0);
                        }
                        emit(b, (i0, mi), (j0, nj), &mut buffers);
                    }
                }
                j0 += nj;
            }
            i0 += mi;
        }
        if let Rounding::Pairs(kernel) = rounding {
            // SAFETY: as for `enter`.
            unsafe { (kernel.leave)() };
        }
    }
}

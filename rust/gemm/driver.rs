//! The loops around the register tile.

use super::epilogue::Epilogue;
use super::pack::{Packed, SendPtr, Terms, pack_rhs};
use super::pairs::{self, PairTile, Rounding, rhs_to_pairs, round_in_place};
use super::{Context, Tile};
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
    /// Only tiles that touch `i ≤ j` are computed; the others keep what they had.
    Upper,
    /// `lhs[i, k]` is zero for `k > i` and not read there.
    LowerLhs,
}

/// `out ← β·out + α·(lhs·rhs) + plus`; see the module.
pub(crate) struct Product<'a, 'b, T> {
    pub(crate) lhs: &'b Packed<T>,
    pub(crate) rhs: Terms<'a>,
    pub(crate) out: MatMut<'a>,
    pub(crate) alpha: f64,
    pub(crate) beta: f64,
    pub(crate) plus: Terms<'a>,
    /// Receives Σ_k rhs[k, j]², one number a column.
    pub(crate) sums: Option<&'a mut [f64]>,
    pub(crate) region: Region,
}

/// Elements of the accumulator block (half of a common L2 in float32).
const ACC: usize = 64 * 1024;

impl<T: Real> Product<'_, '_, T> {
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
        let body = Body {
            lhs: self.lhs,
            rhs: self.rhs,
            epilogue: Epilogue {
                out: self.out.raw(),
                alpha: T::of(self.alpha),
                beta: T::of(self.beta),
                plus: self.plus,
            },
            sums,
            region: self.region,
        };
        // Columns are independent, so any split gives the same bits; 24 is a multiple of every NR.
        let work = i as f64 * j as f64 * (self.lhs.depth + 8) as f64;
        let threads = cx.threads.min(1 + (work / 1e6) as usize);
        // A triangle's columns cost unequally: smaller shares, taken as threads become free.
        let shares = if self.region == Region::Upper { 4 * threads } else { threads };
        let share = j.div_ceil(if threads > 1 { shares } else { 1 }).next_multiple_of(24);
        pool::for_each(threads, j.div_ceil(share), &|t| {
            cx.isa.run(Columns { body: &body, range: t * share..j.min((t + 1) * share) });
        });
    }
}

struct Body<'a, 'b, T> {
    lhs: &'b Packed<T>,
    rhs: Terms<'a>,
    epilogue: Epilogue<'a, T>,
    sums: Option<SendPtr<f64>>,
    region: Region,
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
        let k_major = b.rhs.contiguous_down();
        let nc = match b.lhs.depth <= T::KC {
            true if matches!(rounding, Rounding::Pairs(_)) => 2 * pairs::COLUMNS,
            true if k_major => L::NR,
            // A line along the right side's rows that is one tile long would cost more to begin than to read.
            true => 8 * L::NR,
            // A multiple of every tile's width.
            false => (ACC / mc / 48 * 48).clamp(48, 384),
        };
        let mut acc = Scratch::<T>::new(mc * nc);
        let mut packed = Scratch::<T>::new(nc * T::KC);
        let mut line = Scratch::<T>::new(2 * nc);
        let mut words = match rounding {
            Rounding::Pairs(_) => Scratch::<f32>::new(nc * T::KC / 2),
            _ => Scratch::new(0),
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
                if b.region != Region::Upper || i0 < j0 + nj {
                    // SAFETY: block (i0, j0) lies inside the operands; the scratch buffers have the sizes that the
                    // block needs; this thread alone writes columns j0.. of `out` and of `sums`.
                    unsafe {
                        let sums = b.sums.filter(|_| i0 == 0).map(|s| s.0.add(j0));
                        let mut k0 = 0;
                        while k0 < b.lhs.depth {
                            let kc = T::KC.min(b.lhs.depth - k0);
                            pack_rhs(
                                &b.rhs,
                                (k0, kc),
                                (j0, nj),
                                L::NR,
                                k_major,
                                packed.as_mut_ptr(),
                                line.as_mut_ptr(),
                                sums,
                            );
                            let at = ((i0, mi), (j0, nj), (k0, kc));
                            let block_of = (kc, rounding.pad(kc), T::KC);
                            match rounding {
                                Rounding::None => {}
                                Rounding::Rounded => {
                                    let columns = nj.next_multiple_of(L::NR);
                                    round_in_place(packed.as_mut_ptr().cast(), columns * T::KC);
                                }
                                Rounding::Pairs(_) => {
                                    let columns = nj.next_multiple_of(L::NR);
                                    let (src, dst) = (packed.as_ptr().cast(), words.as_mut_ptr().cast());
                                    rhs_to_pairs(src, columns, block_of, L::NR, k_major, dst);
                                }
                            }
                            block::<T, L>(
                                b,
                                at,
                                packed.as_ptr(),
                                words.as_ptr().cast(),
                                k_major,
                                acc.as_mut_ptr(),
                            );
                            k0 += kc;
                        }
                        if b.lhs.depth == 0 {
                            acc.fill(T::default());
                        }
                        emit(b, (i0, mi), (j0, nj), acc.as_mut_ptr());
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

/// First index and length along the rows, the columns and the reduction.
type Block = ((usize, usize), (usize, usize), (usize, usize));

/// Adds one block of the reduction to the accumulator, tile by tile.
///
/// # Safety
/// As stated in `Columns::run`.
#[inline(always)]
unsafe fn block<T: Real, L: Level>(
    b: &Body<'_, '_, T>,
    ((i0, mi), (j0, nj), (k0, kc)): Block,
    packed: *const T,
    words: *const u32,
    k_major: bool,
    acc: *mut T,
) {
    let last = k0 + kc == b.lhs.depth;
    if let Rounding::Pairs(kernel) = b.lhs.rounding {
        let pad = b.lhs.rounding.pad(kc);
        for j in (0..nj).step_by(pairs::COLUMNS) {
            let mut i = 0;
            while i < mi {
                let rows = (3 * 16).min(mi - i);
                if last {
                    let wide = pairs::COLUMNS.min(nj - j);
                    b.epilogue.prefetch(
                        (i0 + i, j0 + j),
                        rows.min(b.lhs.rows - (i0 + i).min(b.lhs.rows)),
                        wide,
                    );
                }
                // SAFETY: panels and accumulator as below. The buffer of words has whole tiles of columns; what columns
                // behind the block's own hold is summed into lines that are never emitted.
                unsafe {
                    (kernel.tile)(PairTile {
                        vectors: rows / 16,
                        pairs: pad / 2,
                        lhs: b.lhs.words(i0 + i, k0, pad),
                        rhs: words.add(j * (T::KC / 2)),
                        stride: T::KC / 2,
                        acc: acc.add(j * mi + i).cast(),
                        ld: mi,
                        first: k0 == 0,
                    });
                }
                i += rows;
            }
        }
        return;
    }
    let lanes = <T::Simd<L> as Simd<T>>::LANES;
    let mr = L::MV * lanes;
    let mut j = 0;
    while j < nj {
        let mut i = 0;
        while i < mi {
            let rows = mr.min(mi - i);
            let depth = match b.region {
                Region::LowerLhs => (i0 + i + rows).saturating_sub(k0).min(kc),
                _ => kc,
            };
            let wanted = b.region != Region::Upper || i0 + i < j0 + j + L::NR;
            if last {
                let wide = L::NR.min(nj - j);
                b.epilogue.prefetch((i0 + i, j0 + j), rows.min(b.lhs.rows - (i0 + i).min(b.lhs.rows)), wide);
            }
            if wanted && (depth > 0 || k0 == 0) {
                // SAFETY: the panels exist and the accumulator holds whole tiles.
                unsafe {
                    L::tile(
                        rows / lanes,
                        Tile {
                            kc: depth,
                            lhs: b.lhs.panel(i0 + i, k0, kc),
                            rhs: packed.add(j * T::KC),
                            k_major,
                            acc: acc.add(j * mi + i),
                            ld: mi,
                            first: k0 == 0,
                        },
                    );
                }
            }
            i += rows;
        }
        j += L::NR;
    }
}

/// The epilogue over a finished block of the accumulator.
///
/// # Safety
/// As stated in `Columns::run`.
#[inline(always)]
unsafe fn emit<T: Real>(
    b: &Body<'_, '_, T>,
    (i0, mi): (usize, usize),
    (j0, nj): (usize, usize),
    acc: *mut T,
) {
    for j in 0..nj {
        let mut rows = mi.min(b.lhs.rows - i0);
        if b.region == Region::Upper {
            rows = rows.min((j0 + j + 1).saturating_sub(i0));
        }
        // SAFETY: `rows` elements of line `j` of the accumulator, and of column `j0 + j` of `out` and `plus`.
        unsafe { b.epilogue.line((i0, j0 + j), acc.add(j * mi), rows) };
    }
}

//! A block of a product: one part of the reduction added to the accumulator, tile by tile.

use super::Tile;
use super::driver::{Body, Region};
use super::line::Line;
use super::pack::{Terms, pack_rhs};
use super::pairs::{self, PairTile, Rounding, rhs_to_pairs, round_in_place};
use crate::isa::{Level, Simd};
use crate::scalar::Real;
use crate::scratch::Scratch;
use std::ops::Range;

/// Terms summed in working precision where the sums of such sums are formed in double. A longer chain would err more: a
/// constant's partial sums all round the same way, by up to a quarter of this many roundoffs.
const SHORT: usize = 32;

/// Such sums that are added up in working precision, pairwise, before they go to double, which costs a pass over the tile.
pub(super) const SUMS: usize = 4;

/// A thread's scratch.
pub(super) struct Buffers<T> {
    /// A block of the right side in panels, and in pairs of bfloat16 where the product is of those.
    pub(super) packed: Scratch<T>,
    pub(super) words: Scratch<f32>,
    /// What packing needs.
    pub(super) line: Scratch<T>,
    /// Sums of the block's columns; of a few tiles where they are joined in double.
    pub(super) acc: Scratch<T>,
    pub(super) joined: Scratch<f64>,
}

impl<T: Real> Buffers<T> {
    /// Packs columns `j0..j0+nj` of rows `k0..k0+kc` of the right side.
    ///
    /// # Safety
    /// They lie inside it; the buffers have room for `nj` columns rounded up to tiles, `sums` for `nj` numbers.
    #[inline(always)]
    pub(super) unsafe fn fill<L: Level>(
        &mut self,
        b: &Body<'_, '_, T>,
        (j0, nj): (usize, usize),
        (k0, kc): (usize, usize),
        sums: Option<*mut f64>,
    ) {
        let (packed, line) = (self.packed.as_mut_ptr(), self.line.as_mut_ptr());
        let columns = nj.next_multiple_of(L::NR);
        // SAFETY: the caller's.
        unsafe {
            pack_rhs(&b.rhs, (k0, kc), (j0, nj), L::NR, b.k_major, packed, line, sums);
            match b.lhs.rounding {
                Rounding::None => {}
                Rounding::Rounded => round_in_place(packed.cast(), columns * T::KC),
                Rounding::Pairs(_) => {
                    let (block, words) =
                        ((kc, b.lhs.rounding.pad(kc), T::KC), self.words.as_mut_ptr().cast());
                    rhs_to_pairs(packed.cast(), columns, block, L::NR, b.k_major, words);
                }
            }
        }
    }
}

/// What is packed next, asked for a little at each tile of this block, so that memory is read while sums are formed.
pub(super) struct Ahead<'a> {
    rhs: Terms<'a>,
    /// Where it begins in `rhs`.
    at: (usize, usize),
    down: bool,
    lines: Range<usize>,
    len: usize,
}

impl<'a> Ahead<'a> {
    /// Columns `j0..j0+nj` of the block of the reduction that begins at `k0`.
    #[inline(always)]
    pub(super) fn new<T: Real>(b: &Body<'a, '_, T>, (k0, j0): (usize, usize), nj: usize) -> Self {
        let kc = T::KC.min(b.lhs.depth - k0);
        let down = b.k_major;
        let (lines, len) = if down { (nj, kc) } else { (kc, nj) };
        Ahead { rhs: b.rhs, at: (k0, j0), down, lines: 0..lines, len }
    }

    /// The next `lines` lines.
    #[inline(always)]
    pub(super) fn ask(&mut self, lines: usize) {
        let (k0, j0) = self.at;
        for _ in 0..lines {
            let Some(l) = self.lines.next() else { return };
            let at = if self.down { (k0, j0 + l) } else { (k0 + l, j0) };
            self.rhs.prefetch(at, self.down, self.len);
        }
    }
}

/// First index and length along the rows, the columns and the reduction.
type Block = ((usize, usize), (usize, usize), (usize, usize));

/// Adds one block of the reduction to the accumulator, tile by tile.
///
/// # Safety
/// The block lies inside the operands, `buffers` has been filled with its part of the right side and is large enough for
/// it, and the processor has the level.
#[inline(always)]
pub(super) unsafe fn block<T: Real, L: Level>(
    b: &Body<'_, '_, T>,
    at: Block,
    ahead: &mut Ahead<'_>,
    buffers: &mut Buffers<T>,
) {
    if let Rounding::Pairs(kernel) = b.lhs.rounding {
        // SAFETY: the caller's.
        unsafe { block_of_pairs(b, kernel, at, buffers) };
        return;
    }
    let ((i0, mi), (j0, nj), (k0, kc)) = at;
    let last = k0 + kc == b.lhs.depth;
    let k_major = b.k_major;
    let (packed, acc) = (buffers.packed.as_ptr(), buffers.acc.as_mut_ptr());
    let joined = buffers.joined.as_mut_ptr();
    let lanes = <T::Simd<L> as Simd<T>>::LANES;
    let mr = L::MV * lanes;
    let per_tile = ahead.lines.len().div_ceil(nj.div_ceil(L::NR) * mi.div_ceil(mr));
    let mut j = 0;
    while j < nj {
        let mut i = 0;
        while i < mi {
            let rows = mr.min(mi - i);
            let (from, to) = b.reduction((i0 + i, rows), (j0 + j, L::NR), (k0, kc));
            let depth = to - from;
            let wanted = b.wants((i0 + i, rows), (j0 + j, L::NR));
            if last && wanted {
                b.ask_for_epilogue((i0 + i, j0 + j), rows, L::NR.min(nj - j));
            }
            ahead.ask(per_tile);
            if wanted && (depth > 0 || k0 == 0) {
                // SAFETY: the panels exist and the accumulators hold whole tiles.
                unsafe {
                    let lhs = b.lhs.panel(i0 + i, k0, kc).add(from * rows);
                    let rhs = packed.add(j * T::KC + if k_major { from } else { from * L::NR });
                    if b.joined {
                        for from in (0..depth).step_by(SUMS * SHORT) {
                            let to = depth.min(from + SUMS * SHORT);
                            let mut sums = 0;
                            for s in (from..to).step_by(SHORT) {
                                let (lhs, kc) = (lhs.add(s * rows), SHORT.min(to - s));
                                let rhs = rhs.add(if k_major { s } else { s * L::NR });
                                let acc = acc.add(sums * rows * L::NR);
                                L::tile(
                                    rows / lanes,
                                    Tile { kc, lhs, rhs, k_major, acc, ld: rows, first: true },
                                );
                                sums += 1;
                            }
                            let into = joined.add(j * mi + i);
                            join::<T>(acc, sums, (rows, L::NR), into, mi, k0 + from == 0);
                        }
                    } else {
                        let (acc, first) = (acc.add(j * mi + i), k0 == 0);
                        L::tile(rows / lanes, Tile { kc: depth, lhs, rhs, k_major, acc, ld: mi, first });
                    }
                }
            }
            i += rows;
        }
        j += L::NR;
    }
}

/// [`block`] of bfloat16 pairs.
///
/// # Safety
/// As [`block`].
#[inline(always)]
unsafe fn block_of_pairs<T: Real>(
    b: &Body<'_, '_, T>,
    kernel: pairs::PairKernel,
    ((i0, mi), (j0, nj), (k0, kc)): Block,
    buffers: &mut Buffers<T>,
) {
    let last = k0 + kc == b.lhs.depth;
    let pad = b.lhs.rounding.pad(kc);
    let (words, acc) = (buffers.words.as_ptr().cast::<u32>(), buffers.acc.as_mut_ptr());
    for j in (0..nj).step_by(pairs::COLUMNS) {
        let mut i = 0;
        while i < mi {
            let rows = (3 * 16).min(mi - i);
            if last {
                b.ask_for_epilogue((i0 + i, j0 + j), rows, pairs::COLUMNS.min(nj - j));
            }
            // SAFETY: panels and accumulator as in `block`. The buffer of words has whole tiles of columns; what columns
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
}

impl<T: Real> Body<'_, '_, T> {
    /// Whether anything of rows `i..i+rows`, columns `j..j+columns` is wanted.
    #[inline(always)]
    pub(super) fn wants(&self, (i, rows): (usize, usize), (j, columns): (usize, usize)) -> bool {
        match self.region {
            Region::Upper => i < j + columns,
            Region::Lower => i + rows > j,
            _ => true,
        }
    }

    /// What of the reductions `k0..k0+kc` such a tile needs, counted from `k0`.
    #[inline(always)]
    fn reduction(
        &self,
        (i, rows): (usize, usize),
        (j, columns): (usize, usize),
        (k0, kc): (usize, usize),
    ) -> (usize, usize) {
        let within = |k: usize| k.saturating_sub(k0).min(kc);
        match self.region {
            Region::LowerLhs => (0, within(i + rows)),
            Region::UpperRhs => (0, within(j + columns)),
            Region::LowerRhs => (within(j), kc),
            _ => (0, kc),
        }
    }

    /// Asks for what the epilogue will read of a tile of `rows` (padded) by `columns`.
    #[inline(always)]
    fn ask_for_epilogue(&self, (i, j): (usize, usize), rows: usize, columns: usize) {
        self.epilogue.prefetch((i, j), rows.min(self.lhs.rows - i.min(self.lhs.rows)), columns);
    }
}

/// `joined ← Σ tiles` if `first`, else `+=`: `count` ≤ [`SUMS`] tiles of `lines` lines of `rows`, which are `ld` apart in
/// `joined`. The tiles are used up.
///
/// # Safety
/// Both are that large.
#[inline(always)]
unsafe fn join<T: Real>(
    tiles: *mut T,
    count: usize,
    (rows, lines): (usize, usize),
    joined: *mut f64,
    ld: usize,
    first: bool,
) {
    let size = rows * lines;
    // SAFETY: the caller's.
    unsafe {
        for (to, from) in [(0, 1), (2, 3), (0, 2)] {
            if from < count {
                for i in 0..size {
                    *tiles.add(to * size + i) += *tiles.add(from * size + i);
                }
            }
        }
        for j in 0..lines {
            for i in 0..rows {
                let (x, sum) = ((*tiles.add(j * rows + i)).f64(), joined.add(j * ld + i));
                *sum = if first { x } else { *sum + x };
            }
        }
    }
}

/// The epilogue over a finished block of the accumulator.
///
/// # Safety
/// As [`block`]; nobody else uses columns `j0..j0+nj` of `out`.
#[inline(always)]
pub(super) unsafe fn emit<T: Real>(
    b: &Body<'_, '_, T>,
    (i0, mi): (usize, usize),
    (j0, nj): (usize, usize),
    buffers: &mut Buffers<T>,
) {
    let rows = mi.min(b.lhs.rows - i0);
    for j in 0..nj {
        let diagonal = (j0 + j).saturating_sub(i0);
        let (from, to) = match b.region {
            Region::Upper => (0, rows.min((j0 + j + 1).saturating_sub(i0))),
            Region::Lower => (rows.min(diagonal), rows),
            _ => (0, rows),
        };
        // SAFETY: those elements of line `j` of an accumulator, and of column `j0 + j` of `out` and `plus`.
        unsafe {
            if b.joined {
                let sums = buffers.joined.as_ptr().add(j * mi + from);
                Line::down(b.epilogue.out, i0 + from, j0 + j).write(sums, to - from);
            } else {
                let sums = buffers.acc.as_mut_ptr().add(j * mi + from);
                b.epilogue.line((i0 + from, j0 + j), sums, to - from);
            }
        }
    }
}

//! Packing: operands are copied into the order in which the register tile reads them.

use super::Context;
use super::line::{Line, sum_of_squares};
use super::pairs::{Rounding, lhs_to_pairs, round_in_place};
use crate::isa::{Kernel, Level, Simd};
use crate::pool;
use crate::scalar::Real;
use crate::scratch::Scratch;
use crate::view::Mat;
use std::marker::PhantomData;

/// A linear combination of up to two views of one shape.
#[derive(Clone, Copy)]
pub(crate) struct Terms<'a> {
    terms: [Option<(f64, Mat<'a>)>; 2],
}

impl<'a> Terms<'a> {
    pub(crate) fn none() -> Self {
        Terms { terms: [None, None] }
    }

    pub(crate) fn one(a: Mat<'a>) -> Self {
        Terms { terms: [Some((1.0, a)), None] }
    }

    /// `c0·a + c1·b`
    pub(crate) fn two(c0: f64, a: Mat<'a>, c1: f64, b: Mat<'a>) -> Self {
        debug_assert_eq!((a.rows, a.cols), (b.rows, b.cols));
        Terms { terms: [Some((c0, a)), Some((c1, b))] }
    }

    /// Every coefficient times `c`.
    pub(crate) fn scaled(self, c: f64) -> Self {
        Terms { terms: self.terms.map(|t| t.map(|(c0, a)| (c * c0, a))) }
    }

    pub(crate) fn t(self) -> Self {
        Terms { terms: self.terms.map(|t| t.map(|(c, a)| (c, a.t()))) }
    }

    pub(crate) fn row_range(self, range: std::ops::Range<usize>) -> Self {
        Terms { terms: self.terms.map(|t| t.map(|(c, a)| (c, a.row_range(range.clone())))) }
    }

    pub(crate) fn shape(&self) -> Option<(usize, usize)> {
        self.terms[0].map(|(_, a)| (a.rows, a.cols))
    }

    /// The columns are the contiguous direction.
    pub(crate) fn contiguous_down(&self) -> bool {
        self.terms[0].is_some_and(|(_, a)| a.rs == 1 || a.cs != 1)
    }

    /// The terms' coefficients and their lines down a column from `(i, j)`.
    #[inline(always)]
    pub(crate) fn lines_down<T: Real>(&self, i: usize, j: usize) -> [Option<(T, Line)>; 2] {
        self.terms.map(|t| t.map(|(c, view)| (T::of(c), Line::down(view, i, j))))
    }

    /// Asks for what [`Terms::read`] would read.
    #[inline(always)]
    pub(crate) fn prefetch(&self, (i, j): (usize, usize), down: bool, len: usize) {
        for (_, view) in self.terms.iter().flatten() {
            let line = if down { Line::down(*view, i, j) } else { Line::along(*view, i, j) };
            line.prefetch(len);
        }
    }

    /// `dst ← Σ c·line`, or `+=` if `add`; lines start at `(i, j)` and run down a column or along a row.
    ///
    /// # Safety
    /// The lines lie inside the views; `dst` is writable for `len` elements.
    #[inline(always)]
    pub(crate) unsafe fn read<T: Real>(
        &self,
        (i, j): (usize, usize),
        down: bool,
        dst: *mut T,
        len: usize,
        mut add: bool,
    ) {
        if let ([Some((c0, a)), Some((c1, b))], false) = (self.terms, add) {
            let line = |v| if down { Line::down(v, i, j) } else { Line::along(v, i, j) };
            if let (Some(x), Some(y)) = (line(a).dense::<T>(), line(b).dense::<T>()) {
                let (c0, c1) = (T::of(c0), T::of(c1));
                // SAFETY: the caller's.
                unsafe {
                    for k in 0..len {
                        *dst.add(k) = c0 * *x.add(k) + c1 * *y.add(k);
                    }
                }
                return;
            }
        }
        for (c, view) in self.terms.iter().flatten() {
            let line = if down { Line::down(*view, i, j) } else { Line::along(*view, i, j) };
            // SAFETY: the caller's.
            unsafe {
                if add {
                    line.add_to(dst, len, T::of(*c));
                } else {
                    line.scaled(dst, len, T::of(*c));
                }
            }
            add = true;
        }
    }
}

/// A left operand I×K in panels: for each block of `KC` reductions, for each panel of up to `MV` vectors of rows,
/// `kc` lines of the panel's rows. Rows are padded with zeros to a whole vector.
pub(crate) struct Packed<T> {
    data: Scratch<T>,
    pub(crate) rows: usize,
    pub(crate) depth: usize,
    /// Rows padded to whole vectors.
    pub(crate) padded: usize,
    pub(super) rounding: Rounding,
}

impl<T: Real> Packed<T> {
    pub(crate) fn new(cx: Context, view: Mat<'_>) -> Self {
        struct Lanes<T>(PhantomData<T>);
        impl<T: Real> Kernel for Lanes<T> {
            type Out = usize;
            #[inline(always)]
            fn run<L: Level>(self) -> usize {
                <T::Simd<L> as Simd<T>>::LANES
            }
        }
        let lanes = cx.isa.run(Lanes::<T>(PhantomData));
        let (rows, depth) = (view.rows, view.cols);
        let padded = rows.next_multiple_of(lanes);
        let rounding = Rounding::of::<T>(cx);
        let mut data =
            Scratch::new(padded.checked_mul(rounding.pad(depth)).expect("a panel that fits into memory"));
        let base = SendPtr(data.as_mut_ptr());
        let blocks = depth.div_ceil(T::KC);
        pool::for_each(cx.threads, blocks, &|b| {
            cx.isa.run(PackLhs { view, block: b, padded, dst: base, rounding });
        });
        Packed { data, rows, depth, padded, rounding }
    }
}

impl<T: Real> Packed<T> {
    /// [`Packed::panel`] of a left operand in pairs; `pad` is the block's padded length.
    ///
    /// # Safety
    /// As [`Packed::panel`].
    #[inline(always)]
    pub(super) unsafe fn words(&self, i0: usize, k0: usize, pad: usize) -> *const u32 {
        // SAFETY: inside the buffer, as `PackLhs` laid it out.
        unsafe { self.data.as_ptr().cast::<u32>().add((k0 * self.padded + i0 * pad) / 2) }
    }

    /// The panel that starts at row `i0` of the block that starts at reduction `k0`.
    ///
    /// # Safety
    /// `i0` starts a panel and `k0` a block.
    #[inline(always)]
    pub(crate) unsafe fn panel(&self, i0: usize, k0: usize, kc: usize) -> *const T {
        debug_assert!(k0 * self.padded + i0 * kc <= self.data.len());
        // SAFETY: inside the buffer, by the layout above.
        unsafe { self.data.as_ptr().add(k0 * self.padded + i0 * kc) }
    }
}

/// A pointer whose users write disjoint parts.
#[derive(Clone, Copy)]
pub(crate) struct SendPtr<T>(pub(crate) *mut T);
// SAFETY: every use states which part a thread writes; elements then move between threads.
unsafe impl<T: Send> Send for SendPtr<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SendPtr<T> {}

struct PackLhs<'a, T> {
    view: Mat<'a>,
    block: usize,
    padded: usize,
    dst: SendPtr<T>,
    rounding: Rounding,
}

impl<T: Real> Kernel for PackLhs<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let (rows, padded) = (self.view.rows, self.padded);
        let mr = L::MV * <T::Simd<L> as Simd<T>>::LANES;
        let k0 = self.block * T::KC;
        let kc = T::KC.min(self.view.cols - k0);
        let mut single = match self.rounding {
            Rounding::Pairs(_) => Scratch::<T>::new(padded * kc),
            _ => Scratch::new(0),
        };
        // SAFETY: this block owns `[k0·padded, (k0 + kc)·padded)` of the buffer, and in it a panel of `p` rows from `i0` on
        // `p·kc` elements from `i0·kc` on; lines are inside the view.
        unsafe {
            let block = match self.rounding {
                Rounding::Pairs(_) => single.as_mut_ptr(),
                _ => self.dst.0.add(k0 * padded),
            };
            if self.view.rs == 1 || self.view.cs != 1 {
                let mut line = Scratch::<T>::new(padded);
                line[rows..].fill(T::default());
                for k in 0..kc {
                    let from = Line::down(self.view, 0, k0 + k);
                    let src = match from.dense::<T>() {
                        Some(src) if rows == padded => src.cast_const(),
                        _ => {
                            from.scaled(line.as_mut_ptr(), rows, T::of(1.0));
                            line.as_ptr()
                        }
                    };
                    let whole = padded / mr * mr;
                    for i0 in (0..whole).step_by(mr) {
                        std::ptr::copy_nonoverlapping(src.add(i0), block.add(i0 * kc + k * mr), mr); // some registers
                    }
                    let rest = padded - whole;
                    std::ptr::copy_nonoverlapping(src.add(whole), block.add(whole * kc + k * rest), rest);
                }
            } else {
                let mut line = Scratch::<T>::new(kc);
                for i in 0..padded {
                    if i < rows {
                        Line::along(self.view, i, k0).scaled(line.as_mut_ptr(), kc, T::of(1.0));
                    } else {
                        line.fill(T::default());
                    }
                    let i0 = i / mr * mr;
                    let (panel, lines) = (block.add(i0 * kc + i - i0), mr.min(padded - i0));
                    for (k, x) in line.iter().enumerate() {
                        *panel.add(k * lines) = *x;
                    }
                }
            }
            match self.rounding {
                Rounding::None => {}
                Rounding::Rounded => round_in_place(block.cast(), kc * padded),
                Rounding::Pairs(_) => {
                    let pad = self.rounding.pad(kc);
                    for i0 in (0..padded).step_by(mr) {
                        let words = self.dst.0.cast::<u32>().add((k0 * padded + i0 * pad) / 2);
                        lhs_to_pairs(block.add(i0 * kc).cast(), kc, mr.min(padded - i0), pad, words);
                    }
                }
            }
        }
    }
}

/// Packs rows `k0..k0+kc`, columns `j0..j0+nj` of `rhs` into panels of `nr` columns, `KC·nr` elements each; missing
/// columns become zero. If `sums` is given, adds each column's squares to `sums[j − j0]`.
///
/// # Safety
/// The block lies inside `rhs`; `dst` is writable for `⌈nj/nr⌉·nr·KC` elements; `line` for twice `nj` rounded up to
/// panels; `sums` for `nj`.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn pack_rhs<T: Real>(
    rhs: &Terms<'_>,
    (k0, kc): (usize, usize),
    (j0, nj): (usize, usize),
    nr: usize,
    k_major: bool,
    dst: *mut T,
    line: *mut T,
    sums: Option<*mut f64>,
) {
    let padded = nj.next_multiple_of(nr);
    // SAFETY: panel p owns `[p·nr·KC, (p+1)·nr·KC)`; lines are inside the views.
    unsafe {
        if k_major {
            for j in 0..padded {
                let p = dst.add(j * T::KC);
                if j < nj {
                    rhs.read((k0, j0 + j), true, p, kc, false);
                    if let Some(sums) = sums {
                        *sums.add(j) += sum_of_squares(p, kc);
                    }
                } else {
                    for k in 0..kc {
                        *p.add(k) = T::default();
                    }
                }
            }
        } else {
            for j in nj..padded {
                *line.add(j) = T::default();
            }
            // A block's squares are few enough to be added in `T`; blocks are added in double.
            let squares = line.add(padded);
            for j in 0..padded {
                *squares.add(j) = T::default();
            }
            for k in 0..kc {
                rhs.read((k0 + k, j0), false, line, nj, false);
                if sums.is_some() {
                    for j in 0..nj {
                        *squares.add(j) += *line.add(j) * *line.add(j);
                    }
                }
                let mut j = 0;
                while j < padded {
                    let p = dst.add(j * T::KC + k * nr);
                    std::ptr::copy_nonoverlapping(line.add(j), p, nr); // one register: `nr` is a constant here
                    j += nr;
                }
            }
            if let Some(sums) = sums {
                for j in 0..nj {
                    *sums.add(j) += (*squares.add(j)).f64();
                }
            }
        }
    }
}

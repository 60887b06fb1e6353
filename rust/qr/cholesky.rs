//! Cholesky factor and its inverse, recursively, so that all but the smallest blocks are products.

use crate::gemm::{Context, Packed, Product, Region, Terms};
use crate::isa::{Kernel, Level};
use crate::scratch::Scratch;
use crate::view::{Mat, MatMut};
use std::ops::Range;

/// Up to this size rows fit in registers and products do not pay.
const BASE: usize = 24;

/// `S = TᵀT`: overwrites `s` (r×r, row-major, symmetric; its upper triangle is read) with the upper triangular T, and
/// writes `T⁻¹` into `inverse`.
///
/// A pivot `T_jj² ≤ threshold` makes direction `j` null: its row of T, and its row and column of the inverse, are zero, and
/// the later directions are factored as if it were not there.
pub(super) fn factor(
    cx: Context,
    s: &mut [f64],
    inverse: &mut [f64],
    r: usize,
    threshold: f64,
    null: &mut [bool],
) {
    inverse.fill(0.0);
    recurse(cx, s, inverse, r, 0..r, threshold, null);
    for i in 1..r {
        s[i * r..i * r + i].fill(0.0);
    }
}

fn recurse(
    cx: Context,
    s: &mut [f64],
    inverse: &mut [f64],
    r: usize,
    range: Range<usize>,
    threshold: f64,
    null: &mut [bool],
) {
    if range.len() <= BASE {
        cx.isa.run(Base { s, r, range: range.clone(), threshold, null });
        cx.isa.run(Invert { t: s, inverse, r, range, null: Some(null) });
        return;
    }
    let (lo, hi) = (range.start, range.end);
    let mid = middle(&range);
    let (h1, h2) = (mid - lo, hi - mid);
    recurse(cx, s, inverse, r, lo..mid, threshold, null);
    // T₁₂ = T₁₁⁻ᵀ S₁₂
    let mut t12 = Scratch::<f64>::new(h1 * h2);
    {
        let i11 = part(inverse, r, lo..mid, lo..mid);
        let out = MatMut::row_major(&mut t12, h1, h2);
        product(cx, 1.0, i11.t(), part(s, r, lo..mid, mid..hi), 0.0, out, Region::UpperRhs);
    }
    for i in 0..h1 {
        s[(lo + i) * r + mid..(lo + i) * r + hi].copy_from_slice(&t12[i * h2..(i + 1) * h2]);
    }
    // S₂₂ ← S₂₂ − T₁₂ᵀ T₁₂
    let t12 = Mat::row_major(&t12, h1, h2);
    let s22 = part_mut(s, r, mid..hi, mid..hi);
    product(cx, -1.0, t12.t(), t12, 1.0, s22, Region::Lower);
    recurse(cx, s, inverse, r, mid..hi, threshold, null);
    join(cx, s, inverse, r, lo, mid, hi);
}

/// `inverse ← T⁻¹` for an upper triangular `t` with positive diagonal; r×r, row-major.
pub(super) fn invert_upper(cx: Context, t: &[f64], inverse: &mut [f64], r: usize) {
    inverse.fill(0.0);
    invert(cx, t, inverse, r, 0..r);
}

fn invert(cx: Context, t: &[f64], inverse: &mut [f64], r: usize, range: Range<usize>) {
    if range.len() <= BASE {
        cx.isa.run(Invert { t, inverse, r, range, null: None });
        return;
    }
    let (lo, mid, hi) = (range.start, middle(&range), range.end);
    invert(cx, t, inverse, r, lo..mid);
    invert(cx, t, inverse, r, mid..hi);
    join(cx, t, inverse, r, lo, mid, hi);
}

fn middle(range: &Range<usize>) -> usize {
    range.start + (range.len() / 2).next_multiple_of(8)
}

/// `(T⁻¹)₁₂ = −T₁₁⁻¹ T₁₂ T₂₂⁻¹`
fn join(cx: Context, t: &[f64], inverse: &mut [f64], r: usize, lo: usize, mid: usize, hi: usize) {
    let (h1, h2) = (mid - lo, hi - mid);
    let mut half = Scratch::<f64>::new(h1 * h2);
    let t12 = part(t, r, lo..mid, mid..hi);
    let out = MatMut::row_major(&mut half, h1, h2);
    product(cx, -1.0, part(inverse, r, lo..mid, lo..mid), t12, 0.0, out, Region::LowerRhs);
    let mut whole = Scratch::<f64>::new(h1 * h2);
    let (half, out) = (Mat::row_major(&half, h1, h2), MatMut::row_major(&mut whole, h1, h2));
    product(cx, 1.0, half, part(inverse, r, mid..hi, mid..hi), 0.0, out, Region::LowerLhs);
    for i in 0..h1 {
        inverse[(lo + i) * r + mid..(lo + i) * r + hi].copy_from_slice(&whole[i * h2..(i + 1) * h2]);
    }
}

/// `C ← βC + αAB` of row-major matrices; `region` speaks of the transposed product, `Cᵀ = βCᵀ + αBᵀAᵀ`.
fn product(cx: Context, alpha: f64, a: Mat<'_>, b: Mat<'_>, beta: f64, c: MatMut<'_>, region: Region) {
    let lhs = Packed::<f64>::new(cx, b.t());
    Product { alpha, beta, region, ..Product::new(&lhs, Terms::one(a.t()), c.t()) }.run(cx);
}

fn part(s: &[f64], r: usize, rows: Range<usize>, cols: Range<usize>) -> Mat<'_> {
    Mat::row_major(&s[..r * r], r, r).row_range(rows).col_range(cols)
}

fn part_mut(s: &mut [f64], r: usize, rows: Range<usize>, cols: Range<usize>) -> MatMut<'_> {
    MatMut::row_major(&mut s[..r * r], r, r).row_range(rows).col_range(cols)
}

/// The unblocked factorisation, along rows.
struct Base<'a> {
    s: &'a mut [f64],
    r: usize,
    range: Range<usize>,
    threshold: f64,
    null: &'a mut [bool],
}

impl Kernel for Base<'_> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let Base { s, r, range, threshold, null } = self;
        let (lo, hi) = (range.start, range.end);
        for j in lo..hi {
            let pivot = s[j * r + j];
            if pivot <= threshold {
                null[j] = true;
                s[j * r + j..j * r + hi].fill(0.0);
                continue;
            }
            let scale = 1.0 / pivot.sqrt();
            s[j * r + j] = pivot.sqrt();
            for x in &mut s[j * r + j + 1..j * r + hi] {
                *x *= scale;
            }
            let (above, below) = s.split_at_mut((j + 1) * r);
            for i in j + 1..hi {
                let c = above[j * r + i];
                let row = &mut below[(i - j - 1) * r + i..(i - j - 1) * r + hi];
                for (x, t) in row.iter_mut().zip(&above[j * r + i..j * r + hi]) {
                    *x -= c * t;
                }
            }
        }
    }
}

/// The unblocked inverse, row by row from the last: `T_jj·I_j = e_j − Σ_{l>j} T_jl·I_l`.
struct Invert<'a> {
    t: &'a [f64],
    inverse: &'a mut [f64],
    r: usize,
    range: Range<usize>,
    null: Option<&'a [bool]>,
}

impl Kernel for Invert<'_> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let Invert { t: s, inverse, r, range, null } = self;
        let (lo, hi) = (range.start, range.end);
        for j in (lo..hi).rev() {
            if null.is_some_and(|null| null[j]) {
                continue;
            }
            let (above, below) = inverse.split_at_mut((j + 1) * r);
            let row = &mut above[j * r + lo..j * r + hi];
            row[j - lo] = 1.0;
            for l in j + 1..hi {
                let c = s[j * r + l];
                let other = &below[(l - j - 1) * r + lo..(l - j - 1) * r + hi];
                for (x, y) in row.iter_mut().zip(other) {
                    *x -= c * y;
                }
            }
            let scale = 1.0 / s[j * r + j];
            for x in row.iter_mut() {
                *x *= scale;
            }
        }
    }
}

//! Blocked Householder QR in compact WY form (Schreiber and Van Loan 1989): the path that no conditioning can break.
//!
//! A null column takes no reflector. An ordinary Householder QR would invent a direction for it, and the columns that
//! follow would lose what they have along that invention.

use super::{copy, nan_max};
use crate::error::Error;
use crate::gemm::{Context, gemm};
use crate::isa::{Kernel, Level};
use crate::scratch::Scratch;
use crate::view::{Mat, MatMut};

/// Columns a block; its panel is factored column by column.
const BLOCK: usize = 32;

/// A block of reflectors `I − Y·W·Yᵀ` that starts at row `row`.
struct Reflectors {
    row: usize,
    count: usize,
    /// (n − row)×count, row-major, unit lower trapezoidal.
    y: Scratch<f64>,
    /// count×count, row-major, upper triangular.
    w: Scratch<f64>,
}

/// `(V, T, null)` of `a`: V n×r and T r×r, row-major; columns of V and rows of T that are null are zero.
#[allow(clippy::type_complexity)]
pub(super) fn factor(
    cx: Context,
    a: Mat<'_>,
    tol: f64,
) -> Result<(Scratch<f64>, Scratch<f64>, Vec<bool>), Error> {
    let (n, r) = (a.rows, a.cols);
    let mut work = Scratch::<f64>::new(n * r); // column-major
    copy(a, column_major(&mut work, n, r));
    let largest = work.iter().fold(0.0, |m, x| nan_max(m, x.abs()));
    if !largest.is_finite() {
        return Err(Error::NonFinite { what: "the matrix" });
    }
    // Squares must neither overflow nor vanish; a power of two changes no digit.
    let scale = if largest > 0.0 { (-largest.log2().floor()).clamp(-1000.0, 1000.0).exp2() } else { 1.0 };
    work.iter_mut().for_each(|x| *x *= scale);
    let norms = work.chunks_exact(n.max(1)).map(|c| super::square_norm(c).sqrt());
    let threshold = tol * norms.fold(0.0, f64::max);

    let mut null = vec![false; r];
    let mut at_row = vec![0; r]; // the reflector, so the row of the result, that a column has
    let mut blocks: Vec<Reflectors> = Vec::new();
    let mut row = 0;
    for lo in (0..r).step_by(BLOCK) {
        let hi = (lo + BLOCK).min(r);
        let first = row;
        let mut taus = Vec::with_capacity(BLOCK);
        let mut of_column = Vec::with_capacity(BLOCK);
        for j in lo..hi {
            let (head, tail) = work[lo * n..hi * n].split_at_mut((j - lo + 1) * n);
            let column = &mut head[(j - lo) * n..][row..];
            match reflector(column, threshold) {
                None => null[j] = true,
                Some(tau) => {
                    cx.isa.run(Apply { y: column, tau, columns: tail, n, row });
                    at_row[j] = row;
                    taus.push(tau);
                    of_column.push(j);
                    row += 1;
                }
            }
        }
        let block = compact(cx, &work, n, first, &of_column, &taus);
        if hi < r && block.count > 0 {
            let trailing = column_major(&mut work[hi * n..], n, r - hi).row_range(first..n);
            apply(cx, &block, trailing, true);
        }
        blocks.push(block);
    }

    let mut t = Scratch::zeros(r * r);
    for j in 0..r {
        for i in (0..=j).filter(|&i| !null[i]) {
            t[i * r + j] = work[j * n + at_row[i]] / scale;
        }
    }
    // V = H₁ H₂ … applied to the unit columns that the reflectors belong to.
    work.fill(0.0);
    for j in (0..r).filter(|&j| !null[j]) {
        work[j * n + at_row[j]] = 1.0;
    }
    for block in blocks.iter().rev().filter(|b| b.count > 0) {
        apply(cx, block, column_major(&mut work, n, r).row_range(block.row..n), false);
    }
    let mut v = Scratch::<f64>::new(n * r);
    copy(column_major(&mut work, n, r).as_ref(), MatMut::row_major(&mut v, n, r));
    for i in 0..r {
        if t[i * r + i] < 0.0 {
            t[i * r..(i + 1) * r].iter_mut().for_each(|x| *x = -*x);
            v.iter_mut().skip(i).step_by(r).for_each(|x| *x = -*x);
        }
    }
    Ok((v, t, null))
}

fn column_major(data: &mut [f64], n: usize, r: usize) -> MatMut<'_> {
    MatMut::row_major(&mut data[..n * r], r, n).t()
}

/// Turns `x` into the reflector `y` (with `y₀ = 1` understood) that maps it to `β·e₀`; `x₀` becomes β.
/// None if `‖x‖ ≤ threshold`.
fn reflector(x: &mut [f64], threshold: f64) -> Option<f64> {
    let norm = super::square_norm(x).sqrt();
    if norm <= threshold || norm == 0.0 {
        return None;
    }
    let beta = if x[0] >= 0.0 { -norm } else { norm };
    let head = x[0] - beta;
    x[1..].iter_mut().for_each(|v| *v /= head);
    let tau = -head / beta;
    x[0] = beta;
    Some(tau)
}

/// `c ← c − τ·y·(yᵀc)` for the panel's remaining columns.
struct Apply<'a> {
    y: &'a [f64],
    tau: f64,
    columns: &'a mut [f64],
    n: usize,
    row: usize,
}

impl Kernel for Apply<'_> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let y = &self.y[1..];
        for column in self.columns.chunks_exact_mut(self.n) {
            let (head, c) = column[self.row..].split_first_mut().expect("reflectors have a head");
            let mut partial = [0.0; 16];
            let (body, rest) = (y.chunks_exact(16), y.chunks_exact(16).remainder());
            for (yb, cb) in body.zip(c.chunks_exact(16)) {
                for l in 0..16 {
                    partial[l] += yb[l] * cb[l];
                }
            }
            let tail: f64 = rest.iter().zip(&c[y.len() - rest.len()..]).map(|(y, c)| y * c).sum();
            let dot = self.tau * (*head + partial.iter().sum::<f64>() + tail);
            *head -= dot;
            for (c, y) in c.iter_mut().zip(y) {
                *c -= dot * y;
            }
        }
    }
}

/// Collects a panel's reflectors: W from `H₁…H_k = I − Y·W·Yᵀ`, one column at a time.
fn compact(cx: Context, work: &[f64], n: usize, row: usize, columns: &[usize], taus: &[f64]) -> Reflectors {
    let (count, height) = (columns.len(), n - row);
    let mut y = Scratch::zeros(height * count);
    for (c, &j) in columns.iter().enumerate() {
        y[c * count + c] = 1.0;
        for i in c + 1..height {
            y[i * count + c] = work[j * n + row + i];
        }
    }
    let mut yty = Scratch::zeros(count * count);
    super::gram(cx, Mat::row_major(&y, height, count), &mut yty);
    let mut w = Scratch::zeros(count * count);
    for c in 0..count {
        w[c * count + c] = taus[c];
        for i in 0..c {
            let dot: f64 = (i..c).map(|k| w[i * count + k] * yty[k * count + c]).sum();
            w[i * count + c] = -taus[c] * dot;
        }
    }
    Reflectors { row, count, y, w }
}

/// `C ← (I − Y W Yᵀ) C`, or with Wᵀ.
fn apply(cx: Context, b: &Reflectors, mut c: MatMut<'_>, transposed: bool) {
    let (k, cols) = (b.count, c.as_ref().cols);
    let y = Mat::row_major(&b.y, b.y.len() / k, k);
    let w = Mat::row_major(&b.w, k, k);
    let w = if transposed { w.t() } else { w };
    let (mut yc, mut wyc) = (Scratch::<f64>::new(k * cols), Scratch::<f64>::new(k * cols));
    gemm::<f64>(cx, 1.0, y.t(), c.as_ref(), 0.0, MatMut::row_major(&mut yc, k, cols));
    gemm::<f64>(cx, 1.0, w, Mat::row_major(&yc, k, cols), 0.0, MatMut::row_major(&mut wyc, k, cols));
    gemm::<f64>(cx, -1.0, y, Mat::row_major(&wyc, k, cols), 1.0, c.reborrow());
}

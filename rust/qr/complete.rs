//! Completion of an orthonormal set whose null columns are zero.

use super::{factor, square_norm};
use crate::error::Error;
use crate::gemm::{Context, gemm};
use crate::scalar::Real;
use crate::scratch::Scratch;
use crate::view::{Mat, MatMut};

/// A candidate that keeps less than this of its length after projection is not used.
const KEEP: f64 = 1e-3;

/// Fills the null columns of `v` (n×r, the others orthonormal) so that all r columns are orthonormal.
///
/// The candidates are the same columns of `old`, so that a warm start changes as little as possible; where such a
/// column lies in the span already, the one of `old` with the largest remainder serves: `old` has r independent columns
/// and `v` fewer. So the result does not depend on the orthonormal basis that both are written in.
///
/// # Errors
/// [`Error::NonFinite`] if `old` is.
pub fn complete<T: Real>(cx: Context, mut v: MatMut<'_>, null: &[bool], old: Mat<'_>) -> Result<(), Error> {
    let n = v.as_ref().rows;
    let empty: Vec<usize> = (0..null.len()).filter(|&j| null[j]).collect();
    if empty.is_empty() {
        return Ok(());
    }
    let k = empty.len();
    let mut w = Scratch::<f64>::new(n * k);
    for (c, &j) in empty.iter().enumerate() {
        super::copy(old.col_range(j..j + 1), MatMut::row_major(&mut w, n, k).col_range(c..c + 1));
    }
    for _ in 0..2 {
        project_out(cx, v.as_ref(), MatMut::row_major(&mut w, n, k));
    }
    // Candidates have unit length, so an absolute tolerance is a relative one.
    let norm = w.chunks_exact(k).map(square_norm).sum::<f64>().sqrt();
    let view = Mat::row_major(&w, n, k);
    let f = factor::<T>(cx, view, (KEEP / norm.max(KEEP)).min(1.0), super::Paths::Any)?;
    let mut q = Scratch::<f64>::new(n * k);
    f.orthonormal(cx, MatMut::row_major(&mut q, n, k));
    let mut missing = Vec::new();
    for (c, &j) in empty.iter().enumerate() {
        if f.null[c] {
            missing.push(j);
        } else {
            super::copy(Mat::row_major(&q, n, k).col_range(c..c + 1), v.reborrow().col_range(j..j + 1));
        }
    }
    for j in missing {
        let view = v.as_ref();
        let (n, r) = (view.rows, old.cols);
        let mut rest = Scratch::<f64>::new(n * r);
        super::copy(old, MatMut::row_major(&mut rest, n, r));
        project_out(cx, view, MatMut::row_major(&mut rest, n, r));
        let mut energies = Scratch::<f64>::zeros(r);
        for row in rest.chunks_exact(r) {
            energies.iter_mut().zip(row).for_each(|(e, x)| *e += x * x);
        }
        let best = (0..r).max_by(|&a, &b| energies[a].total_cmp(&energies[b]).then(b.cmp(&a))).unwrap_or(0);
        let mut e = Scratch::<f64>::new(n);
        e.iter_mut().zip(rest.chunks_exact(r)).for_each(|(e, row)| *e = row[best]);
        for _ in 0..2 {
            let norm = square_norm(&e).sqrt().max(1e-300);
            e.iter_mut().for_each(|x| *x /= norm);
            project_out(cx, view, MatMut::row_major(&mut e, n, 1));
        }
        let norm = square_norm(&e).sqrt().max(1e-300);
        e.iter_mut().for_each(|x| *x /= norm);
        super::copy(Mat::row_major(&e, n, 1), v.reborrow().col_range(j..j + 1));
    }
    Ok(())
}

/// `W ← W − V(VᵀW)`
fn project_out(cx: Context, v: Mat<'_>, mut w: MatMut<'_>) {
    let (r, k) = (v.cols, w.as_ref().cols);
    let mut vtw = Scratch::<f64>::new(r * k);
    gemm::<f64>(cx, 1.0, v.t(), w.as_ref(), 0.0, MatMut::row_major(&mut vtw, r, k));
    gemm::<f64>(cx, -1.0, v, Mat::row_major(&vtw, r, k), 1.0, w.reborrow());
}

//! The right factor: the one line in which Dion, Orth-Dion and the exact polar step differ (docs/algorithms.md, section 2).

use super::{Options, Report};
use crate::error::Error;
use crate::gemm::Context;
use crate::isa::{Kernel, Level};
use crate::qr::{self, Paths};
use crate::scalar::Real;
use crate::scratch::Scratch;
use crate::view::{Mat, MatMut};

/// How V is made from R.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RightFactor {
    /// The Q of R = V T, diag(T) ≥ 0: Orth-Dion.
    Qr,
    /// R with unit columns: Dion.
    Column,
    /// R (RᵀR)^(−1/2): the rank-r step that Muon aims at.
    Polar,
}

/// V has been written; what else is known of it.
pub(super) struct Right {
    pub(super) null: Vec<bool>,
}

/// `v ← right_factor(R)` for n×r row-major `r`; null columns of `column` and `qr` are zero.
pub(super) fn right_factor<T: Real>(
    cx: Context,
    o: &Options,
    r: Mat<'_>,
    v: MatMut<'_>,
    tol: f64,
) -> Result<Right, Error> {
    let null = match o.right {
        RightFactor::Column => {
            let norms = column_norms(cx, r);
            let largest = norms.iter().fold(0.0f64, |m, x| m.max(*x));
            if norms.iter().any(|x| !x.is_finite()) {
                return Err(Error::NonFinite { what: "the right factor" });
            }
            let null: Vec<bool> = norms.iter().map(|x| *x <= tol * largest).collect();
            let scales = norms.iter().zip(&null);
            let scales: Vec<f64> =
                scales.map(|(x, null)| if *null { 0.0 } else { 1.0 / (x + o.epsilon * largest) }).collect();
            // SAFETY: this thread alone uses `v`.
            cx.isa.run(ScaleColumns { r, scales: &scales, out: unsafe { v.raw() } });
            null
        }
        // Unlike those of B·Q, R's columns are nearly orthogonal once the power iteration has settled.
        RightFactor::Qr => {
            let f = qr::factor::<T>(cx, r, tol, Paths::Short)?;
            f.orthonormal(cx, v);
            f.null
        }
        RightFactor::Polar => {
            let f = qr::factor::<T>(cx, r, tol, Paths::Short)?;
            f.polar::<T>(cx, v);
            f.null
        }
    };
    Ok(Right { null })
}

/// Makes the warm start whole again: null columns of `v` become what `old` has there, orthonormal to the others where
/// the kind is orthonormal.
pub(super) fn keep_null(cx: Context, o: &Options, null: &[bool], mut v: MatMut<'_>, old: Mat<'_>) {
    match o.right {
        RightFactor::Column => {
            for j in (0..null.len()).filter(|&j| null[j]) {
                qr::copy(old.col_range(j..j + 1), v.reborrow().col_range(j..j + 1));
            }
        }
        RightFactor::Qr => {
            // A non-finite Q cannot get here: its product with B was finite.
            let _ = qr::complete::<f64>(cx, v, null, old);
        }
        RightFactor::Polar => {
            // V has lost rank but no column need be zero: take its orthonormal basis, then complete that.
            let (n, r) = (v.as_ref().rows, v.as_ref().cols);
            let mut basis = Scratch::<f64>::new(n * r);
            let Ok(f) = qr::factor::<f64>(cx, v.as_ref(), 1e-3, Paths::Only(qr::Method::Householder)) else {
                return;
            };
            f.orthonormal(cx, MatMut::row_major(&mut basis, n, r));
            let _ = qr::complete::<f64>(cx, MatMut::row_major(&mut basis, n, r), &f.null, old);
            qr::copy(Mat::row_major(&basis, n, r), v);
        }
    }
}

impl Right {
    /// ν, alignment and effective rank.
    pub(super) fn diagnose(&self, cx: Context, o: &Options, r: Mat<'_>, v: Mat<'_>, report: &mut Report) {
        let k = r.cols;
        let norms = column_norms(cx, r);
        report.r_energy = qr::square_norm(&norms);
        report.nu = match o.right {
            RightFactor::Column => qr::spectral_norm(cx, v),
            _ => f64::from(self.null.iter().any(|null| !null)),
        };
        report.descent = (0..r.rows).map(|i| (0..k).map(|j| r.get(i, j) * v.get(i, j)).sum::<f64>()).sum();
        if let Ok(f) = qr::factor::<f32>(cx, r, 1e-6, Paths::Any) {
            report.nuclear = f.nuclear_norm(cx);
        }
        report.effective_rank = effective_rank(&norms);
    }
}

/// exp of the entropy of the normalised column norms (docs/algorithms.md, section 10).
fn effective_rank(norms: &[f64]) -> f64 {
    let total: f64 = norms.iter().sum();
    if total == 0.0 {
        return 0.0;
    }
    let entropy: f64 = norms.iter().filter(|&&x| x > 0.0).map(|x| -(x / total) * (x / total).ln()).sum();
    entropy.exp()
}

/// ‖R_j‖ in double.
fn column_norms(cx: Context, r: Mat<'_>) -> Vec<f64> {
    struct Sums<'a>(Mat<'a>);
    impl Kernel for Sums<'_> {
        type Out = Vec<f64>;
        #[inline(always)]
        fn run<L: Level>(self) -> Vec<f64> {
            let k = self.0.cols;
            let (mut line, mut sums) = (Scratch::<f64>::new(k), vec![0.0; k]);
            for i in 0..self.0.rows {
                // SAFETY: row `i` has `k` elements.
                unsafe {
                    crate::gemm::line::Line::along(self.0, i, 0).scaled(line.as_mut_ptr(), k, 1.0);
                }
                for (s, x) in sums.iter_mut().zip(line.iter()) {
                    *s += x * x;
                }
            }
            sums
        }
    }
    cx.isa.run(Sums(r)).into_iter().map(f64::sqrt).collect()
}

/// `out_j ← scales_j·R_j`
struct ScaleColumns<'a> {
    r: Mat<'a>,
    scales: &'a [f64],
    out: Mat<'a>,
}

impl Kernel for ScaleColumns<'_> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let k = self.r.cols;
        let mut line = Scratch::<f64>::new(k);
        for i in 0..self.r.rows {
            // SAFETY: row `i` of either view has `k` elements; `out` is the caller's exclusive view.
            unsafe {
                crate::gemm::line::Line::along(self.r, i, 0).scaled(line.as_mut_ptr(), k, 1.0);
                for (x, s) in line.iter_mut().zip(self.scales) {
                    *x *= s;
                }
                crate::gemm::line::Line::along(self.out, i, 0).write(line.as_ptr(), k);
            }
        }
    }
}

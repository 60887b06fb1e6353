//! The polar factor of a small upper triangular matrix by QDWH (Nakatsukasa, Bai, Gygi 2010), products only.

use super::{cholesky, householder, square_norm};
use crate::gemm::{Context, gemm};
use crate::scratch::Scratch;
use crate::view::{Mat, MatMut};

/// `u ← polar(T)`, to about `unit`, for r×r upper triangular `t` whose rows marked `null` are zero.
///
/// With null rows, T = Z·Sᵀ for a smaller triangular S (a complete orthogonal decomposition) and polar(T) = polar(Sᵀ) Zᵀ
/// on the rows that are left.
pub(super) fn polar_upper(cx: Context, t: &[f64], null: &[bool], unit: f64, u: &mut [f64]) {
    let r = null.len();
    let kept: Vec<usize> = (0..r).filter(|&j| !null[j]).collect();
    let k = kept.len();
    u.fill(0.0);
    if k == 0 {
        return;
    }
    if k == r {
        u.copy_from_slice(t);
        iterate(cx, u, r, unit);
        return;
    }
    let mut rows = Scratch::<f64>::new(k * r);
    for (row, &j) in rows.chunks_exact_mut(r).zip(&kept) {
        row.copy_from_slice(&t[j * r..(j + 1) * r]);
    }
    // Rowsᵀ = Z S: Z r×k orthonormal, S k×k upper triangular.
    let view = Mat::row_major(&rows, k, r);
    let Ok((z, mut s, dropped)) = householder::factor(cx, view.t(), 1e-14) else {
        return; // `t` is finite: `factor` has checked it
    };
    if dropped.iter().any(|&d| d) {
        // Numerically deficient although no pivot said so: what is left of S has full rank.
        let mut inner = Scratch::<f64>::new(k * k);
        polar_upper(cx, &s, &dropped, unit, &mut inner);
        s = inner;
    } else {
        iterate(cx, &mut s, k, unit);
    }
    let mut small = Scratch::<f64>::new(k * r);
    let (z, s) = (Mat::row_major(&z, r, k), Mat::row_major(&s, k, k));
    gemm::<f64>(cx, 1.0, s.t(), z.t(), 0.0, MatMut::row_major(&mut small, k, r));
    for (row, &j) in small.chunks_exact(r).zip(&kept) {
        u[j * r..(j + 1) * r].copy_from_slice(row);
    }
}

/// One of QDWH's rounds, as a function of a singular value: `σ ← keep·σ + weight·σ/(1 + c·σ²)`.
pub(super) struct Round {
    pub(super) keep: f64,
    pub(super) weight: f64,
    pub(super) c: f64,
    /// What becomes of the smallest one.
    pub(super) raised: f64,
}

impl Round {
    /// The weights that best raise singular values in [l, 1].
    pub(super) fn raising(l: f64) -> Self {
        let l2 = l * l;
        let d = (4.0 * (1.0 - l2) / (l2 * l2)).cbrt();
        let root = (1.0 + d).sqrt();
        let a = root + 0.5 * (8.0 - 4.0 * d + 8.0 * (2.0 - l2) / (l2 * root)).max(0.0).sqrt();
        let b = (a - 1.0).powi(2) / 4.0;
        let c = a + b - 1.0;
        let raised = (l * (a + b * l2) / (1.0 + c * l2)).min(1.0);
        Round { keep: b / c, weight: a - b / c, c, raised }
    }
}

/// `x ← polar(x)`, x r×r upper triangular and nonsingular, by
///
/// ```text
/// X ← (b/c)·X + (a − b/c)·X (I + c·XᵀX)⁻¹
/// ```
///
/// with the weights that best raise the smallest singular value, of which `l` is a lower bound. Six rounds at most for
/// condition numbers up to 1e16. The Cholesky form of a round errs by about c·2⁻⁵³; where that is not
/// below `unit`, the round is taken by Householder's QR of [√c·X; I] instead.
fn iterate(cx: Context, x: &mut [f64], r: usize, unit: f64) {
    let eye = |s: &mut [f64]| (0..r).for_each(|i| s[i * r + i] += 1.0);
    let mut inverse = Scratch::zeros(r * r);
    let scale = largest(x, r);
    x.iter_mut().for_each(|v| *v /= scale);
    // Below 1e-70 its fourth power would vanish; such directions are far beyond what double precision can tell apart.
    let mut l = (1.0 / triangular_inverse_norm(cx, x, &mut inverse, r)).clamp(1e-70, 1.0);
    let (mut s, mut null) = (Scratch::zeros(r * r), vec![false; r]);
    let (mut y, mut z) = (Scratch::<f64>::new(r * r), Scratch::<f64>::new(r * r));
    for _ in 0..12 {
        if 1.0 - l < unit.sqrt() / 8.0 {
            break; // the last step below squares this
        }
        let Round { keep, weight, c, raised } = Round::raising(l);
        if c * 1e-16 > unit.max(1e-14) {
            stacked_round(cx, x, r, c, weight / c.sqrt(), &mut z);
        } else {
            super::gram(cx, Mat::row_major(x, r, r), &mut s);
            s.iter_mut().for_each(|v| *v *= c);
            eye(&mut s);
            cholesky::factor(cx, &mut s, &mut inverse, r, 0.0, &mut null);
            let (xv, inv) = (Mat::row_major(x, r, r), Mat::row_major(&inverse, r, r));
            gemm::<f64>(cx, 1.0, xv, inv, 0.0, MatMut::row_major(&mut y, r, r));
            let out = MatMut::row_major(&mut z, r, r);
            gemm::<f64>(cx, weight, Mat::row_major(&y, r, r), inv.t(), 0.0, out);
        }
        for (x, z) in x.iter_mut().zip(z.iter()) {
            *x = keep * *x + z;
        }
        l = raised;
    }
    // One Newton–Schulz step squares what error is left.
    super::gram(cx, Mat::row_major(x, r, r), &mut s);
    s.iter_mut().for_each(|v| *v *= -0.5);
    (0..r).for_each(|i| s[i * r + i] += 1.5);
    gemm::<f64>(
        cx,
        1.0,
        Mat::row_major(x, r, r),
        Mat::row_major(&s, r, r),
        0.0,
        MatMut::row_major(&mut y, r, r),
    );
    x.copy_from_slice(&y);
}

/// `z ← weight·Q₁Q₂ᵀ` for the QR of [√c·X; I] = [Q₁; Q₂]·R, which is `weight·√c·X (I + c·XᵀX)⁻¹`.
fn stacked_round(cx: Context, x: &[f64], r: usize, c: f64, weight: f64, z: &mut [f64]) {
    let mut stack = Scratch::zeros(2 * r * r);
    for (s, x) in stack.iter_mut().zip(x) {
        *s = c.sqrt() * x;
    }
    for i in 0..r {
        stack[(r + i) * r + i] = 1.0;
    }
    let Ok((q, _, _)) = householder::factor(cx, Mat::row_major(&stack, 2 * r, r), 0.0) else {
        return; // finite: the caller has scaled x to norm 1
    };
    let q = Mat::row_major(&q, 2 * r, r);
    gemm::<f64>(cx, weight, q.row_range(0..r), q.row_range(r..2 * r).t(), 0.0, MatMut::row_major(z, r, r));
}

/// An upper bound on ‖x‖₂: sqrt(‖x‖₁‖x‖_∞) or the Frobenius norm.
fn largest(x: &[f64], r: usize) -> f64 {
    let rows = x.chunks_exact(r).map(|row| row.iter().map(|v| v.abs()).sum::<f64>());
    let mut columns = vec![0.0; r];
    for row in x.chunks_exact(r) {
        columns.iter_mut().zip(row).for_each(|(c, v)| *c += v.abs());
    }
    let one_inf = (rows.fold(0.0, f64::max) * columns.into_iter().fold(0.0, f64::max)).sqrt();
    one_inf.min(square_norm(x).sqrt()).max(f64::MIN_POSITIVE)
}

/// ‖T⁻¹‖_F of an upper triangular T with positive diagonal, by rows.
fn triangular_inverse_norm(cx: Context, t: &[f64], inverse: &mut [f64], r: usize) -> f64 {
    cholesky::invert_upper(cx, t, inverse, r);
    square_norm(inverse).sqrt()
}

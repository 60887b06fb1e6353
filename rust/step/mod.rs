//! The low-rank step of Dion's family for one matrix, and over a list of them (docs/algorithms.md, sections 1 to 3b).
//!
//! ```text
//! M⁺ = M + G                          never stored: formed while panels are packed
//! B  = M⁺, or κM⁺ + G                 Nesterov's look-ahead
//! P  = orth(B Q),  R = Bᵀ P           one power iteration
//! V  = right_factor(R)
//! D  = P Vᵀ + residual(B − P Rᵀ)
//! X  = (1 − ηλ)·X − η·scale·D
//! M  = a·M⁺ − (a − b)·P (M⁺ᵀ P)ᵀ
//! Q  = V, with null directions kept orthonormal
//! ```
//!
//! Everything up to V only reads. A gradient with NaN or infinity is found there, and then nothing is written at all.

mod apply;
pub mod parts;
pub mod residual;
mod right;

pub use right::RightFactor;

use crate::error::Error;
use crate::gemm::{Context, Packed, Product, Terms, gemm};
use crate::isa::{Kernel, Level};
use crate::pool;
use crate::qr::{self, Paths};
use crate::scalar::Real;
use crate::scratch::Scratch;
use crate::view::{Mat, MatMut};

/// What is done with the part of B that rank r misses (docs/algorithms.md, section 3b).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tail {
    /// It stays in M until later steps: the published form.
    Feedback,
    /// Applied at once, as it is: `D = P (V − αR)ᵀ + αB`.
    Linear,
    /// Applied at once, its columns and then its rows brought to one norm.
    Normalized,
}

/// Hyperparameters of a step, shared by the matrices of a group.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// η
    pub lr: f64,
    /// λ
    pub weight_decay: f64,
    /// Decay only entries that the step does not push away from zero.
    pub cautious: bool,
    /// What is kept of the residual.
    pub a: f64,
    /// What is kept of the captured part.
    pub b: f64,
    /// The one line in which the family differs.
    pub right: RightFactor,
    /// What happens to the residual.
    pub tail: Tail,
    /// c, the root mean square that the residual's singular values get.
    pub tail_scale: f64,
    /// κ of the look-ahead, if any.
    pub nesterov: Option<f64>,
    /// Ascend instead of descend.
    pub maximize: bool,
    /// Guards the division in the `column` right factor, relative to the largest column.
    pub epsilon: f64,
    /// Fill in the report's diagnostics.
    pub diagnostics: bool,
    /// Round the operands of single-precision products to bfloat16.
    pub half: bool,
}

/// One matrix and its state: X, G, M m×n, Q n×r, any strides; `scale` multiplies η.
#[derive(Debug)]
pub struct Matrix<'a> {
    /// Weights.
    pub x: MatMut<'a>,
    /// Gradient.
    pub g: Mat<'a>,
    /// Error-feedback buffer.
    pub m: MatMut<'a>,
    /// Warm start of the power iteration, orthonormal (unit columns for `column`).
    pub q: MatMut<'a>,
    /// `sqrt(fan_out / fan_in)` for Dion's family.
    pub scale: f64,
}

/// What happened to a matrix.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Report {
    /// The gradient or a state held NaN or infinity; nothing was written.
    pub skipped: bool,
    /// Directions in which B was numerically zero.
    pub null: usize,
    /// ‖B‖²; this and what follows only if diagnostics were asked for.
    pub b_energy: f64,
    /// ‖R‖², the part that P captures.
    pub r_energy: f64,
    /// ‖V‖₂
    pub nu: f64,
    /// ⟨B, P Vᵀ⟩ = tr(RᵀV)
    pub descent: f64,
    /// ‖R‖_*, the largest value that `descent` could have.
    pub nuclear: f64,
    /// exp(entropy of R's normalised column norms)
    pub effective_rank: f64,
}

/// What is rounding noise, given how products are rounded.
#[derive(Clone, Copy)]
struct Noise {
    /// Directions of B·Q smaller than this, relative to the largest, come from rounding its operands.
    left: f64,
    /// The same for R.
    right: f64,
    /// With less than this share of B's energy there is no residual.
    tail: f64,
    /// Rows and columns whose residual has less than this share of B's energy there fade out.
    fade: f64,
}

impl Noise {
    fn of<T: Real>(half: bool) -> Self {
        if half && T::UNIT > 1e-10 {
            // Where B's rank ends, a column of B·Q is 2⁻⁹·√2 of noise times the condition of those before it. What is
            // left out there stays in M. Energies are sums of many such errors, which average out.
            return Noise {
                left: 2f64.powi(-6),
                right: 2f64.powi(-8),
                tail: 2f64.powi(-12),
                fade: 2f64.powi(-8),
            };
        }
        Noise {
            left: 64.0 * T::UNIT,
            right: 64.0 * T::UNIT,
            tail: 16.0 * T::UNIT,
            fade: T::UNIT.sqrt() / 16.0,
        }
    }
}

impl Matrix<'_> {
    fn flops(&self) -> f64 {
        let (x, r) = (self.x.as_ref(), self.q.as_ref().cols);
        8.0 * x.rows as f64 * x.cols as f64 * r as f64
    }
}

/// Steps every matrix; `reports[i]` tells about `matrices[i]`.
///
/// Threads take whole matrices, largest first, see [`pool::map`].
///
/// # Errors
/// [`Error::Shape`] if a state does not fit its weight; then nothing has been written.
pub fn step<T: Real>(
    cx: Context,
    matrices: &mut [(Matrix<'_>, Options)],
    reports: &mut [Report],
) -> Result<(), Error> {
    matrices.iter().try_for_each(|(m, _)| check(m))?;
    assert_eq!(matrices.len(), reports.len(), "one report a matrix");
    let jobs = matrices.iter_mut().zip(reports).collect();
    pool::map(
        cx.threads,
        jobs,
        |((matrix, _), _)| matrix.flops(),
        |threads, ((matrix, options), report)| {
            *report = one::<T>(Context { threads, ..cx }, matrix, options);
        },
    );
    Ok(())
}

fn check(m: &Matrix<'_>) -> Result<(), Error> {
    let shape = |v: Mat<'_>| (v.rows, v.cols);
    let x = shape(m.x.as_ref());
    for (what, view) in [("the gradient", m.g), ("the momentum", m.m.as_ref())] {
        if shape(view) != x {
            return Err(Error::Shape { what, need: x, got: shape(view) });
        }
    }
    let q = shape(m.q.as_ref());
    if q.0 != x.1 || q.1 > x.0.min(x.1) {
        return Err(Error::Shape { what: "Q", need: (x.1, q.1.min(x.0.min(x.1))), got: q });
    }
    Ok(())
}

/// The step of one matrix.
fn one<T: Real>(cx: Context, matrix: &mut Matrix<'_>, o: &Options) -> Report {
    let x = matrix.x.as_ref();
    let (m, n, r) = (x.rows, x.cols, matrix.q.as_ref().cols);
    if m == 0 || n == 0 || r == 0 {
        return Report::default();
    }
    let skipped = Report { skipped: true, ..Report::default() };
    let sign = if o.maximize { -1.0 } else { 1.0 };
    // Shared copies of M and G: read here, and by `apply` panel by panel before it writes that panel's M.
    let (mv, gv) = (matrix.m.raw(), matrix.g);
    let unscaled = match o.nesterov {
        Some(k) => Terms::two(k, mv, (1.0 + k) * sign, gv),
        None => Terms::two(1.0, mv, sign, gv),
    };

    // P = orth(B Q)
    let noise = Noise::of::<T>(o.half);
    let products = Context { half: o.half, ..cx };
    let count = o.tail != Tail::Feedback || o.diagnostics;
    let mut row_energy = Scratch::<f64>::zeros(m);
    let mut p = Scratch::<T>::new(m * r);
    let Some((size, largest)) =
        project(products, unscaled, matrix.q.as_ref(), &mut p, count.then_some(&mut row_energy[..]))
    else {
        return skipped;
    };
    // No entry of P Rᵀ is more than ‖B‖: what could be written as infinity is not.
    if largest * ((m * n) as f64).sqrt() > T::MAX {
        return skipped;
    }
    let b = unscaled.scaled(size);
    let mut orthonormal = Scratch::<T>::new(m * r);
    let Ok(factor) = qr::factor::<T>(cx, Mat::row_major(&p, m, r), noise.left, Paths::Any) else {
        return skipped;
    };
    factor.orthonormal(cx, MatMut::row_major(&mut orthonormal, m, r));
    drop(factor);
    let p = Mat::row_major(&orthonormal, m, r);

    // R = Bᵀ P, and M⁺ᵀ P where that is something else
    let packed = Packed::<T>::new(products, p.t());
    let mut column_energy = Scratch::<f64>::zeros(n);
    let mut rfac = Scratch::<T>::new(n * r);
    let columns = (o.tail == Tail::Normalized).then_some(&mut column_energy[..]);
    project_back(cx, &packed, b, &mut rfac, columns);
    let own = (o.nesterov.is_some() && o.a != o.b).then(|| {
        let mut w = Scratch::<T>::new(n * r);
        project_back(cx, &packed, Terms::two(size, mv, size * sign, gv), &mut w, None);
        w
    });
    drop(packed);
    let rv = Mat::row_major(&rfac, n, r);

    // V
    let mut v = Scratch::<T>::new(n * r);
    let Ok(right) = right::right_factor::<T>(cx, o, rv, MatMut::row_major(&mut v, n, r), noise.right) else {
        return skipped;
    };
    let mut report = Report { null: right.null.iter().filter(|&&x| x).count(), ..Report::default() };
    let b_energy: f64 = row_energy.iter().sum();
    let energies = apply::Energies { row: &row_energy, column: &column_energy };
    if o.diagnostics {
        right.diagnose(cx, o, rv, Mat::row_major(&v, n, r), &mut report);
        report.b_energy = b_energy / size.powi(2);
        report.r_energy /= size.powi(2);
        report.descent /= size;
        report.nuclear /= size;
    }

    // From here on, writes.
    let factors = apply::Factors {
        p,
        r: rv,
        v: Mat::row_major(&v, n, r),
        w: own.as_ref().map_or(rv, |w| Mat::row_major(w, n, r)),
        b,
        size,
        sign,
    };
    apply::apply::<T>(
        products,
        o,
        matrix.scale,
        matrix.x.reborrow(),
        matrix.m.reborrow(),
        gv,
        &factors,
        &energies,
        noise,
    );
    if right.null.iter().all(|&null| null) {
        return report; // nothing was learnt: Q stays, bit-exact
    }
    if right.null.iter().any(|&null| null) {
        right::keep_null(cx, o, &right.null, MatMut::row_major(&mut v, n, r), matrix.q.as_ref());
    }
    qr::copy(Mat::row_major(&v, n, r), matrix.q.reborrow());
    report
}

/// `p ← size·B·Q` (m×r) and B's row energies; returns `size`, a power of two that brings B into the working
/// precision's comfortable range, and max |B| (0 where it is comfortable), or None if B holds NaN or infinity.
fn project<T: Real>(
    cx: Context,
    b: Terms<'_>,
    q: Mat<'_>,
    p: &mut [T],
    mut row_energy: Option<&mut [f64]>,
) -> Option<(f64, f64)> {
    let (m, r) = (b.shape()?.0, q.cols);
    let lhs = Packed::<T>::new(cx, q.t());
    let (mut size, mut entry) = (1.0, 0.0);
    for attempt in 0..2 {
        Product {
            sums: row_energy.as_deref_mut(),
            ..Product::new(&lhs, b.scaled(size).t(), MatMut::row_major(p, m, r).t())
        }
        .run(cx);
        let largest = cx.isa.run(Largest { x: p });
        let comfortable = largest > 1.0 / T::SAFE_MAX && largest < T::SAFE_MAX;
        if comfortable || attempt == 1 {
            return largest.is_finite().then_some((size, entry));
        }
        // NaN, overflow, underflow or zero: only B itself can tell.
        entry = largest_entry(cx, b);
        if !entry.is_finite() {
            return None;
        }
        if entry == 0.0 {
            return Some((1.0, entry));
        }
        size = (-entry.log2().floor()).clamp(-T::SAFE_EXPONENT, T::SAFE_EXPONENT).exp2();
        if entry * size < 2f64.powi(-60) {
            // So far below the smallest normal number that a power of two cannot bring it back: zero, but for decay.
            p.fill(T::default());
            if let Some(energy) = row_energy {
                energy.fill(0.0);
            }
            return Some((1.0, entry));
        }
    }
    None
}

/// `out ← (terms)ᵀ·P` (n×r) for `packed` = Pᵀ.
fn project_back<T: Real>(
    cx: Context,
    packed: &Packed<T>,
    terms: Terms<'_>,
    out: &mut [T],
    sums: Option<&mut [f64]>,
) {
    let (r, n) = (packed.rows, terms.shape().map_or(0, |s| s.1));
    Product { sums, ..Product::new(packed, terms, MatMut::row_major(out, n, r).t()) }.run(cx);
}

/// max |x|, or NaN if one is.
struct Largest<'a, T> {
    x: &'a [T],
}

impl<T: Real> Kernel for Largest<'_, T> {
    type Out = f64;
    #[inline(always)]
    fn run<L: Level>(self) -> f64 {
        // `0·x` is NaN for NaN and infinity and zero otherwise; the maximum below would lose a NaN.
        let mut largest = [T::default(); 16];
        let mut poison = [T::default(); 16];
        let chunks = self.x.chunks_exact(16);
        let rest = chunks.remainder();
        for chunk in chunks {
            for l in 0..16 {
                let a = chunk[l].abs();
                largest[l] = if a > largest[l] { a } else { largest[l] };
                poison[l] += chunk[l] * T::default();
            }
        }
        let mut all = 0.0f64;
        let mut bad = 0.0f64;
        for l in 0..16 {
            all = all.max(largest[l].f64());
            bad += poison[l].f64();
        }
        for x in rest {
            all = all.max(x.abs().f64());
            bad += (*x * T::default()).f64();
        }
        if bad == 0.0 { all } else { f64::NAN }
    }
}

/// max |B_ij| in double; infinite or NaN if B is anywhere.
pub(crate) fn largest_entry(cx: Context, b: Terms<'_>) -> f64 {
    let (m, n) = b.shape().unwrap_or((0, 0));
    let down = b.contiguous_down();
    let (lines, len) = if down { (n, m) } else { (m, n) };
    let mut line = Scratch::<f64>::new(len);
    let mut largest = 0.0f64;
    for l in 0..lines {
        // SAFETY: line `l` of B has `len` elements.
        unsafe { b.read(if down { (0, l) } else { (l, 0) }, down, line.as_mut_ptr(), len, false) };
        let here = cx.isa.run(Largest { x: &line[..] });
        if here.is_nan() {
            return here;
        }
        largest = largest.max(here);
    }
    largest
}

/// One power iteration: `P = orth(A Q)`, `R = Aᵀ P` for A m×n, Q n×r; P m×r and R n×r are overwritten.
///
/// Null directions (relative tolerance `tol`) have zero columns in P and R.
///
/// # Errors
/// [`Error::Shape`] if shapes do not fit or r > min(m, n), [`Error::NonFinite`] for A or Q; then nothing has been
/// written.
pub fn power_iteration<T: Real>(
    cx: Context,
    a: Mat<'_>,
    q: Mat<'_>,
    mut p: MatMut<'_>,
    r: MatMut<'_>,
    tol: f64,
) -> Result<Vec<bool>, Error> {
    let (m, n, k) = (a.rows, a.cols, q.cols);
    let need = [
        ("Q", q.rows, q.cols, n, k.min(m.min(n))),
        ("P", p.as_ref().rows, p.as_ref().cols, m, k),
        ("R", r.as_ref().rows, r.as_ref().cols, n, k),
    ];
    for (what, rows, cols, want_rows, want_cols) in need {
        if (rows, cols) != (want_rows, want_cols) {
            return Err(Error::Shape { what, need: (want_rows, want_cols), got: (rows, cols) });
        }
    }
    let mut sketch = Scratch::<T>::new(m * k);
    if k > 0 && project(cx, Terms::one(a), q, &mut sketch, None).is_none() {
        return Err(Error::NonFinite { what: "the matrix or its start Q" });
    }
    let factor = qr::factor::<T>(cx, Mat::row_major(&sketch, m, k), tol, Paths::Any)?;
    factor.orthonormal(cx, p.reborrow());
    gemm::<T>(cx, 1.0, a.t(), p.as_ref(), 0.0, r);
    Ok(factor.null)
}

#[cfg(test)]
mod oracle;
#[cfg(test)]
mod tests;

//! Orthonormal factors of tall matrices.
//!
//! It runs in double precision, whatever the input is stored in, except for two steps that benign float32 input can do
//! in single: the Gram matrix ([`Method::Short`]) and the last product. A product of two singles is exact in double, so
//! one Cholesky QR of a float32 matrix with condition κ leaves an orthogonality error of about κ²·2⁻⁵³, below float32's
//! own roundoff up to κ ≈ 10⁴, for the price of two products.
//! [`factor`] estimates κ from the triangular factor it has anyway and takes a second pass, or Householder reflections,
//! where one does not suffice.
//!
//! A direction that the input does not determine is *null* (docs/algorithms.md, section 2): its column of the orthonormal factor is
//! zero and its row of the triangular one too. The rule: `|T_jj| ≤ tol · max_i ‖a_i‖`.

mod cholesky;
mod complete;
mod householder;
mod polar;
mod root;

pub use complete::complete;

use crate::error::Error;
use crate::gemm::{Context, Packed, Product, Region, Terms, gemm};
use crate::pool;
use crate::scalar::Real;
use crate::scratch::Scratch;
use crate::view::{Mat, MatMut};

/// `A = V·T`, not yet multiplied out: `V = base·right`.
pub(crate) struct Factor<'a> {
    base: Base<'a>,
    /// r×r, row-major, upper triangular.
    right: Option<Scratch<f64>>,
    /// T, r×r, row-major, upper triangular, diagonal ≥ 0; rows of null directions are zero.
    pub(crate) t: Scratch<f64>,
    /// The null directions.
    pub(crate) null: Vec<bool>,
    /// How it was computed.
    pub(crate) method: Method,
    /// `base·right` may be multiplied out in single precision: it then errs by a roundoff or two of `V`'s own.
    single: bool,
    /// AᵀA, where one Cholesky factorisation of it was enough and single precision is wanted.
    gram: Option<Scratch<f64>>,
}

enum Base<'a> {
    Input(Mat<'a>),
    Own(Scratch<f64>),
}

/// The path that a factorisation took.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Method {
    /// One Cholesky QR whose Gram matrix is made of short sums in single precision, joined in double.
    Short,
    /// One Cholesky QR.
    Cholesky,
    /// Two of them.
    CholeskyTwice,
    /// Blocked Householder reflections.
    Householder,
}

/// The paths that a factorisation may take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Paths {
    /// Whatever is accurate, the cheapest in double precision first.
    Any,
    /// The same, and before that [`Method::Short`]: three quarters of the price for columns that are nearly orthogonal,
    /// a third more for others.
    Short,
    /// This one, accurate or not; Householder's where it can give no factor at all.
    Only(Method),
}

/// Equilibrated condition numbers up to which one and two Cholesky passes reach working accuracy.
///
/// float32: κ²·2⁻⁵³ stays below 2⁻²⁴/8 up to 3·10³. Two passes need a first one that succeeds, κ² < 2⁵³/r, and we keep
/// two digits from that. float64: the explicit inverse costs κ·2⁻⁵³ of residual, so only well-conditioned input goes
/// that way.
fn gate<T: Real>() -> (f64, f64) {
    if T::UNIT > 1e-10 { (3e3, 3e5) } else { (0.0, 30.0) }
}

/// Up to which `Σ ‖a_i‖²·‖(T⁻¹)_i‖² / r`, which is 1 for orthogonal columns of any lengths, a Gram matrix of short sums
/// will do. In units of √r·2⁻²⁴, orthogonality then errs by one to four for columns of random entries, and by up to
/// sixteen where all partial sums round the same way.
const BENIGN: f64 = 2.0;

/// The same for the product `A·T⁻¹` in single precision: its terms are √ of that times as large as their sums, in the
/// mean, and so are its errors.
const SINGLE: f64 = 16.0;

/// The smallest null tolerance that Cholesky's pivots, with errors of about r·2⁻⁵³, can decide.
const CHOLESKY_TOL: f64 = 1e-6;

/// Factors `a` (n×r, n ≥ r) to the accuracy of working precision `T`.
///
/// # Errors
/// [`Error::NonFinite`]; [`Error::Shape`] for a wide input.
pub(crate) fn factor<'a, T: Real>(
    cx: Context,
    a: Mat<'a>,
    tol: f64,
    paths: Paths,
) -> Result<Factor<'a>, Error> {
    let cx = cx.unrounded();
    let (n, r) = (a.rows, a.cols);
    if r == 0 {
        let (right, t) = (Some(Scratch::new(0)), Scratch::new(0));
        return Ok(Factor {
            base: Base::Input(a),
            right,
            t,
            null: Vec::new(),
            method: Method::Cholesky,
            single: false,
            gram: None,
        });
    }
    if n < r {
        return Err(Error::Shape {
            what: "the matrix (pass the transpose of a wide one)",
            need: (r, r),
            got: (n, r),
        });
    }
    let single = T::UNIT > 1e-10;
    let (short, one, two) = match paths {
        Paths::Any => (0.0, gate::<T>().0, gate::<T>().1),
        Paths::Short => (BENIGN.sqrt() * r as f64, gate::<T>().0, gate::<T>().1),
        Paths::Only(Method::Short) => (f64::INFINITY, 0.0, 0.0),
        Paths::Only(Method::Cholesky) => (0.0, f64::INFINITY, f64::INFINITY),
        Paths::Only(Method::CholeskyTwice) => (0.0, 0.0, f64::INFINITY),
        Paths::Only(Method::Householder) => (0.0, 0.0, 0.0),
    };
    if single && short > 0.0 {
        let mut s = Scratch::zeros(r * r);
        symmetric_in::<T>(cx, a, a, &mut s);
        if let Some(f) = by_cholesky(cx, a, s, tol, (short, 0.0), true)
            && f.single
            && !f.null.contains(&true)
        {
            return Ok(Factor { method: Method::Short, ..f });
        }
    }
    if two > 0.0 {
        let mut s = Scratch::zeros(r * r);
        gram(cx, a, &mut s);
        if let Some(f) = by_cholesky(cx, a, s, tol, (one, two), single) {
            return Ok(f);
        }
    }
    let (q, t, null) = householder::factor(cx, a, tol)?;
    Ok(Factor {
        base: Base::Own(q),
        right: None,
        t,
        null,
        method: Method::Householder,
        single: false,
        gram: None,
    })
}

/// `max` that keeps a NaN.
fn nan_max(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) }
}

fn by_cholesky<'a>(
    cx: Context,
    a: Mat<'a>,
    mut s: Scratch<f64>,
    tol: f64,
    (one, two): (f64, f64),
    single: bool,
) -> Option<Factor<'a>> {
    let r = a.cols;
    let scale = (0..r).map(|j| s[j * r + j]).fold(0.0, nan_max);
    // A Gram matrix out of double's comfortable range is Householder's business, which scales its input and tells
    // overflow from NaN.
    if !(1e-200..1e200).contains(&scale) {
        return None;
    }
    let norms: Vec<f64> = (0..r).map(|j| s[j * r + j].sqrt()).collect();
    let kept = single.then(|| {
        let mut kept = Scratch::new(r * r);
        kept.copy_from_slice(&s);
        kept
    });
    let mut inverse = Scratch::zeros(r * r);
    let mut null = vec![false; r];
    // Below `CHOLESKY_TOL` a pivot cannot tell null from small: then none may be that small.
    let threshold = tol.max(CHOLESKY_TOL).powi(2) * scale;
    cholesky::factor(cx, &mut s, &mut inverse, r, threshold, &mut null);
    if tol < CHOLESKY_TOL && (0..r).any(|j| null[j] && norms[j] > 0.0) {
        return None;
    }
    // κ of the column-equilibrated input, which is what Cholesky's error depends on (van der Sluis).
    let weighted: f64 = (0..r).map(|i| norms[i].powi(2) * square_norm(&inverse[i * r..(i + 1) * r])).sum();
    let kappa = (r as f64 * weighted).sqrt();
    if kappa <= one {
        return Some(Factor {
            base: Base::Input(a),
            right: Some(inverse),
            t: s,
            null,
            method: Method::Cholesky,
            single: single
                && weighted <= SINGLE * r as f64
                && norms.iter().all(|x| (1e-12..1e12).contains(x)),
            gram: kept,
        });
    }
    if kappa > two || kappa.is_nan() {
        return None;
    }
    let mut first = Scratch::<f64>::new(a.rows * r);
    times_upper::<f64>(cx, a, &inverse, MatMut::row_major(&mut first, a.rows, r));
    let mut s2 = Scratch::zeros(r * r);
    gram(cx, Mat::row_major(&first, a.rows, r), &mut s2);
    let mut still_null = null.clone();
    cholesky::factor(cx, &mut s2, &mut inverse, r, 0.25, &mut still_null);
    if still_null != null {
        return None;
    }
    let mut t = Scratch::zeros(r * r);
    gemm::<f64>(
        cx.serial(),
        1.0,
        Mat::row_major(&s2, r, r),
        Mat::row_major(&s, r, r),
        0.0,
        MatMut::row_major(&mut t, r, r),
    );
    Some(Factor {
        base: Base::Own(first),
        right: Some(inverse),
        t,
        null,
        method: Method::CholeskyTwice,
        single: false,
        gram: None,
    })
}

impl Factor<'_> {
    /// `V`, into `out` (n×r, any strides and element type).
    pub(crate) fn orthonormal(&self, cx: Context, out: MatMut<'_>) {
        let cx = cx.unrounded();
        match &self.right {
            Some(right) if self.single => times_upper::<f32>(cx, self.base(), right, out),
            Some(right) => times_upper::<f64>(cx, self.base(), right, out),
            None => copy(self.base(), out),
        }
    }

    /// `V·polar(T)`, the polar factor of `A`, into `out`.
    pub(crate) fn polar<T: Real>(&self, cx: Context, out: MatMut<'_>) {
        let cx = cx.unrounded();
        let r = self.null.len();
        let mut u = Scratch::<f64>::new(r * r);
        if let (Some(gram), Some(inverse)) = (&self.gram, &self.right)
            && !self.null.contains(&true)
            && root::inverse_root(cx, gram, inverse, r, &mut u)
        {
            let product = if self.single { gemm::<f32> } else { gemm::<f64> };
            product(cx, 1.0, self.base(), Mat::row_major(&u, r, r), 0.0, out);
            return;
        }
        polar::polar_upper(cx, &self.t, &self.null, T::UNIT, &mut u);
        let (u, mut right) = (Mat::row_major(&u, r, r), Scratch::<f64>::new(r * r));
        let right = match &self.right {
            Some(upper) => {
                let product = MatMut::row_major(&mut right, r, r);
                gemm::<f64>(cx, 1.0, Mat::row_major(upper, r, r), u, 0.0, product);
                Mat::row_major(&right, r, r)
            }
            None => u,
        };
        gemm::<f64>(cx, 1.0, self.base(), right, 0.0, out);
    }

    /// ‖A‖_* = tr(polar(T)ᵀ T)
    pub(crate) fn nuclear_norm(&self, cx: Context) -> f64 {
        let r = self.null.len();
        let mut u = Scratch::<f64>::new(r * r);
        polar::polar_upper(cx, &self.t, &self.null, 1e-8, &mut u);
        u.iter().zip(self.t.iter()).map(|(u, t)| u * t).sum()
    }

    fn base(&self) -> Mat<'_> {
        match &self.base {
            Base::Input(a) => *a,
            Base::Own(q) => Mat::row_major(q, q.len() / self.null.len().max(1), self.null.len()),
        }
    }
}

/// `AᵀA` in double, both triangles, row-major.
pub(crate) fn gram(cx: Context, a: Mat<'_>, s: &mut [f64]) {
    symmetric(cx, a, a, s);
}

/// `AᵀB` in double where that is known to be symmetric, both triangles, row-major.
fn symmetric(cx: Context, a: Mat<'_>, b: Mat<'_>, s: &mut [f64]) {
    symmetric_in::<f64>(cx, a, b, s);
}

/// [`symmetric`], short sums of the terms in `T`, those sums' sums in double.
fn symmetric_in<T: Real>(cx: Context, a: Mat<'_>, b: Mat<'_>, s: &mut [f64]) {
    let r = a.cols;
    let lhs = Packed::<T>::new(cx, a.t());
    // (i, j) with i ≤ j of the transpose: the lower triangle
    let out = MatMut::row_major(s, r, r).t();
    let joined = T::UNIT > f64::UNIT;
    Product { region: Region::Upper, joined, ..Product::new(&lhs, Terms::one(b), out) }.run(cx);
    mirror(s, r);
}

/// Copies the lower triangle of row-major r×r `s` to the upper one, in squares that stay in cache.
pub(crate) fn mirror<E: Copy>(s: &mut [E], r: usize) {
    const SIDE: usize = 16;
    for i0 in (0..r).step_by(SIDE) {
        for j0 in (0..=i0).step_by(SIDE) {
            for i in i0..r.min(i0 + SIDE) {
                for j in j0..i.min(j0 + SIDE) {
                    s[j * r + i] = s[i * r + j];
                }
            }
        }
    }
}

/// `out ← A·U` for an upper triangular U.
fn times_upper<T: Real>(cx: Context, a: Mat<'_>, upper: &[f64], out: MatMut<'_>) {
    let r = a.cols;
    let lhs = Packed::<T>::new(cx, Mat::row_major(upper, r, r).t());
    Product { region: Region::LowerLhs, ..Product::new(&lhs, Terms::one(a.t()), out.t()) }.run(cx);
}

/// `out ← a`, converted.
pub(crate) fn copy(a: Mat<'_>, mut out: MatMut<'_>) {
    // SAFETY: this thread alone uses `out`.
    let view = unsafe { out.reborrow().raw() };
    assert_eq!((a.rows, a.cols), (view.rows, view.cols), "a copy keeps the shape");
    let mut line = Scratch::<f64>::new(a.cols);
    for i in 0..a.rows {
        // SAFETY: row `i` of either view, which `out` borrows exclusively.
        unsafe {
            crate::gemm::line::Line::along(a, i, 0).scaled(line.as_mut_ptr(), a.cols, 1.0);
            crate::gemm::line::Line::along(view, i, 0).write(line.as_ptr(), a.cols);
        }
    }
}

pub(crate) fn square_norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum()
}

/// Thin QR: `A = V·T`, T upper triangular with non-negative diagonal, for n×r `a` with n ≥ r.
///
/// `v` (n×r) receives V, `t` (r×r row-major), if given, T. Columns of V that belong to null directions are zero.
/// Orthogonality and residual are at most 30·√r roundoffs of `T`, for any conditioning. `tol` is the null tolerance.
///
/// # Errors
/// [`Error::Shape`] if `a` is wide or the shapes do not fit, [`Error::NonFinite`]; then nothing has been written.
pub fn qr<T: Real>(
    cx: Context,
    a: Mat<'_>,
    v: MatMut<'_>,
    t: Option<&mut [f64]>,
    tol: f64,
    paths: Paths,
) -> Result<(Vec<bool>, Method), Error> {
    check_out(a, &v, t.as_deref())?;
    let f = factor::<T>(cx, a, tol, paths)?;
    f.orthonormal(cx, v);
    if let Some(t) = t {
        t.copy_from_slice(&f.t);
    }
    Ok((f.null, f.method))
}

/// Polar factor `A (AᵀA)^(−1/2)` of n×r `a`, n ≥ r, into `v`; null directions (`tol`) contribute nothing.
///
/// # Errors
/// As [`qr`].
pub fn polar<T: Real>(
    cx: Context,
    a: Mat<'_>,
    v: MatMut<'_>,
    tol: f64,
    paths: Paths,
) -> Result<Vec<bool>, Error> {
    check_out(a, &v, None)?;
    let f = factor::<T>(cx, a, tol, paths)?;
    f.polar::<T>(cx, v);
    Ok(f.null)
}

/// A matrix of [`factors`].
#[derive(Debug)]
pub struct Job<'a> {
    /// What is factored, n×r.
    pub a: Mat<'a>,
    /// Receives the factor, n×r.
    pub v: MatMut<'a>,
    /// Receives [`qr`]'s T, r×r row-major; [`polar`] has none.
    pub t: Option<&'a mut [f64]>,
}

/// [`qr`], or [`polar`], of each of a list, threads as for [`crate::step::step`]. Returns the null directions of each.
///
/// # Errors
/// [`Error::Shape`] if one is wide or does not fit; then nothing has been written. [`Error::NonFinite`] if one holds NaN
/// or infinity; then others may have been written.
pub fn factors<T: Real>(
    cx: Context,
    jobs: Vec<Job<'_>>,
    polar: bool,
    tol: f64,
    paths: Paths,
) -> Result<Vec<Vec<bool>>, Error> {
    for job in &jobs {
        check_out(job.a, &job.v, job.t.as_deref())?;
    }
    let cost = |job: &Job<'_>| job.a.rows as f64 * job.a.cols.pow(2) as f64;
    pool::map(cx.threads, jobs, cost, |threads, Job { a, v, t }| {
        let cx = Context { threads, ..cx };
        if polar { self::polar::<T>(cx, a, v, tol, paths) } else { Ok(qr::<T>(cx, a, v, t, tol, paths)?.0) }
    })
    .into_iter()
    .collect()
}

fn check_out(a: Mat<'_>, v: &MatMut<'_>, t: Option<&[f64]>) -> Result<(), Error> {
    if a.rows < a.cols {
        let what = "the matrix (pass the transpose of a wide one)";
        return Err(Error::Shape { what, need: (a.cols, a.cols), got: a.shape() });
    }
    let got = v.as_ref().shape();
    if got != a.shape() {
        return Err(Error::Shape { what: "the orthonormal factor", need: (a.rows, a.cols), got });
    }
    if t.is_some_and(|t| t.len() != a.cols * a.cols) {
        let got = (t.map_or(0, <[f64]>::len), 1);
        return Err(Error::Shape { what: "the triangular factor", need: (a.cols, a.cols), got });
    }
    Ok(())
}

/// σ_max(V) of an n×r matrix, from its Gram matrix squared eight times.
pub(crate) fn spectral_norm(cx: Context, v: Mat<'_>) -> f64 {
    let r = v.cols;
    let mut s = Scratch::zeros(r * r);
    gram(cx, v, &mut s);
    let first = s.to_vec();
    let mut next = Scratch::<f64>::new(r * r);
    for _ in 0..8 {
        let norm = square_norm(&s).sqrt();
        if norm == 0.0 {
            return 0.0;
        }
        let view = Mat::row_major(&s, r, r);
        gemm::<f64>(cx, norm.powi(-2), view, view, 0.0, MatMut::row_major(&mut next, r, r));
        std::mem::swap(&mut s, &mut next);
    }
    // A column of S^256 is a dominant eigenvector to rounding, or a mix of those that share the largest eigenvalue.
    let best = (0..r).max_by(|&i, &j| s[i * r + i].total_cmp(&s[j * r + j])).unwrap_or(0);
    let x: Vec<f64> = (0..r).map(|i| s[i * r + best]).collect();
    let sx: Vec<f64> = (0..r).map(|i| (0..r).map(|j| first[i * r + j] * x[j]).sum()).collect();
    let quotient = x.iter().zip(&sx).map(|(x, y)| x * y).sum::<f64>() / square_norm(&x);
    quotient.max(0.0).sqrt()
}

#[cfg(test)]
mod tests;

//! The halves of a step, for matrices that lie on several ranks; and which operands share memory.

use super::step::LowRankOptions;
use super::table::{Table, draws, number_rows, operands, pick};
use super::{bad, detached};
use crate::borrow;
use crate::error::Error;
use crate::gemm::Context;
use crate::step::parts::{self, Missing, Residual, Sum};
use numpy::{PyReadonlyArray1, PyReadonlyArray2, PyReadwriteArray1};
use pyo3::prelude::*;

/// OUT ← B·A, or Bᵀ·A, for B = cm·M + cg·G, over a list of matrices.
///
/// table: int64 (N, 28): m, n, k, unused and the views M, G (m×n), A, OUT: n×k and m×k, or transposed m×k and n×k.
/// coefficients: float64 (N, 2): cm, cg.
/// sums: float64, empty or overwritten: B's squares summed along the side that OUT has, one matrix after the other.
/// Returns max |OUT| of each, NaN if an entry is not finite; for k = 0, NaN if one of B is not and else 0, if there are sums.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub(super) fn products(
    py: Python<'_>,
    table: PyReadonlyArray2<'_, i64>,
    coefficients: PyReadonlyArray2<'_, f64>,
    transposed: bool,
    mut sums: PyReadwriteArray1<'_, f64>,
    double: bool,
    bfloat16: bool,
    threads: usize,
) -> PyResult<Vec<f64>> {
    let sides = |&[m, n, ..]: &[usize; 4]| if transposed { (m, n) } else { (n, m) };
    let table = Table::<4>::new(&table, |head| {
        let &[m, n, k, _] = head;
        let (inner, outer) = sides(head);
        Ok([((m, n), false), ((m, n), false), ((inner, k), false), ((outer, k), true)])
    })?;
    let coefficients = number_rows("coefficients", &coefficients, Some(table.heads.len()))?;
    let sums = sums.as_slice_mut().map_err(|_| bad("sums must be contiguous"))?;
    let sums = table.split("sums", sums, |head| sides(head).1)?;
    detached(py, move || {
        borrow::check(table.claims.as_flattened(), 4)?;
        let jobs = table.claims.iter().zip(coefficients).zip(sums);
        let jobs = jobs.map(|(([m, g, a, out], &[cm, cg]), sums)| {
            // SAFETY: as in `lowrank_step`.
            let (m, g, a, out) = unsafe { (m.shared(), g.shared(), a.shared(), out.exclusive()) };
            Ok(parts::Projection { b: Sum::new((cm, m), (cg, g))?, a, out, sums })
        });
        let jobs = jobs.collect::<Result<_, Error>>()?;
        let products = if double { parts::products::<f64> } else { parts::products::<f32> };
        products(Context { half: bfloat16, ..Context::new(threads) }, jobs, transposed)
    })
}

/// max |cm·M + cg·G| of each of a list, infinite or NaN if an entry is not finite.
///
/// table: int64 (N, 16): m, n, unused, unused and the views M, G (m×n).
/// coefficients: float64 (N, 2): cm, cg.
#[pyfunction]
pub(super) fn largest(
    py: Python<'_>,
    table: PyReadonlyArray2<'_, i64>,
    coefficients: PyReadonlyArray2<'_, f64>,
    threads: usize,
) -> PyResult<Vec<f64>> {
    let table = Table::<2>::new(&table, |&[m, n, ..]| Ok([((m, n), false); 2]))?;
    let coefficients = number_rows("coefficients", &coefficients, Some(table.heads.len()))?;
    detached(py, move || {
        borrow::check(table.claims.as_flattened(), 2)?;
        let sums = table.claims.iter().zip(coefficients).map(|([m, g], &[cm, cg])| {
            // SAFETY: as in `lowrank_step`.
            let (m, g) = unsafe { (m.shared(), g.shared()) };
            Sum::new((cm, m), (cg, g))
        });
        Ok(parts::largest(Context::new(threads), sums.collect::<Result<_, _>>()?))
    })
}

/// The writing half of a step over a list of matrices.
///
/// table: int64 (N, 46): m, n, r, k and the views X, G, M (m×n), P (m×r), U, W (n×r), E; `options[k]` is the matrix's.
/// numbers: float64 (N, 3): scale, α, size.
/// residual: "share" (α·B; E is not read), "given" (α·T; E is T, m×n), "scaled" (T with its columns and rows multiplied by
/// scales; E is T) or "missed" (the same of T = B − P Rᵀ; E is R, n×r).
/// scales: float64, empty, or for the last two n + m numbers a matrix, one matrix after the other.
/// rounding: int64 (N, 4) or (0, 4), see [`draws`]: how X is rounded.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub(super) fn writes(
    py: Python<'_>,
    table: PyReadonlyArray2<'_, i64>,
    options: Vec<LowRankOptions>,
    numbers: PyReadonlyArray2<'_, f64>,
    residual: &str,
    scales: PyReadonlyArray1<'_, f64>,
    rounding: PyReadonlyArray2<'_, i64>,
    double: bool,
    threads: usize,
) -> PyResult<()> {
    let kind = Kind::of(residual)?;
    let table = Table::<7>::new(&table, |&[m, n, r, _]| {
        let (whole, left, right) = ((m, n), (m, r), (n, r));
        let extra = match kind {
            Kind::Share => (0, 0),
            Kind::Given | Kind::Scaled => whole,
            Kind::Missed => right,
        };
        let views = [(whole, true), (whole, false), (whole, true), (left, false), (right, false)];
        let [x, g, m, p, u] = views;
        Ok([x, g, m, p, u, (right, false), (extra, false)])
    })?;
    let options = options.iter().map(LowRankOptions::parse).collect::<Result<Vec<_>, _>>()?;
    let numbers = number_rows("numbers", &numbers, Some(table.heads.len()))?;
    let scaled = matches!(kind, Kind::Scaled | Kind::Missed);
    let need = table.heads.iter().map(|&[m, n, ..]| if scaled { m + n } else { 0 }).sum();
    let mut scales = super::table::numbers("scales", &scales, need)?;
    let rounding = draws(&rounding, table.heads.len())?;
    detached(py, move || {
        borrow::check(table.claims.as_flattened(), 7)?;
        let jobs = table.heads.iter().zip(&table.claims).zip(numbers).zip(rounding);
        let jobs = jobs.map(|(((&[rows, cols, _, k], claims), &[scale, alpha, size]), drawn)| {
            let [x, g, m, p, u, w, extra] = claims;
            // SAFETY: as in `lowrank_step`.
            let (x, g, m, factors, extra) = unsafe {
                (
                    x.exclusive().drawn(drawn),
                    g.shared(),
                    m.exclusive(),
                    [p, u, w].map(|c| c.shared()),
                    extra.shared(),
                )
            };
            let mut take = |n| scales.split_off(..n).unwrap_or_default();
            let residual = match kind {
                Kind::Share => Residual::Share(alpha),
                Kind::Given => Residual::Given(alpha, extra),
                Kind::Scaled | Kind::Missed => {
                    let from = if kind == Kind::Scaled { Missing::T(extra) } else { Missing::R(extra) };
                    Residual::Scaled { from, columns: take(cols), rows: take(rows) }
                }
            };
            Ok(parts::Write { options: *pick(&options, k)?, scale, x, g, m, factors, residual, size })
        });
        let jobs = jobs.collect::<Result<_, Error>>()?;
        let writes = if double { parts::writes::<f64> } else { parts::writes::<f32> };
        writes(Context::new(threads), jobs)
    })
}

/// What [`writes`] adds.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Share,
    Given,
    Scaled,
    Missed,
}

impl Kind {
    fn of(name: &str) -> Result<Self, Error> {
        Ok(match name {
            "share" => Kind::Share,
            "given" => Kind::Given,
            "scaled" => Kind::Scaled,
            "missed" => Kind::Missed,
            _ => return Err(bad(format!("residual must be share, given, scaled or missed, not {name}"))),
        })
    }
}

/// Copies matrices: X ← A, rounded as `rounding` says.
///
/// table: int64 (N, 16): m, n, unused, unused and the views X, A (m×n).
/// rounding: int64 (N, 4) or (0, 4), see [`draws`].
#[pyfunction]
pub(super) fn rounded(
    py: Python<'_>,
    table: PyReadonlyArray2<'_, i64>,
    rounding: PyReadonlyArray2<'_, i64>,
    threads: usize,
) -> PyResult<()> {
    let table = Table::<2>::new(&table, |&[m, n, ..]| Ok([((m, n), true), ((m, n), false)]))?;
    let rounding = draws(&rounding, table.heads.len())?;
    detached(py, move || {
        borrow::check(table.claims.as_flattened(), 2)?;
        let jobs = table.claims.iter().zip(rounding).map(|([x, a], drawn)| {
            // SAFETY: as in `lowrank_step`.
            unsafe { (x.exclusive().drawn(drawn), a.shared()) }
        });
        parts::rounded(Context::new(threads), jobs.collect());
        Ok(())
    })
}

/// The first two of some operands that share memory, if any do.
#[pyfunction]
pub(super) fn overlap(table: PyReadonlyArray2<'_, i64>) -> PyResult<Option<(usize, usize)>> {
    match borrow::check(&operands(&table, None, 0)?, 1) {
        Err(Error::Overlap { first, second }) => Ok(Some((first, second))),
        Err(Error::Value { .. }) | Ok(()) => Ok(None), // a view that aliases itself is refused when it is stepped
        Err(e) => Err(e.into()),
    }
}

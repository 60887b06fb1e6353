//! Factorisations and products on their own.

use super::table::{Table, number_rows, operands};
use super::{bad, detached};
use crate::borrow;
use crate::error::Error;
use crate::gemm::{self, Context};
use crate::isa::Isa;
use crate::newton_schulz as iteration;
use crate::pool;
use crate::qr::{self, Paths};
use crate::step;
use numpy::{PyReadonlyArray2, PyReadwriteArray1};
use pyo3::prelude::*;

/// QR or polar factors of a list of matrices.
///
/// table: int64 (N, 16): n, r, unused, unused and the views A, V (n×r).
/// triangles: float64, empty or Σr² entries: the r×r row-major T of each, one after the other; overwritten by QR.
/// nearly_orthogonal: the columns of A are thought to be that.
/// Returns the null flags of each. An error for one that is not finite may come when others have been written.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub(super) fn factors(
    py: Python<'_>,
    table: PyReadonlyArray2<'_, i64>,
    mut triangles: PyReadwriteArray1<'_, f64>,
    polar: bool,
    nearly_orthogonal: bool,
    tol: f64,
    double: bool,
    threads: usize,
) -> PyResult<Vec<Vec<bool>>> {
    let table = Table::<2>::new(&table, |&[n, r, ..]| Ok([((n, r), false), ((n, r), true)]))?;
    let triangles = triangles.as_slice_mut().map_err(|_| bad("triangles must be contiguous"))?;
    let triangles = table.split("triangles", triangles, |&[_, r, ..]| r * r)?;
    super::finite([("tol", tol)])?;
    let paths = if nearly_orthogonal { Paths::Short } else { Paths::Any };
    detached(py, move || {
        borrow::check(table.claims.as_flattened(), 2)?;
        let jobs = table.claims.iter().zip(triangles);
        // SAFETY: as in `lowrank_step`.
        let jobs = jobs.map(|([a, v], t)| unsafe { qr::Job { a: a.shared(), v: v.exclusive(), t } });
        let factors = if double { qr::factors::<f64> } else { qr::factors::<f32> };
        factors(Context::new(threads), jobs.collect(), polar, tol, paths)
    })
}

/// Newton–Schulz iterations, OUT ← X after all steps, of a list of matrices.
///
/// X₀ = U / max(‖U‖·divisor, ε), X ← a·X + (b·A + c·A²)·X with A = X·Xᵀ on the smaller side.
///
/// table: int64 (N, 16): m, n, unused, unused and the views U, OUT (m×n).
/// coefficients: float64 (steps, 3): a, b, c.
/// Returns whether each U is finite; OUT of one that is not keeps what it had.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub(super) fn newton_schulz(
    py: Python<'_>,
    table: PyReadonlyArray2<'_, i64>,
    coefficients: PyReadonlyArray2<'_, f64>,
    divisor: f64,
    epsilon: f64,
    bfloat16: bool,
    double: bool,
    threads: usize,
) -> PyResult<Vec<bool>> {
    let table = Table::<2>::new(&table, |&[m, n, ..]| Ok([((m, n), false), ((m, n), true)]))?;
    let coefficients = number_rows("coefficients", &coefficients, None)?;
    detached(py, move || {
        borrow::check(table.claims.as_flattened(), 2)?;
        // SAFETY: as in `lowrank_step`.
        let jobs = table
            .claims
            .iter()
            .map(|[u, out]| unsafe { iteration::Job { u: u.shared(), out: out.exclusive() } });
        let iterate = if double { iteration::newton_schulz::<f64> } else { iteration::newton_schulz::<f32> };
        let cx = Context { half: bfloat16, ..Context::new(threads) };
        iterate(cx, jobs.collect(), &iteration::Schedule { coefficients, divisor, epsilon })
    })
}

/// P = orth(A Q), R = AᵀP; the operands A, Q, P, R. Returns the null flags.
#[pyfunction]
pub(super) fn power_iteration(
    py: Python<'_>,
    table: PyReadonlyArray2<'_, i64>,
    tol: f64,
    double: bool,
    threads: usize,
) -> PyResult<Vec<bool>> {
    let claims = operands(&table, Some(4), 2)?;
    detached(py, move || {
        borrow::check(&claims, 1)?;
        // SAFETY: as in `lowrank_step`.
        let (a, q, p, r) =
            unsafe { (claims[0].shared(), claims[1].shared(), claims[2].exclusive(), claims[3].exclusive()) };
        let iterate = if double { step::power_iteration::<f64> } else { step::power_iteration::<f32> };
        iterate(Context::new(threads), a, q, p, r, tol)
    })
}

/// C ← β·C + α·A·B; the operands A, B, C; `half` rounds A and B to bfloat16.
#[pyfunction]
pub(super) fn matmul(
    py: Python<'_>,
    table: PyReadonlyArray2<'_, i64>,
    alpha: f64,
    beta: f64,
    double: bool,
    half: bool,
    threads: usize,
) -> PyResult<()> {
    let claims = operands(&table, Some(3), 2)?;
    detached(py, move || {
        borrow::check(&claims, 1)?;
        let (a, b, c) = (claims[0], claims[1], claims[2]);
        if (a.shape.0, b.shape.1, a.shape.1) != (c.shape.0, c.shape.1, b.shape.0) {
            return Err(Error::Shape { what: "C", need: (a.shape.0, b.shape.1), got: c.shape });
        }
        let gemm = if double { gemm::gemm::<f64> } else { gemm::gemm::<f32> };
        // SAFETY: as in `lowrank_step`.
        let (a, b, c) = unsafe { (a.shared(), b.shared(), c.exclusive()) };
        gemm(Context { half, ..Context::new(threads) }, alpha, a, b, beta, c);
        Ok(())
    })
}

/// The instruction set in use, all that this processor has, and what multiplies bfloat16 pairs ("rounded singles" if nothing).
#[pyfunction]
pub(super) fn instruction_sets() -> (&'static str, Vec<&'static str>, &'static str) {
    let pairs = gemm::pairs::kernel(Isa::current()).map_or("rounded singles", |k| k.name);
    (Isa::current().name(), Isa::available().into_iter().map(Isa::name).collect(), pairs)
}

/// Whose threads serve calls: "openmp", those of the OpenMP runtime that torch has loaded, or "own".
#[pyfunction]
pub(super) fn thread_pool() -> &'static str {
    pool::Kind::current().name()
}

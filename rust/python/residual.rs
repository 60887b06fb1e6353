//! The residual between the halves of a step: formed, summed, and in few bits.

use super::detached;
use super::table::{Table, number_rows, numbers, same};
use crate::bits::{self, Bits, Changes, Coded, Format};
use crate::borrow;
use crate::error::Error;
use crate::gemm::Context;
use crate::step::parts::Sum;
use crate::step::residual::{self, Missed};
use numpy::{Element, PyReadonlyArray1, PyReadonlyArray2, PyReadwriteArray1};
use pyo3::prelude::*;

/// T ← B − P Rᵀ for B = cm·M + cg·G, over a list of matrices.
///
/// table: int64 (N, 34): m, n, r, unused and the views M, G (m×n), P (m×r), R (n×r), T (m×n).
/// coefficients: float64 (N, 2): cm, cg.
#[pyfunction]
pub(super) fn residuals(
    py: Python<'_>,
    table: PyReadonlyArray2<'_, i64>,
    coefficients: PyReadonlyArray2<'_, f64>,
    double: bool,
    bfloat16: bool,
    threads: usize,
) -> PyResult<()> {
    let table = Table::<5>::new(&table, |&[m, n, r, _]| {
        Ok([((m, n), false), ((m, n), false), ((m, r), false), ((n, r), false), ((m, n), true)])
    })?;
    let coefficients = number_rows("coefficients", &coefficients, Some(table.heads.len()))?;
    detached(py, move || {
        borrow::check(table.claims.as_flattened(), 5)?;
        let jobs = table.claims.iter().zip(coefficients).map(|([m, g, p, r, t], &[cm, cg])| {
            // SAFETY: as in `lowrank_step`.
            let (m, g, p, r, t) = unsafe { (m.shared(), g.shared(), p.shared(), r.shared(), t.exclusive()) };
            Ok((Missed { b: Sum::new((cm, m), (cg, g))?, p, r }, t))
        });
        let jobs = jobs.collect::<Result<_, Error>>()?;
        let residuals = if double { residual::residuals::<f64> } else { residual::residuals::<f32> };
        residuals(Context { half: bfloat16, ..Context::new(threads) }, jobs)
    })
}

/// Sums of squares along the rows of T = B − P Rᵀ, over a list of matrices.
///
/// table: int64 (N, 28): m, n, r, unused and the views M, G (m×n), P (m×r), R (n×r).
/// coefficients: float64 (N, 2): cm, cg.
/// columns: float64, n numbers a matrix, one matrix after the other.
/// sums: float64, overwritten by 2m numbers a matrix: T's, then those of T with its columns multiplied by `columns`.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub(super) fn residual_sums(
    py: Python<'_>,
    table: PyReadonlyArray2<'_, i64>,
    coefficients: PyReadonlyArray2<'_, f64>,
    columns: PyReadonlyArray1<'_, f64>,
    mut sums: PyReadwriteArray1<'_, f64>,
    double: bool,
    bfloat16: bool,
    threads: usize,
) -> PyResult<()> {
    let table = Table::<4>::new(&table, |&[m, n, r, _]| {
        Ok([((m, n), false), ((m, n), false), ((m, r), false), ((n, r), false)])
    })?;
    let coefficients = number_rows("coefficients", &coefficients, Some(table.heads.len()))?;
    let mut columns = numbers("columns", &columns, table.heads.iter().map(|h| h[1]).sum())?;
    let sums = sums.as_slice_mut().map_err(|_| super::bad("sums must be contiguous"))?;
    same("sums", sums.len(), table.heads.iter().map(|h| 2 * h[0]).sum())?;
    let mut sums = sums;
    detached(py, move || {
        borrow::check(table.claims.as_flattened(), 4)?;
        let jobs = table.heads.iter().zip(&table.claims).zip(coefficients);
        let jobs = jobs.map(|((&[rows, cols, ..], [m, g, p, r]), &[cm, cg])| {
            // SAFETY: as in `lowrank_step`.
            let (m, g, p, r) = unsafe { (m.shared(), g.shared(), p.shared(), r.shared()) };
            let missed = Missed { b: Sum::new((cm, m), (cg, g))?, p, r };
            let columns = columns.split_off(..cols).unwrap_or_default();
            let mut take = || sums.split_off_mut(..rows).unwrap_or_default();
            Ok(residual::Sums { missed, columns, raw: take(), scaled: take() })
        });
        let jobs = jobs.collect::<Result<_, Error>>()?;
        let run = if double { residual::residual_sums::<f64> } else { residual::residual_sums::<f32> };
        run(Context { half: bfloat16, ..Context::new(threads) }, jobs)
    })
}

/// A C-contiguous array in either working precision.
#[derive(FromPyObject)]
pub(super) enum Numbers<'py> {
    Single(PyReadonlyArray1<'py, f32>),
    Double(PyReadonlyArray1<'py, f64>),
}

/// The same, to be overwritten.
#[derive(FromPyObject)]
pub(super) enum NumbersMut<'py> {
    Single(PyReadwriteArray1<'py, f32>),
    Double(PyReadwriteArray1<'py, f64>),
}

fn read<'a, T: Element>(array: &'a PyReadonlyArray1<'_, T>) -> Result<&'a [T], Error> {
    array.as_slice().map_err(|_| super::bad("arrays must be contiguous"))
}

fn write<'a, T: Element>(array: &'a mut PyReadwriteArray1<'_, T>) -> Result<&'a mut [T], Error> {
    array.as_slice_mut().map_err(|_| super::bad("arrays must be contiguous"))
}

/// Sums of squares of a row-major matrix, along its rows and, if `of_columns` is not empty, down its columns; with its
/// columns multiplied by `columns` first, if that is not empty. Both are overwritten.
#[pyfunction]
pub(super) fn squares(
    py: Python<'_>,
    matrix: Numbers<'_>,
    columns: PyReadonlyArray1<'_, f64>,
    mut rows: PyReadwriteArray1<'_, f64>,
    mut of_columns: PyReadwriteArray1<'_, f64>,
    threads: usize,
) -> PyResult<()> {
    let columns = read(&columns)?;
    super::finite(columns.iter().map(|x| ("columns", *x)))?;
    let columns = (!columns.is_empty()).then_some(columns);
    let (rows, of_columns) = (write(&mut rows)?, write(&mut of_columns)?);
    let of_columns = (!of_columns.is_empty()).then_some(of_columns);
    let cx = Context::new(threads);
    match &matrix {
        Numbers::Single(t) => {
            let t = read(t)?;
            detached(py, || residual::squares(cx, vec![residual::Squares { t, columns, rows, of_columns }]))
        }
        Numbers::Double(t) => {
            let t = read(t)?;
            detached(py, || residual::squares(cx, vec![residual::Squares { t, columns, rows, of_columns }]))
        }
    }
}

fn format(rows: usize, columns: usize, bits: usize) -> Result<Format, Error> {
    Ok(Format { rows, columns, bits: Bits::of(bits)? })
}

/// Packs a row-major matrix into bytes, a string a row; see `numerics/bits.py`.
#[pyfunction]
pub(super) fn pack(
    py: Python<'_>,
    matrix: Numbers<'_>,
    shape: (usize, usize),
    bits: usize,
    mut packed: PyReadwriteArray1<'_, u8>,
    threads: usize,
) -> PyResult<()> {
    let (format, cx, to) = (format(shape.0, shape.1, bits)?, Context::new(threads), write(&mut packed)?);
    match &matrix {
        Numbers::Single(from) => {
            let from = read(from)?;
            detached(py, || bits::pack(cx, vec![(format, from, to)]))
        }
        Numbers::Double(from) => {
            let from = read(from)?;
            detached(py, || bits::pack(cx, vec![(format, from, to)]))
        }
    }
}

/// Overwrites a row-major matrix by what packed rows stand for.
#[pyfunction]
pub(super) fn unpack(
    py: Python<'_>,
    packed: PyReadonlyArray1<'_, u8>,
    shape: (usize, usize),
    bits: usize,
    mut matrix: NumbersMut<'_>,
    threads: usize,
) -> PyResult<()> {
    let (format, cx, from) = (format(shape.0, shape.1, bits)?, Context::new(threads), read(&packed)?);
    match &mut matrix {
        NumbersMut::Single(to) => {
            let to = write(to)?;
            detached(py, || bits::unpack(cx, vec![(format, from, to)]))
        }
        NumbersMut::Double(to) => {
            let to = write(to)?;
            detached(py, || bits::unpack(cx, vec![(format, from, to)]))
        }
    }
}

/// The mean of several ranks' packed rows, packed again. `packed` holds all ranks', one's behind the other's.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub(super) fn average(
    py: Python<'_>,
    packed: PyReadonlyArray1<'_, u8>,
    ranks: usize,
    shape: (usize, usize),
    bits: usize,
    mut mean: PyReadwriteArray1<'_, u8>,
    double: bool,
    threads: usize,
) -> PyResult<()> {
    let (format, cx) = (format(shape.0, shape.1, bits)?, Context::new(threads));
    let (from, to) = (read(&packed)?, write(&mut mean)?);
    let average = if double { bits::average::<f64> } else { bits::average::<f32> };
    detached(py, || average(cx, vec![(format, ranks, from, to)]))
}

/// T, H and the next H, in one working precision.
enum Three<'a> {
    Single([&'a [f32]; 2], &'a mut [f32]),
    Double([&'a [f64]; 2], &'a mut [f64]),
}

fn three<'a>(
    matrix: &'a Numbers<'_>,
    known: &'a Numbers<'_>,
    next: &'a mut NumbersMut<'_>,
) -> Result<Three<'a>, Error> {
    match (matrix, known, next) {
        (Numbers::Single(t), Numbers::Single(h), NumbersMut::Single(to)) => {
            Ok(Three::Single([read(t)?, read(h)?], write(to)?))
        }
        (Numbers::Double(t), Numbers::Double(h), NumbersMut::Double(to)) => {
            Ok(Three::Double([read(t)?, read(h)?], write(to)?))
        }
        _ => Err(super::bad("the three matrices must be of one precision")),
    }
}

fn changes<'a, T: Coded>([matrix, known]: [&'a [T]; 2], next: &'a mut [T], fade: f64) -> Changes<'a, T> {
    Changes { matrix, known, next, fade: T::of(fade) }
}

/// Packs T − H, and overwrites `next` by fade·(H + what the bytes say).
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub(super) fn pack_change(
    py: Python<'_>,
    matrix: Numbers<'_>,
    known: Numbers<'_>,
    shape: (usize, usize),
    bits: usize,
    fade: f64,
    mut packed: PyReadwriteArray1<'_, u8>,
    mut next: NumbersMut<'_>,
    threads: usize,
) -> PyResult<()> {
    let (format, cx, to) = (format(shape.0, shape.1, bits)?, Context::new(threads), write(&mut packed)?);
    match three(&matrix, &known, &mut next)? {
        Three::Single(old, next) => {
            detached(py, || bits::pack_changes(cx, vec![(format, changes(old, next, fade), to)]))
        }
        Three::Double(old, next) => {
            detached(py, || bits::pack_changes(cx, vec![(format, changes(old, next, fade), to)]))
        }
    }
}

/// The mean of one rank's T and of the others', whose changes are packed: `packed` holds all ranks', of which number
/// `own` is not read. `known` is the mean of the others' before, and `next` is overwritten by fade times that of now.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub(super) fn average_changes(
    py: Python<'_>,
    packed: PyReadonlyArray1<'_, u8>,
    ranks: usize,
    own: usize,
    matrix: Numbers<'_>,
    known: Numbers<'_>,
    shape: (usize, usize),
    bits: usize,
    fade: f64,
    mut mean: PyReadwriteArray1<'_, u8>,
    mut next: NumbersMut<'_>,
    threads: usize,
) -> PyResult<()> {
    let (format, cx) = (format(shape.0, shape.1, bits)?, Context::new(threads));
    let (from, to) = (read(&packed)?, write(&mut mean)?);
    match three(&matrix, &known, &mut next)? {
        Three::Single(old, next) => {
            let jobs = vec![(format, ranks, own, from, changes(old, next, fade), to)];
            detached(py, || bits::average_changes(cx, jobs))
        }
        Three::Double(old, next) => {
            let jobs = vec![(format, ranks, own, from, changes(old, next, fade), to)];
            detached(py, || bits::average_changes(cx, jobs))
        }
    }
}

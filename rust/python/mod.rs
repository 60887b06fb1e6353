//! The module `orthdion._core`. It checks what Python says, borrows, releases the GIL and maps errors; no numerics.
//!
//! Tensors arrive as rows of an int64 table, one call a step: `[m, n, r]`, then for each view
//! `[address, dtype, row stride, column stride, allocation's address, its bytes]`, strides in elements. Every number is
//! checked again here; what cannot be checked is that an allocation is alive, for which the caller holds the tensors.

use crate::borrow::{self, Claim};
use crate::elementwise::{self, Rule};
use crate::error::Error;
use crate::gemm::{self, Context};
use crate::isa::Isa;
use crate::qr;
use crate::scalar::Dtype;
use crate::step::parts::{self, Sum};
use crate::step::{self, Matrix, Options, Report, RightFactor, Tail};
use numpy::{PyReadonlyArray1, PyReadonlyArray2, PyReadwriteArray1, PyReadwriteArray2};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use std::panic::{AssertUnwindSafe, catch_unwind};

const VIEW: usize = 6;
const HEAD: usize = 3;

impl From<Error> for PyErr {
    fn from(e: Error) -> PyErr {
        PyValueError::new_err(e.to_string())
    }
}

/// Every long call goes through here: without the GIL, and a panic becomes a `RuntimeError` (PyO3's own
/// `PanicException` is a `BaseException` and would end a training loop past its handlers).
fn detached<R: Send>(py: Python<'_>, f: impl FnOnce() -> Result<R, Error> + Send) -> PyResult<R> {
    match py.detach(|| catch_unwind(AssertUnwindSafe(f))) {
        Ok(result) => Ok(result?),
        Err(payload) => {
            let text = payload.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("unknown");
            Err(PyRuntimeError::new_err(format!("orthdion's core panicked, please report it: {text}")))
        }
    }
}

fn bad(why: impl Into<String>) -> Error {
    Error::Value { why: why.into() }
}

fn dtype(code: i64) -> Result<Dtype, Error> {
    Ok(match code {
        0 => Dtype::F32,
        1 => Dtype::F64,
        2 => Dtype::Bf16,
        3 => Dtype::F16,
        _ => return Err(bad(format!("dtype code {code} is unknown"))),
    })
}

fn size(x: i64) -> Result<usize, Error> {
    usize::try_from(x).map_err(|_| bad(format!("a size or address is negative: {x}")))
}

fn claim(words: &[i64], shape: (usize, usize), written: bool) -> Result<Claim, Error> {
    Ok(Claim {
        ptr: words[0] as usize,
        dtype: dtype(words[1])?,
        shape,
        strides: (words[2] as isize, words[3] as isize),
        base: words[4] as usize,
        bytes: size(words[5])?,
        written,
    })
}

/// The rows of a C-contiguous table with `width` columns.
fn rows<'a>(
    table: &'a PyReadonlyArray2<'_, i64>,
    width: usize,
) -> Result<std::slice::ChunksExact<'a, i64>, Error> {
    let words = table.as_slice().map_err(|_| bad("the table must be C-contiguous"))?;
    if words.len() % width != 0 {
        return Err(bad(format!("the table must have {width} columns")));
    }
    Ok(words.chunks_exact(width))
}

/// The low-rank step over a list of matrices of one working precision.
///
/// table: int64 (N, 27): m, n, r and the views X, G, M (m×n) and Q (n×r).
/// numbers: float64 (N, 13): lr, weight_decay, a, b, right factor (0 qr, 1 column, 2 polar), tail (0 feedback, 1 linear,
/// 2 normalized), tail_scale, κ or NaN, maximize, epsilon, diagnostics, bfloat16 products, scale.
/// reports: float64 (N, 8), overwritten: skipped, null, ‖B‖², ‖R‖², ν, ⟨B,D⟩, ‖R‖_*, effective rank.
#[pyfunction]
fn lowrank_step(
    py: Python<'_>,
    table: PyReadonlyArray2<'_, i64>,
    numbers: PyReadonlyArray2<'_, f64>,
    mut reports: PyReadwriteArray2<'_, f64>,
    double: bool,
    threads: usize,
) -> PyResult<()> {
    const WIDTH: usize = HEAD + 4 * VIEW;
    const NUMBERS: usize = 13;
    let mut claims = Vec::new();
    let rows = rows(&table, WIDTH)?;
    let numbers = numbers.as_slice().map_err(|_| bad("the numbers must be C-contiguous"))?;
    let out = reports.as_slice_mut().map_err(|_| bad("the reports must be C-contiguous"))?;
    let count = rows.len();
    if numbers.len() != count * NUMBERS || out.len() != count * 8 {
        return Err(bad("table, numbers and reports must have as many rows").into());
    }
    for row in rows {
        let (m, n, r) = (size(row[0])?, size(row[1])?, size(row[2])?);
        let view = |k: usize| &row[HEAD + k * VIEW..];
        claims.push(claim(view(0), (m, n), true)?);
        claims.push(claim(view(1), (m, n), false)?);
        claims.push(claim(view(2), (m, n), true)?);
        claims.push(claim(view(3), (n, r), true)?);
    }
    let options = numbers.chunks_exact(NUMBERS).map(options).collect::<Result<Vec<_>, _>>()?;
    let reports = detached(py, move || {
        borrow::check(&claims, 4)?;
        let mut jobs: Vec<_> = claims
            .chunks_exact(4)
            .zip(options)
            .map(|(c, (o, scale))| {
                // SAFETY: `check` has passed the claims together, and Python holds the tensors during the call.
                let matrix = unsafe {
                    Matrix {
                        x: c[0].exclusive(),
                        g: c[1].shared(),
                        m: c[2].exclusive(),
                        q: c[3].exclusive(),
                        scale,
                    }
                };
                (matrix, o)
            })
            .collect();
        let mut reports = vec![Report::default(); jobs.len()];
        let cx = Context::new(threads);
        if double {
            step::step::<f64>(cx, &mut jobs, &mut reports)?;
        } else {
            step::step::<f32>(cx, &mut jobs, &mut reports)?;
        }
        Ok(reports)
    })?;
    for (out, r) in out.chunks_exact_mut(8).zip(reports) {
        let skipped = f64::from(r.skipped);
        out.copy_from_slice(&[
            skipped,
            r.null as f64,
            r.b_energy,
            r.r_energy,
            r.nu,
            r.descent,
            r.nuclear,
            r.effective_rank,
        ]);
    }
    Ok(())
}

fn options(n: &[f64]) -> Result<(Options, f64), Error> {
    let o = Options {
        lr: n[0],
        weight_decay: n[1],
        a: n[2],
        b: n[3],
        right: match n[4] as i64 {
            0 => RightFactor::Qr,
            1 => RightFactor::Column,
            2 => RightFactor::Polar,
            x => return Err(bad(format!("right factor code {x} is unknown"))),
        },
        tail: match n[5] as i64 {
            0 => Tail::Feedback,
            1 => Tail::Linear,
            2 => Tail::Normalized,
            x => return Err(bad(format!("tail code {x} is unknown"))),
        },
        tail_scale: n[6],
        nesterov: (!n[7].is_nan()).then_some(n[7]),
        maximize: n[8] != 0.0,
        epsilon: n[9],
        diagnostics: n[10] != 0.0,
        half: n[11] != 0.0,
    };
    let finite = [o.lr, o.weight_decay, o.a, o.b, o.tail_scale, o.epsilon, o.nesterov.unwrap_or(0.0), n[12]];
    if finite.iter().all(|x| x.is_finite()) {
        Ok((o, n[12]))
    } else {
        Err(bad("a hyperparameter is not finite"))
    }
}

/// AdamW or Lion over a list of tensors of one working precision.
///
/// table: int64 (N, 27): m, n, unused, and the views X, G, M, V (m×n; V is ignored for Lion).
/// numbers: float64 (N, 9): rule (0 AdamW, 1 Lion), lr, weight_decay, β₁, β₂, ε, 1 − β₁ᵗ, 1 − β₂ᵗ, maximize.
/// skipped: bool (N,), overwritten.
#[pyfunction]
fn elementwise_step(
    py: Python<'_>,
    table: PyReadonlyArray2<'_, i64>,
    numbers: PyReadonlyArray2<'_, f64>,
    mut skipped: PyReadwriteArray1<'_, bool>,
    double: bool,
    threads: usize,
) -> PyResult<()> {
    const WIDTH: usize = HEAD + 4 * VIEW;
    const NUMBERS: usize = 9;
    let rows = rows(&table, WIDTH)?;
    let numbers = numbers.as_slice().map_err(|_| bad("the numbers must be C-contiguous"))?;
    let out = skipped.as_slice_mut().map_err(|_| bad("the flags must be contiguous"))?;
    if numbers.len() != rows.len() * NUMBERS || out.len() != rows.len() {
        return Err(bad("table, numbers and flags must have as many rows").into());
    }
    let mut claims = Vec::new();
    let mut settings = Vec::new();
    for (row, n) in rows.zip(numbers.chunks_exact(NUMBERS)) {
        let shape = (size(row[0])?, size(row[1])?);
        let lion = n[0] != 0.0;
        for k in 0..4 {
            // Lion has no variance: an empty view stands in for it.
            let shape = if k == 3 && lion { (0, 0) } else { shape };
            claims.push(claim(&row[HEAD + k * VIEW..], shape, k != 1)?);
        }
        if !n[1..8].iter().all(|x| x.is_finite()) {
            return Err(bad("a hyperparameter is not finite").into());
        }
        let rule = if lion {
            Rule::Lion
        } else {
            Rule::AdamW { correction1: n[6], correction2: n[7], epsilon: n[5] }
        };
        settings.push(elementwise::Settings {
            rule,
            lr: n[1],
            weight_decay: n[2],
            beta1: n[3],
            beta2: n[4],
            maximize: n[8] != 0.0,
        });
    }
    let mut flags = vec![false; settings.len()];
    let flags = detached(py, move || {
        borrow::check(&claims, 4)?;
        let mut tensors: Vec<_> = claims
            .chunks_exact(4)
            .zip(settings)
            .map(|(c, s)| {
                // SAFETY: as in `lowrank_step`.
                let tensor = unsafe {
                    elementwise::Tensor {
                        x: c[0].exclusive(),
                        g: c[1].shared(),
                        m: c[2].exclusive(),
                        v: (s.rule != Rule::Lion).then(|| c[3].exclusive()),
                    }
                };
                (tensor, s)
            })
            .collect();
        let cx = Context::new(threads);
        if double {
            elementwise::step::<f64>(cx, &mut tensors, &mut flags)?;
        } else {
            elementwise::step::<f32>(cx, &mut tensors, &mut flags)?;
        }
        Ok(flags)
    })?;
    out.copy_from_slice(&flags);
    Ok(())
}

/// Claims for the rows of a small table: `[rows, cols, unused]` and one view each; those from `written` on are written.
fn operands(table: &PyReadonlyArray2<'_, i64>, count: usize, written: usize) -> Result<Vec<Claim>, Error> {
    let rows = rows(table, HEAD + VIEW)?;
    if rows.len() != count {
        return Err(bad(format!("{count} operands are needed")));
    }
    rows.enumerate()
        .map(|(i, row)| claim(&row[HEAD..], (size(row[0])?, size(row[1])?), i >= written))
        .collect()
}

/// QR or polar factor: A, V (n×r) and T (r×r float64, C-contiguous); `short` if A's columns are thought to be nearly
/// orthogonal. Returns the null flags and the method's name.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn factor(
    py: Python<'_>,
    table: PyReadonlyArray2<'_, i64>,
    mut t: PyReadwriteArray2<'_, f64>,
    polar: bool,
    short: bool,
    tol: f64,
    double: bool,
    threads: usize,
) -> PyResult<(Vec<bool>, String)> {
    let claims = operands(&table, 2, 1)?;
    let t = t.as_slice_mut().map_err(|_| bad("T must be C-contiguous"))?;
    detached(py, move || {
        borrow::check(&claims, 1)?;
        let cx = Context::new(threads);
        // SAFETY: as in `lowrank_step`.
        let (a, v) = unsafe { (claims[0].shared(), claims[1].exclusive()) };
        let paths = if short { qr::Paths::Short } else { qr::Paths::Any };
        if polar {
            let f = if double { qr::polar::<f64> } else { qr::polar::<f32> };
            let null = f(cx, a, v, tol, paths)?;
            return Ok((null, "qdwh".to_owned()));
        }
        let f = if double { qr::qr::<f64> } else { qr::qr::<f32> };
        let (null, method) = f(cx, a, v, Some(t), tol, paths)?;
        Ok((null, format!("{method:?}")))
    })
}

/// P = orth(A Q), R = AᵀP; the operands A, Q, P, R. Returns the null flags.
#[pyfunction]
fn power_iteration(
    py: Python<'_>,
    table: PyReadonlyArray2<'_, i64>,
    tol: f64,
    double: bool,
    threads: usize,
) -> PyResult<Vec<bool>> {
    let claims = operands(&table, 4, 2)?;
    detached(py, move || {
        borrow::check(&claims, 1)?;
        let cx = Context::new(threads);
        // SAFETY: as in `lowrank_step`.
        let (a, q, p, r) =
            unsafe { (claims[0].shared(), claims[1].shared(), claims[2].exclusive(), claims[3].exclusive()) };
        if double {
            step::power_iteration::<f64>(cx, a, q, p, r, tol)
        } else {
            step::power_iteration::<f32>(cx, a, q, p, r, tol)
        }
    })
}

/// C ← β·C + α·A·B; the operands A, B, C; `half` rounds A and B to bfloat16.
#[pyfunction]
fn matmul(
    py: Python<'_>,
    table: PyReadonlyArray2<'_, i64>,
    alpha: f64,
    beta: f64,
    double: bool,
    half: bool,
    threads: usize,
) -> PyResult<()> {
    let claims = operands(&table, 3, 2)?;
    detached(py, move || {
        borrow::check(&claims, 1)?;
        let (a, b, c) = (claims[0], claims[1], claims[2]);
        if (a.shape.0, b.shape.1, a.shape.1) != (c.shape.0, c.shape.1, b.shape.0) {
            return Err(Error::Shape { what: "C", need: (a.shape.0, b.shape.1), got: c.shape });
        }
        let cx = Context { half, ..Context::new(threads) };
        // SAFETY: as in `lowrank_step`.
        let (a, b, c) = unsafe { (a.shared(), b.shared(), c.exclusive()) };
        if double {
            gemm::gemm::<f64>(cx, alpha, a, b, beta, c);
        } else {
            gemm::gemm::<f32>(cx, alpha, a, b, beta, c);
        }
        Ok(())
    })
}

/// OUT ← B·A, or Bᵀ·A, for B = cm·M + cg·G; the operands M, G, A, OUT. `sums`, overwritten if it is not empty: B's squares
/// summed along the side that OUT has. Returns max |OUT|, NaN if an entry is not finite.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn part_product(
    py: Python<'_>,
    table: PyReadonlyArray2<'_, i64>,
    coefficients: (f64, f64),
    transposed: bool,
    mut sums: PyReadwriteArray1<'_, f64>,
    double: bool,
    half: bool,
    threads: usize,
) -> PyResult<f64> {
    let claims = operands(&table, 4, 3)?;
    let sums = sums.as_slice_mut().map_err(|_| bad("the sums must be contiguous"))?;
    sums.fill(0.0);
    detached(py, move || {
        borrow::check(&claims, 1)?;
        let cx = Context { half, ..Context::new(threads) };
        // SAFETY: as in `lowrank_step`.
        let (m, g, a, out) =
            unsafe { (claims[0].shared(), claims[1].shared(), claims[2].shared(), claims[3].exclusive()) };
        let b = Sum::new((coefficients.0, m), (coefficients.1, g))?;
        let sums = (!sums.is_empty()).then_some(sums);
        if double {
            b.product::<f64>(cx, transposed, a, out, sums)
        } else {
            b.product::<f32>(cx, transposed, a, out, sums)
        }
    })
}

/// max |cm·M + cg·G|, infinite or NaN if an entry is not finite; the operands M, G.
#[pyfunction]
fn part_largest(
    py: Python<'_>,
    table: PyReadonlyArray2<'_, i64>,
    coefficients: (f64, f64),
    threads: usize,
) -> PyResult<f64> {
    let claims = operands(&table, 2, 2)?;
    detached(py, move || {
        borrow::check(&claims, 1)?;
        // SAFETY: as in `lowrank_step`.
        let (m, g) = unsafe { (claims[0].shared(), claims[1].shared()) };
        Ok(Sum::new((coefficients.0, m), (coefficients.1, g))?.largest::<f64>(Context::new(threads)))
    })
}

/// The writing half of a step; the operands G, P, U, W, X, M, and a row of `lowrank_step`'s numbers.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn part_write(
    py: Python<'_>,
    table: PyReadonlyArray2<'_, i64>,
    numbers: PyReadonlyArray1<'_, f64>,
    alpha: f64,
    size: f64,
    double: bool,
    threads: usize,
) -> PyResult<()> {
    let claims = operands(&table, 6, 4)?;
    let numbers = numbers.as_slice().map_err(|_| bad("the numbers must be contiguous"))?;
    if numbers.len() != 13 || !alpha.is_finite() || !size.is_finite() {
        return Err(bad("13 finite numbers, alpha and size are needed").into());
    }
    let (o, scale) = options(numbers)?;
    detached(py, move || {
        borrow::check(&claims, 1)?;
        let cx = Context { half: o.half, ..Context::new(threads) };
        // SAFETY: as in `lowrank_step`.
        let ([g, p, u, w], x, m) = unsafe {
            ([0, 1, 2, 3].map(|k| claims[k].shared()), claims[4].exclusive(), claims[5].exclusive())
        };
        if double {
            parts::write::<f64>(cx, &o, scale, x, g, m, [p, u, w], alpha, size)
        } else {
            parts::write::<f32>(cx, &o, scale, x, g, m, [p, u, w], alpha, size)
        }
    })
}

/// The first two of some operands that share memory, if any do.
#[pyfunction]
fn overlap(table: PyReadonlyArray2<'_, i64>) -> PyResult<Option<(usize, usize)>> {
    let count = rows(&table, HEAD + VIEW)?.len();
    match borrow::check(&operands(&table, count, 0)?, 1) {
        Err(Error::Overlap { first, second }) => Ok(Some((first, second))),
        Err(Error::Value { .. }) | Ok(()) => Ok(None), // a view that aliases itself is refused when it is stepped
        Err(e) => Err(e.into()),
    }
}

/// The instruction set in use, all that this processor has, and what multiplies bfloat16 pairs ("rounded singles" if nothing).
#[pyfunction]
fn instruction_sets() -> (&'static str, Vec<&'static str>, &'static str) {
    let pairs = gemm::pairs::kernel(Isa::current()).map_or("rounded singles", |k| k.name);
    (Isa::current().name(), Isa::available().into_iter().map(Isa::name).collect(), pairs)
}

/// orthdion's numerical core.
#[pymodule]
fn _core(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    m.add_function(wrap_pyfunction!(lowrank_step, m)?)?;
    m.add_function(wrap_pyfunction!(elementwise_step, m)?)?;
    m.add_function(wrap_pyfunction!(factor, m)?)?;
    m.add_function(wrap_pyfunction!(power_iteration, m)?)?;
    m.add_function(wrap_pyfunction!(matmul, m)?)?;
    m.add_function(wrap_pyfunction!(part_product, m)?)?;
    m.add_function(wrap_pyfunction!(part_largest, m)?)?;
    m.add_function(wrap_pyfunction!(part_write, m)?)?;
    m.add_function(wrap_pyfunction!(overlap, m)?)?;
    m.add_function(wrap_pyfunction!(instruction_sets, m)?)?;
    Ok(())
}

//! The module `orthdion._core`. It checks what Python says, borrows, releases the GIL and maps errors; no numerics.
//!
//! Tensors arrive as rows of an int64 table, see [`table`]; what a group of them shares arrives as objects whose attributes
//! are read by name, once a call. A call takes any number of matrices. Every number is checked again here; what cannot
//! be checked is that an allocation is alive, for which the caller holds the tensors, and that no other call writes to
//! one meanwhile.

mod linalg;
mod parts;
mod residual;
mod step;
mod table;

use crate::error::Error;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use std::panic::{AssertUnwindSafe, catch_unwind};

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

/// That each number is finite, or an error that names the first one that is not.
fn finite<'n>(numbers: impl IntoIterator<Item = (&'n str, f64)>) -> Result<(), Error> {
    match numbers.into_iter().find(|(_, x)| !x.is_finite()) {
        Some((name, x)) => Err(bad(format!("{name} must be finite, but it is {x}"))),
        None => Ok(()),
    }
}

/// orthdion's numerical core.
#[pymodule]
fn _core(m: &Bound<'_, PyModule>) -> PyResult<()> {
    // Both read the environment, which is safe while nobody else runs: now.
    linalg::instruction_sets();
    linalg::thread_pool();
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    m.add_function(wrap_pyfunction!(step::lowrank_step, m)?)?;
    m.add_function(wrap_pyfunction!(step::elementwise_step, m)?)?;
    m.add_function(wrap_pyfunction!(linalg::factors, m)?)?;
    m.add_function(wrap_pyfunction!(linalg::newton_schulz, m)?)?;
    m.add_function(wrap_pyfunction!(linalg::power_iteration, m)?)?;
    m.add_function(wrap_pyfunction!(linalg::matmul, m)?)?;
    m.add_function(wrap_pyfunction!(linalg::instruction_sets, m)?)?;
    m.add_function(wrap_pyfunction!(linalg::thread_pool, m)?)?;
    m.add_function(wrap_pyfunction!(parts::products, m)?)?;
    m.add_function(wrap_pyfunction!(parts::largest, m)?)?;
    m.add_function(wrap_pyfunction!(parts::writes, m)?)?;
    m.add_function(wrap_pyfunction!(parts::rounded, m)?)?;
    m.add_function(wrap_pyfunction!(parts::overlap, m)?)?;
    m.add_function(wrap_pyfunction!(residual::residuals, m)?)?;
    m.add_function(wrap_pyfunction!(residual::residual_sums, m)?)?;
    m.add_function(wrap_pyfunction!(residual::squares, m)?)?;
    m.add_function(wrap_pyfunction!(residual::pack, m)?)?;
    m.add_function(wrap_pyfunction!(residual::unpack, m)?)?;
    m.add_function(wrap_pyfunction!(residual::average, m)?)?;
    m.add_function(wrap_pyfunction!(residual::pack_change, m)?)?;
    m.add_function(wrap_pyfunction!(residual::average_changes, m)?)?;
    Ok(())
}

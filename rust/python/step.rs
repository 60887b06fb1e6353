//! Whole steps over lists of matrices.

use super::table::{Table, draws, numbers, pick, same};
use super::{bad, detached, finite};
use crate::borrow;
use crate::elementwise::{self, Rule, Settings, Tensor};
use crate::error::Error;
use crate::gemm::Context;
use crate::step::{self, Matrix, Options, Report, RightFactor, Tail};
use numpy::{PyReadonlyArray1, PyReadonlyArray2, PyReadwriteArray1, PyReadwriteArray2};
use pyo3::prelude::*;

/// What the low-rank steps of a group share, read from any object with these attributes.
#[derive(FromPyObject)]
pub(super) struct LowRankOptions {
    lr: f64,
    weight_decay: f64,
    cautious: bool,
    a: f64,
    b: f64,
    right_factor: String,
    residual: Option<String>,
    residual_scale: f64,
    kappa: Option<f64>,
    maximize: bool,
    epsilon: f64,
    diagnostics: bool,
    bfloat16: bool,
}

impl LowRankOptions {
    pub(super) fn parse(&self) -> Result<Options, Error> {
        finite([
            ("lr", self.lr),
            ("weight_decay", self.weight_decay),
            ("a", self.a),
            ("b", self.b),
            ("residual_scale", self.residual_scale),
            ("kappa", self.kappa.unwrap_or(0.0)),
            ("epsilon", self.epsilon),
        ])?;
        Ok(Options {
            lr: self.lr,
            weight_decay: self.weight_decay,
            cautious: self.cautious,
            a: self.a,
            b: self.b,
            right: match self.right_factor.as_str() {
                "qr" => RightFactor::Qr,
                "column" => RightFactor::Column,
                "polar" => RightFactor::Polar,
                x => return Err(bad(format!("right_factor must be 'qr', 'column' or 'polar', not {x:?}"))),
            },
            tail: match self.residual.as_deref() {
                None => Tail::Feedback,
                Some("linear") => Tail::Linear,
                Some("normalized") => Tail::Normalized,
                Some(x) => {
                    return Err(bad(format!("residual must be None, 'linear' or 'normalized', not {x:?}")));
                }
            },
            tail_scale: self.residual_scale,
            nesterov: self.kappa,
            maximize: self.maximize,
            epsilon: self.epsilon,
            diagnostics: self.diagnostics,
            half: self.bfloat16,
        })
    }
}

/// The low-rank step over a list of matrices of one working precision.
///
/// table: int64 (N, 28): m, n, r, k and the views X, G, M (m×n) and Q (n×r); `options[k]` is the matrix's.
/// scales: float64 (N,), what multiplies lr.
/// rounding: int64 (N, 4) or (0, 4), see [`draws`]: how X is rounded.
/// reports: float64 (N, 8), overwritten: skipped, null, ‖B‖², ‖R‖², ν, ⟨B,D⟩, ‖R‖_*, effective rank.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub(super) fn lowrank_step(
    py: Python<'_>,
    table: PyReadonlyArray2<'_, i64>,
    options: Vec<LowRankOptions>,
    scales: PyReadonlyArray1<'_, f64>,
    rounding: PyReadonlyArray2<'_, i64>,
    mut reports: PyReadwriteArray2<'_, f64>,
    double: bool,
    threads: usize,
) -> PyResult<()> {
    let table = Table::<4>::new(&table, |&[m, n, r, _]| {
        Ok([((m, n), true), ((m, n), false), ((m, n), true), ((n, r), true)])
    })?;
    let options = options.iter().map(LowRankOptions::parse).collect::<Result<Vec<_>, _>>()?;
    let options =
        table.heads.iter().map(|head| pick(&options, head[3]).copied()).collect::<Result<Vec<_>, _>>()?;
    let scales = numbers("scales", &scales, options.len())?;
    let rounding = draws(&rounding, options.len())?;
    let out = reports.as_slice_mut().map_err(|_| bad("reports must be C-contiguous"))?;
    same("reports", out.len(), 8 * options.len())?;
    let reports = detached(py, move || {
        borrow::check(table.claims.as_flattened(), 4)?;
        let jobs = table.claims.iter().zip(options).zip(scales).zip(rounding);
        let mut jobs: Vec<_> = jobs
            .map(|((([x, g, m, q], o), &scale), drawn)| {
                // SAFETY: `check` has passed the claims together, and Python holds the tensors during the call.
                let matrix = unsafe {
                    Matrix {
                        x: x.exclusive().drawn(drawn),
                        g: g.shared(),
                        m: m.exclusive(),
                        q: q.exclusive(),
                        scale,
                    }
                };
                (matrix, o)
            })
            .collect();
        let mut reports = vec![Report::default(); jobs.len()];
        let step = if double { step::step::<f64> } else { step::step::<f32> };
        step(Context::new(threads), &mut jobs, &mut reports)?;
        Ok(reports)
    })?;
    for (out, r) in out.chunks_exact_mut(8).zip(reports) {
        let (skipped, null) = (f64::from(r.skipped), r.null as f64);
        let shape = [r.b_energy, r.r_energy, r.nu, r.descent, r.nuclear, r.effective_rank];
        out[..2].copy_from_slice(&[skipped, null]);
        out[2..].copy_from_slice(&shape);
    }
    Ok(())
}

/// What the elementwise steps of a group share, read from any object with these attributes.
#[derive(FromPyObject)]
pub(super) struct ElementwiseOptions {
    rule: String,
    lr: f64,
    weight_decay: f64,
    cautious: bool,
    beta1: f64,
    beta2: f64,
    epsilon: f64,
    maximize: bool,
    compensate: bool,
}

impl ElementwiseOptions {
    /// Checks the options, and tells whether the rule is Lion.
    fn lion(&self) -> Result<bool, Error> {
        finite([
            ("lr", self.lr),
            ("weight_decay", self.weight_decay),
            ("beta1", self.beta1),
            ("beta2", self.beta2),
            ("epsilon", self.epsilon),
        ])?;
        match self.rule.as_str() {
            "lion" => Ok(true),
            "adamw" => Ok(false),
            x => Err(bad(format!("rule must be 'adamw' or 'lion', not {x:?}"))),
        }
    }

    /// For the step that is the `t`-th of its tensor.
    fn settings(&self, lion: bool, t: f64) -> Result<Settings, Error> {
        let rule = if lion {
            Rule::Lion
        } else if t >= 1.0 {
            let correction = |beta: f64| 1.0 - beta.powf(t);
            Rule::AdamW {
                correction1: correction(self.beta1),
                correction2: correction(self.beta2),
                epsilon: self.epsilon,
            }
        } else {
            return Err(bad(format!("steps must be counted from 1, but one is {t}")));
        };
        let &ElementwiseOptions { lr, weight_decay, cautious, beta1, beta2, maximize, compensate, .. } = self;
        Ok(Settings { rule, lr, weight_decay, cautious, beta1, beta2, maximize, compensate })
    }
}

/// AdamW or Lion over a list of tensors of one working precision.
///
/// table: int64 (N, 28): m, n, unused, k and the views X, G, M, V (m×n; V is ignored for Lion); `options[k]` is the tensor's.
/// steps: float64 (N,), how many steps each tensor has taken with this one; unused for Lion.
/// rounding: int64 (N, 4) or (0, 4), see [`draws`]: how X is rounded.
/// skipped: bool (N,), overwritten.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub(super) fn elementwise_step(
    py: Python<'_>,
    table: PyReadonlyArray2<'_, i64>,
    options: Vec<ElementwiseOptions>,
    steps: PyReadonlyArray1<'_, f64>,
    rounding: PyReadonlyArray2<'_, i64>,
    mut skipped: PyReadwriteArray1<'_, bool>,
    double: bool,
    threads: usize,
) -> PyResult<()> {
    let lion = options.iter().map(ElementwiseOptions::lion).collect::<Result<Vec<_>, _>>()?;
    let table = Table::<4>::new(&table, |&[m, n, _, k]| {
        // Lion has no variance: an empty view stands in for it.
        let variance = if *pick(&lion, k)? { (0, 0) } else { (m, n) };
        Ok([((m, n), true), ((m, n), false), ((m, n), true), (variance, true)])
    })?;
    let steps = numbers("steps", &steps, table.heads.len())?;
    let settings = table.heads.iter().zip(steps).map(|(&[.., k], &t)| options[k].settings(lion[k], t));
    let settings = settings.collect::<Result<Vec<_>, _>>()?;
    let out = skipped.as_slice_mut().map_err(|_| bad("skipped must be contiguous"))?;
    same("skipped", out.len(), settings.len())?;
    let rounding = draws(&rounding, settings.len())?;
    detached(py, move || {
        borrow::check(table.claims.as_flattened(), 4)?;
        let mut tensors: Vec<_> = table
            .claims
            .iter()
            .zip(settings)
            .zip(rounding)
            .map(|(([x, g, m, v], s), drawn)| {
                // SAFETY: as in `lowrank_step`.
                let tensor = unsafe {
                    let v = (s.rule != Rule::Lion).then(|| v.exclusive());
                    Tensor { x: x.exclusive().drawn(drawn), g: g.shared(), m: m.exclusive(), v }
                };
                (tensor, s)
            })
            .collect();
        let step = if double { elementwise::step::<f64> } else { elementwise::step::<f32> };
        step(Context::new(threads), &mut tensors, out)
    })
}

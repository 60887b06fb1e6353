//! What rank r misses, T = B − P Rᵀ, as a matrix and by its energies, where ranks meet between the halves of a step.

use super::apply::{Side, panel_rows};
use super::parts::Sum;
use crate::error::Error;
use crate::gemm::Context;
use crate::isa::{Kernel, Level};
use crate::pool;
use crate::scalar::Real;
use crate::scratch::Scratch;
use crate::view::{Mat, MatMut};

/// `T = B − P Rᵀ` of one matrix: P m×r, R n×r.
#[derive(Clone, Copy, Debug)]
pub struct Missed<'a> {
    /// B, m×n.
    pub b: Sum<'a>,
    /// The left factor.
    pub p: Mat<'a>,
    /// The right one, not normalised.
    pub r: Mat<'a>,
}

impl Missed<'_> {
    fn check(&self) -> Result<(), Error> {
        let (m, n) = self.b.shape();
        let k = self.p.cols;
        for (what, view, need) in [("P", self.p, (m, k)), ("R", self.r, (n, k))] {
            if view.shape() != need {
                return Err(Error::Shape { what, need, got: view.shape() });
            }
        }
        Ok(())
    }

    fn flops(&self) -> f64 {
        let (m, n) = self.b.shape();
        m as f64 * (n * (self.p.cols + 1)) as f64
    }
}

/// `out ← T` over a list, threads as for [`super::step`].
///
/// # Errors
/// [`Error::Shape`] if shapes do not fit; then nothing has been written.
pub fn residuals<T: Real>(cx: Context, jobs: Vec<(Missed<'_>, MatMut<'_>)>) -> Result<(), Error> {
    for (missed, out) in &jobs {
        missed.check()?;
        let (need, got) = (missed.b.shape(), out.as_ref().shape());
        if need != got {
            return Err(Error::Shape { what: "the residual", need, got });
        }
    }
    pool::map(
        cx.threads,
        jobs,
        |job| job.0.flops(),
        |threads, (missed, out)| {
            let cx = Context { threads, ..cx };
            let row_major = out.as_ref().cs == 1;
            Side::<T>::new(cx, missed.r, row_major).product(cx, -1.0, missed.p, 0.0, out, missed.b.terms());
        },
    );
    Ok(())
}

/// A matrix of [`residual_sums`].
#[derive(Debug)]
pub struct Sums<'a> {
    /// T.
    pub missed: Missed<'a>,
    /// What each column of T is multiplied by for the second sums.
    pub columns: &'a [f64],
    /// Receives the sum of squares of each row of T.
    pub raw: &'a mut [f64],
    /// The same with scaled columns.
    pub scaled: &'a mut [f64],
}

/// Sums over a list; T itself is never whole.
///
/// # Errors
/// As [`residuals`].
pub fn residual_sums<T: Real>(cx: Context, jobs: Vec<Sums<'_>>) -> Result<(), Error> {
    for Sums { missed, columns, raw, scaled } in &jobs {
        missed.check()?;
        let (m, n) = missed.b.shape();
        for (what, have, need) in [
            ("the columns' scales", columns.len(), n),
            ("the sums", raw.len(), m),
            ("the sums", scaled.len(), m),
        ] {
            if have != need {
                return Err(Error::Shape { what, need: (need, 1), got: (have, 1) });
            }
        }
    }
    pool::map(
        cx.threads,
        jobs,
        |job| job.missed.flops(),
        |threads, Sums { missed, columns, raw, scaled }| {
            let cx = Context { threads, ..cx };
            let side = Side::<T>::new(cx, missed.r, true);
            let rows = panel_rows(missed.b.shape());
            let panels =
                raw.chunks_mut(rows.max(1)).zip(scaled.chunks_mut(rows.max(1))).enumerate().collect();
            pool::map(
                threads,
                panels,
                |_| 1.0,
                |_, (panel, (raw, scaled)): (usize, (&mut [f64], &mut [f64]))| {
                    let range = panel * rows..panel * rows + raw.len();
                    let n = columns.len();
                    let mut t = Scratch::<T>::new(raw.len() * n);
                    let (p, b) = (missed.p.row_range(range.clone()), missed.b.terms().row_range(range));
                    side.product(cx.serial(), -1.0, p, 0.0, MatMut::row_major(&mut t, raw.len(), n), b);
                    cx.isa.run(RowSquares { t: &t, columns: None, rows: raw });
                    cx.isa.run(RowSquares { t: &t, columns: Some(columns), rows: scaled });
                },
            );
        },
    );
    Ok(())
}

/// A row-major matrix whose squares [`squares`] sums.
#[derive(Debug)]
pub struct Squares<'a, T> {
    /// Entries, of as many rows as `rows` has.
    pub t: &'a [T],
    /// What its columns are multiplied by first, if anything.
    pub columns: Option<&'a [f64]>,
    /// Receives the sum of each row.
    pub rows: &'a mut [f64],
    /// Receives the sum of each column, if wanted.
    pub of_columns: Option<&'a mut [f64]>,
}

/// Row groups whose column sums are joined in order, so that these are the same bits for any number of threads.
const GROUPS: usize = 8;

/// Sums of squares over a list of matrices.
///
/// # Errors
/// [`Error::Shape`] if sizes do not fit; then nothing has been written.
pub fn squares<T: Real>(cx: Context, jobs: Vec<Squares<'_, T>>) -> Result<(), Error> {
    for job in &jobs {
        let (m, have) = (job.rows.len(), job.t.len());
        let n = have / m.max(1);
        for len in
            [job.columns.map(<[f64]>::len), job.of_columns.as_ref().map(|c| c.len())].into_iter().flatten()
        {
            if len != n && m > 0 {
                return Err(Error::Shape { what: "the columns' numbers", need: (n, 1), got: (len, 1) });
            }
        }
        if m * n != have {
            return Err(Error::Shape { what: "the matrix", need: (m, n), got: (have, 1) });
        }
    }
    pool::map(
        cx.threads,
        jobs,
        |job| job.t.len() as f64,
        |threads, Squares { t, columns, rows, of_columns }| {
            let (m, n) = (rows.len(), t.len() / rows.len().max(1));
            let each = m.div_ceil(GROUPS).max(1);
            let groups: Vec<_> = t.chunks((each * n).max(1)).zip(rows.chunks_mut(each)).collect();
            let wanted = of_columns.is_some();
            let partial = pool::map(
                threads,
                groups,
                |_| 1.0,
                |_, (t, rows)| {
                    cx.isa.run(RowSquares { t, columns, rows });
                    wanted.then(|| cx.isa.run(ColumnSquares { t, columns, n }))
                },
            );
            if let Some(sums) = of_columns {
                sums.fill(0.0);
                for part in partial.into_iter().flatten() {
                    sums.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
                }
            }
        },
    );
    Ok(())
}

/// `rows[i] ← Σ_j (columns_j·t_ij)²`: partial sums in `T`, joined in double.
struct RowSquares<'a, T> {
    t: &'a [T],
    columns: Option<&'a [f64]>,
    rows: &'a mut [f64],
}

impl<T: Real> Kernel for RowSquares<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        const LANES: usize = 32;
        let n = self.t.len() / self.rows.len().max(1);
        if n == 0 {
            self.rows.fill(0.0);
            return;
        }
        let mut scales = Scratch::<T>::new(n);
        match self.columns {
            Some(columns) => scales.iter_mut().zip(columns).for_each(|(s, c)| *s = T::of(*c)),
            None => scales.fill(T::of(1.0)),
        }
        for (row, sum) in self.t.chunks_exact(n).zip(self.rows) {
            let mut lanes = [T::default(); LANES];
            for (chunk, c) in row.chunks(LANES).zip(scales.chunks(LANES)) {
                for l in 0..chunk.len() {
                    let x = chunk[l] * c[l];
                    lanes[l] += x * x;
                }
            }
            *sum = lanes.into_iter().map(T::f64).sum();
        }
    }
}

/// `Σ_i (columns_j·t_ij)²` of each column, in double.
struct ColumnSquares<'a, T> {
    t: &'a [T],
    columns: Option<&'a [f64]>,
    n: usize,
}

impl<T: Real> Kernel for ColumnSquares<'_, T> {
    type Out = Vec<f64>;
    #[inline(always)]
    fn run<L: Level>(self) -> Vec<f64> {
        let mut sums = vec![0.0; self.n];
        for row in self.t.chunks_exact(self.n.max(1)) {
            for (sum, x) in sums.iter_mut().zip(row) {
                let x = x.f64();
                *sum += x * x;
            }
        }
        if let Some(columns) = self.columns {
            sums.iter_mut().zip(columns).for_each(|(sum, c)| *sum *= c * c);
        }
        sums
    }
}

/// `t_ij ← columns_j·t_ij·rows_i` of a dense panel, row-major or, if `down`, column-major.
pub(super) struct ScaleBoth<'a, T> {
    pub(super) t: &'a mut [T],
    pub(super) down: bool,
    pub(super) columns: &'a [f64],
    pub(super) rows: &'a [f64],
}

impl<T: Real> Kernel for ScaleBoth<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let (outer, inner) = if self.down { (self.columns, self.rows) } else { (self.rows, self.columns) };
        let mut along = Scratch::<T>::new(inner.len());
        along.iter_mut().zip(inner).for_each(|(s, c)| *s = T::of(*c));
        for (line, c) in self.t.chunks_exact_mut(inner.len().max(1)).zip(outer) {
            let c = T::of(*c);
            for (x, s) in line.iter_mut().zip(along.iter()) {
                *x = *x * *s * c;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::oracle::Dense;
    use super::super::parts::{Missing, Residual, Write, writes};
    use super::super::tests::options;
    use super::super::{RightFactor, Tail};
    use super::*;
    use crate::gemm::tests::noise;

    fn dense(rows: usize, cols: usize, seed: u64) -> Dense {
        Dense::new(rows, cols, noise(seed, rows * cols))
    }

    /// `T`, its row sums, and those with columns scaled.
    fn by_hand(b: &Dense, p: &Dense, r: &Dense, columns: &[f64]) -> (Dense, Vec<f64>, Vec<f64>) {
        let t = b.mix(1.0, -1.0, &p.times(&r.t()));
        let sum = |scales: Option<&[f64]>| {
            let row = |i: usize| {
                let entry = |j: usize| t.data[i * t.cols + j] * scales.map_or(1.0, |s| s[j]);
                (0..t.cols).map(|j| entry(j).powi(2)).sum::<f64>()
            };
            (0..t.rows).map(row).collect::<Vec<_>>()
        };
        let (raw, scaled) = (sum(None), sum(Some(columns)));
        (t, raw, scaled)
    }

    fn close(got: &[f64], want: &[f64]) {
        for (x, y) in got.iter().zip(want) {
            assert!((x - y).abs() <= 1e-12 * (1.0 + y.abs()), "{x} is not {y}");
        }
    }

    #[test]
    fn residuals_and_their_sums_are_their_definitions() {
        for (rows, cols, k, threads) in
            [(1, 1, 1, 1), (50, 37, 6, 2), (400, 90, 9, 3), (0, 4, 0, 1), (4, 0, 0, 1)]
        {
            let cx = Context::new(threads);
            let (m, g) = (dense(rows, cols, 1), dense(rows, cols, 2));
            let (p, r) = (dense(rows, k, 3), dense(cols, k, 4));
            let columns: Vec<f64> = noise(5, cols);
            let b = m.mix(0.5, -2.0, &g);
            let (t, raw, scaled) = by_hand(&b, &p, &r, &columns);
            let b = Sum::new((0.5, m.view()), (-2.0, g.view())).unwrap();
            let missed = Missed { b, p: p.view(), r: r.view() };
            let mut out = vec![7.0f64; rows * cols];
            residuals::<f64>(cx, vec![(missed, MatMut::row_major(&mut out, rows, cols))]).unwrap();
            close(&out, &t.data);
            let (mut first, mut second) = (vec![7.0; rows], vec![7.0; rows]);
            let job = Sums { missed, columns: &columns, raw: &mut first, scaled: &mut second };
            residual_sums::<f64>(cx, vec![job]).unwrap();
            close(&first, &raw);
            close(&second, &scaled);
            let (mut of_rows, mut of_columns) = (vec![7.0; rows], vec![7.0; cols]);
            let job =
                Squares { t: &t.data, columns: None, rows: &mut of_rows, of_columns: Some(&mut of_columns) };
            if rows > 0 && cols > 0 {
                squares(cx, vec![job]).unwrap();
                close(&of_rows, &raw);
                let down = |j: usize| (0..rows).map(|i| t.data[i * cols + j].powi(2)).sum::<f64>();
                close(&of_columns, &(0..cols).map(down).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn a_residual_is_written_alike_whether_it_is_given_or_formed() {
        let (rows, cols, k) = (300, 41, 5);
        let (x, g, m) = (dense(rows, cols, 1), dense(rows, cols, 2), dense(rows, cols, 3));
        let (p, u, r) = (dense(rows, k, 4), dense(cols, k, 5), dense(cols, k, 6));
        let (of_columns, of_rows): (Vec<f64>, Vec<f64>) = (noise(7, cols), noise(8, rows));
        let o = options(RightFactor::Qr, Tail::Feedback);
        let b = m.mix(1.0, 1.0, &g);
        let (t, ..) = by_hand(&b, &p, &r, &of_columns);
        let mut scaled = t.clone();
        for (row, by) in scaled.data.chunks_mut(cols).zip(&of_rows) {
            row.iter_mut().zip(&of_columns).for_each(|(x, c)| *x *= c * by);
        }
        let (columns, scales) = (&of_columns[..], &of_rows[..]);
        for (residual, added) in [
            (Residual::Given(0.3, t.view()), t.mix(0.3, 0.0, &t)),
            (Residual::Scaled { from: Missing::T(t.view()), columns, rows: scales }, scaled.clone()),
            (Residual::Scaled { from: Missing::R(r.view()), columns, rows: scales }, scaled.clone()),
        ] {
            for down in [false, true] {
                let d = p.times(&u.t()).mix(1.0, 1.0, &added);
                let want = x.mix(1.0 - o.lr * o.weight_decay, -o.lr * 0.7, &d);
                let mut weights = if down { x.t().data } else { x.data.clone() };
                let view = if down {
                    MatMut::row_major(&mut weights, cols, rows).t()
                } else {
                    MatMut::row_major(&mut weights, rows, cols)
                };
                let mut momentum = m.clone();
                let job = Write {
                    options: o,
                    scale: 0.7,
                    x: view,
                    g: g.view(),
                    m: MatMut::row_major(&mut momentum.data, rows, cols),
                    factors: [p.view(), u.view(), u.view()],
                    residual,
                    size: 1.0,
                };
                writes::<f64>(Context::new(2), vec![job]).unwrap();
                let got =
                    if down { Dense::new(cols, rows, weights).t() } else { Dense::new(rows, cols, weights) };
                assert!(got.distance(&want) < 1e-12 * want.norm());
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_before_anything_is_written() {
        let cx = Context::new(1);
        let (m, a) = (dense(4, 3, 1), dense(4, 2, 2));
        let b = Sum::new((1.0, m.view()), (1.0, m.view())).unwrap();
        let mut out = vec![7.0f64; 12];
        let wrong = Missed { b, p: a.view(), r: a.view() };
        assert!(residuals::<f64>(cx, vec![(wrong, MatMut::row_major(&mut out, 4, 3))]).is_err());
        let mut rows = [7.0; 3];
        let job = Squares { t: &m.data, columns: None, rows: &mut rows, of_columns: Some(&mut out[..2]) };
        assert!(squares(cx, vec![job]).is_err());
        assert!(out == [7.0; 12] && rows == [7.0; 3]);
    }
}

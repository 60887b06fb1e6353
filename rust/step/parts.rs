//! The halves of a step for a matrix that lies on several ranks: between them others reduce P and R.
//!
//! `B = cm·M + cg·G` with coefficients that hold Nesterov's look-ahead, the direction and a power of two against
//! overflow; it is formed while panels are packed, as in the whole step.

use super::apply::{self, Factors, Plan};
use super::{Largest, Options, largest_entry, project_back};
use crate::error::Error;
use crate::gemm::{Context, Packed, Terms};
use crate::pool;
use crate::scalar::Real;
use crate::scratch::Scratch;
use crate::view::{Mat, MatMut};

/// `cm·M + cg·G`, both m×n.
#[derive(Clone, Copy, Debug)]
pub struct Sum<'a> {
    m: (f64, Mat<'a>),
    g: (f64, Mat<'a>),
}

impl<'a> Sum<'a> {
    /// From M and G, each with its coefficient.
    ///
    /// # Errors
    /// [`Error::Shape`] if they are not of one shape.
    pub fn new(m: (f64, Mat<'a>), g: (f64, Mat<'a>)) -> Result<Self, Error> {
        let (need, got) = ((m.1.rows, m.1.cols), (g.1.rows, g.1.cols));
        if need == got { Ok(Sum { m, g }) } else { Err(Error::Shape { what: "the gradient", need, got }) }
    }

    pub(super) fn shape(&self) -> (usize, usize) {
        self.m.1.shape()
    }

    pub(super) fn terms(&self) -> Terms<'a> {
        Terms::two(self.m.0, self.m.1, self.g.0, self.g.1)
    }

    fn entries(&self) -> f64 {
        self.m.1.rows as f64 * self.m.1.cols as f64
    }

    /// max |B_ij|; infinite or NaN if B is anywhere.
    pub fn largest(&self, cx: Context) -> f64 {
        largest_entry(cx, self.terms())
    }

    /// `out ← B·A`, or `Bᵀ·A`; and the sums of B's squares along the side that `out` has, if asked for. Returns max |out|,
    /// or NaN if an entry is not finite.
    ///
    /// # Errors
    /// [`Error::Shape`] if shapes do not fit; then nothing has been written.
    pub fn product<T: Real>(
        &self,
        cx: Context,
        transposed: bool,
        a: Mat<'_>,
        mut out: MatMut<'_>,
        sums: Option<&mut [f64]>,
    ) -> Result<f64, Error> {
        let b = if transposed { self.terms() } else { self.terms().t() };
        let (inner, outer) = b.shape().unwrap_or((0, 0));
        let got = (out.as_ref().rows, out.as_ref().cols);
        if a.rows != inner {
            return Err(Error::Shape { what: "the factor", need: (inner, a.cols), got: (a.rows, a.cols) });
        }
        if got != (outer, a.cols) || sums.as_ref().is_some_and(|s| s.len() != outer) {
            return Err(Error::Shape { what: "the product", need: (outer, a.cols), got });
        }
        // The sums are by-products: without a factor, those of a product with a column of zeros.
        let k = if sums.is_some() { a.cols.max(1) } else { a.cols };
        let mut whole = Scratch::<T>::zeros(outer * k);
        if inner > 0 && k > 0 && outer > 0 {
            let none = Scratch::<T>::zeros(if a.cols == 0 { inner } else { 0 });
            let factor = if a.cols == 0 { Mat::row_major(&none, inner, 1) } else { a };
            project_back(cx, &Packed::new(cx, factor.t()), b, &mut whole, sums);
        } else if let Some(sums) = sums {
            sums.fill(0.0);
        }
        if a.cols > 0 {
            crate::qr::copy(Mat::row_major(&whole, outer, k), out.reborrow());
        }
        Ok(cx.isa.run(Largest { x: &whole }))
    }
}

/// A matrix of [`products`].
#[derive(Debug)]
pub struct Projection<'a> {
    /// B
    pub b: Sum<'a>,
    /// Its factor, n×k, or m×k where B is transposed.
    pub a: Mat<'a>,
    /// What is overwritten, m×k, or n×k where B is transposed.
    pub out: MatMut<'a>,
    /// Receives the sums of B's squares along the side that `out` has.
    pub sums: Option<&'a mut [f64]>,
}

/// [`Sum::product`] over a list, threads as for [`super::step`].
///
/// # Errors
/// As there, for the first matrix that has one; others may have been written.
pub fn products<T: Real>(
    cx: Context,
    jobs: Vec<Projection<'_>>,
    transposed: bool,
) -> Result<Vec<f64>, Error> {
    let cost = |job: &Projection<'_>| job.b.entries() * (job.a.cols + 1) as f64;
    pool::map(cx.threads, jobs, cost, |threads, Projection { b, a, out, sums }| {
        b.product::<T>(Context { threads, ..cx }, transposed, a, out, sums)
    })
    .into_iter()
    .collect()
}

/// [`Sum::largest`] over a list, threads as for [`super::step`].
pub fn largest(cx: Context, sums: Vec<Sum<'_>>) -> Vec<f64> {
    pool::map(cx.threads, sums, Sum::entries, |threads, b| b.largest(Context { threads, ..cx }))
}

/// What [`Write`] adds to `P Uᵀ`.
#[derive(Clone, Copy, Debug)]
pub enum Residual<'a> {
    /// α·B, whose part in P's space U has taken off; nothing if α is 0.
    Share(f64),
    /// α·T.
    Given(f64, Mat<'a>),
    /// T, given or `B − P Rᵀ` of this R, with its columns and rows multiplied by these numbers.
    Scaled {
        /// T, m×n, or R, n×r.
        from: Missing<'a>,
        /// n numbers.
        columns: &'a [f64],
        /// m numbers.
        rows: &'a [f64],
    },
}

/// Where T comes from.
#[derive(Clone, Copy, Debug)]
pub enum Missing<'a> {
    /// It is given.
    T(Mat<'a>),
    /// From the right factor.
    R(Mat<'a>),
}

/// A matrix of [`writes`].
#[derive(Debug)]
pub struct Write<'a> {
    /// Hyperparameters; what they say of the residual is not read.
    pub options: Options,
    /// What multiplies η.
    pub scale: f64,
    /// Weights, m×n.
    pub x: MatMut<'a>,
    /// Gradient.
    pub g: Mat<'a>,
    /// Error-feedback buffer.
    pub m: MatMut<'a>,
    /// P m×r, U and W n×r.
    pub factors: [Mat<'a>; 3],
    /// What is added to P Uᵀ.
    pub residual: Residual<'a>,
    /// What B was scaled by.
    pub size: f64,
}

/// [`Write::run`] over a list, threads as for [`super::step`].
///
/// # Errors
/// As there; then nothing has been written.
pub fn writes<T: Real>(cx: Context, jobs: Vec<Write<'_>>) -> Result<(), Error> {
    jobs.iter().try_for_each(Write::check)?;
    let cost = |job: &Write<'_>| {
        job.x.as_ref().rows as f64 * (job.x.as_ref().cols * (job.factors[0].cols + 1)) as f64
    };
    pool::map(cx.threads, jobs, cost, |threads, job| job.run::<T>(Context { threads, ..cx }))
        .into_iter()
        .collect()
}

impl Write<'_> {
    fn check(&self) -> Result<(), Error> {
        let (rows, cols) = self.x.as_ref().shape();
        let [p, u, w] = self.factors;
        let views = [
            ("the gradient", self.g, (rows, cols)),
            ("the momentum", self.m.as_ref(), (rows, cols)),
            ("P", p, (rows, p.cols)),
            ("V", u, (cols, p.cols)),
            ("W", w, (cols, p.cols)),
        ];
        views.into_iter().try_for_each(|(what, view, need)| same(what, view.shape(), need))?;
        match self.residual {
            Residual::Share(_) => Ok(()),
            Residual::Given(_, t) => same("the residual", t.shape(), (rows, cols)),
            Residual::Scaled { from, columns, rows: scales } => {
                match from {
                    Missing::T(t) => same("the residual", t.shape(), (rows, cols))?,
                    Missing::R(r) => same("R", r.shape(), (cols, p.cols))?,
                }
                same("the columns' scales", (columns.len(), 1), (cols, 1))?;
                same("the rows' scales", (scales.len(), 1), (rows, 1))
            }
        }
    }

    /// `X ← (1 − ηλ)X − η·scale·(P Uᵀ + residual)`, `M ← a·M⁺ − (a − b)·P Wᵀ/size`, where B is scaled by `size`.
    ///
    /// # Errors
    /// [`Error::Shape`] if shapes do not fit; then nothing has been written.
    pub fn run<T: Real>(self, cx: Context) -> Result<(), Error> {
        self.check()?;
        let Write { options: o, scale, x, g, m, factors: [p, u, w], residual, size } = self;
        if x.as_ref().rows == 0 || x.as_ref().cols == 0 {
            return Ok(());
        }
        let sign = if o.maximize { -1.0 } else { 1.0 };
        // A shared copy of M, as in the whole step: each panel reads it before it writes that panel.
        // SAFETY: `apply::write` reads a panel of M before it writes that panel, on one thread.
        let mv = unsafe { m.raw() };
        let b = match o.nesterov {
            Some(k) => Terms::two(k, mv, (1.0 + k) * sign, g),
            None => Terms::two(1.0, mv, sign, g),
        };
        let mut f = Factors { p, r: u, v: u, w, b: b.scaled(size), size, sign };
        let plan = match residual {
            Residual::Share(0.0) => Plan::None,
            Residual::Share(alpha) => Plan::Linear(alpha),
            Residual::Given(alpha, t) => Plan::Given(alpha, t),
            Residual::Scaled { from: Missing::T(t), columns, rows } => {
                Plan::Scaled { given: Some(t), columns, rows }
            }
            Residual::Scaled { from: Missing::R(r), columns, rows } => {
                f.r = r;
                Plan::Scaled { given: None, columns, rows }
            }
        };
        apply::write::<T>(Context { half: o.half, ..cx }, &o, scale, x, m, g, &f, &plan);
        Ok(())
    }
}

/// `X ← A` over a list of pairs of one shape, as X says that it is rounded; threads take rows.
pub fn rounded(cx: Context, jobs: Vec<(MatMut<'_>, Mat<'_>)>) {
    const ROWS: usize = 64;
    let mut pieces = Vec::new();
    for (x, a) in jobs {
        // SAFETY: the pieces are disjoint ranges of X's rows, and X is used up here.
        let x = unsafe { x.raw() };
        for first in (0..a.rows).step_by(ROWS) {
            let range = first..a.rows.min(first + ROWS);
            pieces.push((x.row_range(range.clone()), a.row_range(range)));
        }
    }
    pool::for_each(cx.threads, pieces.len(), &|k| {
        let (x, a) = pieces[k];
        // SAFETY: as above; one thread has a piece.
        let x =
            unsafe { MatMut::from_raw(x.ptr.cast_mut(), x.dtype, x.shape(), (x.rs, x.cs)) }.drawn(x.draws);
        crate::qr::copy(a, x);
    });
}

fn same(what: &'static str, got: (usize, usize), need: (usize, usize)) -> Result<(), Error> {
    if got == need { Ok(()) } else { Err(Error::Shape { what, need, got }) }
}

#[cfg(test)]
mod tests {
    use super::super::oracle::Dense;
    use super::super::tests::options;
    use super::super::{RightFactor, Tail};
    use super::*;
    use crate::gemm::tests::noise;

    fn dense(rows: usize, cols: usize, seed: u64) -> Dense {
        Dense::new(rows, cols, noise(seed, rows * cols))
    }

    #[test]
    fn products_and_energies_of_a_sum_on_either_side() {
        let cx = Context::new(2);
        for (rows, cols, k) in [(1, 1, 1), (7, 5, 3), (40, 33, 8), (0, 4, 2), (4, 0, 2), (130, 70, 31)] {
            let (m, g) = (dense(rows, cols, 1), dense(rows, cols, 2));
            let sum = Sum::new((0.5, m.view()), (-2.0, g.view())).unwrap();
            for transposed in [false, true] {
                let b = m.mix(0.5, -2.0, &g);
                let b = if transposed { b.t() } else { b };
                let a = dense(b.cols, k, 3);
                let mut out = vec![7.0f64; b.rows * k];
                let mut sums = vec![0.0; b.rows];
                let largest = sum
                    .product::<f64>(
                        cx,
                        transposed,
                        a.view(),
                        MatMut::row_major(&mut out, b.rows, k),
                        Some(&mut sums),
                    )
                    .unwrap();
                let want = b.times(&a);
                assert!(Dense::new(b.rows, k, out).distance(&want) <= 1e-12 * (1.0 + want.norm()));
                let expected = want.data.iter().fold(0.0f64, |m, x| m.max(x.abs()));
                assert!((largest - expected).abs() <= 1e-12 * (1.0 + expected));
                for (i, sum) in sums.iter().enumerate().filter(|_| b.cols > 0) {
                    let row: f64 = b.data[i * b.cols..(i + 1) * b.cols].iter().map(|x| x * x).sum();
                    assert!((sum - row).abs() <= 1e-12 * (1.0 + row));
                }
            }
        }
    }

    #[test]
    fn sums_need_no_factor_and_a_list_is_its_matrices() {
        let shapes = [(7, 5), (300, 41), (0, 3), (3, 0), (64, 64), (5, 500)];
        let mats: Vec<_> = shapes.iter().map(|&(m, n)| (dense(m, n, 1), dense(m, n, 2))).collect();
        let bs: Vec<_> =
            mats.iter().map(|(m, g)| Sum::new((0.5, m.view()), (-2.0, g.view())).unwrap()).collect();
        for (transposed, threads) in [(false, 1), (true, 1), (false, 3), (true, 3)] {
            let cx = Context::new(threads);
            let side = |&(m, n): &(usize, usize)| if transposed { n } else { m };
            let mut sums: Vec<_> = shapes.iter().map(|s| vec![7.0; side(s)]).collect();
            let jobs = bs.iter().zip(&mut sums).zip(&shapes).map(|((&b, sums), &(m, n))| {
                let (a, out) = if transposed { (m, n) } else { (n, m) };
                let a = Mat::row_major::<f64>(&[], a, 0);
                Projection { b, a, out: MatMut::row_major::<f64>(&mut [], out, 0), sums: Some(sums) }
            });
            assert_eq!(products::<f64>(cx, jobs.collect(), transposed).unwrap(), [0.0; 6]);
            for ((sums, (m, g)), &(_, n)) in sums.iter().zip(&mats).zip(&shapes) {
                let b = m.mix(0.5, -2.0, g);
                let b = if transposed { b.t() } else { b };
                let n = if transposed { m.rows } else { n };
                for (i, sum) in sums.iter().enumerate() {
                    let row: f64 = b.data[i * n..(i + 1) * n].iter().map(|x| x * x).sum();
                    assert!((sum - row).abs() <= 1e-12 * (1.0 + row));
                }
            }
            let alone: Vec<_> = bs.iter().map(|b| b.largest(Context::new(1))).collect();
            assert_eq!(largest(cx, bs.clone()), alone);
        }
    }

    #[test]
    fn writing_is_its_equation_for_every_coefficient() {
        let cx = Context::new(2);
        let (rows, cols, r) = (50, 37, 6);
        let (x, g, m) = (dense(rows, cols, 1), dense(rows, cols, 2), dense(rows, cols, 3));
        let (p, u, w) = (dense(rows, r, 4), dense(cols, r, 5), dense(cols, r, 6));
        for (alpha, size, nesterov, maximize) in
            [(0.0, 1.0, None, false), (0.3, 4.0, Some(0.9), true), (0.3, 0.25, None, false)]
        {
            let o = Options { nesterov, maximize, ..options(RightFactor::Qr, Tail::Linear) };
            let (mut nx, mut nm) = (x.clone(), m.clone());
            let job = Write {
                options: o,
                scale: 0.7,
                x: MatMut::row_major(&mut nx.data, rows, cols),
                g: g.view(),
                m: MatMut::row_major(&mut nm.data, rows, cols),
                factors: [p.view(), u.view(), w.view()],
                residual: Residual::Share(alpha),
                size,
            };
            writes::<f64>(cx, vec![job]).unwrap();
            let plus = m.mix(1.0, if maximize { -1.0 } else { 1.0 }, &g);
            let b = match nesterov {
                Some(k) => plus.mix(k, if maximize { -1.0 } else { 1.0 }, &g),
                None => plus.clone(),
            };
            let d = p.times(&u.t()).mix(1.0, alpha * size, &b);
            let want = x.mix(1.0 - o.lr * o.weight_decay, -o.lr * 0.7, &d);
            assert!(nx.distance(&want) < 1e-12 * want.norm());
            let want = plus.mix(o.a, -(o.a - o.b) / size, &p.times(&w.t()));
            assert!(nm.distance(&want) < 1e-12 * want.norm());
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_before_anything_is_written() {
        let cx = Context::new(1);
        let (m, g, a) = (dense(4, 3, 1), dense(4, 3, 2), dense(4, 2, 3));
        assert!(Sum::new((1.0, m.view()), (1.0, a.view())).is_err());
        let sum = Sum::new((1.0, m.view()), (1.0, g.view())).unwrap();
        let mut out = vec![7.0f64; 8];
        assert!(sum.product::<f64>(cx, false, a.view(), MatMut::row_major(&mut out, 4, 2), None).is_err());
        assert!(sum.product::<f64>(cx, true, a.view(), MatMut::row_major(&mut out, 4, 2), None).is_err());
        let (mut x, mut n) = (m.clone(), m.clone());
        let wrong = Write {
            options: options(RightFactor::Qr, Tail::Feedback),
            scale: 1.0,
            x: MatMut::row_major(&mut x.data, 4, 3),
            g: g.view(),
            m: MatMut::row_major(&mut n.data, 4, 3),
            factors: [a.view(); 3],
            residual: Residual::Share(0.0),
            size: 1.0,
        };
        assert!(
            writes::<f64>(cx, vec![wrong]).is_err()
                && x.data == m.data
                && n.data == m.data
                && out == [7.0; 8]
        );
    }
}

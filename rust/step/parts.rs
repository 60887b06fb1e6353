//! The halves of a step for a matrix that lies on several ranks: between them others reduce P and R.
//!
//! `B = cm·M + cg·G` with coefficients that hold Nesterov's look-ahead, the direction and a power of two against
//! overflow; it is formed while panels are packed, as in the whole step.

use super::apply::{self, Factors, Plan};
use super::{Largest, Options, Tail, largest_entry, project_back};
use crate::error::Error;
use crate::gemm::{Context, Packed, Terms};
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

    fn terms(&self) -> Terms<'a> {
        Terms::two(self.m.0, self.m.1, self.g.0, self.g.1)
    }

    /// max |B_ij|; infinite or NaN if B is anywhere.
    pub fn largest<T: Real>(&self, cx: Context) -> f64 {
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
        let mut whole = Scratch::<T>::zeros(outer * a.cols);
        if inner > 0 && a.cols > 0 && outer > 0 {
            let packed = Packed::<T>::new(cx, a.t());
            project_back(cx, &packed, b, &mut whole, sums);
        }
        crate::qr::copy(Mat::row_major(&whole, outer, a.cols), out.reborrow());
        Ok(cx.isa.run(Largest { x: &whole }))
    }
}

/// `X ← (1 − ηλ)X − η·scale·(P Uᵀ + α·B)`, `M ← a·M⁺ − (a − b)·P Wᵀ/size`: P m×r, U and W n×r, `b` = B scaled by `size`.
///
/// # Errors
/// [`Error::Shape`] if shapes do not fit, [`Error::Value`] for a normalized tail; then nothing has been written.
#[allow(clippy::too_many_arguments)]
pub fn write<T: Real>(
    cx: Context,
    o: &Options,
    scale: f64,
    x: MatMut<'_>,
    g: Mat<'_>,
    m: MatMut<'_>,
    factors: [Mat<'_>; 3],
    alpha: f64,
    size: f64,
) -> Result<(), Error> {
    let [p, u, w] = factors;
    let (rows, cols) = (x.as_ref().rows, x.as_ref().cols);
    let views = [
        ("the gradient", g, (rows, cols)),
        ("the momentum", m.as_ref(), (rows, cols)),
        ("P", p, (rows, p.cols)),
        ("V", u, (cols, p.cols)),
        ("W", w, (cols, p.cols)),
    ];
    for (what, view, need) in views {
        if (view.rows, view.cols) != need {
            return Err(Error::Shape { what, need, got: (view.rows, view.cols) });
        }
    }
    if o.tail == Tail::Normalized {
        return Err(Error::Value { why: "a normalized tail has sums of its own between the halves".into() });
    }
    if rows == 0 || cols == 0 {
        return Ok(());
    }
    let sign = if o.maximize { -1.0 } else { 1.0 };
    // A shared copy of M, as in the whole step: each panel reads it before it writes that panel.
    let mv = m.raw();
    let b = match o.nesterov {
        Some(k) => Terms::two(k, mv, (1.0 + k) * sign, g),
        None => Terms::two(1.0, mv, sign, g),
    };
    let f = Factors { p, r: u, v: u, w, b: b.scaled(size), size, sign };
    let plan = if alpha == 0.0 { Plan::None } else { Plan::Linear(alpha) };
    apply::write::<T>(cx, o, scale, x, m, g, &f, &plan);
    Ok(())
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
            let views =
                (MatMut::row_major(&mut nx.data, rows, cols), MatMut::row_major(&mut nm.data, rows, cols));
            write::<f64>(
                cx,
                &o,
                0.7,
                views.0,
                g.view(),
                views.1,
                [p.view(), u.view(), w.view()],
                alpha,
                size,
            )
            .unwrap();
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
        let views = (MatMut::row_major(&mut x.data, 4, 3), MatMut::row_major(&mut n.data, 4, 3));
        let o = options(RightFactor::Qr, Tail::Feedback);
        let wrong = write::<f64>(cx, &o, 1.0, views.0, g.view(), views.1, [a.view(); 3], 0.0, 1.0);
        assert!(wrong.is_err() && x.data == m.data && n.data == m.data && out == [7.0; 8]);
    }
}

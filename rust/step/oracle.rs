//! The slow transcription of the step that its tests are held to, and problems in every storage and layout.

use super::*;
use crate::gemm::tests::{naive, noise};
use crate::scalar::Element;

/// A dense row-major matrix of doubles, for the oracle.
#[derive(Clone, Debug)]
pub(super) struct Dense {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) data: Vec<f64>,
}

impl Dense {
    pub(super) fn new(rows: usize, cols: usize, data: Vec<f64>) -> Self {
        Dense { rows, cols, data }
    }
    pub(super) fn view(&self) -> Mat<'_> {
        Mat::row_major(&self.data, self.rows, self.cols)
    }
    pub(super) fn t(&self) -> Dense {
        let data =
            (0..self.cols).flat_map(|j| (0..self.rows).map(move |i| self.data[i * self.cols + j])).collect();
        Dense::new(self.cols, self.rows, data)
    }
    pub(super) fn times(&self, other: &Dense) -> Dense {
        Dense::new(self.rows, other.cols, naive(self.view(), other.view()))
    }
    /// `c0·self + c1·other`
    pub(super) fn mix(&self, c0: f64, c1: f64, other: &Dense) -> Dense {
        let data = self.data.iter().zip(&other.data).map(|(x, y)| c0 * x + c1 * y).collect();
        Dense::new(self.rows, self.cols, data)
    }
    pub(super) fn norm(&self) -> f64 {
        qr::square_norm(&self.data).sqrt()
    }
    pub(super) fn distance(&self, other: &Dense) -> f64 {
        self.mix(1.0, -1.0, other).norm()
    }
    pub(super) fn scale_rows(&self, f: impl Fn(&[f64]) -> f64) -> Dense {
        let data = self.data.chunks(self.cols).flat_map(|row| {
            let s = f(row);
            row.iter().map(move |x| x * s)
        });
        Dense::new(self.rows, self.cols, data.collect())
    }
}

/// Gram–Schmidt twice: its diagonal is positive by construction. Directions that vanish stay zero.
pub(super) fn orth(a: &Dense) -> Dense {
    let columns = a.t();
    let largest = columns.data.chunks(a.rows).map(|c| qr::square_norm(c).sqrt()).fold(0.0, f64::max);
    let mut q: Vec<Vec<f64>> = Vec::new();
    for column in columns.data.chunks(a.rows) {
        let mut c = column.to_vec();
        for _ in 0..2 {
            for p in &q {
                let dot: f64 = p.iter().zip(&c).map(|(x, y)| x * y).sum();
                c.iter_mut().zip(p).for_each(|(x, y)| *x -= dot * y);
            }
        }
        let norm = qr::square_norm(&c).sqrt();
        let null = norm <= 1e-9 * largest;
        c.iter_mut().for_each(|x| *x = if null { 0.0 } else { *x / norm });
        q.push(c);
    }
    Dense::new(a.cols, a.rows, q.concat()).t()
}

pub(super) fn right(kind: RightFactor, r: &Dense) -> Dense {
    match kind {
        RightFactor::Qr => orth(r),
        RightFactor::Column => {
            let largest = r.t().data.chunks(r.rows).map(|c| qr::square_norm(c).sqrt()).fold(0.0, f64::max);
            r.t()
                .scale_rows(|c| {
                    if c.iter().all(|&x| x == 0.0) {
                        0.0
                    } else {
                        1.0 / (qr::square_norm(c).sqrt() + 1e-8 * largest)
                    }
                })
                .t()
        }
        RightFactor::Polar => {
            // Newton–Schulz, as long as it takes.
            let mut x = r.mix(1.0 / r.norm().max(1e-300), 0.0, r);
            for _ in 0..120 {
                x = x.mix(1.5, -0.5, &x.times(&x.t().times(&x)));
            }
            x
        }
    }
}

/// X, M, Q after one step.
pub(super) fn oracle(
    x: &Dense,
    g: &Dense,
    m: &Dense,
    q: &Dense,
    scale: f64,
    o: &Options,
    unit: f64,
) -> (Dense, Dense, Dense) {
    let g = g.mix(if o.maximize { -1.0 } else { 1.0 }, 0.0, g);
    let plus = m.mix(1.0, 1.0, &g);
    let b = o.nesterov.map_or(plus.clone(), |k| plus.mix(k, 1.0, &g));
    let p = orth(&b.times(q));
    let r = b.t().times(&p);
    let v = right(o.right, &r);
    let mut d = p.times(&v.t());
    let t = b.mix(1.0, -1.0, &p.times(&r.t()));
    let spare = x.rows.min(x.cols) - q.cols;
    let c = o.tail_scale * (spare as f64).sqrt();
    if spare > 0 && t.norm().powi(2) > 16.0 * unit * b.norm().powi(2) {
        match o.tail {
            Tail::Feedback => {}
            Tail::Linear => d = d.mix(1.0, c / t.norm(), &t),
            Tail::Normalized => {
                let inverse = |row: &[f64]| 1.0 / qr::square_norm(row).sqrt().max(1e-300);
                let n = t.t().scale_rows(inverse).t().scale_rows(inverse);
                d = d.mix(1.0, c / n.norm(), &n);
            }
        }
    }
    let plain = x.mix(1.0 - o.lr * o.weight_decay, -o.lr * scale, &d);
    let bare = x.mix(1.0, -o.lr * scale, &d);
    let against = |i: usize| o.cautious && x.data[i] * d.data[i] < 0.0;
    let kept = (0..x.data.len()).map(|i| if against(i) { bare.data[i] } else { plain.data[i] }).collect();
    let x = Dense::new(x.rows, x.cols, kept);
    let m = plus.mix(o.a, -(o.a - o.b), &p.times(&plus.t().times(&p).t()));
    (x, m, v)
}

/// Stored copies of a problem, in one layout.
pub(super) struct Stored<E> {
    pub(super) shape: (usize, usize, usize),
    pub(super) strides: (usize, usize),
    pub(super) x: Vec<E>,
    pub(super) g: Vec<E>,
    pub(super) m: Vec<E>,
    pub(super) q: Vec<E>,
}

impl<E: Element> Stored<E> {
    pub(super) fn new((m, n, r): (usize, usize, usize), row_major: bool, seed: u64) -> Self {
        let strides = if row_major { (n, 1) } else { (1, m) };
        let of = |s: u64, len| noise(seed + s, len).into_iter().map(E::store).collect::<Vec<E>>();
        let start = orth(&Dense::new(n, r, noise(seed + 9, n * r)));
        let q = start.data.into_iter().map(E::store).collect();
        Stored { shape: (m, n, r), strides, x: of(1, m * n), g: of(2, m * n), m: of(3, m * n), q }
    }
    pub(super) fn matrix(&mut self, scale: f64) -> Matrix<'_> {
        let (m, n, r) = self.shape;
        Matrix {
            x: MatMut::new(&mut self.x, (m, n), self.strides).unwrap(),
            g: Mat::new(&self.g, (m, n), self.strides).unwrap(),
            m: MatMut::new(&mut self.m, (m, n), self.strides).unwrap(),
            q: MatMut::row_major(&mut self.q, n, r),
            scale,
        }
    }
    pub(super) fn dense(&self, data: &[E]) -> Dense {
        let (m, n, _) = self.shape;
        let view = Mat::new(data, (m, n), self.strides).unwrap();
        Dense::new(m, n, (0..m).flat_map(|i| (0..n).map(move |j| view.get(i, j))).collect())
    }
    pub(super) fn dense_q(&self) -> Dense {
        let (_, n, r) = self.shape;
        Dense::new(n, r, self.q.iter().map(|q| q.load::<f64>()).collect())
    }
}

//! The fused step against a slow transcription of its equations, and the claims that every option must keep.

use super::*;
use crate::gemm::tests::{naive, noise};
use crate::isa::Isa;
use crate::scalar::{Dtype, Element};
use proptest::prelude::*;

/// A dense row-major matrix of doubles, for the oracle.
#[derive(Clone, Debug)]
struct Dense {
    rows: usize,
    cols: usize,
    data: Vec<f64>,
}

impl Dense {
    fn new(rows: usize, cols: usize, data: Vec<f64>) -> Self {
        Dense { rows, cols, data }
    }
    fn view(&self) -> Mat<'_> {
        Mat::row_major(&self.data, self.rows, self.cols)
    }
    fn t(&self) -> Dense {
        let data =
            (0..self.cols).flat_map(|j| (0..self.rows).map(move |i| self.data[i * self.cols + j])).collect();
        Dense::new(self.cols, self.rows, data)
    }
    fn times(&self, other: &Dense) -> Dense {
        Dense::new(self.rows, other.cols, naive(self.view(), other.view()))
    }
    /// `c0·self + c1·other`
    fn mix(&self, c0: f64, c1: f64, other: &Dense) -> Dense {
        let data = self.data.iter().zip(&other.data).map(|(x, y)| c0 * x + c1 * y).collect();
        Dense::new(self.rows, self.cols, data)
    }
    fn norm(&self) -> f64 {
        qr::square_norm(&self.data).sqrt()
    }
    fn distance(&self, other: &Dense) -> f64 {
        self.mix(1.0, -1.0, other).norm()
    }
    fn scale_rows(&self, f: impl Fn(&[f64]) -> f64) -> Dense {
        let data = self.data.chunks(self.cols).flat_map(|row| {
            let s = f(row);
            row.iter().map(move |x| x * s)
        });
        Dense::new(self.rows, self.cols, data.collect())
    }
}

/// Gram–Schmidt twice: its diagonal is positive by construction. Directions that vanish stay zero.
fn orth(a: &Dense) -> Dense {
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

fn right(kind: RightFactor, r: &Dense) -> Dense {
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
fn oracle(
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
    let x = x.mix(1.0 - o.lr * o.weight_decay, -o.lr * scale, &d);
    let m = plus.mix(o.a, -(o.a - o.b), &p.times(&plus.t().times(&p).t()));
    (x, m, v)
}

fn options(right: RightFactor, tail: Tail) -> Options {
    Options {
        lr: 0.1,
        weight_decay: 0.2,
        a: 0.95,
        b: 0.6,
        right,
        tail,
        tail_scale: 1.5,
        nesterov: None,
        maximize: false,
        epsilon: 1e-8,
        diagnostics: true,
        half: false,
    }
}

const RIGHTS: [RightFactor; 3] = [RightFactor::Qr, RightFactor::Column, RightFactor::Polar];
const TAILS: [Tail; 3] = [Tail::Feedback, Tail::Linear, Tail::Normalized];

/// Stored copies of a problem, in one layout.
struct Stored<E> {
    shape: (usize, usize, usize),
    strides: (usize, usize),
    x: Vec<E>,
    g: Vec<E>,
    m: Vec<E>,
    q: Vec<E>,
}

impl<E: Element> Stored<E> {
    fn new((m, n, r): (usize, usize, usize), row_major: bool, seed: u64) -> Self {
        let strides = if row_major { (n, 1) } else { (1, m) };
        let of = |s: u64, len| noise(seed + s, len).into_iter().map(E::store).collect::<Vec<E>>();
        let start = orth(&Dense::new(n, r, noise(seed + 9, n * r)));
        let q = start.data.into_iter().map(E::store).collect();
        Stored { shape: (m, n, r), strides, x: of(1, m * n), g: of(2, m * n), m: of(3, m * n), q }
    }
    fn matrix(&mut self, scale: f64) -> Matrix<'_> {
        let (m, n, r) = self.shape;
        Matrix {
            x: MatMut::new(&mut self.x, (m, n), self.strides).unwrap(),
            g: Mat::new(&self.g, (m, n), self.strides).unwrap(),
            m: MatMut::new(&mut self.m, (m, n), self.strides).unwrap(),
            q: MatMut::row_major(&mut self.q, n, r),
            scale,
        }
    }
    fn dense(&self, data: &[E]) -> Dense {
        let (m, n, _) = self.shape;
        let view = Mat::new(data, (m, n), self.strides).unwrap();
        Dense::new(m, n, (0..m).flat_map(|i| (0..n).map(move |j| view.get(i, j))).collect())
    }
    fn dense_q(&self) -> Dense {
        let (_, n, r) = self.shape;
        Dense::new(n, r, self.q.iter().map(|q| q.load::<f64>()).collect())
    }
}

/// Runs `steps` of both and returns the largest relative distance of X and M.
fn compare<T: Real, E: Element>(
    shape: (usize, usize, usize),
    row_major: bool,
    o: &Options,
    steps: usize,
    cx: Context,
) -> f64 {
    let mut s = Stored::<E>::new(shape, row_major, 17);
    let (mut x, mut m, mut q) = (s.dense(&s.x), s.dense(&s.m), s.dense_q());
    let mut worst = 0.0f64;
    for k in 0..steps {
        s.g = noise(100 + k as u64, shape.0 * shape.1).into_iter().map(E::store).collect();
        let g = s.dense(&s.g);
        (x, m, q) = oracle(&x, &g, &m, &q, 0.7, o, T::UNIT);
        let mut report = [Report::default()];
        step::<T>(cx, &mut [(s.matrix(0.7), *o)], &mut report).unwrap();
        assert!(!report[0].skipped && report[0].null == 0);
        let (gx, gm) = (s.dense(&s.x), s.dense(&s.m));
        worst = worst.max(gx.distance(&x) / x.norm()).max(gm.distance(&m) / m.norm());
    }
    worst
}

#[test]
fn every_option_equals_the_oracle_in_both_precisions_and_layouts() {
    for isa in Isa::available() {
        let cx = Context { isa, ..Context::new(2) };
        for right in RIGHTS {
            for tail in TAILS {
                for nesterov in [None, Some(0.9), Some(0.0)] {
                    for (a, b) in [(0.95, 0.6), (0.95, 0.95), (1.0, 0.95), (0.95, 0.0)] {
                        let o = Options { nesterov, a, b, ..options(right, tail) };
                        for row_major in [true, false] {
                            let double = compare::<f64, f64>((33, 21, 6), row_major, &o, 3, cx);
                            assert!(double < 1e-10, "{o:?} {isa:?}: {double:e}");
                            let single = compare::<f32, f32>((33, 21, 6), row_major, &o, 1, cx);
                            assert!(single < 1e-5, "{o:?} {isa:?}: {single:e}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn shapes_from_one_to_several_panels() {
    let cx = Context::new(2);
    for shape in
        [(1, 1, 1), (1, 7, 1), (9, 1, 1), (5, 5, 5), (8, 20, 3), (70, 48, 48), (260, 130, 17), (400, 40, 40)]
    {
        for right in RIGHTS {
            for tail in TAILS {
                let o = Options { nesterov: Some(0.95), ..options(right, tail) };
                for row_major in [true, false] {
                    let double = compare::<f64, f64>(shape, row_major, &o, 2, cx);
                    assert!(double < 1e-9, "{shape:?} {o:?}: {double:e}");
                }
            }
        }
    }
}

#[test]
fn fifty_steps_stay_with_the_oracle() {
    for right in RIGHTS {
        for tail in TAILS {
            let o = Options { lr: 0.02, ..options(right, tail) };
            let double = compare::<f64, f64>((24, 16, 5), true, &o, 50, Context::new(1));
            assert!(double < 1e-10, "{o:?}: {double:e}");
        }
    }
}

#[test]
fn bfloat16_storage_rounds_the_result_and_nothing_else() {
    for right in RIGHTS {
        let mut s = Stored::<half::bf16>::new((40, 30, 8), true, 5);
        let o = options(right, Tail::Feedback);
        let (x, m, q) = (s.dense(&s.x), s.dense(&s.m), s.dense_q());
        let (wx, wm, _) = oracle(&x, &s.dense(&s.g), &m, &q, 1.0, &o, f32::UNIT);
        step::<f32>(Context::new(1), &mut [(s.matrix(1.0), o)], &mut [Report::default()]).unwrap();
        for (got, want) in [(s.dense(&s.x), wx), (s.dense(&s.m), wm)] {
            for (g, w) in got.data.iter().zip(&want.data) {
                assert!((g - w).abs() <= w.abs() / 256.0 + 1e-4, "{g} {w}");
            }
        }
    }
}

#[test]
fn a_zero_gradient_is_a_no_op_but_for_decay() {
    for right in RIGHTS {
        for tail in TAILS {
            let o = Options { weight_decay: 0.0, ..options(right, tail) };
            let mut s = Stored::<f32>::new((30, 20, 6), true, 3);
            s.g.fill(0.0);
            s.m.fill(0.0);
            let (x, q) = (s.x.clone(), s.q.clone());
            let mut report = [Report::default()];
            step::<f32>(Context::new(1), &mut [(s.matrix(1.0), o)], &mut report).unwrap();
            assert_eq!((report[0].null, report[0].skipped), (6, false));
            assert!(s.x == x && s.q == q && s.m.iter().all(|&m| m == 0.0), "{right:?} {tail:?}");
        }
    }
}

#[test]
fn a_rank_two_gradient_moves_only_in_its_spaces_and_q_stays_orthonormal() {
    for right in RIGHTS {
        for tail in TAILS {
            let (m, n, r) = (60, 40, 12);
            let mut s = Stored::<f32>::new((m, n, r), true, 3);
            let (u, w) = (Dense::new(m, 2, noise(51, 2 * m)), Dense::new(2, n, noise(52, 2 * n)));
            let (pu, pw) = (orth(&u), orth(&w.t()));
            s.m.fill(0.0);
            s.x.fill(0.0);
            for _ in 0..3 {
                s.g = u.times(&w).data.iter().map(|&x| x as f32).collect();
                let o = Options { weight_decay: 0.0, ..options(right, tail) };
                let mut report = [Report::default()];
                step::<f32>(Context::new(1), &mut [(s.matrix(1.0), o)], &mut report).unwrap();
                assert_eq!(report[0].null, 10);
            }
            let x = s.dense(&s.x);
            let inside = pu.times(&pu.t().times(&x).times(&pw)).times(&pw.t());
            assert!(x.distance(&inside) < 0.01 * x.norm(), "{right:?} {tail:?}");
            if right != RightFactor::Column {
                let g = s.dense_q().t().times(&s.dense_q());
                let eye = Dense::new(r, r, (0..r * r).map(|i| f64::from(i / r == i % r)).collect());
                assert!(g.distance(&eye) < 1e-5);
            }
        }
    }
}

#[test]
fn one_nan_or_infinity_changes_nothing() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for at in [0, 17, 599] {
            for tail in TAILS {
                let mut s = Stored::<f32>::new((30, 20, 6), true, 3);
                s.g[at] = bad;
                let before = (s.x.clone(), s.m.clone(), s.q.clone());
                let mut report = [Report::default()];
                step::<f32>(
                    Context::new(1),
                    &mut [(s.matrix(1.0), options(RightFactor::Qr, tail))],
                    &mut report,
                )
                .unwrap();
                assert!(report[0].skipped);
                assert!((s.x, s.m, s.q) == before);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn the_step_does_not_see_the_gradients_scale(
        exponent in -36.0..12.0f64, right in 0usize..3, tail in 0usize..3, seed in 0u64..99,
    ) {
        let o = Options { weight_decay: 0.0, ..options(RIGHTS[right], TAILS[tail]) };
        let run = |factor: f64| {
            let mut s = Stored::<f32>::new((50, 30, 7), true, seed);
            s.x.fill(0.0);
            s.m.fill(0.0);
            s.g.iter_mut().for_each(|g| *g = (f64::from(*g) * factor) as f32);
            step::<f32>(Context::new(1), &mut [(s.matrix(1.0), o)], &mut [Report::default()]).unwrap();
            s.dense(&s.x)
        };
        // A power of two, so that the gradient itself is not rounded; the smallest entries may be subnormal.
        let factor = (exponent * std::f64::consts::LOG2_10).floor().exp2();
        let one = run(1.0);
        prop_assert!(run(factor).distance(&one) < 1e-4 * one.norm());
    }

    #[test]
    fn the_step_is_bounded_and_downhill_for_every_spectrum(
        decay in 0.0..8.0f64, right in 0usize..3, m in 2usize..60, n in 2usize..60, seed in 0u64..99,
    ) {
        let r = (m.min(n) / 2).max(1);
        let o = Options { weight_decay: 0.0, lr: 1.0, ..options(RIGHTS[right], Tail::Feedback) };
        let mut s = Stored::<f32>::new((m, n, r), true, seed);
        let d = m.min(n);
        let (u, mut w) = (orth(&Dense::new(m, d, noise(seed, m * d))), orth(&Dense::new(n, d, noise(seed + 1, n * d))).t());
        for (i, row) in w.data.chunks_mut(n).enumerate() {
            row.iter_mut().for_each(|x| *x *= 10f64.powf(-decay * i as f64 / d as f64));
        }
        s.g = u.times(&w).data.iter().map(|&x| x as f32).collect();
        s.m.fill(0.0);
        s.x.fill(0.0);
        let mut report = [Report::default()];
        step::<f32>(Context::new(1), &mut [(s.matrix(1.0), o)], &mut report).unwrap();
        let (x, g) = (s.dense(&s.x), s.dense(&s.g));
        let inner: f64 = x.data.iter().zip(&g.data).map(|(x, g)| x * g).sum();
        prop_assert!(inner < 0.0, "uphill by {inner}");
        if right != 1 {
            let norm = qr::spectral_norm(Context::new(1), x.view());
            prop_assert!(norm <= 1.0 + 1e-4, "‖D‖ = {norm}");
        }
        prop_assert!(report[0].descent > 0.0 && report[0].descent <= report[0].nuclear * (report[0].nu + 1e-3));
    }
}

#[test]
fn diagnostics_of_a_known_matrix() {
    // B = diag-like with singular values 4, 2, 1 seen at rank 2 from its own right vectors.
    let (m, n, r) = (6, 5, 2);
    let mut s = Stored::<f64>::new((m, n, r), true, 1);
    s.m.fill(0.0);
    s.g.fill(0.0);
    for (i, v) in [4.0, 2.0, 1.0].into_iter().enumerate() {
        s.g[i * n + i] = v;
    }
    s.q.fill(0.0);
    (s.q[0], s.q[r + 1]) = (1.0, 1.0);
    let mut report = [Report::default()];
    step::<f64>(
        Context::new(1),
        &mut [(s.matrix(1.0), options(RightFactor::Qr, Tail::Feedback))],
        &mut report,
    )
    .unwrap();
    let got = report[0];
    let close = |x: f64, y: f64| (x - y).abs() < 1e-9;
    assert!(close(got.b_energy, 21.0) && close(got.r_energy, 20.0) && close(got.nu, 1.0));
    assert!(close(got.descent, 6.0) && close(got.nuclear, 6.0));
    let (p, q) = (2.0 / 3.0, 1.0 / 3.0);
    assert!(close(got.effective_rank, (-p * f64::ln(p) - q * f64::ln(q)).exp()));
}

#[test]
fn threads_and_neighbours_do_not_change_a_bit() {
    let shapes = [(300, 200, 40), (64, 64, 16), (64, 64, 16), (20, 90, 5), (128, 256, 64)];
    let o = Options { nesterov: Some(0.95), ..options(RightFactor::Polar, Tail::Normalized) };
    let run = |threads: usize, together: bool| {
        let mut stored: Vec<_> =
            shapes.iter().enumerate().map(|(i, s)| Stored::<f32>::new(*s, i % 2 == 0, i as u64)).collect();
        let cx = Context::new(threads);
        let mut jobs: Vec<_> = stored.iter_mut().map(|s| (s.matrix(1.0), o)).collect();
        if together {
            let mut reports = vec![Report::default(); jobs.len()];
            step::<f32>(cx, &mut jobs, &mut reports).unwrap();
        } else {
            for job in jobs.chunks_mut(1) {
                step::<f32>(cx, job, &mut [Report::default()]).unwrap();
            }
        }
        drop(jobs);
        stored.into_iter().map(|s| (s.x, s.m, s.q)).collect::<Vec<_>>()
    };
    let one = run(1, true);
    for (threads, together) in [(2, true), (3, true), (1, false), (4, false)] {
        assert!(one == run(threads, together), "{threads} threads");
    }
}

#[test]
fn no_tail_makes_a_temporary_of_the_matrix_size() {
    let (m, n, r) = (1536, 1024, 32);
    for tail in TAILS {
        let used = std::thread::spawn(move || {
            let mut s = Stored::<f32>::new((m, n, r), true, 1);
            let o = Options { nesterov: Some(0.9), ..options(RightFactor::Qr, tail) };
            step::<f32>(Context::new(1), &mut [(s.matrix(1.0), o)], &mut [Report::default()]).unwrap();
            crate::scratch::kept_bytes()
        });
        let used = used.join().unwrap();
        // Factors and their packed and double copies, and panels of fixed size.
        assert!(used < 12 * 4 * (m + n) * r + (3 << 20), "{tail:?}: {used} bytes");
        assert!(used < 4 * m * n, "{tail:?}: {used} bytes");
    }
}

#[test]
fn a_state_that_does_not_fit_is_refused_before_anything_is_written() {
    let mut s = Stored::<f32>::new((8, 6, 3), true, 1);
    let mut t = Stored::<f32>::new((8, 6, 3), true, 2);
    let before = s.x.clone();
    let o = options(RightFactor::Qr, Tail::Feedback);
    let mut bad = t.matrix(1.0);
    bad.q = bad.q.row_range(0..5);
    let got = step::<f32>(Context::new(1), &mut [(s.matrix(1.0), o), (bad, o)], &mut [Report::default(); 2]);
    assert_eq!(got.unwrap_err(), Error::Shape { what: "Q", need: (6, 3), got: (5, 3) });
    assert!(s.x == before);
    assert_eq!(f32::DTYPE, Dtype::F32);
}

#[test]
fn half_products_stay_close_and_keep_every_claim() {
    for isa in Isa::available() {
        let cx = Context { isa, ..Context::new(2) };
        for right in RIGHTS {
            for tail in TAILS {
                let o = Options { half: true, nesterov: Some(0.9), ..options(right, tail) };
                for row_major in [true, false] {
                    let distance = compare::<f32, f32>((130, 70, 20), row_major, &o, 1, cx);
                    assert!(distance > 1e-7 && distance < 0.02, "{o:?} {isa:?}: {distance:e}");
                    assert!(
                        compare::<f64, f64>((33, 21, 6), row_major, &o, 2, cx) < 1e-9,
                        "float64 is not rounded"
                    );
                }
                // A rank-two gradient: rounding noise must not become directions.
                let mut s = Stored::<f32>::new((60, 40, 12), true, 3);
                let (u, w) = (Dense::new(60, 2, noise(51, 120)), Dense::new(2, 40, noise(52, 80)));
                s.m.fill(0.0);
                s.x.fill(0.0);
                s.g = u.times(&w).data.iter().map(|&x| x as f32).collect();
                let o = Options { weight_decay: 0.0, ..o };
                let mut report = [Report::default()];
                step::<f32>(cx, &mut [(s.matrix(1.0), o)], &mut report).unwrap();
                assert_eq!(report[0].null, 10, "{o:?}");
                let (pu, pw, x) = (orth(&u), orth(&w.t()), s.dense(&s.x));
                let inside = pu.times(&pu.t().times(&x).times(&pw)).times(&pw.t());
                assert!(x.distance(&inside) < 0.01 * x.norm(), "{right:?} {tail:?}");
            }
        }
    }
}

#[test]
fn subnormal_gradients_are_small_not_bad() {
    for exponent in [-40, -43, -46] {
        let mut s = Stored::<f32>::new((30, 20, 6), true, 3);
        let x = s.x.clone();
        s.m.fill(0.0);
        s.g.iter_mut().for_each(|g| *g = (f64::from(*g) * 10f64.powi(exponent)) as f32);
        let mut report = [Report::default()];
        let o = Options { weight_decay: 0.5, lr: 0.1, ..options(RightFactor::Qr, Tail::Normalized) };
        step::<f32>(Context::new(1), &mut [(s.matrix(1.0), o)], &mut report).unwrap();
        assert!(!report[0].skipped, "1e{exponent}");
        assert!(s.x.iter().all(|x| x.is_finite()) && s.x != x, "decay goes on");
    }
}

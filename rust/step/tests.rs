//! The fused step against a slow transcription of its equations, and the claims that every option must keep.

use super::oracle::{Dense, Stored, oracle, orth};
use super::*;
use crate::gemm::tests::noise;
use crate::isa::Isa;
use crate::scalar::{Dtype, Element};
use proptest::prelude::*;

pub(super) fn options(right: RightFactor, tail: Tail) -> Options {
    Options {
        lr: 0.1,
        weight_decay: 0.2,
        cautious: false,
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
                        let cautious = b == 0.6 || b == 0.0;
                        let o = Options { nesterov, a, b, cautious, ..options(right, tail) };
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

//! The iteration against its definition in double precision, one product after the other on X itself.

use super::*;
use crate::gemm::tests::noise;
use crate::isa::Isa;
use crate::scalar::Element;
use half::bf16;

const JORDAN: Schedule<'_> =
    Schedule { coefficients: &[[3.4445, -4.7750, 2.0315]; 5], divisor: 1.0, epsilon: 0.0 };
const POLAR_EXPRESS: Schedule<'_> = Schedule {
    coefficients: &[
        [8.15655, -22.48329, 15.87877],
        [4.04293, -2.80892, 0.50002],
        [3.89167, -2.77248, 0.50606],
        [3.28575, -2.36813, 0.46449],
        [2.34654, -1.70978, 0.42324],
    ],
    divisor: 1.02,
    epsilon: 0.0,
};

fn norm(x: &[f64]) -> f64 {
    let largest = x.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    if largest == 0.0 { 0.0 } else { largest * x.iter().map(|x| (x / largest).powi(2)).sum::<f64>().sqrt() }
}

/// `A·B` of row-major matrices, A m×k.
fn dot(a: &[f64], b: &[f64], (m, k): (usize, usize)) -> Vec<f64> {
    let n = b.len() / k;
    let mut out = vec![0.0; m * n];
    for (a, out) in a.chunks(k).zip(out.chunks_mut(n)) {
        for (a, b) in a.iter().zip(b.chunks(n)) {
            out.iter_mut().zip(b).for_each(|(out, b)| *out += a * b);
        }
    }
    out
}

fn transposed(x: &[f64], (m, n): (usize, usize)) -> Vec<f64> {
    (0..n).flat_map(|j| (0..m).map(move |i| x[i * n + j])).collect()
}

/// The definition.
fn oracle(u: Mat<'_>, schedule: &Schedule<'_>) -> Vec<f64> {
    let (m, n) = u.shape();
    if m > n {
        return transposed(&oracle(u.t(), schedule), (n, m));
    }
    let mut x: Vec<f64> = (0..m).flat_map(|i| (0..n).map(move |j| u.get(i, j))).collect();
    let size = (norm(&x) * schedule.divisor).max(schedule.epsilon);
    if size == 0.0 {
        return x;
    }
    x.iter_mut().for_each(|x| *x /= size);
    for &[a, b, c] in schedule.coefficients {
        let g = dot(&x, &transposed(&x, (m, n)), (m, n));
        let g2 = dot(&g, &g, (m, m));
        let h: Vec<f64> = g.iter().zip(&g2).map(|(g, g2)| b * g + c * g2).collect();
        let hx = dot(&h, &x, (m, m));
        x.iter_mut().zip(hx).for_each(|(x, hx)| *x = a * *x + hx);
    }
    x
}

/// m×n of scale `scale` whose spectrum falls by about 10^−`decay`.
fn decaying((m, n): (usize, usize), decay: i32, scale: f64, seed: u64) -> Vec<f64> {
    let k = m.min(n);
    if k == 0 {
        return Vec::new();
    }
    let (mut left, right) = (noise(seed, m * k), noise(seed + 1, k * n));
    for (i, x) in left.iter_mut().enumerate() {
        *x *= scale * 10f64.powf(-f64::from(decay) * (i % k) as f64 / k as f64);
    }
    dot(&left, &right, (m, k))
}

fn stored<E: Element>(x: &[f64]) -> Vec<E> {
    x.iter().map(|&x| E::store(x)).collect()
}

/// The result as stored in `O` for `u` as stored in `E`, row-major or column-major with gaps, and its relative distance from
/// the oracle.
fn distance<T: Real, E: Element, O: Element>(
    cx: Context,
    u: &[f64],
    (m, n): (usize, usize),
    (row_major, out_row_major): (bool, bool),
    schedule: &Schedule<'_>,
) -> (Vec<f64>, f64) {
    const GAP: usize = 3;
    let strides = |row_major| if row_major { (n + GAP, 1) } else { (1, m + GAP) };
    let at = |(rs, cs): (usize, usize), i: usize, j: usize| i * rs + j * cs;
    let (from, to) = (strides(row_major), strides(out_row_major));
    let len = (m + GAP) * (n + GAP);
    let mut data = vec![f64::NAN; len];
    for (k, x) in u.iter().enumerate() {
        data[at(from, k / n, k % n)] = *x;
    }
    let data: Vec<E> = stored(&data);
    let mut out: Vec<O> = vec![O::store(7.0); len];
    let u = Mat::new(&data, (m, n), from).unwrap();
    let job = Job { u, out: MatMut::new(&mut out, (m, n), to).unwrap() };
    assert_eq!(newton_schulz::<T>(cx, vec![job], schedule), Ok(vec![true]));
    let outside = out.iter().filter(|x| x.load::<f64>() == 7.0).count();
    assert_eq!(outside, len - m * n, "every entry is written and nothing else");
    let view = Mat::new(&out, (m, n), to).unwrap();
    let got: Vec<f64> = (0..m * n).map(|k| view.get(k / n, k % n)).collect();
    let want = oracle(u, schedule);
    let difference: Vec<f64> = got.iter().zip(&want).map(|(x, y)| x - y).collect();
    (got, norm(&difference) / norm(&want).max(f64::MIN_POSITIVE))
}

const SHAPES: [(usize, usize); 13] = [
    (1, 1),
    (1, 9),
    (40, 1),
    (2, 3),
    (17, 16),
    (33, 33),
    (31, 64),
    (100, 7),
    (64, 65),
    (70, 130),
    (97, 97),
    (290, 41),
    (20, 300),
];

#[test]
fn every_shape_layout_level_and_schedule_equals_the_definition() {
    for isa in Isa::available() {
        for (k, shape) in SHAPES.into_iter().enumerate() {
            let u = decaying(shape, 0, 1.0, 7);
            for schedule in [JORDAN, POLAR_EXPRESS] {
                for layout in [(true, true), (true, false), (false, true), (false, false)] {
                    let cx = Context { isa, ..Context::new(1 + k % 3) };
                    let (_, double) = distance::<f64, f64, f64>(cx, &u, shape, layout, &schedule);
                    assert!(double <= 1e-11, "{isa:?} {shape:?} {layout:?}: {double}");
                    let (_, single) = distance::<f32, f32, f32>(cx, &u, shape, layout, &schedule);
                    assert!(single <= 3e-5, "{isa:?} {shape:?} {layout:?}: {single}");
                }
            }
        }
    }
}

#[test]
fn decaying_spectra_lose_nothing_on_the_gram_matrix() {
    let cx = Context::new(2);
    for shape in [(64, 64), (60, 66), (90, 300), (400, 48)] {
        for decay in [2, 4, 6, 8] {
            let u = decaying(shape, decay, 1.0, 3);
            for schedule in [JORDAN, POLAR_EXPRESS] {
                let (_, double) = distance::<f64, f64, f64>(cx, &u, shape, (true, true), &schedule);
                let (_, single) = distance::<f32, f32, f32>(cx, &u, shape, (true, true), &schedule);
                assert!(double <= 1e-11, "{shape:?} 1e-{decay}: {double}");
                assert!(single <= 3e-5, "{shape:?} 1e-{decay}: {single}");
            }
        }
    }
}

#[test]
fn any_number_of_steps_and_cubic_ones() {
    let cx = Context::new(2);
    let all = [[2.0, -1.5, 0.5], [1.5, -0.5, 0.0], [1.875, -1.25, 0.375]].repeat(3);
    for shape in [(20, 20), (20, 31), (50, 9)] {
        let u = decaying(shape, 1, 1.0, 3);
        for steps in 0..=all.len() {
            let schedule = Schedule { coefficients: &all[..steps], ..JORDAN };
            let (_, double) = distance::<f64, f64, f64>(cx, &u, shape, (true, true), &schedule);
            assert!(double <= 1e-11, "{shape:?} {steps}: {double}");
        }
    }
}

#[test]
fn scale_does_not_matter_but_for_epsilon() {
    let cx = Context::new(2);
    for shape in [(24, 24), (24, 60)] {
        for exponent in [-300, -200, -30, -10, 10, 30, 200, 300] {
            let u = decaying(shape, 1, 10f64.powi(exponent), 5);
            let (_, double) = distance::<f64, f64, f64>(cx, &u, shape, (true, false), &JORDAN);
            assert!(double <= 1e-11, "{shape:?} 1e{exponent}: {double}");
            if exponent.abs() <= 30 {
                let (_, single) = distance::<f32, f32, f32>(cx, &u, shape, (true, false), &JORDAN);
                assert!(single <= 3e-5, "{shape:?} 1e{exponent}: {single}");
            }
        }
        let u = decaying(shape, 1, 1e-3, 5);
        for epsilon in [1e-9, 1.0] {
            let schedule = Schedule { epsilon, ..POLAR_EXPRESS };
            let (_, double) = distance::<f64, f64, f64>(cx, &u, shape, (true, true), &schedule);
            assert!(double <= 1e-11, "ε = {epsilon}: {double}");
        }
        // The smallest subnormal is still a number.
        let one = |x: f64| (0..24 * 24).map(|k| if k == 30 { x } else { 0.0 }).collect::<Vec<f64>>();
        let (tiny, _) = distance::<f64, f64, f64>(cx, &one(5e-324), (24, 24), (true, true), &JORDAN);
        let (unit, _) = distance::<f64, f64, f64>(cx, &one(1.0), (24, 24), (true, true), &JORDAN);
        assert_eq!(tiny, unit);
    }
}

#[test]
fn storage_formats_round_the_result_and_nothing_else() {
    let cx = Context::new(1);
    for shape in [(48, 48), (20, 90)] {
        let u = decaying(shape, 1, 1.0, 5);
        let (_, single) = distance::<f32, bf16, f32>(cx, &u, shape, (true, false), &JORDAN);
        let (_, rounded) = distance::<f32, f32, bf16>(cx, &u, shape, (false, true), &JORDAN);
        assert!(single <= 3e-5 && rounded <= 4e-3, "{single} {rounded}");
    }
}

#[test]
fn bfloat16_products_stay_close() {
    for isa in Isa::available() {
        let cx = Context { half: true, isa, ..Context::new(2) };
        for shape in [(1, 1), (5, 30), (48, 48), (100, 350), (200, 64)] {
            let u = decaying(shape, 0, 1.0, 5);
            for schedule in [JORDAN, POLAR_EXPRESS] {
                let (_, far) = distance::<f32, f32, f32>(cx, &u, shape, (true, true), &schedule);
                assert!(far <= 0.1, "{isa:?} {shape:?}: {far}");
            }
        }
    }
}

#[test]
fn zero_stays_zero_and_nothing_of_what_is_not_finite_is_written() {
    let u = decaying((9, 30), 1, 1.0, 5);
    for epsilon in [0.0, 1e-7] {
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let zero = vec![-0.0; 9 * 30];
            let mut spoilt = u.clone();
            spoilt[100] = bad;
            let inputs = [&zero, &spoilt, &u];
            let mut outs = [(); 3].map(|()| vec![7.0; 9 * 30]);
            let jobs = inputs
                .iter()
                .zip(&mut outs)
                .map(|(u, out)| Job { u: Mat::row_major(u, 9, 30), out: MatMut::row_major(out, 9, 30) });
            let finite =
                newton_schulz::<f32>(Context::new(2), jobs.collect(), &Schedule { epsilon, ..JORDAN });
            assert_eq!(finite, Ok(vec![true, false, true]));
            assert!(outs[0].iter().all(|&x| x == 0.0) && outs[1].iter().all(|&x| x == 7.0));
            assert!(outs[2].iter().all(|&x| x != 7.0));
        }
    }
}

#[test]
fn threads_and_neighbours_do_not_change_a_bit() {
    let shapes = [(400, 300), (0, 5), (64, 64), (5, 0), (64, 64), (500, 180), (1, 300), (290, 290)];
    let us: Vec<Vec<f32>> = shapes.iter().map(|&s| stored(&decaying(s, 1, 1.0, 5))).collect();
    for half in [false, true] {
        let run = |threads: usize, alone: bool| {
            let mut outs: Vec<_> = us.iter().map(|u| vec![0.0f32; u.len()]).collect();
            let jobs = us.iter().zip(&mut outs).zip(shapes).map(|((u, out), (m, n))| Job {
                u: Mat::row_major(u, m, n),
                out: MatMut::row_major(out, m, n),
            });
            let cx = Context { half, ..Context::new(threads) };
            if alone {
                for job in jobs {
                    newton_schulz::<f32>(cx, vec![job], &POLAR_EXPRESS).unwrap();
                }
            } else {
                let finite = newton_schulz::<f32>(cx, jobs.collect(), &POLAR_EXPRESS).unwrap();
                assert_eq!(finite, [true; 8]);
            }
            outs
        };
        let first = run(1, false);
        for threads in 1..=3 {
            assert!(run(threads, false) == first && run(threads, true) == first, "{threads} threads");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_written() {
    let (u, mut out) = (vec![1.0; 6], [vec![7.0; 6], vec![7.0; 6]]);
    let [first, second] = &mut out;
    let u = Mat::row_major(&u, 2, 3);
    let jobs =
        vec![Job { u, out: MatMut::row_major(first, 2, 3) }, Job { u, out: MatMut::row_major(second, 3, 2) }];
    let refused = newton_schulz::<f64>(Context::new(1), jobs, &JORDAN);
    assert!(matches!(refused, Err(Error::Shape { need: (2, 3), got: (3, 2), .. })));
    let wrong = [
        Schedule { divisor: 0.0, ..JORDAN },
        Schedule { epsilon: f64::NAN, ..JORDAN },
        Schedule { epsilon: -1.0, ..JORDAN },
        Schedule { coefficients: &[[1.0, f64::INFINITY, 0.0]], ..JORDAN },
    ];
    for schedule in wrong {
        let job = Job { u, out: MatMut::row_major(&mut out[0], 2, 3) };
        let refused = newton_schulz::<f64>(Context::new(1), vec![job], &schedule);
        assert!(matches!(refused, Err(Error::Value { .. })));
    }
    assert_eq!(out, [vec![7.0; 6], vec![7.0; 6]]);
}

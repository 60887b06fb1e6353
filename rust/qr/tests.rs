//! Orthogonality and residual in LAPACK's own ratios, over conditioning, rank, scale, shape, layout and level.

use super::*;
use crate::gemm::tests::noise;
use crate::isa::Isa;
use crate::rng::Stream;
use crate::scalar::Element;
use proptest::prelude::*;

/// n×r, row-major, with singular values from 1 down to 1/κ, geometrically; left and right factors random orthonormal.
fn with_condition(n: usize, r: usize, kappa: f64, seed: u64) -> Vec<f64> {
    let cx = Context::new(1);
    let ortho = |rows: usize, seed: u64| {
        let mut rng = Stream::new(seed, 1);
        let x: Vec<f64> = (0..rows * r).map(|_| rng.normal()).collect();
        let mut q = vec![0.0; rows * r];
        qr::<f64>(
            cx,
            Mat::row_major(&x, rows, r),
            MatMut::row_major(&mut q, rows, r),
            None,
            0.0,
            Paths::Only(Method::Householder),
        )
        .unwrap();
        q
    };
    let (mut u, w) = (ortho(n, seed), ortho(r, seed + 1));
    for row in u.chunks_exact_mut(r) {
        for (j, x) in row.iter_mut().enumerate() {
            *x *= kappa.powf(-(j as f64) / (r.max(2) - 1) as f64);
        }
    }
    let mut a = vec![0.0; n * r];
    gemm::<f64>(
        cx,
        1.0,
        Mat::row_major(&u, n, r),
        Mat::row_major(&w, r, r).t(),
        0.0,
        MatMut::row_major(&mut a, n, r),
    );
    a
}

fn stored<E: Element>(x: &[f64]) -> Vec<E> {
    x.iter().map(|&x| E::store(x)).collect()
}

struct Ratios {
    orthogonality: f64,
    residual: f64,
    nulls: usize,
    method: Method,
}

/// The two ratios in units of √r·u, and the invariants that hold always.
fn ratios<T: Real>(
    cx: Context,
    a: &[T],
    n: usize,
    r: usize,
    layout: (bool, bool),
    force: Option<Method>,
) -> Ratios {
    let order = |row_major: bool| if row_major { (r, 1) } else { (1, n) };
    let av = Mat::new(a, (n, r), order(layout.0)).unwrap();
    let (mut v, mut t) = (vec![T::of(f64::NAN); n * r], vec![f64::NAN; r * r]);
    let out = MatMut::new(&mut v, (n, r), order(layout.1)).unwrap();
    let paths = force.map_or(Paths::Short, Paths::Only);
    let (null, method) = qr::<T>(cx, av, out, Some(&mut t), T::UNIT, paths).unwrap();
    let v = Mat::new(&v, (n, r), order(layout.1)).unwrap();
    let mut orthogonality = 0.0;
    for i in 0..r {
        for j in 0..r {
            let dot: f64 = (0..n).map(|k| v.get(k, i) * v.get(k, j)).sum();
            let want = if i == j && !null[i] { 1.0 } else { 0.0 };
            orthogonality += (dot - want).powi(2);
            assert!(t[i * r + j] == 0.0 || (i <= j && !null[i]), "T is upper triangular without null rows");
        }
        assert!(t[i * r + i] >= 0.0, "T's diagonal is not negative");
    }
    let (mut residual, mut norm) = (0.0, 0.0);
    let size = a.iter().map(|x| x.f64().abs()).fold(f64::MIN_POSITIVE, f64::max); // so that squares fit in double
    for i in 0..n {
        for j in 0..r {
            let vt: f64 = (0..=j).map(|k| v.get(i, k) * t[k * r + j]).sum();
            residual += ((av.get(i, j) - vt) / size).powi(2);
            norm += (av.get(i, j) / size).powi(2);
        }
    }
    let unit = (r as f64).sqrt() * T::UNIT;
    let residual = if norm > 0.0 { (residual / norm).sqrt() / unit } else { residual };
    Ratios {
        orthogonality: orthogonality.sqrt() / unit,
        residual,
        nulls: null.iter().filter(|&&x| x).count(),
        method,
    }
}

fn assert_good(r: &Ratios, what: &str) {
    assert!(
        r.orthogonality <= 30.0 && r.residual <= 30.0,
        "{what}: orthogonality {} residual {} by {:?}",
        r.orthogonality,
        r.residual,
        r.method
    );
}

#[test]
fn any_conditioning_to_lapack_ratios() {
    for isa in Isa::available() {
        let cx = Context { isa, ..Context::new(2) };
        for (n, r) in [(64, 16), (200, 33), (130, 130), (700, 96)] {
            for exponent in 0..=8 {
                let a = with_condition(n, r, 10f64.powi(exponent), 7);
                let single = ratios::<f32>(cx, &stored(&a), n, r, (true, true), None);
                assert_good(&single, &format!("f32 {n}x{r} 1e{exponent} {isa:?}"));
                let double = ratios::<f64>(cx, &a, n, r, (true, true), None);
                assert_good(&double, &format!("f64 {n}x{r} 1e{exponent} {isa:?}"));
                assert_eq!(double.nulls, 0);
                assert!(single.nulls == 0 || exponent >= 7, "1e{exponent} has no null direction in f32");
            }
        }
    }
}

#[test]
fn every_method_where_it_is_valid() {
    let cx = Context::new(2);
    let a = with_condition(300, 50, 100.0, 3);
    let benign = with_condition(300, 50, 2.0, 3);
    for method in [Method::Short, Method::Cholesky, Method::CholeskyTwice, Method::Householder] {
        let a = if method == Method::Short { &benign } else { &a };
        let r = ratios::<f32>(cx, &stored(a), 300, 50, (true, true), Some(method));
        assert_eq!(r.method, method);
        assert_good(&r, &format!("{method:?}"));
    }
    let path = |kappa| {
        ratios::<f32>(cx, &stored(&with_condition(300, 50, kappa, 3)), 300, 50, (true, true), None).method
    };
    assert_eq!(path(2.0), Method::Short);
    assert_eq!(path(10.0), Method::Cholesky);
    assert_eq!(path(3e4), Method::CholeskyTwice);
    assert_eq!(path(1e7), Method::Householder);
}

#[test]
fn gram_matrices_of_short_sums_err_by_a_few_roundoffs_on_every_level_and_in_every_layout() {
    for isa in Isa::available() {
        for threads in [1, 3] {
            let cx = Context { isa, threads, half: false };
            for (n, r) in [
                (0, 3),
                (1, 1),
                (63, 5),
                (64, 16),
                (65, 17),
                (255, 49),
                (256, 24),
                (257, 100),
                (700, 33),
                (90, 800),
            ] {
                let a: Vec<f32> = stored(&noise(n as u64, n * r));
                for strides in [(r, 1), (1, n)] {
                    let a = Mat::new(&a, (n, r), strides).unwrap();
                    let mut s = vec![f64::NAN; r * r];
                    symmetric_in::<f32>(cx, a, a, &mut s);
                    let exact = crate::gemm::tests::naive(a.t(), a);
                    for i in 0..r {
                        for j in 0..r {
                            let size = (exact[i * r + i] * exact[j * r + j]).sqrt();
                            let error = (s[i * r + j] - exact[i * r + j]).abs();
                            assert!(
                                error <= 6.0 * f32::UNIT * size,
                                "{n}x{r} ({i}, {j}): {error} of {size}, {isa:?}"
                            );
                            assert_eq!(s[i * r + j].to_bits(), s[j * r + i].to_bits());
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn short_sums_cost_a_few_roundoffs_and_are_left_where_they_would_cost_more() {
    let cx = Context::new(2);
    for (n, r) in [(64, 16), (97, 31), (200, 100), (384, 24), (700, 96), (1500, 10)] {
        for kappa in [1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 100.0] {
            let mut a = with_condition(n, r, kappa, 13);
            // Columns of very different lengths are as good as others.
            for row in a.chunks_exact_mut(r) {
                row.iter_mut().enumerate().for_each(|(j, x)| *x *= 10f64.powi(j as i32 % 5 - 2));
            }
            let view = stored::<f32>(&a);
            let got = ratios::<f32>(cx, &view, n, r, (true, true), None);
            let short = got.method == Method::Short;
            assert!(short || kappa > 1.5, "{n}x{r} κ {kappa}: {:?}", got.method);
            assert!(!short || kappa < 10.0, "{n}x{r} κ {kappa}");
            assert!(
                got.method != Method::Short || got.orthogonality < 6.0,
                "{n}x{r} κ {kappa}: {}",
                got.orthogonality
            );
            assert_good(&got, "f32");
        }
    }
}

#[test]
fn short_sums_of_constants_which_all_round_the_same_way_stay_within_the_bound() {
    let cx = Context::new(1);
    for (seed, value) in [(1, 1.912_872_3), (2, 0.1), (3, 1.7), (4, 1.912_872_3), (5, 1.333_333_3)] {
        for (n, r) in [(64, 16), (64, 4), (512, 6), (2048, 32)] {
            // One sign a row, flipped here and there, which leaves ω near 2; or, orthogonal, Rademacher's functions.
            let draw = noise(seed, n * (r + 1));
            let flipped = |i: usize, j: usize| (draw[i] < 0.0) != (draw[n + i * r + j] < -0.6);
            let alternating = |i: usize, j: usize| i >> j & 1 == 1;
            for sign in [&flipped as &dyn Fn(usize, usize) -> bool, &alternating] {
                let a: Vec<f64> =
                    (0..n * r).map(|k| if sign(k / r, k % r) { -value } else { value }).collect();
                assert_good(
                    &ratios::<f32>(cx, &stored(&a), n, r, (true, true), None),
                    &format!("{value} {n}x{r}"),
                );
            }
        }
    }
}

#[test]
fn odd_sizes_around_block_boundaries_and_layouts() {
    let cx = Context::new(2);
    for r in [1, 2, 7, 8, 9, 23, 24, 25, 31, 32, 33, 48, 49, 63, 64, 65, 97] {
        for n in [r, r + 1, 2 * r + 3, 193, 257] {
            if n < r {
                continue;
            }
            for layout in [(true, true), (false, true), (true, false), (false, false)] {
                let a = with_condition(n, r, 50.0, r as u64);
                assert_good(&ratios::<f32>(cx, &stored(&a), n, r, layout, None), "f32");
                assert_good(&ratios::<f64>(cx, &a, n, r, layout, Some(Method::Householder)), "f64");
            }
        }
    }
}

#[test]
fn tiny_and_huge_input() {
    let cx = Context::new(1);
    for (exponent, kappa) in [(-36, 1.5), (-30, 1e3), (-20, 1e3), (20, 1e3), (30, 1e3), (36, 1.5)] {
        let a: Vec<f64> = with_condition(90, 20, kappa, 5).iter().map(|x| x * 10f64.powi(exponent)).collect();
        assert_good(&ratios::<f32>(cx, &stored(&a), 90, 20, (true, true), None), "f32");
        assert_polar::<f32>(&stored(&a), 90, 20, 20);
    }
    for exponent in [-40, -38, 36, 37] {
        let mut a: Vec<f64> =
            with_condition(90, 20, 2.0, 5).iter().map(|x| x * 10f64.powi(exponent)).collect();
        a.iter_mut().for_each(|x| *x *= 9.0);
        assert_polar::<f32>(&stored(&a), 90, 20, 20);
    }
    for exponent in [-250, -120, 120, 250] {
        let a: Vec<f64> = with_condition(90, 20, 1e3, 5).iter().map(|x| x * 10f64.powi(exponent)).collect();
        assert_good(&ratios::<f64>(cx, &a, 90, 20, (true, true), None), "f64");
    }
}

#[test]
fn dependent_columns_are_null_and_lose_nothing_to_invented_ones() {
    let cx = Context::new(1);
    for force in [None, Some(Method::Householder)] {
        // Columns a, a, b, 2a − b, c: two nulls.
        let mut a = vec![0.0f32; 100 * 5];
        let (x, y, z) = (noise(1, 100), noise(2, 100), noise(3, 100));
        for i in 0..100 {
            let row = [x[i], x[i], y[i], 2.0 * x[i] - y[i], z[i]];
            for (j, v) in row.into_iter().enumerate() {
                a[i * 5 + j] = v as f32;
            }
        }
        let r = ratios::<f32>(cx, &a, 100, 5, (true, true), force);
        assert_eq!(r.nulls, 2, "{:?}", r.method);
        assert!(r.orthogonality < 30.0 && r.residual < 30.0);
    }
    let zero = ratios::<f32>(cx, &[0.0; 60], 12, 5, (true, true), None);
    assert_eq!((zero.nulls, zero.orthogonality, zero.residual), (5, 0.0, 0.0));
}

#[test]
fn non_finite_input_is_refused_before_anything_is_written() {
    for bad in [f32::NAN, f32::INFINITY] {
        for force in [None, Some(Method::Householder)] {
            let mut a = vec![1.0f32; 40];
            a[13] = bad;
            let mut v = vec![7.0f32; 40];
            let out = MatMut::row_major(&mut v, 10, 4);
            let paths = force.map_or(Paths::Short, Paths::Only);
            let got = qr::<f32>(Context::new(1), Mat::row_major(&a, 10, 4), out, None, 0.0, paths);
            assert_eq!(got.unwrap_err(), Error::NonFinite { what: "the matrix" });
            assert!(v.iter().all(|&x| x == 7.0));
        }
    }
}

#[test]
fn threads_give_the_same_bits() {
    for (kappa, want) in [
        (1.5, Method::Short),
        (10.0, Method::Cholesky),
        (1e4, Method::CholeskyTwice),
        (1e8, Method::Householder),
    ] {
        let a = stored::<f32>(&with_condition(500, 100, kappa, 11));
        let a = Mat::row_major(&a, 500, 100);
        let run = |threads| {
            let (mut v, mut u) = (vec![0.0f32; 50_000], vec![0.0f32; 50_000]);
            let (vm, um) = (MatMut::row_major(&mut v, 500, 100), MatMut::row_major(&mut u, 500, 100));
            let cx = Context::new(threads);
            let (_, method) = qr::<f32>(cx, a, vm, None, 0.0, Paths::Short).unwrap();
            assert_eq!(method, want, "κ {kappa}");
            polar::<f32>(cx, a, um, 0.0, Paths::Short).unwrap();
            (v, u)
        };
        assert_eq!(run(1), run(2));
        assert_eq!(run(1), run(3));
    }
}

/// ‖VᵀV − P‖ and ‖VᵀA − (VᵀA)ᵀ‖ relative, and that VᵀA is positive semidefinite on its diagonal.
fn assert_polar<T: Real>(a: &[T], n: usize, r: usize, rank: usize) {
    let cx = Context::new(2);
    let mut v = vec![T::default(); n * r];
    polar::<T>(cx, Mat::row_major(a, n, r), MatMut::row_major(&mut v, n, r), 4.0 * T::UNIT, Paths::Short)
        .unwrap();
    let (a, v) = (Mat::row_major(a, n, r), Mat::row_major(&v, n, r));
    let product = |x: Mat<'_>, y: Mat<'_>| crate::gemm::tests::naive(x.t(), y);
    let h = product(v, a);
    let norm = square_norm(&h).sqrt();
    let unit = 30.0 * (r as f64).sqrt() * T::UNIT;
    for i in 0..r {
        assert!(h[i * r + i] >= -unit * norm);
        for j in 0..i {
            assert!((h[i * r + j] - h[j * r + i]).abs() <= unit * norm, "VᵀA is symmetric");
        }
    }
    // VᵀV is a projector of the right rank: V·VᵀV = V.
    let g = product(v, v);
    let trace: f64 = (0..r).map(|i| g[i * r + i]).sum();
    assert!((trace - rank as f64).abs() < unit * 10.0, "rank {rank}, trace {trace}");
    let mut off = 0.0;
    for i in 0..r {
        for j in 0..r {
            let gg: f64 = (0..r).map(|k| g[i * r + k] * g[k * r + j]).sum();
            off += (gg - g[i * r + j]).powi(2);
        }
    }
    assert!(off.sqrt() <= unit * 2.0, "projector to {}", off.sqrt());
}

#[test]
fn polar_factor_over_conditioning_and_rank() {
    for (n, r) in [(50, 10), (150, 60), (64, 64), (30, 1)] {
        for exponent in [0, 1, 3, 5, 6] {
            let a = with_condition(n, r, 10f64.powi(exponent), 2);
            assert_polar::<f32>(&stored(&a), n, r, r);
            assert_polar::<f64>(&a, n, r, r);
        }
    }
    // Rank 7 of 12, by dependent columns in every position.
    let (x, y) = (noise(1, 80 * 7), noise(2, 7 * 12));
    let low = crate::gemm::tests::naive(Mat::row_major(&x, 80, 7), Mat::row_major(&y, 7, 12));
    assert_polar::<f64>(&low, 80, 12, 7);
    assert_polar::<f64>(&vec![0.0; 60], 12, 5, 0);
}

#[test]
fn completion_is_orthonormal_and_keeps_what_was_there() {
    let cx = Context::new(1);
    let (n, r) = (40, 9);
    let old = with_condition(n, r, 1.0, 4);
    for case in 0..4 {
        let mut v = with_condition(n, r, 1.0, 9);
        let null: Vec<bool> = (0..r).map(|j| case == 3 || j % 3 == case).collect();
        let old = if case == 2 { v.clone() } else { old.clone() };
        for row in v.chunks_exact_mut(r) {
            row.iter_mut().zip(&null).filter(|(_, n)| **n).for_each(|(x, _)| *x = 0.0);
        }
        // Case 1: the candidates lie in the span already.
        let old = if case == 1 { vec![v[0]; n * r] } else { old };
        let before = v.clone();
        complete::<f64>(cx, MatMut::row_major(&mut v, n, r), &null, Mat::row_major(&old, n, r)).unwrap();
        let g = crate::gemm::tests::naive(Mat::row_major(&v, n, r).t(), Mat::row_major(&v, n, r));
        for i in 0..r {
            for j in 0..r {
                assert!((g[i * r + j] - f64::from(i == j)).abs() < 1e-12, "case {case}");
            }
        }
        for (at, (x, y)) in v.iter().zip(&before).enumerate() {
            assert!(null[at % r] || x == y);
        }
    }
}

#[test]
fn spectral_norm_of_known_spectra() {
    let cx = Context::new(1);
    for kappa in [1.0, 3.0, 1e4] {
        let a = with_condition(60, 20, kappa, 8);
        assert!((spectral_norm(cx, Mat::row_major(&a, 60, 20)) - 1.0).abs() < 1e-6);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn qr_of_anything(n in 1usize..160, r in 1usize..60, exponent in 0.0..8.0f64, seed in 0u64..1000, scale in -30i32..30) {
        let (n, r) = (n.max(r), r);
        let a: Vec<f64> = with_condition(n, r, 10f64.powf(exponent), seed).iter().map(|x| x * 10f64.powi(scale)).collect();
        let cx = Context::new(1);
        assert_good(&ratios::<f32>(cx, &stored(&a), n, r, (true, true), None), "f32");
        assert_good(&ratios::<f64>(cx, &a, n, r, (true, true), None), "f64");
    }
}

#[test]
fn no_columns_subnormal_input_and_hopeless_conditioning() {
    let cx = Context::new(1);
    let mut none: [f64; 0] = [];
    let empty = Mat::new(&[0.0f64; 0], (5, 0), (0, 1)).unwrap();
    qr::<f64>(cx, empty, MatMut::new(&mut none, (5, 0), (0, 1)).unwrap(), Some(&mut []), 0.0, Paths::Any)
        .unwrap();
    let mut none: [f64; 0] = [];
    polar::<f64>(cx, empty, MatMut::new(&mut none, (5, 0), (0, 1)).unwrap(), 0.0, Paths::Any).unwrap();
    let tiny: Vec<f64> = noise(1, 100).iter().map(|x| x * 1e-310).collect();
    let mut v = vec![0.0f64; 100];
    let (null, _) = qr::<f64>(
        cx,
        Mat::row_major(&tiny, 20, 5),
        MatMut::row_major(&mut v, 20, 5),
        None,
        1e-14,
        Paths::Any,
    )
    .unwrap();
    assert!(null.iter().all(|n| !n) && v.iter().all(|x| x.is_finite()));
    let mut graded = noise(2, 100);
    graded.iter_mut().skip(1).step_by(5).for_each(|x| *x *= 1e-80);
    polar::<f64>(cx, Mat::row_major(&graded, 20, 5), MatMut::row_major(&mut v, 20, 5), 0.0, Paths::Any)
        .unwrap();
    assert!(v.iter().all(|x| x.is_finite()));
}

//! Every layout, element type, instruction set and epilogue against a three-line oracle in double precision.

use super::*;
use half::bf16;
use proptest::prelude::*;

/// `A·B`, the definition.
pub(crate) fn naive(a: Mat<'_>, b: Mat<'_>) -> Vec<f64> {
    let dot = |i, j| (0..a.cols).map(|k| a.get(i, k) * b.get(k, j)).sum();
    (0..a.rows).flat_map(|i| (0..b.cols).map(move |j| (i, j))).map(|(i, j)| dot(i, j)).collect()
}

/// A reproducible stream of numbers in (−1, 1).
pub(crate) fn noise(seed: u64, len: usize) -> Vec<f64> {
    let mut rng = crate::rng::Stream::new(seed, 0);
    (0..len).map(|_| 2.0 * rng.uniform() - 1.0).collect()
}

fn to<E: crate::scalar::Element>(x: &[f64]) -> Vec<E> {
    x.iter().map(|&x| E::store(x)).collect()
}

fn strides(row_major: bool, rows: usize, cols: usize, pad: usize) -> (usize, usize) {
    if row_major { (cols + pad, 1) } else { (1, rows + pad) }
}

#[allow(clippy::too_many_arguments)]
fn check<W: Real, E: crate::scalar::Element>(
    (m, n, k): (usize, usize, usize),
    layout: u8,
    pad: usize,
    (alpha, beta): (f64, f64),
    threads: usize,
    isa: Isa,
) {
    let side = |bit: u8, r: usize, c: usize| strides(layout & bit != 0, r, c, pad);
    let len = |(rs, cs): (usize, usize), r: usize, c: usize| rs * r.max(1) + cs * c.max(1);
    let (sa, sb, sc) = (side(1, m, k), side(2, k, n), side(4, m, n));
    let a: Vec<E> = to(&noise(1, len(sa, m, k)));
    let b: Vec<E> = to(&noise(2, len(sb, k, n)));
    let c0: Vec<W> = to(&noise(3, len(sc, m, n)));
    let a = Mat::new(&a, (m, k), sa).unwrap();
    let b = Mat::new(&b, (k, n), sb).unwrap();
    let mut c = c0.clone();
    let cx = Context { isa, ..Context::new(threads) };
    gemm::<W>(cx, alpha, a, b, beta, MatMut::new(&mut c, (m, n), sc).unwrap());
    let want = naive(a, b);
    let tol = 4.0 * W::UNIT * (k as f64 + 4.0);
    let mut touched = vec![false; c.len()];
    for i in 0..m {
        for j in 0..n {
            let at = i * sc.0 + j * sc.1;
            touched[at] = true;
            let w = alpha * want[i * n + j] + beta * c0[at].f64();
            assert!(
                (c[at].f64() - w).abs() <= tol,
                "{isa:?} ({i},{j}) of {m}x{n}x{k}: {} for {w}",
                c[at].f64()
            );
        }
    }
    for (at, t) in touched.iter().enumerate() {
        assert!(*t || c[at].f64() == c0[at].f64(), "padding at {at} was written");
    }
}

#[test]
fn every_small_shape_on_every_level() {
    for isa in Isa::available() {
        for m in [0, 1, 2, 7, 16, 17, 47, 48, 49, 65] {
            for n in [0, 1, 5, 8, 9, 24, 25] {
                for k in [0, 1, 3, 33] {
                    for layout in 0..8 {
                        check::<f32, f32>((m, n, k), layout, layout as usize % 3, (1.0, 0.0), 1, isa);
                    }
                    check::<f64, f64>((m, n, k), 3, 1, (-0.5, 2.0), 2, isa);
                }
            }
        }
    }
}

#[test]
fn sizes_around_every_block_boundary() {
    for isa in Isa::available() {
        for (m, n, k) in [(97, 99, 256), (33, 121, 257), (800, 26, 40), (50, 200, 520), (769, 97, 193)] {
            for layout in [0, 3, 5, 6] {
                check::<f32, f32>((m, n, k), layout, 3, (1.0, 1.0), 2, isa);
                check::<f64, f64>((m, n, k), layout, 0, (2.0, 0.0), 2, isa);
                check::<f32, bf16>((m, n, k), layout, 0, (1.0, 0.0), 1, isa);
                check::<f64, f32>((m, n, k), layout, 0, (1.0, 0.0), 2, isa);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn gemm_is_the_definition(
        m in 1usize..130, n in 1usize..130, k in 0usize..300, layout in 0u8..8, pad in 0usize..4,
        alpha in -2.0..2.0f64, beta in -2.0..2.0f64, threads in 1usize..4,
    ) {
        for isa in Isa::available() {
            check::<f32, f32>((m, n, k), layout, pad, (alpha as f32 as f64, beta as f32 as f64), threads, isa);
            check::<f64, bf16>((m, n, k), layout, pad, (alpha, beta), threads, isa);
        }
    }
}

#[test]
fn beta_zero_does_not_read_and_threads_do_not_matter() {
    let (m, n, k) = (130, 310, 290);
    let a: Vec<f32> = to(&noise(1, m * k));
    let b: Vec<f32> = to(&noise(2, k * n));
    let run = |threads| {
        let mut c = vec![f32::NAN; m * n];
        let cx = Context { threads, ..Context::new(1) };
        let (a, b) = (Mat::row_major(&a, m, k), Mat::row_major(&b, k, n));
        gemm::<f32>(cx, 1.0, a, b, 0.0, MatMut::row_major(&mut c, m, n));
        c
    };
    let one = run(1);
    assert!(one.iter().all(|x| x.is_finite()));
    for threads in 2..6 {
        assert_eq!(one, run(threads));
    }
}

#[test]
fn combined_right_side_sums_and_added_terms() {
    let (i, j, k) = (50, 70, 300);
    let (l, x, y, e): (Vec<f32>, Vec<f32>, Vec<bf16>, Vec<f64>) =
        (to(&noise(1, i * k)), to(&noise(2, k * j)), to(&noise(3, k * j)), to(&noise(4, i * j)));
    for transposed in [false, true] {
        // The same numbers through either layout of the right side.

        let s = if transposed { (1, k) } else { (j, 1) };
        let (xv, yv) = (Mat::new(&x, (k, j), s).unwrap(), Mat::new(&y, (k, j), s).unwrap());
        let cx = Context::new(2);
        let lhs = Packed::<f32>::new(cx, Mat::row_major(&l, i, k));
        let mut out = vec![1.0f32; i * j];
        let mut sums = vec![0.0; j];
        Product {
            alpha: -1.0,
            beta: 3.0,
            plus: Terms::one(Mat::row_major(&e, i, j)),
            sums: Some(&mut sums),
            ..Product::new(&lhs, Terms::two(0.5, xv, 2.0, yv), MatMut::new(&mut out, (i, j), (1, i)).unwrap())
        }
        .run(cx);
        for jj in 0..j {
            let rhs: Vec<f64> = (0..k).map(|kk| 0.5 * xv.get(kk, jj) + 2.0 * yv.get(kk, jj)).collect();
            let want: f64 = rhs.iter().map(|v| v * v).sum();
            assert!((sums[jj] - want).abs() < 1e-4 * want);
            for ii in 0..i {
                let dot: f64 = (0..k).map(|kk| f64::from(l[ii * k + kk]) * rhs[kk]).sum();
                let w = 3.0 - dot + e[ii * j + jj];
                assert!((f64::from(out[jj * i + ii]) - w).abs() < 1e-4);
            }
        }
    }
}

#[test]
fn regions_leave_out_only_what_is_zero_or_not_wanted() {
    use Region::{All, Lower, LowerLhs, LowerRhs, Upper, UpperRhs};
    fn one<T: Real>(cx: Context, n: usize, region: Region, rhs_row_major: bool) {
        let zero_unless = |keep: fn(usize, usize) -> bool, mut x: Vec<f64>| {
            x.iter_mut().enumerate().filter(|(at, _)| !keep(at / n, at % n)).for_each(|(_, x)| *x = 0.0);
            x
        };
        let (mut a, mut b, c) = (noise(1, n * n), noise(2, n * n), noise(3, n * n));
        match region {
            LowerLhs => a = zero_unless(|i, k| k <= i, a),
            LowerRhs => b = zero_unless(|k, j| k >= j, b),
            UpperRhs => b = zero_unless(|k, j| k <= j, b),
            All | Upper | Lower => {}
        }
        let exact = naive(Mat::row_major(&to::<T>(&a), n, n), Mat::row_major(&to::<T>(&b), n, n));
        // What is a whole tile beyond the diagonal is not touched: of 48 rows at most, of 8 columns.
        for (i, j) in (0..n).flat_map(|i| (0..n).map(move |j| (i, j))) {
            match region {
                LowerLhs if j > i + 48 => a[i * n + j] = f64::NAN,
                LowerRhs if i + 8 < j => b[i * n + j] = f64::NAN,
                UpperRhs if i > j + 8 => b[i * n + j] = f64::NAN,
                _ => {}
            }
        }
        let (a, mut c): (Vec<T>, Vec<T>) = (to(&a), to(&c));
        let b: Vec<T> = if rhs_row_major {
            to(&b)
        } else {
            to(&(0..n * n).map(|at| b[at % n * n + at / n]).collect::<Vec<_>>())
        };
        let (a, b) = (Mat::row_major(&a, n, n), Mat::row_major(&b, n, n));
        let b = if rhs_row_major { b } else { b.t() };
        let before = c.clone();
        let lhs = Packed::<T>::new(cx, a);
        let out = MatMut::row_major(&mut c, n, n).t();
        Product { alpha: 2.0, beta: 0.5, region, ..Product::new(&lhs, Terms::one(b), out) }.run(cx);
        for i in 0..n {
            for j in 0..n {
                let (got, was) = (c[j * n + i].f64(), before[j * n + i].f64());
                let wanted = !(region == Upper && i > j || region == Lower && i < j);
                let want = if wanted { 2.0 * exact[i * n + j] + 0.5 * was } else { was };
                let error = (got - want).abs();
                assert!(
                    error <= 40.0 * n as f64 * T::UNIT,
                    "{region:?} of {n}, ({i}, {j}): {got} for {want}, {cx:?}"
                );
            }
        }
    }
    for isa in Isa::available() {
        for n in [1, 7, 8, 25, 49, 97, 300] {
            for region in [All, Upper, Lower, LowerLhs, LowerRhs, UpperRhs] {
                for (threads, row_major) in [(1, true), (3, false), (2, true)] {
                    let cx = Context { isa, threads, half: false };
                    one::<f32>(cx, n, region, row_major);
                    one::<f64>(cx, n, region, row_major);
                }
            }
        }
    }
}

/// bfloat16 products of the rounded operands, by every kernel there is, against the definition on rounded operands.
#[test]
fn half_products_are_products_of_rounded_operands() {
    let round = |x: &[f32]| x.iter().map(|&x| <bf16 as crate::scalar::Element>::store(x)).collect::<Vec<_>>();
    for isa in Isa::available() {
        for (m, n, k) in [
            (1, 1, 1),
            (16, 16, 32),
            (17, 5, 33),
            (50, 40, 256),
            (96, 130, 300),
            (48, 33, 31),
            (800, 20, 515),
        ] {
            let (a, b): (Vec<f32>, Vec<f32>) = (to(&noise(1, m * k)), to(&noise(2, k * n)));
            let (ra, rb) = (round(&a), round(&b));
            let want = naive(Mat::row_major(&ra, m, k), Mat::row_major(&rb, k, n));
            for layout in 0..4 {
                let flip = |x: &[f32], r: usize, c: usize| -> Vec<f32> {
                    (0..c).flat_map(|j| (0..r).map(move |i| x[i * c + j])).collect()
                };
                let (at, bt) = (flip(&a, m, k), flip(&b, k, n));
                let av =
                    if layout & 1 == 0 { Mat::row_major(&a, m, k) } else { Mat::row_major(&at, k, m).t() };
                let bv =
                    if layout & 2 == 0 { Mat::row_major(&b, k, n) } else { Mat::row_major(&bt, n, k).t() };
                for row_major in [true, false] {
                    let mut c = vec![f32::NAN; m * n];
                    let strides = if row_major { (n, 1) } else { (1, m) };
                    let cx = Context { isa, half: true, ..Context::new(2) };
                    gemm::<f32>(cx, 1.0, av, bv, 0.0, MatMut::new(&mut c, (m, n), strides).unwrap());
                    for i in 0..m {
                        for j in 0..n {
                            let got = f64::from(c[i * strides.0 + j * strides.1]);
                            let w = want[i * n + j];
                            assert!(
                                (got - w).abs() < 1e-6 * (k as f64 + 4.0),
                                "{isa:?} {m}x{n}x{k} {layout} ({i},{j}): {got} for {w}"
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn every_pair_kernel_of_this_processor_agrees() {
    for kernel in super::pairs::available() {
        for vectors in 1..=3 {
            for pairs in [16, 48] {
                let (rows, stride) = (16 * vectors, pairs + 16);
                let bits = |s: u64, len: usize| -> Vec<u32> {
                    noise(s, 2 * len)
                        .chunks(2)
                        .map(|p| {
                            let half =
                                |x: f64| u32::from(<bf16 as crate::scalar::Element>::store(x).to_bits());
                            half(p[0]) | half(p[1]) << 16
                        })
                        .collect()
                };
                let (lhs, rhs) = (bits(1, pairs * rows), bits(2, 16 * stride));
                for first in [true, false] {
                    let mut acc = vec![0.5f32; 16 * (rows + 3)];
                    super::pairs::run(kernel, vectors, pairs, &lhs, &rhs, stride, &mut acc, rows + 3, first);
                    let value = |w: u32, high: bool| {
                        f64::from(f32::from_bits(if high { w & 0xffff_0000 } else { w << 16 }))
                    };
                    for j in 0..16 {
                        for i in 0..rows {
                            let dot: f64 = (0..pairs)
                                .map(|k| {
                                    let (a, b) = (lhs[k * rows + i], rhs[j * stride + k]);
                                    value(a, false) * value(b, false) + value(a, true) * value(b, true)
                                })
                                .sum();
                            let want = dot + if first { 0.0 } else { 0.5 };
                            assert!(
                                (f64::from(acc[j * (rows + 3) + i]) - want).abs() < 1e-4,
                                "{}",
                                kernel.name
                            );
                        }
                    }
                }
            }
        }
    }
}

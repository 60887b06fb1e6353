//! The core's products and QR against the crates `gemm` and `faer`, on one thread and on two.
//!
//! `cargo bench --manifest-path benches/micro/Cargo.toml`

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use faer::{Mat as FaerMat, Par};
use orthdion::qr::Paths;
use orthdion::{Context, Mat, MatMut, rng::Stream};
use std::hint::black_box;

fn normal(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = Stream::new(seed, 0);
    (0..len).map(|_| rng.normal() as f32).collect()
}

/// `B·Q`, row-major, the first product of a step.
fn products(c: &mut Criterion) {
    for (m, n, r) in [(768, 768, 48), (768, 768, 192), (3072, 768, 192), (1024, 1024, 1024)] {
        let mut group = c.benchmark_group(format!("product {m}x{n}x{r}"));
        group.throughput(Throughput::Elements(2 * (m * n * r) as u64)).sample_size(20);
        let (b, q, mut p) = (normal(m * n, 1), normal(n * r, 2), vec![0.0f32; m * r]);
        for threads in [1, 2] {
            for half in [false, true] {
                let cx = Context { half, ..Context::new(threads) };
                let name = if half { "orthdion bf16" } else { "orthdion" };
                group.bench_function(BenchmarkId::new(name, threads), |bencher| {
                    bencher.iter(|| {
                        let (b, q) = (Mat::new(&b, (m, n), (n, 1)).unwrap(), Mat::new(&q, (n, r), (r, 1)).unwrap());
                        let out = MatMut::new(black_box(&mut p), (m, r), (r, 1)).unwrap();
                        orthdion::gemm::<f32>(cx, 1.0, b, q, 0.0, out);
                    });
                });
            }
            let par = if threads == 1 { gemm::Parallelism::None } else { gemm::Parallelism::Rayon(threads) };
            group.bench_function(BenchmarkId::new("gemm", threads), |bencher| {
                bencher.iter(|| {
                    let dst = black_box(&mut p).as_mut_ptr();
                    // SAFETY: row-major buffers of exactly these shapes.
                    unsafe {
                        gemm::gemm(
                            m, r, n, dst, 1, r as isize, false, b.as_ptr(), 1, n as isize, q.as_ptr(), 1, r as isize,
                            0.0f32, 1.0f32, false, false, false, par,
                        );
                    }
                });
            });
        }
        group.finish();
    }
}

/// Thin QR with the orthonormal factor formed.
fn factorisations(c: &mut Criterion) {
    for (n, r) in [(768, 48), (3072, 192), (4096, 512)] {
        let mut group = c.benchmark_group(format!("QR {n}x{r}"));
        group.sample_size(10);
        let (a, mut v) = (normal(n * r, 3), vec![0.0f32; n * r]);
        let theirs = FaerMat::from_fn(n, r, |i, j| a[i * r + j]);
        for threads in [1, 2] {
            let cx = Context::new(threads);
            group.bench_function(BenchmarkId::new("orthdion", threads), |bencher| {
                bencher.iter(|| {
                    let out = MatMut::new(black_box(&mut v), (n, r), (r, 1)).unwrap();
                    let a = Mat::new(&a, (n, r), (r, 1)).unwrap();
                    orthdion::qr::qr::<f32>(cx, a, out, None, 0.0, Paths::Any).unwrap()
                });
            });
            faer::set_global_parallelism(if threads == 1 { Par::Seq } else { Par::rayon(threads) });
            group.bench_function(BenchmarkId::new("faer", threads), |bencher| {
                bencher.iter(|| black_box(&theirs).qr().compute_thin_Q());
            });
        }
        group.finish();
    }
}

criterion_group!(benches, products, factorisations);
criterion_main!(benches);

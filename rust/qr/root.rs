//! The inverse square root of a well-conditioned Gram matrix, for the polar factor `A·(AᵀA)^(−1/2)`.
//!
//! QDWH's rational rounds (Nakatsukasa, Bai, Gygi 2010) written for the Gram matrix: everything is a function of S, so
//! all products are symmetric and cost half. Errors are about κ(S)·2⁻⁵³, so this is for κ(S) that leave enough of double
//! precision; [`super::polar`] serves the others.

use super::{cholesky, polar, square_norm, symmetric};
use crate::gemm::{Context, Packed, Product, Region, Terms};
use crate::isa::{Kernel, Level};
use crate::scalar::Element;
use crate::scratch::Scratch;
use crate::view::{Mat, MatMut};

/// Where the Gram matrix's condition, estimated from above, ends the use of its root.
const LIMIT: f64 = 1e7;

/// `z ← S^(−1/2)` to single precision for r×r `s = TᵀT`, given `T⁻¹`; false, with nothing promised of `z`, if S is too
/// ill-conditioned for that.
pub(super) fn inverse_root(cx: Context, s: &[f64], inverse: &[f64], r: usize, z: &mut [f64]) -> bool {
    let bound = square_norm(s).sqrt() * square_norm(inverse);
    if bound.is_nan() || bound > LIMIT {
        return false;
    }
    // Estimates from below, where norms are bounds that are up to √r and r times too wide: that would cost a round.
    // Rounds end by what they have reached, so nothing but time depends on these.
    let size = 1.1 * cx.isa.run(Largest { x: s, r, factor: false });
    let condition = 1.2 * size * cx.isa.run(Largest { x: inverse, r, factor: true });
    let mut l = condition.recip().sqrt().min(1.0);
    let mut a = Scratch::<f64>::new(r * r);
    a.iter_mut().zip(s).for_each(|(a, s)| *a = s / size);
    let (mut w, mut square) = (Scratch::<f64>::new(r * r), Scratch::<f64>::new(r * r));
    let (mut inverse, mut null) = (Scratch::<f64>::new(r * r), vec![false; r]);
    // A^(−1/2) for now: in single precision `size` might take it out of range.
    z.fill(0.0);
    (0..r).for_each(|i| z[i * r + i] = 1.0);
    for taken in 0..6 {
        if finish(cx, &a, size, z) {
            return true;
        }
        // With N = (I + cA)⁻¹:  W = keep·I + weight·N,  A ← WAW,  Z ← ZW
        let round = polar::Round::raising(l);
        square.iter_mut().zip(a.iter()).for_each(|(y, a)| *y = round.c * a);
        (0..r).for_each(|i| square[i * r + i] += 1.0);
        cholesky::factor(cx, &mut square, &mut inverse, r, 0.0, &mut null);
        symmetric(cx, view(&inverse).t(), view(&inverse).t(), &mut w);
        symmetric(cx, view(&w), view(&w), &mut square);
        cx.isa.run(Weigh { a: &mut a, w: &mut w, square: &square, r, round: &round });
        if taken == 0 {
            z.copy_from_slice(&w);
        } else {
            symmetric(cx, view(z), view(&w), &mut square);
            z.copy_from_slice(&square);
        }
        l = round.raised;
    }
    false
}

/// From N in `w` and N² in `square`, W and WAW, the latter without a product, as c·AN = I − N:
///
/// ```text
/// WAW = keep²·A + 2·keep·weight/c·(I − N) + weight²/c·(N − N²)
/// ```
struct Weigh<'a> {
    a: &'a mut [f64],
    w: &'a mut [f64],
    square: &'a [f64],
    r: usize,
    round: &'a polar::Round,
}

impl Kernel for Weigh<'_> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let Weigh { a, w, square, r, round: &polar::Round { keep, weight, c, .. } } = self;
        let (once, twice) = (2.0 * keep * weight / c, weight * weight / c);
        for ((a, w), square) in a.iter_mut().zip(w.iter_mut()).zip(square) {
            *a = keep * keep * *a + (twice - once) * *w - twice * square;
            *w *= weight;
        }
        for i in 0..r {
            a[i * r + i] += once;
            w[i * r + i] += keep;
        }
    }
}

/// About the largest eigenvalue, never more, of a symmetric `x` or (`factor`) of `xxᵀ`, by power iterations.
struct Largest<'a> {
    x: &'a [f64],
    r: usize,
    factor: bool,
}

impl Kernel for Largest<'_> {
    type Out = f64;
    #[inline(always)]
    fn run<L: Level>(self) -> f64 {
        let Largest { x, r, factor } = self;
        let (mut v, mut w) = (Scratch::<f64>::new(r), Scratch::<f64>::new(r));
        // Uneven, so that no eigenvector that a user's structure makes likely is orthogonal to it.
        v.iter_mut().enumerate().for_each(|(i, v)| *v = 1.0 + (i * 7919 % 31) as f64 / 62.0);
        let mut largest = 0.0;
        for _ in 0..5 {
            // w ← xᵀv
            w.fill(0.0);
            for (row, v) in x.chunks_exact(r).zip(v.iter()) {
                w.iter_mut().zip(row).for_each(|(w, x)| *w += v * x);
            }
            if factor {
                // v ← x·w, in eight partial sums that the compiler keeps in registers
                for (row, v) in x.chunks_exact(r).zip(v.iter_mut()) {
                    let mut sums = [0.0; 8];
                    for (x, w) in row.chunks(8).zip(w.chunks(8)) {
                        sums.iter_mut().zip(x.iter().zip(w)).for_each(|(s, (x, w))| *s += x * w);
                    }
                    *v = sums.iter().sum();
                }
            } else {
                std::mem::swap(&mut v, &mut w);
            }
            largest = square_norm(&v).sqrt();
            v.iter_mut().for_each(|v| *v /= largest);
        }
        largest
    }
}

fn view(x: &[f64]) -> Mat<'_> {
    let r = x.len().isqrt();
    Mat::row_major(x, r, r)
}

/// `z ← z·(size·A)^(−1/2)` from the first terms of a series about the mean `t` of A's eigenvalues, if they lie so close to it
/// that single precision is reached; otherwise false, and `z` is as it was.
///
/// ```text
/// A = t·(I − E),      (I − E)^(−1/2) = I + E/2 + 3/8·E² + 5/16·E³ + … = I + F
/// ```
///
/// E and F are small against I, so that their products, and that of Z and F, err by little of a single's roundoff in
/// single precision too.
fn finish(cx: Context, a: &[f64], size: f64, z: &mut [f64]) -> bool {
    const C: [f64; 7] = [1.0, 1.0 / 2.0, 3.0 / 8.0, 5.0 / 16.0, 35.0 / 128.0, 63.0 / 256.0, 231.0 / 1024.0];
    const RADIUS: f64 = 0.09; // its seventh power is 2⁻²⁴
    let r = a.len().isqrt();
    let t = (0..r).map(|i| a[i * r + i]).sum::<f64>() / r as f64;
    // E's trace is zero; and ‖E‖² ≤ √r·‖E²‖.
    if square_norm(a) / t.powi(2) - r as f64 > (r as f64).sqrt() * RADIUS.powi(2) {
        return false;
    }
    let mut e = Scratch::<f32>::new(r * r);
    for (i, (e, a)) in e.chunks_exact_mut(r).zip(a.chunks_exact(r)).enumerate() {
        e.iter_mut().zip(a).for_each(|(e, a)| *e = (-a / t) as f32);
        e[i] = (1.0 - a[i] / t) as f32;
    }
    let (mut e2, mut f) = (Scratch::<f32>::new(r * r), Scratch::<f32>::new(r * r));
    let mut next = Scratch::<f32>::new(r * r);
    symmetric_small(cx, &e, &e, Terms::none(), &mut e2);
    if e2.iter().map(|x| f64::from(x * x)).sum::<f64>().sqrt() > RADIUS.powi(2) {
        return false; // ‖E‖₂ ≤ ‖E²‖^½
    }
    let (ev, ev2) = (Mat::row_major(&e, r, r), Mat::row_major(&e2, r, r));
    f.iter_mut()
        .zip(e.iter().zip(e2.iter()))
        .for_each(|(f, (e, e2))| *f = C[5] as f32 * e + C[6] as f32 * e2);
    for odd in [3, 1] {
        symmetric_small(cx, &e2, &f, Terms::two(C[odd], ev, C[odd + 1], ev2), &mut next);
        std::mem::swap(&mut f, &mut next);
    }
    // Z commutes with A, so that ZF is symmetric.
    symmetric_small(cx, z, &f, Terms::none(), &mut next);
    let scale = (t * size).sqrt().recip();
    z.iter_mut().zip(next.iter()).for_each(|(z, x)| *z = (*z + f64::from(*x)) * scale);
    true
}

/// `out ← AB + plus` in single precision for symmetric r×r A, B that commute.
fn symmetric_small<E: Element>(cx: Context, a: &[E], b: &[f32], plus: Terms<'_>, out: &mut [f32]) {
    let r = b.len().isqrt();
    let lhs = Packed::<f32>::new(cx, Mat::row_major(a, r, r));
    let (rhs, whole) = (Terms::one(Mat::row_major(b, r, r)), MatMut::row_major(out, r, r).t());
    Product { plus: plus.t(), region: Region::Upper, ..Product::new(&lhs, rhs, whole) }.run(cx);
    super::mirror(out, r);
}

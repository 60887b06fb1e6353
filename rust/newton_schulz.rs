//! Newton–Schulz iterations towards a polar factor, products only, as Muon takes them.
//!
//! For U (m×n) and a step's coefficients (a, b, c)
//!
//! ```text
//! X₀ = U / max(‖U‖·divisor, ε)
//! X  ← a·X + (b·A + c·A²)·X,   A = X·Xᵀ
//! ```
//!
//! on the smaller side: X is Uᵀ's where m > n. It is held as s×l, s ≤ l, with contiguous columns. A and A² are symmetric,
//! so half of them is computed, s²·(3l + s)/2 multiplications a step.
//!
//! Every X is a polynomial of A times X₀. So a few steps can be taken on A alone, with Z for the product of their factors:
//!
//! ```text
//! H = a·I + b·A + c·A²,   Z ← H·Z,   A ← H·A·H;   in the end X ← Z·X
//! ```
//!
//! All of these are polynomials of one symmetric matrix, hence symmetric, and half is computed: s²·3l/2 + s³·(2q − 3/2)
//! multiplications for q steps, fewer than above where l > s. But what rounding does to A's small eigenvalues grows by a² a
//! step, so A is formed from X anew before that matters, see [`stretch`]: once in Muon's five steps, twice in Polar
//! Express's. Measured in single precision, that errs by 1 to 4 times what steps on X err, at most 3e-5; without it by 30 to
//! 200 times.

use crate::error::Error;
use crate::gemm::line::{Line, sum_of_squares};
use crate::gemm::{Context, Packed, Product, Region, SendPtr, Terms};
use crate::isa::{Kernel, Level};
use crate::pool;
use crate::qr::mirror;
use crate::scalar::Real;
use crate::scratch::Scratch;
use crate::step::largest_entry;
use crate::view::{Mat, MatMut};
use std::mem::swap;
use std::ops::Range;

/// What is iterated.
#[derive(Clone, Copy, Debug)]
pub struct Schedule<'a> {
    /// (a, b, c) of each step.
    pub coefficients: &'a [[f64; 3]],
    /// How much larger than ‖U‖ the matrix is taken to be.
    pub divisor: f64,
    /// The least that U is divided by.
    pub epsilon: f64,
}

/// A matrix of [`newton_schulz`].
#[derive(Debug)]
pub struct Job<'a> {
    /// U, m×n.
    pub u: Mat<'a>,
    /// Receives X, m×n.
    pub out: MatMut<'a>,
}

/// The iteration, see the module, of each of a list in working precision `T`; threads as for [`crate::step::step`].
///
/// Returns whether each U is finite; the output of one that is not keeps what it had. U = 0 gives 0. With `cx.half` the
/// operands of products are rounded to bfloat16, and every step is taken on X.
///
/// # Errors
/// [`Error::Shape`] if an output does not fit, [`Error::Value`] for a schedule that is not finite or divides by nothing; then
/// nothing has been written.
pub fn newton_schulz<T: Real>(
    cx: Context,
    jobs: Vec<Job<'_>>,
    schedule: &Schedule<'_>,
) -> Result<Vec<bool>, Error> {
    schedule.check()?;
    for job in &jobs {
        let (need, got) = (job.u.shape(), job.out.as_ref().shape());
        if need != got {
            return Err(Error::Shape { what: "the output", need, got });
        }
    }
    let cost = |job: &Job<'_>| {
        let (m, n) = (job.u.rows as f64, job.u.cols as f64);
        m * n * m.min(n)
    };
    let one = |threads, Job { u, out }: Job<'_>| one::<T>(Context { threads, ..cx }, u, out, schedule);
    Ok(pool::map(cx.threads, jobs, cost, one))
}

impl Schedule<'_> {
    fn check(&self) -> Result<(), Error> {
        let refuse = |why: String| Err(Error::Value { why });
        if let Some(step) = self.coefficients.iter().find(|step| step.iter().any(|c| !c.is_finite())) {
            return refuse(format!("coefficients must be finite, but a step has {step:?}"));
        }
        if !(self.divisor > 0.0 && self.divisor.is_finite()) {
            return refuse(format!("divisor must be positive and finite, but it is {}", self.divisor));
        }
        if !(self.epsilon >= 0.0 && self.epsilon.is_finite()) {
            return refuse(format!("epsilon must be at least 0 and finite, but it is {}", self.epsilon));
        }
        Ok(())
    }
}

fn one<T: Real>(cx: Context, u: Mat<'_>, out: MatMut<'_>, schedule: &Schedule<'_>) -> bool {
    let (u, mut out) = if u.rows > u.cols { (u.t(), out.t()) } else { (u, out) };
    let (s, l) = u.shape();
    if s == 0 {
        return true;
    }
    let Some(factors) = normalisation(cx, u, schedule) else {
        return false;
    };
    let mut x = Scratch::<T>::new(s * l);
    transfer(cx, u, factors, MatMut::row_major(&mut x, l, s).t());
    if on_gram(cx, s, l) {
        iterate_gram(cx, &mut x, s, schedule.coefficients);
    } else {
        iterate(cx, &mut x, s, schedule.coefficients);
    }
    transfer(cx, Mat::row_major(&x, l, s).t(), [1.0; 2], out.reborrow());
    true
}

/// Whether steps on A cost less. Rounded to bfloat16 its small eigenvalues would be lost in few steps.
fn on_gram(cx: Context, s: usize, l: usize) -> bool {
    !cx.half && l > s
}

/// X after all steps.
fn iterate<T: Real>(cx: Context, x: &mut Scratch<T>, s: usize, coefficients: &[[f64; 3]]) {
    let (mut a, mut h) = (Scratch::new(s * s), Scratch::new(s * s));
    let mut next = Scratch::new(x.len());
    for &[c1, c3, c5] in coefficients {
        gram(cx, x, s, &mut a);
        polynomial(cx, &a, s, c3, c5, &mut h);
        times(cx, &h, x, s, c1, &mut next);
        swap(x, &mut next);
    }
}

/// The same, with a stretch of steps at a time taken on A.
fn iterate_gram<T: Real>(cx: Context, x: &mut Scratch<T>, s: usize, coefficients: &[[f64; 3]]) {
    let [mut a, mut h, mut z, mut spare] = [(); 4].map(|()| Scratch::new(s * s));
    let mut next = Scratch::new(x.len());
    let (mut most, mut rest) = (3, coefficients);
    while !rest.is_empty() {
        let (steps, later) = rest.split_at(stretch(rest, most));
        gram(cx, x, s, &mut a);
        for (k, &[c1, c3, c5]) in steps.iter().enumerate() {
            polynomial(cx, &a, s, c3, c5, &mut h);
            h.iter_mut().step_by(s + 1).for_each(|d| *d += T::of(c1));
            let packed = Packed::<T>::new(cx, Mat::row_major(&h, s, s));
            if k + 1 < steps.len() {
                product(cx, &packed, &a, &mut spare);
                product(cx, &packed, &spare, &mut a);
            }
            if k == 0 {
                z.copy_from_slice(&h);
            } else {
                product(cx, &packed, &z, &mut spare);
                swap(&mut z, &mut spare);
            }
        }
        times(cx, &z, x, s, 0.0, &mut next);
        swap(x, &mut next);
        (most, rest) = (2, later);
    }
}

/// How many of the first steps are taken on one A: while its error has grown to at most 200 times, and at most `most`, which
/// may be more at the beginning, where all eigenvalues are still small. At least one, if there is one.
fn stretch(coefficients: &[[f64; 3]], most: usize) -> usize {
    let mut growth = 1.0;
    let steps = coefficients.iter().take_while(|[c1, ..]| {
        let small = growth <= 200.0;
        growth = c1 * c1 * growth + 1.0;
        small
    });
    steps.take(most).count()
}

/// `a ← X·Xᵀ`
fn gram<T: Real>(cx: Context, x: &[T], s: usize, a: &mut [T]) {
    let x = Mat::row_major(x, x.len() / s, s);
    let lhs = Packed::<T>::new(cx, x.t());
    let out = MatMut::row_major(a, s, s).t();
    Product { region: Region::Upper, ..Product::new(&lhs, Terms::one(x), out) }.run(cx);
    mirror(a, s);
}

/// `out ← c3·A + c5·A²`
fn polynomial<T: Real>(cx: Context, a: &[T], s: usize, c3: f64, c5: f64, out: &mut [T]) {
    if c5 == 0.0 {
        out.iter_mut().zip(a).for_each(|(out, a)| *out = T::of(c3) * *a);
        return;
    }
    let a = Mat::row_major(a, s, s);
    let (lhs, rhs) = (Packed::<T>::new(cx, a), Terms::one(a.t()));
    let plain = Product::new(&lhs, rhs, MatMut::row_major(out, s, s).t());
    Product { region: Region::Upper, alpha: c5, plus: rhs.scaled(c3), ..plain }.run(cx);
    mirror(out, s);
}

/// `out ← H·A` for symmetric matrices that commute.
fn product<T: Real>(cx: Context, h: &Packed<T>, a: &[T], out: &mut [T]) {
    let s = h.rows;
    let plain = Product::new(h, Terms::one(Mat::row_major(a, s, s).t()), MatMut::row_major(out, s, s).t());
    Product { region: Region::Upper, ..plain }.run(cx);
    mirror(out, s);
}

/// `out ← c·X + H·X`
fn times<T: Real>(cx: Context, h: &[T], x: &[T], s: usize, c: f64, out: &mut [T]) {
    let l = x.len() / s;
    let (lhs, x) = (Packed::<T>::new(cx, Mat::row_major(h, s, s)), Terms::one(Mat::row_major(x, l, s).t()));
    let plus = if c == 0.0 { Terms::none() } else { x.scaled(c) };
    Product { plus, ..Product::new(&lhs, x, MatMut::row_major(out, l, s).t()) }.run(cx);
}

/// Two factors that make X₀ of U: a power of two, 1 where squares are neither huge nor tiny, and the rest. None if U holds
/// NaN or infinity.
fn normalisation(cx: Context, u: Mat<'_>, schedule: &Schedule<'_>) -> Option<[f64; 2]> {
    let (mut size, mut squares) = (1.0, energy(cx, u, 1.0));
    if !(1e-200..1e200).contains(&squares) {
        let largest = largest_entry(cx, Terms::one(u));
        if !largest.is_finite() {
            return None;
        }
        if largest == 0.0 {
            return Some([0.0; 2]);
        }
        size = (-largest.log2().floor()).clamp(-1000.0, 1000.0).exp2();
        squares = energy(cx, u, size);
    }
    Some([size, 1.0 / (squares.sqrt() * schedule.divisor).max(schedule.epsilon * size)])
}

/// Lines that a thread takes at a time.
const LINES: usize = 32;

/// ‖size·U‖², line by line in double.
fn energy(cx: Context, u: Mat<'_>, size: f64) -> f64 {
    struct Energy<'a> {
        u: Mat<'a>,
        rows: Range<usize>,
        size: f64,
        sums: SendPtr<f64>,
    }
    impl Kernel for Energy<'_> {
        type Out = ();
        #[inline(always)]
        fn run<L: Level>(self) {
            let mut line = Scratch::<f64>::new(self.u.cols);
            for i in self.rows {
                // SAFETY: row `i` of U; its sum is this thread's.
                unsafe {
                    Line::along(self.u, i, 0).scaled(line.as_mut_ptr(), line.len(), self.size);
                    *self.sums.0.add(i) = sum_of_squares(line.as_ptr(), line.len());
                }
            }
        }
    }
    let u = if u.rs == 1 { u.t() } else { u };
    let mut sums = Scratch::<f64>::new(u.rows);
    let out = SendPtr(sums.as_mut_ptr());
    pool::for_each(cx.threads, u.rows.div_ceil(LINES), &|t| {
        let rows = t * LINES..u.rows.min((t + 1) * LINES);
        cx.isa.run(Energy { u, rows, size, sums: out });
    });
    sums.iter().sum()
}

/// `out ← f₀·f₁·U`, in squares of which each side's lines are read and written along their contiguous direction.
fn transfer(cx: Context, u: Mat<'_>, factors: [f64; 2], out: MatMut<'_>) {
    struct Columns<'a> {
        u: Mat<'a>,
        out: Mat<'a>,
        columns: Range<usize>,
        factors: [f64; 2],
    }
    impl Kernel for Columns<'_> {
        type Out = ();
        #[inline(always)]
        fn run<L: Level>(self) {
            let Columns { u, out, columns, factors } = self;
            let mut tile = [[0.0f64; LINES]; LINES];
            for i0 in (0..u.rows).step_by(LINES) {
                let (rows, width) = (LINES.min(u.rows - i0), columns.len());
                // SAFETY: the lines of a square of either view; this thread alone writes these columns of `out`.
                unsafe {
                    let down = u.rs == 1;
                    for (l, line) in tile.iter_mut().enumerate().take(if down { width } else { rows }) {
                        let (from, len) = match down {
                            true => (Line::down(u, i0, columns.start + l), rows),
                            false => (Line::along(u, i0 + l, columns.start), width),
                        };
                        from.scaled(line.as_mut_ptr(), len, factors[0]);
                        line[..len].iter_mut().for_each(|x| *x *= factors[1]);
                    }
                    if down != (out.rs == 1) {
                        for i in 1..LINES {
                            let (above, line) = tile.split_at_mut(i);
                            line[0].iter_mut().zip(above).for_each(|(x, above)| swap(x, &mut above[i]));
                        }
                    }
                    let down = out.rs == 1;
                    for (l, line) in tile.iter().enumerate().take(if down { width } else { rows }) {
                        match down {
                            true => Line::down(out, i0, columns.start + l).write(line.as_ptr(), rows),
                            false => Line::along(out, i0 + l, columns.start).write(line.as_ptr(), width),
                        }
                    }
                }
            }
        }
    }
    // SAFETY: each task writes lines of its own, and nobody reads them.
    let out = unsafe { out.raw() };
    pool::for_each(cx.threads, u.cols.div_ceil(LINES), &|t| {
        let columns = t * LINES..u.cols.min((t + 1) * LINES);
        cx.isa.run(Columns { u, out, columns, factors });
    });
}

#[cfg(test)]
mod tests;

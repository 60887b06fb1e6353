//! The writing half of a step: weights and buffer, a panel of rows at a time.
//!
//! A panel's M and G are read while they are still in cache from the panel's weights. The only temporary is the
//! normalised residual's panel, which stays in the second-level cache for up to some thousands of columns.

use super::residual::ScaleBoth;
use super::{Noise, Options, Tail};
use crate::gemm::{Context, Packed, Product, Terms};
use crate::isa::{Kernel, Level};
use crate::pool;
use crate::scalar::Real;
use crate::scratch::Scratch;
use crate::view::{Mat, MatMut};

/// What the reading half has found. `b`, `r` and `w` are scaled by `size`.
pub(super) struct Factors<'a> {
    pub(super) p: Mat<'a>,
    pub(super) r: Mat<'a>,
    pub(super) v: Mat<'a>,
    /// M⁺ᵀP
    pub(super) w: Mat<'a>,
    pub(super) b: Terms<'a>,
    pub(super) size: f64,
    pub(super) sign: f64,
}

/// Σ B² over each row and each column.
pub(super) struct Energies<'a> {
    pub(super) row: &'a [f64],
    pub(super) column: &'a [f64],
}

/// A right factor, packed once if X is row-major and so wants it on the left of its products.
pub(super) struct Side<'a, T> {
    view: Mat<'a>,
    packed: Option<Packed<T>>,
}

impl<'a, T: Real> Side<'a, T> {
    pub(super) fn new(cx: Context, view: Mat<'a>, row_major: bool) -> Self {
        Side { view, packed: row_major.then(|| Packed::new(cx, view)) }
    }

    /// `out ← beta·out + alpha·left·sideᵀ + plus`.
    pub(super) fn product(
        &self,
        cx: Context,
        alpha: f64,
        left: Mat<'_>,
        beta: f64,
        out: MatMut<'_>,
        plus: Terms<'_>,
    ) {
        self.write(cx, alpha, left, (beta, false), out, plus);
    }

    /// The same; where `cautious`, beta only where what is added goes against `out`'s sign.
    fn write(
        &self,
        cx: Context,
        alpha: f64,
        left: Mat<'_>,
        (beta, cautious): (f64, bool),
        out: MatMut<'_>,
        plus: Terms<'_>,
    ) {
        let own;
        let (lhs, rhs, out, plus) = match &self.packed {
            Some(packed) => (packed, left.t(), out.t(), plus.t()),
            None => {
                own = Packed::new(cx, left);
                (&own, self.view.t(), out, plus)
            }
        };
        Product { alpha, beta, plus, cautious, ..Product::new(lhs, Terms::one(rhs), out) }.run(cx);
    }
}

/// The residual of this step, reduced to numbers.
pub(super) enum Plan<'a> {
    None,
    /// `α·T`
    Linear(f64),
    /// `weight·N(T)`, N from the inverse column norms and, panel by panel, the rows.
    Normalized {
        columns: Scratch<f64>,
        weight: f64,
        rows: &'a [f64],
        fade: f64,
    },
    /// `α·T` of a T that is given.
    Given(f64, Mat<'a>),
    /// T, given or formed, with columns and rows multiplied by these.
    Scaled {
        given: Option<Mat<'a>>,
        columns: &'a [f64],
        rows: &'a [f64],
    },
}

/// Rows of X, M and G that are worked on at a time.
pub(super) fn panel_rows((rows, n): (usize, usize)) -> usize {
    ((128 * 1024 / n.max(1)).clamp(24, 192) / 24 * 24).min(rows)
}

fn plan<'a>(o: &Options, f: &Factors<'_>, e: &Energies<'a>, noise: Noise) -> Plan<'a> {
    let (m, n, r) = (f.p.rows, f.r.rows, f.r.cols);
    let total: f64 = e.row.iter().sum();
    let row_of_r = |j: usize| (0..r).map(|k| f.r.get(j, k).powi(2)).sum::<f64>();
    // ‖T‖² = ‖B‖² − ‖R‖², as P is orthonormal; of each column too.
    let captured: f64 = if o.tail == Tail::Feedback { total } else { (0..n).map(row_of_r).sum() };
    let energy = total - captured;
    if energy <= noise.tail * total || m.min(n) == r {
        return Plan::None;
    }
    let c = o.tail_scale * ((m.min(n) - r) as f64).sqrt();
    match o.tail {
        Tail::Feedback => Plan::None,
        Tail::Linear => Plan::Linear(c / energy.sqrt()),
        Tail::Normalized => {
            let mut columns = Scratch::zeros(n);
            for (j, inverse) in columns.iter_mut().enumerate() {
                let norm = (e.column[j] - row_of_r(j)).max(noise.fade * e.column[j]).sqrt();
                *inverse = if norm > 0.0 { 1.0 / norm } else { 0.0 };
            }
            // Every row of N that is not zero has norm 1.
            let rows = e.row.iter().filter(|&&x| x > 0.0).count();
            Plan::Normalized { columns, weight: c / (rows as f64).sqrt(), rows: e.row, fade: noise.fade }
        }
    }
}

/// `X ← (1 − ηλ)X − η·scale·D`, `M ← a·M⁺ − (a − b)·P Wᵀ`.
#[allow(clippy::too_many_arguments)]
pub(super) fn apply<T: Real>(
    cx: Context,
    o: &Options,
    scale: f64,
    x: MatMut<'_>,
    m: MatMut<'_>,
    g: Mat<'_>,
    f: &Factors<'_>,
    e: &Energies<'_>,
    noise: Noise,
) {
    let plan = plan(o, f, e, noise);
    // The linear residual joins the head: P Vᵀ + α(B − P Rᵀ) = P (V − αR)ᵀ + αB.
    let joined = match plan {
        Plan::Linear(alpha) => {
            let mut u = Scratch::<T>::new(f.v.rows * f.v.cols);
            cx.isa.run(Form { terms: Terms::two(1.0, f.v, -alpha, f.r), down: false, out: &mut u });
            Some(u)
        }
        _ => None,
    };
    let u = joined.as_ref().map_or(f.v, |u| Mat::row_major(u, f.v.rows, f.v.cols));
    write::<T>(cx, o, scale, x, m, g, &Factors { v: u, ..*f }, &plan);
}

/// The same with the residual planned, and joined to `f.v` if it is linear.
#[allow(clippy::too_many_arguments)]
pub(super) fn write<T: Real>(
    cx: Context,
    o: &Options,
    scale: f64,
    x: MatMut<'_>,
    m: MatMut<'_>,
    g: Mat<'_>,
    f: &Factors<'_>,
    plan: &Plan<'_>,
) {
    let (rows, n) = (x.as_ref().rows, x.as_ref().cols);
    let row_major = |v: Mat<'_>| v.cs == 1 && (v.rs != 1 || v.rows <= 1 || v.cols > 1);
    let x_row_major = row_major(x.as_ref());
    let head = Side::<T>::new(cx, f.v, x_row_major);
    let forms = matches!(plan, Plan::Normalized { .. } | Plan::Scaled { given: None, .. });
    let tail = forms.then(|| Side::<T>::new(cx, f.r, x_row_major));
    let back = (o.a != o.b).then(|| Side::<T>::new(cx, f.w, row_major(m.as_ref())));

    let panel_rows = panel_rows((rows, n));
    // SAFETY: a panel's rows are read and written by the one thread that has the panel.
    let (x, m) = unsafe { (x.raw(), m.raw()) };
    let step = -o.lr * scale;
    let decay = (1.0 - o.lr * o.weight_decay, o.cautious && o.weight_decay > 0.0);
    let serial = cx.serial();
    pool::for_each(cx.threads, rows.div_ceil(panel_rows), &|panel| {
        let range = panel * panel_rows..rows.min((panel + 1) * panel_rows);
        let part = |v: Mat<'_>| {
            let v = v.row_range(range.clone());
            // SAFETY: `apply` borrows X and M exclusively, and panels are disjoint ranges of their rows.
            unsafe { MatMut::from_raw(v.ptr.cast_mut(), v.dtype, (v.rows, v.cols), (v.rs, v.cs)) }
                .drawn(v.draws)
        };
        let p = f.p.row_range(range.clone());
        let b = f.b.row_range(range.clone());
        match plan {
            Plan::None => head.write(serial, step, p, decay, part(x), Terms::none()),
            Plan::Linear(alpha) => head.write(serial, step, p, decay, part(x), b.scaled(step * alpha)),
            Plan::Given(alpha, t) => {
                let t = Terms::one(t.row_range(range.clone())).scaled(step * alpha);
                head.write(serial, step, p, decay, part(x), t);
            }
            Plan::Normalized { rows, .. } | Plan::Scaled { rows, .. } => {
                let strides = if x_row_major { (n as isize, 1) } else { (1, range.len() as isize) };
                let mut t = Scratch::<T>::new(range.len() * n);
                let view = {
                    // SAFETY: the scratch holds `range.len()·n` elements; the view is used up before the next use of it.
                    unsafe { MatMut::from_raw(t.as_mut_ptr().cast(), T::DTYPE, (range.len(), n), strides) }
                };
                match (&tail, plan) {
                    (Some(tail), _) => tail.product(serial, -1.0, p, 0.0, view, b),
                    (None, Plan::Scaled { given: Some(given), .. }) => {
                        let terms = Terms::one(given.row_range(range.clone()));
                        cx.isa.run(Form { terms, down: !x_row_major, out: &mut t });
                    }
                    _ => unreachable!("a residual that is not given is formed"),
                }
                let (rows, t) = (&rows[range.clone()], &mut t[..]);
                let weight = match plan {
                    Plan::Normalized { columns, weight, fade, .. } => {
                        cx.isa.run(Normalize { t, down: !x_row_major, columns, rows, fade: *fade });
                        *weight
                    }
                    Plan::Scaled { columns, .. } => {
                        cx.isa.run(ScaleBoth { t, down: !x_row_major, columns, rows });
                        1.0
                    }
                    _ => unreachable!("the plans of this arm"),
                };
                // SAFETY: as above, and nothing writes to the panel any more.
                let t = unsafe { Mat::from_raw(t.as_ptr().cast(), T::DTYPE, (range.len(), n), strides) };
                head.write(serial, step, p, decay, part(x), Terms::one(t).scaled(step * weight));
            }
        }
        let (m, g) = (part(m), g.row_range(range.clone()));
        let plus = Terms::one(g).scaled(o.a * f.sign);
        match &back {
            Some(back) => back.product(serial, -(o.a - o.b) / f.size, p, o.a, m, plus),
            None => {
                // SAFETY: this thread alone uses the panel.
                let m = unsafe { m.raw() };
                cx.isa.run(Accumulate::<T> { m, g, a: o.a, sign: f.sign, kind: Default::default() })
            }
        }
    });
}

/// `out ← terms`, row by row or, if `down`, column by column.
struct Form<'a, T> {
    terms: Terms<'a>,
    down: bool,
    out: &'a mut [T],
}

impl<T: Real> Kernel for Form<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let (rows, cols) = self.terms.shape().unwrap_or((0, 0));
        let len = if self.down { rows } else { cols };
        for (l, line) in self.out.chunks_exact_mut(len.max(1)).enumerate() {
            let at = if self.down { (0, l) } else { (l, 0) };
            // SAFETY: line `l` of the terms has `len` elements.
            unsafe { self.terms.read(at, self.down, line.as_mut_ptr(), line.len(), false) };
        }
    }
}

/// `M ← a·(M + G)`
struct Accumulate<'a, T> {
    m: Mat<'a>,
    g: Mat<'a>,
    a: f64,
    sign: f64,
    kind: std::marker::PhantomData<T>,
}

impl<T: Real> Kernel for Accumulate<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let terms = Terms::two(self.a, self.m, self.a * self.sign, self.g);
        let down = terms.contiguous_down();
        let (lines, len) = if down { (self.m.cols, self.m.rows) } else { (self.m.rows, self.m.cols) };
        let mut line = Scratch::<T>::new(len);
        for l in 0..lines {
            let at = if down { (0, l) } else { (l, 0) };
            // SAFETY: line `l` of both views has `len` elements; `m` is the caller's exclusive panel.
            unsafe {
                terms.read(at, down, line.as_mut_ptr(), len, false);
                let out = if down {
                    crate::gemm::line::Line::down(self.m, at.0, at.1)
                } else {
                    crate::gemm::line::Line::along(self.m, at.0, at.1)
                };
                out.write(line.as_ptr(), len);
            }
        }
    }
}

/// A panel of T, columns scaled by `columns`, then each row brought to norm 1; rows that are noise fade out.
struct Normalize<'a, T> {
    /// Dense, row-major or, if `down`, column-major.
    t: &'a mut [T],
    down: bool,
    columns: &'a [f64],
    /// Σ B² of the panel's rows.
    rows: &'a [f64],
    fade: f64,
}

impl<T: Real> Kernel for Normalize<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let Normalize { t: data, down, columns, rows, fade } = self;
        let weight = |raw: f64, scaled: f64, b: f64| {
            if scaled <= 0.0 || b <= 0.0 {
                return 0.0;
            }
            (raw / (fade * b)).min(1.0).sqrt() / scaled.sqrt()
        };
        let mut inverse = Scratch::<T>::new(columns.len());
        for (i, c) in inverse.iter_mut().zip(columns) {
            *i = T::of(*c);
        }
        if !down {
            // Sums of a row's squares in 32 partial sums of the working precision, joined in double.
            const LANES: usize = 32;
            for (row, b) in data.chunks_exact_mut(columns.len().max(1)).zip(rows) {
                let (mut raw, mut scaled) = ([T::default(); LANES], [T::default(); LANES]);
                for (chunk, c) in row.chunks_mut(LANES).zip(inverse.chunks(LANES)) {
                    for l in 0..chunk.len() {
                        let v = chunk[l];
                        let s = v * c[l];
                        raw[l] += v * v;
                        scaled[l] += s * s;
                        chunk[l] = s;
                    }
                }
                let sum = |x: [T; LANES]| x.into_iter().map(T::f64).sum::<f64>();
                let w = T::of(weight(sum(raw), sum(scaled), *b));
                for x in row {
                    *x = *x * w;
                }
            }
        } else {
            let mut raw = Scratch::<T>::zeros(rows.len());
            let mut scaled = Scratch::<T>::zeros(rows.len());
            for (column, c) in data.chunks_exact_mut(rows.len().max(1)).zip(inverse.iter()) {
                for ((x, raw), scaled) in column.iter_mut().zip(raw.iter_mut()).zip(scaled.iter_mut()) {
                    let s = *x * *c;
                    *raw += *x * *x;
                    *scaled += s * s;
                    *x = s;
                }
            }
            let mut weights = Scratch::<T>::new(rows.len());
            for (i, w) in weights.iter_mut().enumerate() {
                *w = T::of(weight(raw[i].f64(), scaled[i].f64(), rows[i]));
            }
            for column in data.chunks_exact_mut(rows.len().max(1)) {
                for (x, w) in column.iter_mut().zip(weights.iter()) {
                    *x = *x * *w;
                }
            }
        }
    }
}

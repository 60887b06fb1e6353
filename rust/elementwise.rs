//! AdamW and Lion over lists of tensors (docs/algorithms.md, section 6): one pass over memory each.

use crate::error::Error;
use crate::gemm::Context;
use crate::gemm::line::Line;
use crate::isa::{Kernel, Level};
use crate::pool;
use crate::scalar::Real;
use crate::view::{Mat, MatMut};
use std::marker::PhantomData;

/// Which rule, and its numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// `m ← β₁m + (1−β₁)g`, `v ← β₂v + (1−β₂)g²`, `x ← (1−ηλ)x − η·(m/c₁)/(sqrt(v/c₂) + ε)`, `cᵢ = 1 − βᵢᵗ`.
    AdamW {
        /// 1 − β₁ᵗ
        correction1: f64,
        /// 1 − β₂ᵗ
        correction2: f64,
        /// ε
        epsilon: f64,
    },
    /// `x ← (1−ηλ)x − η·sign(β₁m + (1−β₁)g)`, `m ← β₂m + (1−β₂)g`.
    Lion,
}

/// Hyperparameters that both rules share.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// The rule.
    pub rule: Rule,
    /// η
    pub lr: f64,
    /// λ
    pub weight_decay: f64,
    /// Decay only entries that the step does not push away from zero.
    pub cautious: bool,
    /// β₁
    pub beta1: f64,
    /// β₂
    pub beta2: f64,
    /// Ascend instead of descend.
    pub maximize: bool,
    /// AdamW's alone: what rounding X loses goes into m, `m ← m − (1/β₁ − 1)·(x̃ − x)·c₁(sqrt(v/c₂) + ε)/η`.
    pub compensate: bool,
}

/// One tensor as a matrix view (a vector is one row) and its state; `v` is AdamW's alone.
#[derive(Debug)]
pub struct Tensor<'a> {
    /// Weights.
    pub x: MatMut<'a>,
    /// Gradient.
    pub g: Mat<'a>,
    /// First moment.
    pub m: MatMut<'a>,
    /// Second moment.
    pub v: Option<MatMut<'a>>,
}

/// Elements that one task handles at a time; four lines of them fit in the first-level cache.
const CHUNK: usize = 512;

/// Steps every tensor; `skipped[i]` tells that gradient `i` held NaN or infinity, and then nothing of it was written.
///
/// # Errors
/// [`Error::Shape`] if a state does not fit its weight; then nothing has been written.
pub fn step<T: Real>(
    cx: Context,
    tensors: &mut [(Tensor<'_>, Settings)],
    skipped: &mut [bool],
) -> Result<(), Error> {
    assert_eq!(tensors.len(), skipped.len(), "one flag a tensor");
    for (t, s) in tensors.iter() {
        let x = t.x.as_ref();
        let mut views = vec![("the gradient", t.g), ("the momentum", t.m.as_ref())];
        match (&t.v, s.rule) {
            (Some(v), _) => views.push(("the variance", v.as_ref())),
            (None, Rule::Lion) => {}
            (None, Rule::AdamW { .. }) => {
                return Err(Error::Value { why: "AdamW needs a variance beside the momentum".into() });
            }
        }
        for (what, v) in views {
            if (v.rows, v.cols) != (x.rows, x.cols) {
                return Err(Error::Shape { what, need: (x.rows, x.cols), got: (v.rows, v.cols) });
            }
        }
    }
    // Lines of up to 64 chunks, so that one large embedding is shared by all threads.
    let mut pieces = Vec::new();
    for (i, (t, _)) in tensors.iter().enumerate() {
        let x = t.x.as_ref();
        let rows = x.cs != 1 && x.rs == 1; // run along whichever direction is contiguous
        let (lines, len) = if rows { (x.cols, x.rows) } else { (x.rows, x.cols) };
        let many = (32 * CHUNK / len.max(1)).max(1);
        for line in (0..lines).step_by(many) {
            for at in (0..len).step_by(64 * CHUNK) {
                pieces.push(Piece {
                    tensor: i,
                    down: rows,
                    lines: line..lines.min(line + many),
                    at,
                    len: (64 * CHUNK).min(len - at),
                });
            }
        }
    }
    let finite: Vec<std::sync::atomic::AtomicBool> = tensors.iter().map(|_| true.into()).collect();
    let shared: &[(Tensor<'_>, Settings)] = tensors;
    pool::for_each(cx.threads, pieces.len(), &|p| {
        let piece = &pieces[p];
        if !cx.isa.run(Finite::<T> { piece, g: shared[piece.tensor].0.g, kind: PhantomData }) {
            finite[piece.tensor].store(false, std::sync::atomic::Ordering::Relaxed);
        }
    });
    let finite: Vec<bool> = finite.into_iter().map(std::sync::atomic::AtomicBool::into_inner).collect();
    pool::for_each(cx.threads, pieces.len(), &|p| {
        let piece = &pieces[p];
        if finite[piece.tensor] {
            let (t, s) = &shared[piece.tensor];
            cx.isa.run(Update::<T> { piece, t, s, kind: PhantomData });
        }
    });
    for (s, f) in skipped.iter_mut().zip(finite) {
        *s = !f;
    }
    Ok(())
}

/// A part of a tensor that no other task touches.
struct Piece {
    tensor: usize,
    down: bool,
    lines: std::ops::Range<usize>,
    at: usize,
    len: usize,
}

impl Piece {
    /// Calls `f` with the start of each chunk and its length.
    #[inline(always)]
    fn chunks(&self, mut f: impl FnMut((usize, usize), usize)) {
        for l in self.lines.clone() {
            let mut i = self.at;
            let end = self.at + self.len;
            while i < end {
                let len = CHUNK.min(end - i);
                f(if self.down { (i, l) } else { (l, i) }, len);
                i += len;
            }
        }
    }

    #[inline(always)]
    fn line(&self, view: Mat<'_>, (i, j): (usize, usize)) -> Line {
        if self.down { Line::down(view, i, j) } else { Line::along(view, i, j) }
    }
}

struct Finite<'a, T> {
    piece: &'a Piece,
    g: Mat<'a>,
    kind: PhantomData<T>,
}

impl<T: Real> Kernel for Finite<'_, T> {
    type Out = bool;
    #[inline(always)]
    fn run<L: Level>(self) -> bool {
        let mut poison = [T::default(); CHUNK];
        let mut g = [T::default(); CHUNK];
        self.piece.chunks(|at, len| {
            // SAFETY: a piece's chunks lie inside its tensor's views.
            unsafe { self.piece.line(self.g, at).scaled(g.as_mut_ptr(), len, T::of(1.0)) };
            for (p, g) in poison[..len].iter_mut().zip(&g[..len]) {
                *p += *g * T::default(); // zero, unless g is infinite or NaN
            }
        });
        poison.iter().all(|p| p.finite())
    }
}

struct Update<'a, 'b, T> {
    piece: &'a Piece,
    t: &'a Tensor<'b>,
    s: &'a Settings,
    kind: PhantomData<T>,
}

impl<T: Real> Kernel for Update<'_, '_, T> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let Update { piece, t, s, .. } = self;
        let (mut x, mut g) = ([T::default(); CHUNK], [T::default(); CHUNK]);
        let (mut m, mut v) = ([T::default(); CHUNK], [T::default(); CHUNK]);
        let mut gain = [T::default(); CHUNK];
        let (b1, b2) = (T::of(s.beta1), T::of(s.beta2));
        let (c1, c2) = (T::of(1.0 - s.beta1), T::of(1.0 - s.beta2));
        let (lr, decay) = (T::of(s.lr), T::of(1.0 - s.lr * s.weight_decay));
        let one = T::of(1.0);
        let first = if s.cautious { one } else { decay };
        // `u` has the sign of what is subtracted.
        let kept = |x: T, u: T| {
            let zero = T::default();
            let against = (x > zero && u < zero) || (x < zero && u > zero);
            if s.cautious && !against { decay * x } else { x }
        };
        let sign = T::of(if s.maximize { -1.0 } else { 1.0 });
        piece.chunks(|at, len| {
            // SAFETY: a piece's chunks lie inside its tensor's views, and pieces are disjoint.
            unsafe {
                piece.line(t.x.raw(), at).scaled(x.as_mut_ptr(), len, first);
                piece.line(t.g, at).scaled(g.as_mut_ptr(), len, sign);
                piece.line(t.m.raw(), at).scaled(m.as_mut_ptr(), len, one);
            }
            match s.rule {
                Rule::AdamW { correction1, correction2, epsilon } => {
                    let Some(var) = t.v.as_ref() else { return };
                    // SAFETY: as above.
                    unsafe { piece.line(var.raw(), at).scaled(v.as_mut_ptr(), len, one) };
                    let step = T::of(s.lr / correction1);
                    let root = T::of(1.0 / correction2.sqrt());
                    let eps = T::of(epsilon);
                    let most = T::of(T::MAX);
                    for i in 0..len {
                        m[i] = b1 * m[i] + c1 * g[i];
                        let next = b2 * v[i] + c2 * (g[i] * g[i]);
                        v[i] = if next > most { most } else { next }; // an infinite variance would stay so for ever
                        let below = v[i].sqrt() * root + eps;
                        x[i] = kept(x[i], m[i]) - step * m[i] / below;
                        gain[i] = below;
                    }
                    if s.compensate && s.lr > 0.0 && s.beta1 > 0.0 {
                        let share = T::of((1.0 / s.beta1 - 1.0) * correction1 / s.lr);
                        // SAFETY: as above; what has been written is read again as it was rounded.
                        unsafe {
                            piece.line(t.x.raw(), at).write(x.as_ptr(), len);
                            piece.line(t.x.raw(), at).scaled(g.as_mut_ptr(), len, one);
                        }
                        for i in 0..len {
                            m[i] = m[i] - share * gain[i] * (x[i] - g[i]);
                        }
                    }
                    // SAFETY: as above.
                    unsafe { piece.line(var.raw(), at).write(v.as_ptr(), len) };
                }
                Rule::Lion => {
                    for i in 0..len {
                        let u = b1 * m[i] + c1 * g[i];
                        let zero = T::default();
                        let up = if u > zero { lr } else { zero };
                        let down = if u < zero { lr } else { zero };
                        x[i] = kept(x[i], u) - up + down;
                        m[i] = b2 * m[i] + c2 * g[i];
                    }
                }
            }
            // SAFETY: as above.
            unsafe {
                piece.line(t.x.raw(), at).write(x.as_ptr(), len);
                piece.line(t.m.raw(), at).write(m.as_ptr(), len);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemm::tests::noise;

    #[test]
    fn both_rules_follow_their_equations_in_any_layout() {
        for (rows, cols, strides) in
            [(1, 5000, (5000, 1)), (37, 41, (41, 1)), (37, 41, (1, 37)), (3, 700, (701, 1))]
        {
            let len = strides.0 * rows + strides.1 * cols;
            let [x0, g, m0] = [1, 2, 3].map(|s| noise(s, len));
            let v0: Vec<f64> = noise(4, len).iter().map(|x| x.abs()).collect();
            for rule in [Rule::AdamW { correction1: 0.4, correction2: 0.1, epsilon: 1e-3 }, Rule::Lion] {
                for cautious in [false, true] {
                    let (mut x, mut m, mut v) = (x0.clone(), m0.clone(), v0.clone());
                    let s = Settings {
                        rule,
                        lr: 0.1,
                        weight_decay: 0.3,
                        cautious,
                        beta1: 0.8,
                        beta2: 0.9,
                        maximize: false,
                        compensate: false,
                    };
                    let shape = (rows, cols);
                    let tensor = Tensor {
                        x: MatMut::new(&mut x, shape, strides).unwrap(),
                        g: Mat::new(&g, shape, strides).unwrap(),
                        m: MatMut::new(&mut m, shape, strides).unwrap(),
                        v: Some(MatMut::new(&mut v, shape, strides).unwrap()),
                    };
                    step::<f64>(Context::new(2), &mut [(tensor, s)], &mut [false]).unwrap();
                    for i in 0..rows {
                        for j in 0..cols {
                            let at = i * strides.0 + j * strides.1;
                            let u = 0.8 * m0[at] + 0.2 * g[at];
                            let kept = if cautious && u * x0[at] < 0.0 { x0[at] } else { 0.97 * x0[at] };
                            let (wm, wv, wx) = match rule {
                                Rule::AdamW { .. } => {
                                    let wm = u;
                                    let wv = 0.9 * v0[at] + 0.1 * g[at] * g[at];
                                    (wm, wv, kept - 0.1 * (wm / 0.4) / ((wv / 0.1).sqrt() + 1e-3))
                                }
                                Rule::Lion => (0.9 * m0[at] + 0.1 * g[at], v0[at], kept - 0.1 * u.signum()),
                            };
                            for (got, want) in [(m[at], wm), (v[at], wv), (x[at], wx)] {
                                assert!((got - want).abs() < 1e-13, "{rule:?} {got} {want}");
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_nan_changes_nothing_of_its_tensor_and_all_of_the_others() {
        let mut x = [vec![1.0f32; 40_000], vec![1.0f32; 7]];
        let mut m = [vec![0.0f32; 40_000], vec![0.0f32; 7]];
        let mut g = [vec![1.0f32; 40_000], vec![1.0f32; 7]];
        g[0][39_999] = f32::NAN;
        let s = Settings {
            rule: Rule::Lion,
            lr: 0.1,
            weight_decay: 0.0,
            cautious: false,
            beta1: 0.9,
            beta2: 0.9,
            maximize: false,
            compensate: false,
        };
        let mut tensors: Vec<_> = x
            .iter_mut()
            .zip(&mut m)
            .zip(&g)
            .map(|((x, m), g)| {
                let n = g.len();
                (
                    Tensor {
                        x: MatMut::row_major(x, 1, n),
                        g: Mat::row_major(g, 1, n),
                        m: MatMut::row_major(m, 1, n),
                        v: None,
                    },
                    s,
                )
            })
            .collect();
        let mut skipped = [false; 2];
        step::<f32>(Context::new(2), &mut tensors, &mut skipped).unwrap();
        assert_eq!(skipped, [true, false]);
        assert!(x[0].iter().all(|&x| x == 1.0) && m[0].iter().all(|&m| m == 0.0));
        assert!(x[1].iter().all(|&x| x == 0.9));
    }
}

//! What happens to a finished block of sums: `out ← β·out + α·acc + Σ cₜ·plusₜ`, one pass over each line.

use super::line::Line;
use super::pack::Terms;
use crate::scalar::Real;
use crate::view::Mat;

/// Where sums go and what joins them.
pub(super) struct Epilogue<'a, T> {
    pub(super) out: Mat<'a>,
    pub(super) alpha: T,
    pub(super) beta: T,
    pub(super) plus: Terms<'a>,
    /// β only where the sum does not push `out` away from zero: elsewhere 1.
    pub(super) cautious: bool,
}

impl<T: Real> Epilogue<'_, T> {
    /// Asks for what [`Epilogue::line`] will read of a tile, while that is still being summed.
    #[inline(always)]
    pub(super) fn prefetch(&self, (i, j): (usize, usize), rows: usize, columns: usize) {
        for l in j..j + columns {
            if self.beta != T::default() {
                Line::down(self.out, i, l).prefetch(rows);
            }
            self.plus.prefetch((i, l), true, rows);
        }
    }

    /// Writes `rows` elements of column `j` from row `i` on; `acc` is used up.
    ///
    /// # Safety
    /// The elements lie inside `out` and `plus`, nobody else uses them, and `acc` holds `rows` elements.
    #[inline(always)]
    pub(super) unsafe fn line(&self, (i, j): (usize, usize), acc: *mut T, rows: usize) {
        if self.cautious {
            // SAFETY: the caller's.
            unsafe { self.with_care((i, j), acc, rows) };
            return;
        }
        let out = Line::down(self.out, i, j);
        // SAFETY: the caller's, for every branch.
        unsafe {
            let lines = self.plus.lines_down(i, j);
            let fast = out.dense::<T>();
            match (fast, lines) {
                (Some(out), [None, _]) if self.beta == T::default() => {
                    for k in 0..rows {
                        *out.add(k) = self.alpha * *acc.add(k);
                    }
                }
                (Some(out), [None, _]) => {
                    for k in 0..rows {
                        *out.add(k) = self.beta * *out.add(k) + self.alpha * *acc.add(k);
                    }
                }
                (Some(out), [Some((c0, l0)), l1]) if l0.dense::<T>().is_some() => {
                    let e0 = l0.dense::<T>().unwrap_unchecked().cast_const();
                    match l1 {
                        None => self.with_one(out, acc, rows, (c0, e0)),
                        Some((c1, l1)) => {
                            if let Some(e1) = l1.dense::<T>() {
                                self.with_two(out, acc, rows, (c0, e0), (c1, e1.cast_const()));
                            } else {
                                self.general((i, j), acc, rows);
                            }
                        }
                    }
                }
                _ => self.general((i, j), acc, rows),
            }
        }
    }

    /// # Safety
    /// As [`Epilogue::line`]; `e0` holds `rows` elements.
    #[inline(always)]
    unsafe fn with_one(&self, out: *mut T, acc: *const T, rows: usize, (c0, e0): (T, *const T)) {
        // SAFETY: the caller's.
        unsafe {
            if self.beta == T::default() {
                for k in 0..rows {
                    *out.add(k) = self.alpha * *acc.add(k) + c0 * *e0.add(k);
                }
            } else {
                for k in 0..rows {
                    *out.add(k) = self.beta * *out.add(k) + (self.alpha * *acc.add(k) + c0 * *e0.add(k));
                }
            }
        }
    }

    /// # Safety
    /// As [`Epilogue::line`]; `e0` and `e1` hold `rows` elements.
    #[inline(always)]
    unsafe fn with_two(
        &self,
        out: *mut T,
        acc: *const T,
        rows: usize,
        (c0, e0): (T, *const T),
        (c1, e1): (T, *const T),
    ) {
        // SAFETY: the caller's.
        unsafe {
            if self.beta == T::default() {
                for k in 0..rows {
                    *out.add(k) = self.alpha * *acc.add(k) + (c0 * *e0.add(k) + c1 * *e1.add(k));
                }
            } else {
                for k in 0..rows {
                    let sum = self.alpha * *acc.add(k) + (c0 * *e0.add(k) + c1 * *e1.add(k));
                    *out.add(k) = self.beta * *out.add(k) + sum;
                }
            }
        }
    }

    /// `out ← β·out + sum` where the sum goes against `out`'s sign (or one of them is zero), `out + sum` elsewhere.
    ///
    /// # Safety
    /// As [`Epilogue::line`].
    #[inline(always)]
    unsafe fn with_care(&self, (i, j): (usize, usize), acc: *mut T, rows: usize) {
        const CHUNK: usize = 64;
        let one = T::of(1.0);
        // SAFETY: the caller's; chunks lie inside the line.
        unsafe {
            for k in 0..rows {
                *acc.add(k) = self.alpha * *acc.add(k);
            }
            self.plus.read((i, j), true, acc, rows, true);
            let mut old = [T::default(); CHUNK];
            for from in (0..rows).step_by(CHUNK) {
                let len = CHUNK.min(rows - from);
                let (out, sum) = (Line::down(self.out, i + from, j), acc.add(from));
                out.scaled(old.as_mut_ptr(), len, one);
                for (k, x) in old.iter().enumerate().take(len) {
                    let keep = if same_sign(*x, *sum.add(k)) { one } else { self.beta };
                    *sum.add(k) = keep * *x + *sum.add(k);
                }
                out.write(sum, len);
            }
        }
    }

    /// Any storage types and strides, in working precision within `acc`.
    ///
    /// # Safety
    /// As [`Epilogue::line`].
    #[inline(always)]
    unsafe fn general(&self, (i, j): (usize, usize), acc: *mut T, rows: usize) {
        // SAFETY: the caller's.
        unsafe {
            for k in 0..rows {
                *acc.add(k) = self.alpha * *acc.add(k);
            }
            self.plus.read((i, j), true, acc, rows, true);
            let out = Line::down(self.out, i, j);
            if self.beta != T::default() {
                out.add_to(acc, rows, self.beta);
            }
            out.write(acc, rows);
        }
    }
}

/// Whether neither is zero and both have one sign; a product of theirs might vanish.
#[inline(always)]
pub(crate) fn same_sign<T: Real>(x: T, y: T) -> bool {
    let zero = T::default();
    (x > zero && y > zero) || (x < zero && y < zero)
}

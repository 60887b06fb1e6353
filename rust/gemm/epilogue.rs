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

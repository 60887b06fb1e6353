//! Lines: `len` elements at a constant stride, of any storage type, read into and written from working precision.
//!
//! Plain loops; they are inlined into kernels and vectorised there for the level at hand.

use crate::scalar::{Dtype, Element, Real, with_element};
use crate::view::Mat;

/// A line inside a view.
#[derive(Clone, Copy)]
pub(crate) struct Line {
    ptr: *const u8,
    dtype: Dtype,
    stride: isize,
}

impl Line {
    /// From `(i, j)` down the column.
    #[inline(always)]
    pub(crate) fn down(view: Mat<'_>, i: usize, j: usize) -> Self {
        Line { ptr: view.at(i, j), dtype: view.dtype, stride: view.rs }
    }

    /// From `(i, j)` along the row.
    #[inline(always)]
    pub(crate) fn along(view: Mat<'_>, i: usize, j: usize) -> Self {
        Line { ptr: view.at(i, j), dtype: view.dtype, stride: view.cs }
    }

    /// `dst ← c·line`
    ///
    /// # Safety
    /// The line holds `len` readable elements, `dst` is writable for `len`.
    #[inline(always)]
    pub(crate) unsafe fn scaled<T: Real>(self, dst: *mut T, len: usize, c: T) {
        // SAFETY: the caller's.
        with_element!(self.dtype, E => unsafe { self.each::<E, T>(len, |i, x| *dst.add(i) = c * x) })
    }

    /// `dst ← dst + c·line`
    ///
    /// # Safety
    /// As [`Line::scaled`].
    #[inline(always)]
    pub(crate) unsafe fn add_to<T: Real>(self, dst: *mut T, len: usize, c: T) {
        // SAFETY: the caller's.
        with_element!(self.dtype, E => unsafe { self.each::<E, T>(len, |i, x| *dst.add(i) += c * x) })
    }

    /// `line ← src`, rounded to the line's type.
    ///
    /// # Safety
    /// The line holds `len` writable elements that nobody else uses, `src` is readable for `len`.
    #[inline(always)]
    pub(crate) unsafe fn write<T: Real>(self, src: *const T, len: usize) {
        with_element!(self.dtype, E => {
            let p = self.ptr.cast::<E>().cast_mut();
            // SAFETY: the caller's.
            unsafe {
                if self.stride == 1 {
                    for i in 0..len {
                        *p.add(i) = E::store(*src.add(i));
                    }
                } else {
                    for i in 0..len {
                        *p.offset(i as isize * self.stride) = E::store(*src.add(i));
                    }
                }
            }
        })
    }

    /// `f(i, line[i])` for each element.
    ///
    /// # Safety
    /// The line holds `len` readable elements of type `E`.
    #[inline(always)]
    unsafe fn each<E: Element, T: Real>(self, len: usize, mut f: impl FnMut(usize, T)) {
        let p = self.ptr.cast::<E>();
        // SAFETY: the caller's.
        unsafe {
            if self.stride == 1 {
                for i in 0..len {
                    f(i, (*p.add(i)).load());
                }
            } else {
                for i in 0..len {
                    f(i, (*p.offset(i as isize * self.stride)).load());
                }
            }
        }
    }
}

/// Σ x², in double precision, eight partial sums in a fixed order.
///
/// # Safety
/// `x` is readable for `len` elements.
#[inline(always)]
pub(crate) unsafe fn sum_of_squares<T: Real>(x: *const T, len: usize) -> f64 {
    let mut s = [0.0f64; 8];
    let body = len / 8 * 8;
    // SAFETY: every index is below `len`.
    unsafe {
        let mut i = 0;
        while i < body {
            for (l, sl) in s.iter_mut().enumerate() {
                let v = (*x.add(i + l)).f64();
                *sl += v * v;
            }
            i += 8;
        }
        for (l, sl) in s.iter_mut().enumerate().take(len - body) {
            let v = (*x.add(body + l)).f64();
            *sl += v * v;
        }
    }
    ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]))
}

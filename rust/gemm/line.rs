//! Lines: `len` elements at a constant stride, of any storage type, read into and written from working precision.
//!
//! Plain loops; they are inlined into kernels and vectorised there for the level at hand.

use crate::isa::prefetch;
use crate::rng::mixed;
use crate::scalar::{Dtype, Element, Real, with_element};
use crate::view::Mat;

/// A line inside a view.
#[derive(Clone, Copy)]
pub(crate) struct Line {
    ptr: *const u8,
    dtype: Dtype,
    stride: isize,
    /// The first element's counter and their distance, where they are rounded by draws.
    draws: Option<(u64, u64)>,
}

impl Line {
    /// From `(i, j)` down the column.
    #[inline(always)]
    pub(crate) fn down(view: Mat<'_>, i: usize, j: usize) -> Self {
        let draws = view.draws.map(|d| d.down(i, j));
        Line { ptr: view.at(i, j), dtype: view.dtype, stride: view.rs, draws }
    }

    /// From `(i, j)` along the row.
    #[inline(always)]
    pub(crate) fn along(view: Mat<'_>, i: usize, j: usize) -> Self {
        Self::down(view.t(), j, i)
    }

    /// Asks for the line's first `len` elements, if they are contiguous.
    #[inline(always)]
    pub(crate) fn prefetch(self, len: usize) {
        if self.stride == 1 {
            prefetch(self.ptr, len * self.dtype.size());
        }
    }

    /// The line's memory, if it is contiguous and of element type `T`.
    #[inline(always)]
    pub(crate) fn dense<T: Element>(self) -> Option<*mut T> {
        (self.stride == 1 && self.dtype == T::DTYPE).then(|| self.ptr.cast::<T>().cast_mut())
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

    /// `line ← src`, rounded to the line's type, to nearest or by draws.
    ///
    /// # Safety
    /// The line holds `len` writable elements that nobody else uses, `src` is readable for `len`.
    #[inline(always)]
    pub(crate) unsafe fn write<T: Real>(self, src: *const T, len: usize) {
        if let Some((mut at, step)) = self.draws {
            with_element!(self.dtype, E => {
                let p = self.ptr.cast::<E>().cast_mut();
                for i in 0..len {
                    // SAFETY: the caller's.
                    unsafe { *p.offset(i as isize * self.stride) = E::store_drawn(*src.add(i), (mixed(at) >> 32) as u32) };
                    at = at.wrapping_add(step);
                }
            });
            return;
        }
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

/// Σ x² over at most a few hundred elements: partial sums in `T`, few enough not to matter, joined in double in a fixed
/// order.
///
/// # Safety
/// `x` is readable for `len` elements.
#[inline(always)]
pub(crate) unsafe fn sum_of_squares<T: Real>(x: *const T, len: usize) -> f64 {
    const LANES: usize = 32;
    let mut s = [T::default(); LANES];
    let body = len / LANES * LANES;
    // SAFETY: every index is below `len`.
    unsafe {
        let mut i = 0;
        while i < body {
            for (l, sl) in s.iter_mut().enumerate() {
                let v = *x.add(i + l);
                *sl += v * v;
            }
            i += LANES;
        }
        for (l, sl) in s.iter_mut().enumerate().take(len - body) {
            let v = *x.add(body + l);
            *sl += v * v;
        }
    }
    s.into_iter().map(T::f64).sum()
}

//! Strided matrix views over memory that somebody else owns.
//!
//! A view carries its element type as a tag, because one optimizer step mixes bfloat16 weights with float32 states and
//! would otherwise be compiled once a combination. Strides count elements and may be zero or negative in a [`Mat`];
//! a [`MatMut`] must not alias itself.

use crate::error::Error;
use crate::rng::Draws;
use crate::scalar::{Dtype, Element};
use std::marker::PhantomData;
use std::ops::Range;

/// A shared view, `rows` by `cols`.
///
/// Invariant, relied on by every `unsafe` block that reads through one: each element `(i, j)` lies at
/// `ptr + (i·rs + j·cs)·size`, aligned and readable for the lifetime `'a`.
#[derive(Clone, Copy, Debug)]
pub struct Mat<'a> {
    pub(crate) ptr: *const u8,
    pub(crate) dtype: Dtype,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) rs: isize,
    pub(crate) cs: isize,
    /// How what is written is rounded, where not to nearest.
    pub(crate) draws: Option<Draws>,
    life: PhantomData<&'a ()>,
}

/// A view that may be written: as [`Mat`], exclusive, no two elements at one address.
#[derive(Debug)]
pub struct MatMut<'a> {
    view: Mat<'a>,
    exclusive: PhantomData<&'a mut ()>,
}

// SAFETY: a view is a borrow of plain numbers; sharing one is sharing a `&[T]`.
unsafe impl Send for Mat<'_> {}
// SAFETY: as above.
unsafe impl Sync for Mat<'_> {}
// SAFETY: an exclusive borrow of plain numbers, as `&mut [T]`.
unsafe impl Send for MatMut<'_> {}
// SAFETY: a shared reference to a `MatMut` gives no way to write.
unsafe impl Sync for MatMut<'_> {}

/// Elements from the first to behind the last, for non-negative strides.
fn span(rows: usize, cols: usize, rs: usize, cs: usize) -> usize {
    if rows == 0 || cols == 0 {
        return 0;
    }
    (rows - 1).saturating_mul(rs).saturating_add((cols - 1).saturating_mul(cs)).saturating_add(1)
}

impl<'a> Mat<'a> {
    /// Views `data`: element `(i, j)` is `data[i·rs + j·cs]`.
    ///
    /// # Errors
    /// [`Error::Bounds`] if an element lies outside `data`.
    pub fn new<T: Element>(
        data: &'a [T],
        (rows, cols): (usize, usize),
        (rs, cs): (usize, usize),
    ) -> Result<Self, Error> {
        let need = span(rows, cols, rs, cs);
        if need > data.len() {
            return Err(Error::Bounds { need, got: data.len() });
        }
        // SAFETY: the span was just checked against the slice, which is aligned and lives for 'a.
        Ok(unsafe {
            Self::from_raw(data.as_ptr().cast(), T::DTYPE, (rows, cols), (rs as isize, cs as isize))
        })
    }

    /// A row-major view of `data`, whose length must be `rows·cols`.
    pub(crate) fn row_major<T: Element>(data: &'a [T], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "a row-major view covers its slice");
        // SAFETY: the assertion is the bounds check.
        unsafe { Self::from_raw(data.as_ptr().cast(), T::DTYPE, (rows, cols), (cols as isize, 1)) }
    }

    /// A view over raw memory.
    ///
    /// # Safety
    /// The invariant of [`Mat`] holds for `'a`.
    pub unsafe fn from_raw(
        ptr: *const u8,
        dtype: Dtype,
        (rows, cols): (usize, usize),
        (rs, cs): (isize, isize),
    ) -> Self {
        Mat { ptr, dtype, rows, cols, rs, cs, draws: None, life: PhantomData }
    }

    /// Rows and columns.
    pub fn shape(self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// The transpose: the same memory with rows and columns exchanged.
    pub fn t(self) -> Self {
        let draws = self.draws.map(Draws::t);
        Mat { rows: self.cols, cols: self.rows, rs: self.cs, cs: self.rs, draws, ..self }
    }

    /// Rows `range` of the view.
    pub fn row_range(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.rows, "row range inside the view");
        let (ptr, draws) = (self.at(range.start, 0), self.draws.map(|d| d.at_row(range.start)));
        Mat { ptr, rows: range.len(), draws, ..self }
    }

    /// Columns `range` of the view.
    pub fn col_range(self, range: Range<usize>) -> Self {
        self.t().row_range(range).t()
    }

    /// Element `(i, j)` in double precision.
    pub fn get(self, i: usize, j: usize) -> f64 {
        assert!(i < self.rows && j < self.cols, "index inside the view");
        // SAFETY: in range, so by the view's invariant readable and aligned.
        crate::scalar::with_element!(self.dtype, E => unsafe {
            self.at(i, j).cast::<E>().read().load::<f64>()
        })
    }

    /// Address of `(i, j)`; may be one row past the end.
    #[inline(always)]
    pub(crate) fn at(self, i: usize, j: usize) -> *const u8 {
        let offset = i as isize * self.rs + j as isize * self.cs;
        self.ptr.wrapping_offset(offset * self.dtype.size() as isize)
    }
}

impl<'a> MatMut<'a> {
    /// Views `data` for writing: element `(i, j)` is `data[i·rs + j·cs]`.
    ///
    /// # Errors
    /// [`Error::Bounds`] if an element lies outside `data`, [`Error::Value`] if two elements share an address.
    pub fn new<T: Element>(
        data: &'a mut [T],
        (rows, cols): (usize, usize),
        (rs, cs): (usize, usize),
    ) -> Result<Self, Error> {
        let need = span(rows, cols, rs, cs);
        if need > data.len() {
            return Err(Error::Bounds { need, got: data.len() });
        }
        if !is_injective((rows, cols), (rs as isize, cs as isize)) {
            return Err(Error::Value {
                why: format!("strides ({rs}, {cs}) put two elements of a written view at one address"),
            });
        }
        // SAFETY: in bounds, injective, exclusively borrowed for 'a.
        Ok(unsafe {
            Self::from_raw(data.as_mut_ptr().cast(), T::DTYPE, (rows, cols), (rs as isize, cs as isize))
        })
    }

    /// A row-major view of `data`, whose length must be `rows·cols`.
    pub(crate) fn row_major<T: Element>(data: &'a mut [T], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "a row-major view covers its slice");
        // SAFETY: the assertion is the bounds check; row-major views are injective.
        unsafe { Self::from_raw(data.as_mut_ptr().cast(), T::DTYPE, (rows, cols), (cols as isize, 1)) }
    }

    /// A writable view over raw memory.
    ///
    /// # Safety
    /// The invariants of [`Mat`] and [`MatMut`] hold for `'a`.
    pub unsafe fn from_raw(
        ptr: *mut u8,
        dtype: Dtype,
        shape: (usize, usize),
        strides: (isize, isize),
    ) -> Self {
        // SAFETY: the caller's.
        let view = unsafe { Mat::from_raw(ptr, dtype, shape, strides) };
        MatMut { view, exclusive: PhantomData }
    }

    /// The same view, what is written to it rounded stochastically to formats of two bytes: up with the probability
    /// that makes it right on average.
    pub fn drawn(mut self, draws: Option<Draws>) -> Self {
        self.view.draws = draws;
        self
    }

    /// A shared view for as long as `self` is borrowed.
    pub fn as_ref(&self) -> Mat<'_> {
        self.view
    }

    /// An exclusive view for as long as `self` is borrowed.
    pub fn reborrow(&mut self) -> MatMut<'_> {
        MatMut { view: self.view, exclusive: PhantomData }
    }

    /// The transpose.
    pub fn t(self) -> Self {
        MatMut { view: self.view.t(), exclusive: PhantomData }
    }

    /// Rows `range` of the view.
    pub fn row_range(self, range: Range<usize>) -> Self {
        MatMut { view: self.view.row_range(range), exclusive: PhantomData }
    }

    /// Columns `range` of the view.
    pub fn col_range(self, range: Range<usize>) -> Self {
        MatMut { view: self.view.col_range(range), exclusive: PhantomData }
    }

    /// The view's memory, for code that reads and writes disjoint parts from several threads.
    ///
    /// # Safety
    /// While a thread writes an element, nobody else reads or writes it through what is returned.
    #[inline(always)]
    pub(crate) unsafe fn raw(&self) -> Mat<'a> {
        self.view
    }
}

/// No two of the `rows·cols` elements share an address. Sufficient test: one stride clears the other's extent.
pub fn is_injective((rows, cols): (usize, usize), (rs, cs): (isize, isize)) -> bool {
    let (rs, cs) = (rs.unsigned_abs(), cs.unsigned_abs());
    if rows == 0 || cols == 0 {
        return true;
    }
    let clears = |inner: usize, n: usize, outer: usize, m: usize| {
        (n == 1 || inner > 0) && (m == 1 || outer > inner.saturating_mul(n - 1))
    };
    clears(cs, cols, rs, rows) || clears(rs, rows, cs, cols)
}

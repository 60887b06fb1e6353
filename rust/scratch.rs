//! Scratch memory, kept by each thread from one step to the next.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

/// One cache line; the unit and the alignment of every buffer.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// What a thread keeps at most: beyond that a step takes so long that fresh pages cost nothing beside it.
const KEPT_BYTES: usize = 64 << 20;

thread_local! {
    static FREE: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// A slice of numbers whose memory returns to its thread's store when it is dropped. Its first contents are arbitrary.
pub(crate) struct Scratch<T> {
    lines: Vec<Line>,
    len: usize,
    kind: PhantomData<T>,
}

/// Plain numbers: every bit pattern is a value, and 64-byte alignment suffices.
pub trait Plain: Copy {}
impl Plain for f32 {}
impl Plain for f64 {}

impl<T: Plain> Scratch<T> {
    /// `len` elements, arbitrary contents.
    pub(crate) fn new(len: usize) -> Self {
        let bytes = len.checked_mul(size_of::<T>()).expect("a buffer that fits into memory");
        let need = bytes.div_ceil(size_of::<Line>());
        let mut lines = FREE.with_borrow_mut(|free| {
            // The smallest buffer that fits, else the largest one, to be grown.
            let fits = (0..free.len()).filter(|&i| free[i].len() >= need).min_by_key(|&i| free[i].len());
            let pick = fits.or_else(|| (0..free.len()).max_by_key(|&i| free[i].len()));
            pick.map(|i| free.swap_remove(i)).unwrap_or_default()
        });
        if lines.len() < need {
            lines = vec![Line([0; 64]); need]; // not `resize`: the old contents need no copy
        }
        Scratch { lines, len, kind: PhantomData }
    }

    /// `len` zeros.
    pub(crate) fn zeros(len: usize) -> Self
    where
        T: Default,
    {
        let mut s = Self::new(len);
        s.fill(T::default());
        s
    }
}

impl<T: Plain> Deref for Scratch<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: the lines are initialised, at least `len` elements long, aligned to 64, and `T` is plain.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl<T: Plain> DerefMut for Scratch<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `self` is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

impl<T> Drop for Scratch<T> {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        // A thread that is ending has no store any more; then the memory is simply freed.
        let _ = FREE.try_with(|free| {
            if let Ok(mut free) = free.try_borrow_mut() {
                let kept: usize = free.iter().map(Vec::len).sum();
                if (kept + lines.len()) * size_of::<Line>() <= KEPT_BYTES {
                    free.push(lines);
                }
            }
        });
    }
}

/// Bytes that this thread keeps for later.
#[cfg(test)]
pub(crate) fn kept_bytes() -> usize {
    FREE.with_borrow(|free| free.iter().map(|b| b.len() * size_of::<Line>()).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_reused() {
        drop(Scratch::<f32>::new(1000));
        let before = kept_bytes();
        for _ in 0..10 {
            let s = Scratch::<f64>::new(500);
            assert_eq!(s.as_ptr() as usize % 64, 0);
        }
        assert_eq!(kept_bytes(), before);
    }
}

//! Checks on views described by a foreign caller: bounds, alignment, overlap.

use crate::error::Error;
use crate::scalar::Dtype;
use crate::view::{Mat, MatMut, is_injective};

/// A view as a caller describes it, with the allocation that it claims to lie in. Strides count elements.
#[derive(Clone, Copy, Debug)]
pub struct Claim {
    /// Address of element (0, 0).
    pub ptr: usize,
    /// Element type.
    pub dtype: Dtype,
    /// Rows and columns.
    pub shape: (usize, usize),
    /// Strides.
    pub strides: (isize, isize),
    /// First byte of the allocation.
    pub base: usize,
    /// Bytes in it.
    pub bytes: usize,
    /// Whether the call writes through it.
    pub written: bool,
}

impl Claim {
    /// First byte and the byte behind the last; empty views have none.
    fn extent(&self) -> Option<(usize, usize)> {
        let (rows, cols) = self.shape;
        if rows == 0 || cols == 0 {
            return None;
        }
        let reach = |n: usize, s: isize| (n as i128 - 1) * s as i128 * self.dtype.size() as i128;
        let (down, along) = (reach(rows, self.strides.0), reach(cols, self.strides.1));
        let low = self.ptr as i128 + down.min(0) + along.min(0);
        let high = self.ptr as i128 + down.max(0) + along.max(0) + self.dtype.size() as i128;
        Some((usize::try_from(low).ok()?, usize::try_from(high).ok()?))
    }

    /// The view, shared.
    ///
    /// # Safety
    /// The allocation exists and stays for `'a`, and [`check`] has passed this claim.
    pub unsafe fn shared<'a>(&self) -> Mat<'a> {
        // SAFETY: the caller's.
        unsafe { Mat::from_raw(self.ptr as *const u8, self.dtype, self.shape, self.strides) }
    }

    /// The view, for writing.
    ///
    /// # Safety
    /// As [`Claim::shared`], and [`check`] has passed it as written, together with all other claims of the call.
    pub unsafe fn exclusive<'a>(&self) -> MatMut<'a> {
        // SAFETY: the caller's.
        unsafe { MatMut::from_raw(self.ptr as *mut u8, self.dtype, self.shape, self.strides) }
    }

    /// Period and width in bytes of a view that is a run of `width` bytes every `period`, if it is one.
    fn lattice(&self) -> (usize, usize) {
        let size = self.dtype.size();
        let (rows, cols) = self.shape;
        let (rs, cs) = (self.strides.0.unsigned_abs(), self.strides.1.unsigned_abs());
        let (outer, inner, n) = if rs >= cs { (rs, cs, cols) } else { (cs, rs, rows) };
        (outer * size, ((n - 1) * inner + 1) * size)
    }
}

/// Checks that each claim lies in its allocation, is aligned, and that no written one shares memory with another.
///
/// `group` is the number of claims a tensor has, for the indices in errors.
///
/// # Errors
/// [`Error::Bounds`], [`Error::Alignment`], [`Error::Overlap`], or [`Error::Value`] for a written view that aliases itself.
pub fn check(claims: &[Claim], group: usize) -> Result<(), Error> {
    let mut extents = Vec::with_capacity(claims.len());
    for (i, c) in claims.iter().enumerate() {
        let huge = [c.shape.0, c.shape.1, c.strides.0.unsigned_abs(), c.strides.1.unsigned_abs()];
        if huge.into_iter().any(|x| x > 1 << 48) {
            return Err(Error::Bounds { need: usize::MAX, got: c.bytes });
        }
        if c.ptr % c.dtype.size() != 0 {
            return Err(Error::Alignment { what: "a tensor" });
        }
        if c.written && !is_injective(c.shape, c.strides) {
            return Err(Error::Value {
                why: format!("tensor {} has two elements at one address, so it cannot be written", i / group),
            });
        }
        if let Some((low, high)) = c.extent() {
            if low < c.base || high > c.base.saturating_add(c.bytes) {
                return Err(Error::Bounds { need: high - low, got: c.bytes });
            }
            extents.push((low, high, i));
        } else if c.shape.0 > 0 && c.shape.1 > 0 {
            return Err(Error::Bounds { need: usize::MAX, got: c.bytes });
        }
    }
    extents.sort_unstable();
    let mut open: Vec<(usize, usize, usize)> = Vec::new();
    for &(low, high, i) in &extents {
        open.retain(|o| o.1 > low);
        for &(_, _, j) in &open {
            if (claims[i].written || claims[j].written) && share(&claims[i], &claims[j]) {
                return Err(Error::Overlap { first: i.min(j) / group, second: i.max(j) / group });
            }
        }
        open.push((low, high, i));
    }
    Ok(())
}

/// Whether two views with overlapping extents really have bytes in common. Slices of one matrix that interleave, such
/// as two ranges of its columns, do not.
fn share(a: &Claim, b: &Claim) -> bool {
    let (Some((la, _)), Some((lb, _))) = (a.extent(), b.extent()) else { return false };
    // Addresses of either differ by multiples of the strides' common divisor: another remainder never meets.
    if a.dtype == b.dtype {
        let strides = [a.strides.0, a.strides.1, b.strides.0, b.strides.1].map(isize::unsigned_abs);
        let step = strides.into_iter().fold(0, gcd) * a.dtype.size();
        if step > 0 && (lb as i128 - la as i128).rem_euclid(step as i128) != 0 {
            return false;
        }
    }
    let ((period, wa), (other, wb)) = (a.lattice(), b.lattice());
    if period != other || period == 0 {
        return true;
    }
    let offset = (lb as i128 - la as i128).rem_euclid(period as i128) as usize;
    !(offset >= wa && offset + wb <= period)
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(ptr: usize, shape: (usize, usize), strides: (isize, isize), written: bool) -> Claim {
        Claim { ptr, dtype: Dtype::F32, shape, strides, base: 4096, bytes: 4096, written }
    }

    #[test]
    fn bounds_alignment_and_self_aliasing() {
        assert!(check(&[claim(4096, (32, 32), (32, 1), true)], 1).is_ok());
        assert!(matches!(check(&[claim(4096, (33, 32), (32, 1), true)], 1), Err(Error::Bounds { .. })));
        assert!(matches!(check(&[claim(4096, (2, 2), (-2, 1), false)], 1), Err(Error::Bounds { .. })));
        assert!(matches!(check(&[claim(4098, (2, 2), (2, 1), false)], 1), Err(Error::Alignment { .. })));
        assert!(matches!(check(&[claim(4096, (4, 4), (0, 1), true)], 1), Err(Error::Value { .. })));
        assert!(check(&[claim(4096, (4, 4), (0, 1), false)], 1).is_ok());
        assert!(check(&[claim(0, (0, 4), (4, 1), true)], 1).is_ok());
    }

    #[test]
    fn overlap_counts_only_where_something_is_written_and_bytes_are_shared() {
        let whole = |written| claim(4096, (8, 8), (8, 1), written);
        assert!(check(&[whole(false), whole(false)], 1).is_ok());
        assert!(matches!(
            check(&[whole(true), whole(false)], 1),
            Err(Error::Overlap { first: 0, second: 1 })
        ));
        // Left and right halves of one matrix interleave without touching.
        let left = claim(4096, (8, 4), (8, 1), true);
        let right = claim(4096 + 16, (8, 4), (8, 1), true);
        assert!(check(&[left, right], 1).is_ok());
        // The last axis of a stack: every fourth element each.
        let every = |k: usize| claim(4096 + 4 * k, (8, 8), (32, 4), true);
        assert!(check(&[every(0), every(1), every(3)], 1).is_ok());
        assert!(check(&[every(1), every(1)], 1).is_err());
        let shifted = claim(4096 + 12, (8, 4), (8, 1), true);
        assert!(check(&[left, shifted], 1).is_err());
    }
}

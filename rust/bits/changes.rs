//! What a rank sends by what its matrix differs from what it is known to have, and what others then remember of it.

use super::{Coded, Format, pack_row, run, unpack_row};
use crate::error::Error;
use crate::gemm::Context;
use crate::isa::{Kernel, Level};
use crate::scratch::Scratch;

/// A row-major matrix T, what is known of it or of others' H, and its new value, which is overwritten.
pub struct Changes<'a, T> {
    /// T.
    pub matrix: &'a [T],
    /// H.
    pub known: &'a [T],
    /// The next H: what is known now, times `fade`.
    pub next: &'a mut [T],
    /// How much is left of what is known from one step to the next.
    pub fade: T,
}

impl<'a, T: Coded> Changes<'a, T> {
    fn check(&self, format: Format, bytes: &[(usize, usize)]) -> Result<(), Error> {
        for entries in [self.matrix.len(), self.known.len(), self.next.len()] {
            format.check::<T>(Some(entries), bytes)?;
        }
        Ok(())
    }

    /// The next rows of it, from the first that has not been taken.
    fn take(&mut self, first: usize, rows: usize, columns: usize) -> Changes<'a, T> {
        let range = first * columns..(first + rows) * columns;
        Changes {
            matrix: &self.matrix[range.clone()],
            known: &self.known[range],
            next: self.next.split_off_mut(..rows * columns).unwrap_or_default(),
            fade: self.fade,
        }
    }
}

/// Packs T − H, and writes `fade·(H + what the bytes say)`: `(format, changes, bytes)`, of which the bytes are
/// overwritten.
///
/// # Errors
/// [`Error::Shape`] if a number of entries or bytes is not the format's; then nothing has been written.
pub fn pack_changes<T: Coded>(cx: Context, jobs: Vec<(Format, Changes<T>, &mut [u8])>) -> Result<(), Error> {
    jobs.iter().try_for_each(|(f, changes, to)| changes.check(*f, &[(to.len(), 1)]))?;
    let mut pieces = Vec::new();
    for (format, mut changes, mut to) in jobs {
        for first in (0..format.rows).step_by(format.step()) {
            let rows = format.step().min(format.rows - first);
            pieces.push(PackRows {
                format,
                changes: changes.take(first, rows, format.columns),
                to: to.split_off_mut(..rows * format.width::<T>()).unwrap_or_default(),
            });
        }
    }
    run(cx, pieces);
    Ok(())
}

/// One rank's rows among others': `(format, ranks, own, bytes, changes, bytes)`. The first bytes are all ranks'
/// changes, one's behind the other's, of which the rank's `own` are not read. H is the mean of the others' matrices
/// before these, T its own; the second bytes are overwritten by the mean of all.
///
/// # Errors
/// As [`pack_changes`]; [`Error::Value`] if there is no rank `own`.
#[allow(clippy::type_complexity)]
pub fn average_changes<T: Coded>(
    cx: Context,
    jobs: Vec<(Format, usize, usize, &[u8], Changes<T>, &mut [u8])>,
) -> Result<(), Error> {
    for (f, ranks, own, from, changes, to) in &jobs {
        if own >= ranks {
            return Err(Error::Value { why: format!("there is no rank {own} of {ranks}") });
        }
        changes.check(*f, &[(from.len(), *ranks), (to.len(), 1)])?;
    }
    let mut pieces = Vec::new();
    for (format, ranks, own, from, mut changes, mut to) in jobs {
        for first in (0..format.rows).step_by(format.step()) {
            let rows = format.step().min(format.rows - first);
            let changes = changes.take(first, rows, format.columns);
            let to = to.split_off_mut(..rows * format.width::<T>()).unwrap_or_default();
            pieces.push(AverageRows { format, ranks, own, from, first, changes, to });
        }
    }
    run(cx, pieces);
    Ok(())
}

struct PackRows<'a, T> {
    format: Format,
    changes: Changes<'a, T>,
    to: &'a mut [u8],
}

impl<T: Coded> Kernel for PackRows<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let Format { columns, bits, .. } = self.format;
        let Changes { matrix, known, next, fade } = self.changes;
        let mut change = Scratch::<T>::new(columns);
        for (i, to) in self.to.chunks_exact_mut(self.format.width::<T>().max(1)).enumerate() {
            let row = i * columns..(i + 1) * columns;
            let (matrix, known, next) = (&matrix[row.clone()], &known[row.clone()], &mut next[row]);
            for ((d, t), h) in change.iter_mut().zip(matrix).zip(known) {
                *d = *t - *h;
            }
            pack_row(bits, &change, to);
            unpack_row(bits, to, &mut change);
            for ((next, d), h) in next.iter_mut().zip(change.iter()).zip(known) {
                *next = (*h + *d) * fade;
            }
        }
    }
}

struct AverageRows<'a, T> {
    format: Format,
    ranks: usize,
    own: usize,
    from: &'a [u8],
    first: usize,
    changes: Changes<'a, T>,
    to: &'a mut [u8],
}

impl<T: Coded> Kernel for AverageRows<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let Format { rows, columns, bits } = self.format;
        let Changes { matrix, known, next, fade } = self.changes;
        let width = self.format.width::<T>();
        let (mut sum, mut one) = (Scratch::<T>::new(columns), Scratch::<T>::new(columns));
        let (others, all) = (T::of((self.ranks - 1) as f64), T::of(self.ranks as f64));
        for (i, to) in self.to.chunks_exact_mut(width.max(1)).enumerate() {
            let row = i * columns..(i + 1) * columns;
            let (matrix, known, next) = (&matrix[row.clone()], &known[row.clone()], &mut next[row]);
            let mut found = false;
            for rank in (0..self.ranks).filter(|rank| *rank != self.own) {
                let at = (rank * rows + self.first + i) * width;
                let from = &self.from[at..at + width];
                if found {
                    unpack_row(bits, from, &mut one);
                    for (sum, x) in sum.iter_mut().zip(one.iter()) {
                        *sum += *x;
                    }
                } else {
                    unpack_row(bits, from, &mut sum);
                    found = true;
                }
            }
            for (((sum, next), t), h) in sum.iter_mut().zip(next.iter_mut()).zip(matrix).zip(known) {
                let now = if found { *h + *sum / others } else { *h };
                *next = now * fade;
                *sum = (*t + others * now) / all;
            }
            pack_row(bits, &sum, to);
        }
    }
}

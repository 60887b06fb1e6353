//! Matrices in one bit or four an entry, a byte string a row (docs/algorithms.md, 7b).
//!
//! A row begins with its scales, in the working precision: at one bit the mean |entry| of the row, at four the largest
//! |entry| of each [`BLOCK`] columns over 7. Then come the entries, eight or two a byte, the first in the low bits: at one
//! bit whether an entry is negative, at four bits its multiple of the scale, −7 … 7, plus 8. A row of zeros stays zero.
//!
//! `python/orthdion/numerics/bits.py` is the reference; at four bits both write the same bytes.

use crate::error::Error;
use crate::gemm::Context;
use crate::isa::{Kernel, Level};
use crate::pool;
use crate::scalar::Real;
use crate::scratch::Scratch;
use std::marker::PhantomData;

mod changes;
pub use changes::{Changes, average_changes, pack_changes};

/// Columns that share a scale at four bits.
pub const BLOCK: usize = 64;
const LEVELS: f64 = 7.0;
/// Times eight bytes of 0 or 1 as one number, it has the first byte's bit lowest in its highest byte.
const GATHERED: u64 = 0x0102_0408_1020_4080;
/// Entries that one task handles at a time, about.
const PIECE: usize = 32 * 1024;

/// Bits an entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bits {
    /// A sign.
    One,
    /// −7 … 7.
    Four,
}

impl Bits {
    /// From their number.
    ///
    /// # Errors
    /// [`Error::Value`] for another than 1 or 4.
    pub fn of(bits: usize) -> Result<Self, Error> {
        match bits {
            1 => Ok(Bits::One),
            4 => Ok(Bits::Four),
            _ => Err(Error::Value { why: format!("bits must be 1 or 4, not {bits}") }),
        }
    }

    fn scales(self, columns: usize) -> usize {
        match self {
            Bits::One => 1,
            Bits::Four => columns.div_ceil(BLOCK),
        }
    }

    /// Bytes of a row: its scales, and ⌈columns·bits/8⌉.
    pub fn row_bytes<T: Real>(self, columns: usize) -> usize {
        let entries = match self {
            Bits::One => columns.div_ceil(8),
            Bits::Four => columns.div_ceil(2),
        };
        self.scales(columns) * size_of::<T>() + entries
    }
}

/// What the format needs of a working precision.
pub trait Coded: Real {
    /// The last byte of the nearest integer, halves to even, of a number of at most [`LEVELS`]; of a NaN any byte.
    fn nearest(self) -> u8;
    /// From a small integer.
    fn whole(x: i32) -> Self;
    /// Its bytes, in the order of this machine.
    fn put(self, to: &mut [u8]);
    /// From such bytes.
    fn get(from: &[u8]) -> Self;
    /// The smallest normal number.
    const TINY: Self;
    /// 1 + 32·(distance from 1 to the next number): means of few ranks lie halfway between two steps, and then go away
    /// from zero, whatever their rounding.
    const GROWN: Self;
}

macro_rules! coded {
    ($t:ty, $ones:literal) => {
        impl Coded for $t {
            #[inline(always)]
            fn nearest(self) -> u8 {
                // So large a number has no fraction: the sum is rounded to an integer, which stands in its last bits.
                (self + $ones).to_bits() as u8
            }
            #[inline(always)]
            fn whole(x: i32) -> Self {
                x as $t
            }
            #[inline(always)]
            fn put(self, to: &mut [u8]) {
                to.copy_from_slice(&self.to_ne_bytes());
            }
            #[inline(always)]
            fn get(from: &[u8]) -> Self {
                let mut bytes = [0; size_of::<$t>()];
                bytes.copy_from_slice(from);
                <$t>::from_ne_bytes(bytes)
            }
            const TINY: Self = <$t>::MIN_POSITIVE;
            const GROWN: Self = 1.0 + 32.0 * <$t>::EPSILON;
        }
    };
}
coded!(f32, 12_582_912.0); // 1.5·2²³
coded!(f64, 6_755_399_441_055_744.0); // 1.5·2⁵²

/// The shape of a matrix, and its format.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Format {
    /// Rows.
    pub rows: usize,
    /// Entries of a row.
    pub columns: usize,
    /// Bits an entry.
    pub bits: Bits,
}

impl Format {
    /// Bytes of a packed row.
    fn width<T: Real>(self) -> usize {
        self.bits.row_bytes::<T>(self.columns)
    }

    /// That there are as many entries and bytes as it says, for `ranks` ranks' bytes on the packed side that is read.
    fn check<T: Real>(self, entries: Option<usize>, bytes: &[(usize, usize)]) -> Result<(), Error> {
        let Format { rows, columns, .. } = self;
        let whole = [(entries.unwrap_or(rows * columns), 1, columns, "the matrix")];
        let packed = bytes.iter().map(|&(have, ranks)| (have, ranks, self.width::<T>(), "the packed rows"));
        for (have, ranks, width, what) in whole.into_iter().chain(packed) {
            if Some(have) != rows.checked_mul(width).and_then(|n| n.checked_mul(ranks)) {
                let got = (have / (ranks * width).max(1), width);
                return Err(Error::Shape { what, need: (rows, width), got });
            }
        }
        Ok(())
    }

    /// Rows that one task takes.
    fn step(self) -> usize {
        (PIECE / self.columns.max(1)).max(1)
    }
}

/// Packs row-major matrices: `(format, entries, bytes)`, of which the bytes are overwritten.
///
/// # Errors
/// [`Error::Shape`] if a number of entries or bytes is not the format's; then nothing has been written.
pub fn pack<T: Coded>(cx: Context, jobs: Vec<(Format, &[T], &mut [u8])>) -> Result<(), Error> {
    jobs.iter().try_for_each(|(f, from, to)| f.check::<T>(Some(from.len()), &[(to.len(), 1)]))?;
    let mut pieces = Vec::new();
    for (format, from, mut to) in jobs {
        for first in (0..format.rows).step_by(format.step()) {
            let rows = format.step().min(format.rows - first);
            let from = &from[first * format.columns..(first + rows) * format.columns];
            pieces.push(PackRows {
                format,
                from,
                to: to.split_off_mut(..rows * format.width::<T>()).unwrap_or_default(),
            });
        }
    }
    run(cx, pieces);
    Ok(())
}

/// Writes what packed rows stand for: `(format, bytes, entries)`, of which the entries are overwritten.
///
/// # Errors
/// As [`pack`].
pub fn unpack<T: Coded>(cx: Context, jobs: Vec<(Format, &[u8], &mut [T])>) -> Result<(), Error> {
    jobs.iter().try_for_each(|(f, from, to)| f.check::<T>(Some(to.len()), &[(from.len(), 1)]))?;
    let mut pieces = Vec::new();
    for (format, from, mut to) in jobs {
        for first in (0..format.rows).step_by(format.step()) {
            let rows = format.step().min(format.rows - first);
            let width = format.width::<T>();
            let from = &from[first * width..(first + rows) * width];
            pieces.push(UnpackRows {
                format,
                from,
                to: to.split_off_mut(..rows * format.columns).unwrap_or_default(),
            });
        }
    }
    run(cx, pieces);
    Ok(())
}

/// Means over ranks, of the same rows as each has packed them, summed in the order of ranks and packed again: `(format,
/// ranks, bytes, bytes)`. The first bytes are all ranks', one's behind the other's; the second are overwritten.
///
/// # Errors
/// As [`pack`]; [`Error::Value`] without a rank.
pub fn average<T: Coded>(cx: Context, jobs: Vec<(Format, usize, &[u8], &mut [u8])>) -> Result<(), Error> {
    for (f, ranks, from, to) in &jobs {
        if *ranks == 0 {
            return Err(Error::Value { why: "a mean is of at least one rank".into() });
        }
        f.check::<T>(None, &[(from.len(), *ranks), (to.len(), 1)])?;
    }
    let mut pieces = Vec::new();
    for (format, ranks, from, mut to) in jobs {
        for first in (0..format.rows).step_by(format.step()) {
            let rows = format.step().min(format.rows - first);
            let to = to.split_off_mut(..rows * format.width::<T>()).unwrap_or_default();
            pieces.push(AverageRows::<T> { format, ranks, from, first, to, kind: PhantomData });
        }
    }
    run(cx, pieces);
    Ok(())
}

fn run<K: Kernel<Out = ()> + Send>(cx: Context, pieces: Vec<K>) {
    pool::map(cx.threads, pieces, |_| 1.0, |_, piece| cx.isa.run(piece));
}

struct PackRows<'a, T> {
    format: Format,
    from: &'a [T],
    to: &'a mut [u8],
}

impl<T: Coded> Kernel for PackRows<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let Format { columns, bits, .. } = self.format;
        for (i, to) in self.to.chunks_exact_mut(self.format.width::<T>().max(1)).enumerate() {
            pack_row(bits, &self.from[i * columns..(i + 1) * columns], to);
        }
    }
}

struct UnpackRows<'a, T> {
    format: Format,
    from: &'a [u8],
    to: &'a mut [T],
}

impl<T: Coded> Kernel for UnpackRows<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let Format { columns, bits, .. } = self.format;
        let width = self.format.width::<T>();
        for (i, to) in self.to.chunks_exact_mut(columns.max(1)).enumerate() {
            unpack_row(bits, &self.from[i * width..(i + 1) * width], to);
        }
    }
}

struct AverageRows<'a, T> {
    format: Format,
    ranks: usize,
    from: &'a [u8],
    first: usize,
    to: &'a mut [u8],
    kind: PhantomData<T>,
}

impl<T: Coded> Kernel for AverageRows<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let Format { rows, columns, bits } = self.format;
        let width = self.format.width::<T>();
        let (mut sum, mut one) = (Scratch::<T>::new(columns), Scratch::<T>::new(columns));
        let ranks = T::of(self.ranks as f64);
        for (i, to) in self.to.chunks_exact_mut(width.max(1)).enumerate() {
            for rank in 0..self.ranks {
                let at = (rank * rows + self.first + i) * width;
                let from = &self.from[at..at + width];
                if rank == 0 {
                    unpack_row(bits, from, &mut sum);
                } else {
                    unpack_row(bits, from, &mut one);
                    for (sum, x) in sum.iter_mut().zip(one.iter()) {
                        *sum += *x;
                    }
                }
            }
            for x in sum.iter_mut() {
                *x = *x / ranks;
            }
            pack_row(bits, &sum, to);
        }
    }
}

#[inline(always)]
fn pack_row<T: Coded>(bits: Bits, row: &[T], to: &mut [u8]) {
    let (scales, entries) = to.split_at_mut(bits.scales(row.len()) * size_of::<T>());
    match bits {
        Bits::One => {
            T::of(sum_of_sizes(row) / row.len().max(1) as f64).put(scales);
            for (chunk, byte) in row.chunks(8).zip(entries) {
                let mut negative = [0u8; 8];
                for (flag, x) in negative.iter_mut().zip(chunk) {
                    *flag = u8::from(*x < T::default());
                }
                *byte = (u64::from_le_bytes(negative).wrapping_mul(GATHERED) >> 56) as u8;
            }
        }
        Bits::Four => {
            let blocks = row.chunks(BLOCK).zip(scales.chunks_exact_mut(size_of::<T>()));
            for ((block, scale), entries) in blocks.zip(entries.chunks_mut(BLOCK / 2)) {
                let mut padded = [T::default(); BLOCK];
                padded[..block.len()].copy_from_slice(block);
                let unit = largest(&padded) / T::of(LEVELS);
                unit.put(scale);
                let unit = if unit > T::TINY { unit } else { T::TINY };
                let (least, most) = (T::of(-LEVELS), T::of(LEVELS));
                let mut codes = [0u8; BLOCK];
                for (code, x) in codes.iter_mut().zip(padded) {
                    let step = x / unit * T::GROWN;
                    let step = if step > most { most } else { step };
                    let step = if step < least { least } else { step };
                    *code = step.nearest().wrapping_add(LEVELS as u8 + 1);
                }
                codes[block.len()..].fill(0);
                for (i, byte) in entries.iter_mut().enumerate() {
                    *byte = codes[2 * i] | codes[2 * i + 1] << 4;
                }
            }
        }
    }
}

#[inline(always)]
fn unpack_row<T: Coded>(bits: Bits, from: &[u8], row: &mut [T]) {
    let (scales, entries) = from.split_at(bits.scales(row.len()) * size_of::<T>());
    match bits {
        Bits::One => {
            let scale = T::get(scales);
            for (chunk, byte) in row.chunks_mut(8).zip(entries) {
                for (l, x) in chunk.iter_mut().enumerate() {
                    let sign = 1 - 2 * i32::from(byte >> l & 1);
                    *x = T::whole(sign) * scale;
                }
            }
        }
        Bits::Four => {
            let blocks = row.chunks_mut(BLOCK).zip(scales.chunks_exact(size_of::<T>()));
            for ((block, scale), entries) in blocks.zip(entries.chunks(BLOCK / 2)) {
                let scale = T::get(scale);
                let mut steps = [0i32; BLOCK];
                for (i, byte) in entries.iter().enumerate() {
                    steps[2 * i] = i32::from(byte & 15) - (LEVELS as i32 + 1);
                    steps[2 * i + 1] = i32::from(byte >> 4) - (LEVELS as i32 + 1);
                }
                for (x, step) in block.iter_mut().zip(steps) {
                    *x = T::whole(step) * scale;
                }
            }
        }
    }
}

/// Σ |x| in double, in lanes that are joined in order.
#[inline(always)]
fn sum_of_sizes<T: Real>(row: &[T]) -> f64 {
    let mut lanes = [0.0f64; 16];
    for chunk in row.chunks(16) {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += x.abs().f64();
        }
    }
    lanes.into_iter().sum()
}

#[inline(always)]
fn largest<T: Real>(block: &[T; BLOCK]) -> T {
    let mut lanes = [T::default(); 16];
    for chunk in block.as_chunks::<16>().0 {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            let x = x.abs();
            *lane = if x > *lane { x } else { *lane };
        }
    }
    lanes.into_iter().fold(T::default(), |most, x| if x > most { x } else { most })
}

#[cfg(test)]
mod tests;

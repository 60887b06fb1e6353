//! Rows of an int64 table as claims on memory.
//!
//! A row is a head of sizes, then for each view `[address, dtype, row stride, column stride, allocation's address, its
//! bytes]`, strides in elements. Heads have [`HEAD`] words, those of single operands [`SHORT_HEAD`].

use super::bad;
use crate::borrow::Claim;
use crate::error::Error;
use crate::rng::Draws;
use crate::scalar::Dtype;
use numpy::{PyReadonlyArray1, PyReadonlyArray2};

const VIEW: usize = 6;
const HEAD: usize = 4;
const SHORT_HEAD: usize = 3;

/// What a view is, given its row's head: its shape and whether the call writes it.
pub(super) type View = ((usize, usize), bool);

/// A table's heads, and the claims of its rows.
pub(super) struct Table<const VIEWS: usize> {
    pub(super) heads: Vec<[usize; HEAD]>,
    pub(super) claims: Vec<[Claim; VIEWS]>,
}

impl<const VIEWS: usize> Table<VIEWS> {
    /// Reads `table`; `layout` tells of a head what the views behind it are.
    pub(super) fn new(
        table: &PyReadonlyArray2<'_, i64>,
        layout: impl Fn(&[usize; HEAD]) -> Result<[View; VIEWS], Error>,
    ) -> Result<Self, Error> {
        let rows = rows(table, HEAD + VIEWS * VIEW)?;
        let (mut heads, mut claims) = (Vec::with_capacity(rows.len()), Vec::with_capacity(rows.len()));
        for row in rows {
            let mut head = [0; HEAD];
            for (size, word) in head.iter_mut().zip(row) {
                *size = self::size(*word)?;
            }
            let mut found = [EMPTY; VIEWS];
            for ((claim, view), words) in
                found.iter_mut().zip(layout(&head)?).zip(row[HEAD..].chunks_exact(VIEW))
            {
                *claim = self::claim(words, view)?;
            }
            heads.push(head);
            claims.push(found);
        }
        Ok(Table { heads, claims })
    }

    /// `values` in parts of `each(head)`, one a row, or None for all rows if there are no values at all.
    pub(super) fn split<'v>(
        &self,
        what: &str,
        mut values: &'v mut [f64],
        each: impl Fn(&[usize; HEAD]) -> usize,
    ) -> Result<Vec<Option<&'v mut [f64]>>, Error> {
        if values.is_empty() {
            return Ok(self.heads.iter().map(|_| None).collect());
        }
        let need = self.heads.iter().map(&each).fold(0, usize::saturating_add);
        same(what, values.len(), need)?;
        Ok(self
            .heads
            .iter()
            .map(|head| Some(values.split_off_mut(..each(head)).unwrap_or_default()))
            .collect())
    }
}

/// A claim on nothing.
const EMPTY: Claim =
    Claim { ptr: 0, dtype: Dtype::F32, shape: (0, 0), strides: (0, 0), base: 0, bytes: 0, written: false };

/// The claims of `count` single operands, `[rows, columns, unused]` and one view each; those from `written` on are written.
pub(super) fn operands(
    table: &PyReadonlyArray2<'_, i64>,
    count: Option<usize>,
    written: usize,
) -> Result<Vec<Claim>, Error> {
    let rows = rows(table, SHORT_HEAD + VIEW)?;
    if let Some(count) = count {
        same("the operands", rows.len(), count)?;
    }
    rows.enumerate()
        .map(|(i, row)| claim(&row[SHORT_HEAD..], ((size(row[0])?, size(row[1])?), i >= written)))
        .collect()
}

/// The rows of a C-contiguous table with `width` columns.
fn rows<'a>(
    table: &'a PyReadonlyArray2<'_, i64>,
    width: usize,
) -> Result<std::slice::ChunksExact<'a, i64>, Error> {
    let words = table.as_slice().map_err(|_| bad("the table must be C-contiguous"))?;
    let columns = table.as_array().ncols();
    if columns != width {
        return Err(bad(format!("the table must have {width} columns, but it has {columns}")));
    }
    Ok(words.chunks_exact(width))
}

fn claim(words: &[i64], (shape, written): View) -> Result<Claim, Error> {
    Ok(Claim {
        ptr: words[0] as usize,
        dtype: dtype(words[1])?,
        shape,
        strides: (words[2] as isize, words[3] as isize),
        base: words[4] as usize,
        bytes: size(words[5])?,
        written,
    })
}

fn dtype(code: i64) -> Result<Dtype, Error> {
    Ok(match code {
        0 => Dtype::F32,
        1 => Dtype::F64,
        2 => Dtype::Bf16,
        3 => Dtype::F16,
        _ => return Err(bad(format!("dtype code {code} is unknown"))),
    })
}

fn size(x: i64) -> Result<usize, Error> {
    usize::try_from(x).map_err(|_| bad(format!("a size is negative: {x}")))
}

/// The numbers of a contiguous array, which must be `count`, all finite.
pub(super) fn numbers<'a>(
    what: &str,
    array: &'a PyReadonlyArray1<'_, f64>,
    count: usize,
) -> Result<&'a [f64], Error> {
    let numbers = array.as_slice().map_err(|_| bad(format!("{what} must be contiguous")))?;
    same(what, numbers.len(), count)?;
    super::finite(numbers.iter().map(|x| (what, *x)))?;
    Ok(numbers)
}

/// The same as rows of `N` numbers.
pub(super) fn number_rows<'a, const N: usize>(
    what: &str,
    array: &'a PyReadonlyArray2<'_, f64>,
    count: Option<usize>,
) -> Result<&'a [[f64; N]], Error> {
    let numbers = array.as_slice().map_err(|_| bad(format!("{what} must be C-contiguous")))?;
    let (have, columns) = array.as_array().dim();
    if columns != N || count.is_some_and(|count| count != have) {
        let need = count.map_or("any number of".to_owned(), |c| c.to_string());
        return Err(bad(format!("{what} must have {need} rows of {N}, not {have} of {columns}")));
    }
    super::finite(numbers.iter().map(|x| (what, *x)))?;
    Ok(numbers.as_chunks().0)
}

/// How the first view of each of `count` rows is rounded: `[key, first, row, column]` a row, or no rows for to nearest.
pub(super) fn draws(
    table: &PyReadonlyArray2<'_, i64>,
    count: usize,
) -> Result<impl Iterator<Item = Option<Draws>> + use<>, Error> {
    let rows: Vec<_> = rows(table, 4)?
        .map(|row| Draws::new(row[0] as u64, row[1] as u64, row[2] as u64, row[3] as u64))
        .collect();
    if !rows.is_empty() {
        same("draws", rows.len(), count)?;
    }
    Ok(rows.into_iter().map(Some).chain(std::iter::repeat(None)))
}

/// That `what` has as many entries as are needed.
pub(super) fn same(what: &str, have: usize, need: usize) -> Result<(), Error> {
    if have == need { Ok(()) } else { Err(bad(format!("{what} must have {need} entries, not {have}"))) }
}

/// Entry `k` of the options.
pub(super) fn pick<T>(options: &[T], k: usize) -> Result<&T, Error> {
    options.get(k).ok_or_else(|| bad(format!("k is {k}, but there are {} options", options.len())))
}

//! What can be wrong with the input: one lower-case sentence each.

use std::fmt;

/// A refused call. Nothing has been written when one is returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// Two shapes that belong together differ.
    Shape {
        /// Which operand.
        what: &'static str,
        /// Rows and columns that the call needs.
        need: (usize, usize),
        /// Rows and columns that it got.
        got: (usize, usize),
    },
    /// A view reaches outside the memory it was built over.
    Bounds {
        /// Elements that the view spans.
        need: usize,
        /// Elements that there are.
        got: usize,
    },
    /// A pointer is not a multiple of its element's size.
    Alignment {
        /// Which operand.
        what: &'static str,
    },
    /// Two operands of which one is written share memory.
    Overlap {
        /// Index of the first one in the call's list.
        first: usize,
        /// Index of the second one.
        second: usize,
    },
    /// A size, rank or option outside its range.
    Value {
        /// What is wrong and what would be right.
        why: String,
    },
    /// The input of a factorisation holds NaN or infinity.
    NonFinite {
        /// Which operand.
        what: &'static str,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Shape { what, need, got } => {
                write!(f, "{what} must be {} by {}, but it is {} by {}", need.0, need.1, got.0, got.1)
            }
            Error::Bounds { need, got } => {
                write!(f, "the view spans {need} elements of a buffer of {got}")
            }
            Error::Alignment { what } => {
                write!(f, "{what} is not aligned to the size of its elements")
            }
            Error::Overlap { first, second } => {
                write!(f, "tensors {first} and {second} share memory that this call writes")
            }
            Error::Value { why } => f.write_str(why),
            Error::NonFinite { what } => {
                write!(f, "{what} holds NaN or infinity; replace those entries first")
            }
        }
    }
}

impl std::error::Error for Error {}

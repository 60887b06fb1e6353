//! The numerical core of orthdion.
//!
//! Views ([`Mat`], [`MatMut`]) borrow their caller's memory: any strides, `f32`, `f64`, and `bf16` or `f16` as storage.
//! Everything that is computed at size is a product ([`gemm`]); factorisations run in double precision where their
//! input needs it, and report directions that they could not determine. Scratch is kept by each thread and reused.
//! Results do not depend on the number of threads.

pub mod borrow;
pub mod elementwise;
pub mod error;
pub mod gemm;
pub mod isa;
pub mod newton_schulz;
pub mod pool;
#[cfg(feature = "python")]
mod python;
pub mod qr;
pub mod rng;
pub mod scalar;
mod scratch;
pub mod step;
pub mod view;

pub use error::Error;
pub use gemm::{Context, gemm};
pub use isa::Isa;
pub use view::{Mat, MatMut};

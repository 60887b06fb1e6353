//! Micro-benches of the core against the crates faer and gemm; see `benches/micro.rs`.

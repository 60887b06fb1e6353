"""Orthonormal and polar factors, Newton–Schulz iterations and rounding in plain torch: the oracle, on any device."""

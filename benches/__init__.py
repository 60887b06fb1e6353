"""The benches suite: every figure beside its floor and as a ratio against a named peer timed in the same run."""

"""orthdion: Orth-Dion and its family, low-rank spectral optimizers for PyTorch with a Rust core."""

from . import diagnostics, linalg
from .grouping import ParamGroups, param_groups
from .optim import CurvaDion, Dion, OrthDion
from .sharding import decouple

__version__ = "0.1.0"

__all__ = ["CurvaDion", "Dion", "OrthDion", "ParamGroups", "decouple", "diagnostics", "linalg", "param_groups"]

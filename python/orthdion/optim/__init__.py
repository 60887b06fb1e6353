"""Optimizers, one file each; what they share stands in files named after what it is."""

from .curvadion import CurvaDion
from .dion import Dion
from .orth_dion import OrthDion

__all__ = ["CurvaDion", "Dion", "OrthDion"]

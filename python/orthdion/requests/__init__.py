"""What a rule may ask for, and the types that its questions are made of. The lowest floor: nothing here computes.

A rule is a generator over one matrix. It yields requests and is sent their answers; the runtime (:mod:`orthdion.core`)
collects the requests of all matrices and has like ones answered together, by a backend (:mod:`orthdion.backends`) or
over process groups (:mod:`orthdion.distributed`).
"""

from .forms import Elementwise, Form, LowRank
from .groups import ALONE, Group, Layout
from .matrix import Blend, Deferred, Extent, Matrix, Noise, Outcome, Precision, Report
from .requests import (
    Body,
    Columns,
    Energies,
    Factor,
    Gather,
    Gram,
    LowRankUpdate,
    Map,
    MatMul,
    NewtonSchulz,
    Polar,
    Product,
    Reduce,
    Request,
    Residual,
    ResidualSums,
    Settle,
    Sketch,
    Triangle,
    Update,
    WarmStart,
    Whole,
)

__all__ = [
    "ALONE",
    "Blend",
    "Body",
    "Columns",
    "Deferred",
    "Elementwise",
    "Energies",
    "Extent",
    "Factor",
    "Form",
    "Gather",
    "Gram",
    "Group",
    "Layout",
    "LowRank",
    "LowRankUpdate",
    "Map",
    "MatMul",
    "Matrix",
    "NewtonSchulz",
    "Noise",
    "Outcome",
    "Polar",
    "Precision",
    "Product",
    "Reduce",
    "Report",
    "Request",
    "Residual",
    "ResidualSums",
    "Settle",
    "Sketch",
    "Triangle",
    "Update",
    "WarmStart",
    "Whole",
]

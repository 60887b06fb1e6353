"""Optimizers, one file each: equations, options, states, step, torch class. This is the registry of ours."""

from __future__ import annotations

from ..core.optimizer import MatrixOptimizer
from .adamw import AdamW
from .completed_dion import CompletedDion
from .curvadion import CurvaDion
from .dion import Dion
from .dion2 import Dion2
from .dion3 import Dion3
from .lion import Lion
from .muon import Muon
from .normuon import NorMuon
from .orth_dion import OrthDion
from .rmnp import RMNP
from .sinkgd import SinkGD

__all__ = [
    "OPTIMIZERS",
    "RMNP",
    "AdamW",
    "CompletedDion",
    "CurvaDion",
    "Dion",
    "Dion2",
    "Dion3",
    "Lion",
    "Muon",
    "NorMuon",
    "OrthDion",
    "SinkGD",
]


#: Every optimizer by name; one line each.
OPTIMIZERS: dict[str, type[MatrixOptimizer]] = {
    "completed-dion": CompletedDion,
    "orth-dion": OrthDion,
    "dion": Dion,
    "dion2": Dion2,
    "dion3": Dion3,
    "curvadion": CurvaDion,
    "muon": Muon,
    "normuon": NorMuon,
    "rmnp": RMNP,
    "sinkgd": SinkGD,
    "adamw": AdamW,
    "lion": Lion,
}

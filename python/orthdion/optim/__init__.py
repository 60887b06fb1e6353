"""Optimizers, one file each: equations, options, states, step, torch class. This is the registry of ours."""

from __future__ import annotations

from ..core.optimizer import MatrixOptimizer
from .adamw import AdamW
from .auon import AuON
from .completed_dion import CompletedDion
from .cosmos import COSMOS
from .curvadion import CurvaDion
from .dct_dion import DCTDion
from .demo import DeMo
from .dion import Dion
from .dion2 import Dion2
from .dion3 import Dion3
from .frugal import FRUGAL
from .lion import Lion
from .mofasgd import MoFaSGD
from .muon import Muon
from .normuon import NorMuon
from .numuon import NuMuon
from .orth_dion import OrthDion
from .rmnp import RMNP
from .sinkgd import SinkGD
from .trasmuon import TrasMuon

__all__ = [
    "COSMOS",
    "FRUGAL",
    "OPTIMIZERS",
    "RMNP",
    "AdamW",
    "AuON",
    "CompletedDion",
    "CurvaDion",
    "DCTDion",
    "DeMo",
    "Dion",
    "Dion2",
    "Dion3",
    "Lion",
    "MoFaSGD",
    "Muon",
    "NorMuon",
    "NuMuon",
    "OrthDion",
    "SinkGD",
    "TrasMuon",
]


#: Every optimizer by name; one line each.
OPTIMIZERS: dict[str, type[MatrixOptimizer]] = {
    "completed-dion": CompletedDion,
    "orth-dion": OrthDion,
    "dion": Dion,
    "dion2": Dion2,
    "dion3": Dion3,
    "dct-dion": DCTDion,
    "curvadion": CurvaDion,
    "muon": Muon,
    "normuon": NorMuon,
    "trasmuon": TrasMuon,
    "numuon": NuMuon,
    "mofasgd": MoFaSGD,
    "cosmos": COSMOS,
    "frugal": FRUGAL,
    "rmnp": RMNP,
    "sinkgd": SinkGD,
    "auon": AuON,
    "demo": DeMo,
    "adamw": AdamW,
    "lion": Lion,
}

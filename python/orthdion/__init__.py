"""orthdion: Orth-Dion and its family, spectral optimizers for PyTorch with a Rust core."""

from . import diagnostics, functional, integrations, linalg, requests
from .captured import capture
from .core.optimizer import MatrixOptimizer
from .core.registry import register
from .core.rule import Rule, StateSpec
from .create import OptimizerInfo, create, list_optimizers
from .distributed import decouple
from .grouping import ParamGroups, param_groups
from .optim import (
    COSMOS,
    FRUGAL,
    RMNP,
    AdamW,
    AuON,
    CompletedDion,
    CurvaDion,
    DCTDion,
    DeMo,
    Dion,
    Dion2,
    Dion3,
    Lion,
    MoFaSGD,
    Muon,
    NorMuon,
    NuMuon,
    OrthDion,
    SinkGD,
    TrasMuon,
)
from .plan import Plan, plan

__version__ = "0.1.0"

__all__ = [
    "COSMOS",
    "FRUGAL",
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
    "MatrixOptimizer",
    "MoFaSGD",
    "Muon",
    "NorMuon",
    "NuMuon",
    "OptimizerInfo",
    "OrthDion",
    "ParamGroups",
    "Plan",
    "Rule",
    "SinkGD",
    "StateSpec",
    "TrasMuon",
    "capture",
    "create",
    "decouple",
    "diagnostics",
    "functional",
    "integrations",
    "linalg",
    "list_optimizers",
    "param_groups",
    "plan",
    "register",
    "requests",
]

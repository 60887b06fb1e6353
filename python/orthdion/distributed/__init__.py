"""Where a matrix lies over process groups, and the requests that other ranks answer (docs/algorithms.md, section 7)."""

from .collectives import Communicator, Traffic
from .ddp import Replicas, decouple
from .groups import everyone, meet
from .layout import Placed, is_dtensor, local, place
from .meshes import Meshes

__all__ = [
    "Communicator",
    "Meshes",
    "Placed",
    "Replicas",
    "Traffic",
    "decouple",
    "everyone",
    "is_dtensor",
    "local",
    "meet",
    "place",
]

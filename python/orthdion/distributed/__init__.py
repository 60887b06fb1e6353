"""Where a matrix lies over process groups, and the requests that other ranks answer (docs/algorithms.md, section 7)."""

from .collectives import Communicator, Traffic
from .ddp import Replicas, decouple
from .groups import everyone, meet
from .layout import Groups, Placed, is_dtensor, lay, local, place, unsharded
from .meshes import Meshes

__all__ = [
    "Communicator",
    "Groups",
    "Meshes",
    "Placed",
    "Replicas",
    "Traffic",
    "decouple",
    "everyone",
    "is_dtensor",
    "lay",
    "local",
    "meet",
    "place",
    "unsharded",
]

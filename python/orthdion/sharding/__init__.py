"""Where a matrix lies over process groups, and what its ranks tell each other (docs/algorithms.md, section 7)."""

from .communicator import Communicator, Traffic, one_each
from .ddp import Replicas, decouple
from .groups import ALONE, Group, everyone, meet
from .layout import Layout, Placed, is_dtensor, local, place, roles
from .meshes import Meshes
from .requests import Body, Factorize, Gather, Reduce, mean_over

__all__ = [
    "ALONE",
    "Body",
    "Communicator",
    "Factorize",
    "Gather",
    "Group",
    "Layout",
    "Meshes",
    "Placed",
    "Reduce",
    "Replicas",
    "Traffic",
    "decouple",
    "everyone",
    "is_dtensor",
    "local",
    "mean_over",
    "meet",
    "one_each",
    "place",
    "roles",
]

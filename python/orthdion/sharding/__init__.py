"""Where a matrix lies: its rows, columns and replicas over process groups (docs/algorithms.md, section 7)."""

from .communicator import Communicator, Null

__all__ = ["Communicator", "Null"]

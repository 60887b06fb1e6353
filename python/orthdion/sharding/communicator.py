"""The communicator of a step: the brackets in its equations. With no process group they cost nothing."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

__all__ = ["Communicator", "Null"]


class Communicator(Protocol):
    """Reductions over the groups that a matrix is laid out on; each returns its argument, reduced."""

    def sum_rows(self, t: Tensor) -> Tensor:
        """Sum over the ranks that hold different rows."""

    def sum_cols(self, t: Tensor) -> Tensor:
        """Sum over the ranks that hold different columns."""

    def mean_replicas(self, t: Tensor) -> Tensor:
        """Mean over the ranks that hold copies, each with a gradient of its own."""


class Null:
    """One process: every group has one rank."""

    def sum_rows(self, t: Tensor) -> Tensor:
        """``t``"""
        return t

    def sum_cols(self, t: Tensor) -> Tensor:
        """``t``"""
        return t

    def mean_replicas(self, t: Tensor) -> Tensor:
        """``t``"""
        return t

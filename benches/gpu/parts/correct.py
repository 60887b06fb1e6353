"""Checks against the reference, each a finding ``check``."""

from __future__ import annotations

from ..context import Context
from ..verify import ASYNCHRONOUS, CORRECT, Check, verify

__all__ = ["asynchronous", "correct"]

_SHAPES = [(512, 256), (256, 1024), (3000, 700)]
_DRY_SHAPES = [(40, 16), (12, 30)]


def correct(context: Context) -> None:
    """Whole steps and factors."""
    _each(context, CORRECT)


def asynchronous(context: Context) -> None:
    """What the host and streams may do."""
    _each(context, ASYNCHRONOUS)


def _each(context: Context, checks: tuple[Check, ...]) -> None:
    for finding in verify(checks, context.device, _DRY_SHAPES if context.dry else _SHAPES):
        if finding.holds is None:
            context.absent(finding.name, finding.found)
        else:
            context.found("check", name=finding.name, holds=finding.holds, said=finding.found)

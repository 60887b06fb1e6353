"""Checkpoints and metrics that survive a kill at any moment: write aside, flush, rename."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

__all__ = ["load", "read_metrics", "save", "write_atomically"]


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls ``write`` with a temporary file beside ``path``, then renames it there: readers see all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as f:
        write(f)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def save(path: Path, state: dict[str, Any]) -> None:
    """Saves a dictionary of tensors and plain values."""
    write_atomically(path, lambda f: torch.save(state, f))


def load(path: Path) -> dict[str, Any]:
    """Loads what :func:`save` wrote; tensors and plain values only (``weights_only``), so a foreign file runs no code.

    Raises:
        ValueError: a missing, truncated or foreign file.
    """
    if not path.is_file():
        raise ValueError(f"resume: there is no checkpoint at {path}; start without --resume")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError, KeyError, ValueError) as e:
        raise ValueError(
            f"resume: {path} is no intact checkpoint ({type(e).__name__}); delete it and start without --resume"
        ) from e
    if not isinstance(state, dict) or not {"step", "model", "optimizers", "config", "text"} <= state.keys():
        raise ValueError(f"resume: {path} was not written by orthdion train; pass the folder of such a run")
    return state


def read_metrics(path: Path, below: int | None = None) -> list[dict[str, Any]]:
    """The JSON lines at ``path`` whose step is at most ``below``; a last line cut short by a kill is dropped."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if below is None or row["step"] <= below:
            rows.append(row)
    return rows

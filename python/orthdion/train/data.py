"""Real text as bytes: the running Python's standard library, a file, or a folder."""

from __future__ import annotations

import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Corpus", "load"]

_SKIP = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", ".git"}


@dataclass(frozen=True)
class Corpus:
    """Training and validation bytes, disjoint by file (or by position in a single file), and where they come from."""

    train: NDArray[np.uint8]
    validation: NDArray[np.uint8]
    source: str

    def checksum(self) -> int:
        """Of all bytes, to tell one text from another."""
        return zlib.crc32(self.validation.tobytes(), zlib.crc32(self.train.tobytes()))

    def batch(self, size: int, context: int, seed: int, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (size, context) int64 each; a function of its arguments alone, so that a resumed run sees
        what an unbroken one does.
        """
        rng = np.random.default_rng((seed, step, micro))
        starts = rng.integers(0, len(self.train) - context, size=size)
        return _windows(self.train, starts, context)

    def evaluation(self, windows: int, context: int) -> tuple[Tensor, Tensor]:
        """The same evenly spread validation windows every time, (windows, context) each."""
        starts = np.linspace(0, len(self.validation) - context - 1, windows).astype(np.int64)
        return _windows(self.validation, starts, context)


def _windows(data: NDArray[np.uint8], starts: NDArray[np.int64], context: int) -> tuple[Tensor, Tensor]:
    index = starts[:, None] + np.arange(context + 1)
    both = torch.from_numpy(data[index].astype(np.int64))
    return both[:, :-1], both[:, 1:]


def load(path: str | Path | None, context: int) -> Corpus:
    """The corpus at ``path``; None is the standard library's source files.

    A folder's files, and the library's, are split by the checksum of their names, one in twenty for validation; a
    single file by position, its last tenth for validation.

    Raises:
        ValueError: a missing or empty path, or too little text for one window of ``context`` bytes on either side.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if path is None else Path(path)
    if not root.exists():
        raise ValueError(
            f"data: {root} does not exist; pass a text file, a folder, or nothing for the standard library"
        )
    if root.is_file():
        data = np.frombuffer(root.read_bytes(), dtype=np.uint8)
        cut = len(data) - len(data) // 10
        corpus = Corpus(data[:cut], data[cut:], str(root))
    else:
        pattern = "*.py" if path is None else "*"
        corpus = _folder(root, pattern)
    for name, part in (("training", corpus.train), ("validation", corpus.validation)):
        if len(part) < context + 2:
            raise ValueError(
                f"data: {root} leaves {len(part)} bytes for {name}; a window needs {context + 2}. "
                "Pass more text or a smaller context"
            )
    return corpus


def _folder(root: Path, pattern: str) -> Corpus:
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    names = sorted(
        p.relative_to(root).as_posix()
        for p in root.rglob(pattern)
        if p.is_file() and not _SKIP & set(p.relative_to(root).parts)
    )
    for name in names:
        data = (root / name).read_bytes()
        if b"\0" not in data[:8192]:  # text, not a binary
            parts[zlib.crc32(name.encode()) % 20 == 0].append(data)
    if len(parts[0]) + len(parts[1]) == 1:
        raise ValueError(
            f"data: {root} holds a single text file; pass that file itself, so that it is split by position"
        )
    train, validation = (np.frombuffer(b"\n".join(part), dtype=np.uint8) for part in parts)
    return Corpus(train, validation, f"{root} ({len(names)} files)")

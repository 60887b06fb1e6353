"""The tests that need no device, on this machine's cores."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

from ..context import Context

__all__ = ["cpu_tests"]

_ROOT = Path(__file__).parents[3]
_SUMMARY = re.compile(r"\d+ (?:passed|failed|error|skipped).* in .*")


def cpu_tests(context: Context) -> None:
    """A finding ``check``, with pytest's own summary; a rehearsal runs one file."""
    missing = [name for name in ("pytest", "hypothesis", "orthdion._core") if importlib.util.find_spec(name) is None]
    if missing:
        context.absent("the CPU suite", f"{', '.join(missing)} not installed or not built")
        return
    what = ["tests/test_bits.py"] if context.dry else ["tests"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *what]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-20000:], done.stderr[-5000:])
    said = _SUMMARY.findall(done.stdout)
    context.found("check", name="the CPU suite passes", holds=done.returncode == 0, said=said[-1] if said else "")

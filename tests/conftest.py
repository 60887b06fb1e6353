import os
import signal
import sys
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def interrupts():
    """Python's own handler of SIGINT: workers of pytest-xdist ignore it, and so would every process that they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def threads():
    """The same number of threads everywhere, whatever the machine has: two, or of several workers one each, as OpenMP's
    threads wait for each other in loops, which costs most where there are more of them than cores.
    """
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture
def orthdion_cli(monkeypatch, capsys):
    """The command line, in this process: code, stdout and stderr."""
    from orthdion import cli

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["orthdion", *map(str, args)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as e:
            code = e.code or 0
        said = capsys.readouterr()
        return SimpleNamespace(code=code, out=said.out, err=said.err)

    return run

import os
import sys
from types import SimpleNamespace

import pytest
import torch


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With several workers (pytest -n 2) a file's tests stay together, and so do all those with process groups, which
    would take each other's time.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return "tests/distributed" if file.startswith("tests/distributed/") else file

    return ByFile(config, log)


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

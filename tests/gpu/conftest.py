import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from shim import COMPILER, ShimDevice

from orthdion.backends import choose
from orthdion.backends.cupy import register


@pytest.fixture
def shim():
    """Kernels run on the processor, threads of a block in shuffled orders; backend="cupy" then serves CPU tensors."""
    if COMPILER is None:
        pytest.skip("no g++ to compile the kernels for the processor with")
    device = ShimDevice(seed=1)
    undo = register(torch.device("cpu"), device)
    choose.cache_clear()
    yield device
    undo()
    choose.cache_clear()

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from shim import COMPILER, ShimDevice, serving


@pytest.fixture
def shim():
    """Kernels run on the processor, threads of a block in shuffled orders; backend="cupy" then serves CPU tensors."""
    if COMPILER is None:
        pytest.skip("no g++ to compile the kernels for the processor with")
    with serving(ShimDevice(seed=1)) as device:
        yield device

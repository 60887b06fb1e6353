"""What only a device can tell; ``make gpu-check`` runs the same checks, and measures."""

import pytest
import torch
from benches.gpu.verify import ASYNCHRONOUS, CORRECT

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("check", (*CORRECT, *ASYNCHRONOUS), ids=lambda check: check.__name__)
def test_on_a_device(check):
    check(torch.device("cuda"), [(512, 256), (256, 1024), (3000, 700)])

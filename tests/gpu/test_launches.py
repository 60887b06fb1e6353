"""How many launches a step takes on real models' shapes: counted on torch's meta device, where nothing is computed."""

import pytest
import torch
from benches.gpu.cases import MODELS
from oracles import parameter, randn

import orthdion
from orthdion.backends import choose
from orthdion.backends.cupy.device import Device, register
from orthdion.core import runtime


class Counting(Device):
    """Launches nothing; an H100's sizes."""

    panel_bytes = factor_bytes = (80 << 30) // 32

    def __init__(self):
        self.kernels, self.products = [], 0

    def _launch(self, kernel, grid, threads, arguments):
        assert max(grid[1:], default=1) <= 65535
        self.kernels.append(kernel)

    def multiply(self, out, a, b, add=False, tf32=False):
        self.products += 1


@pytest.fixture
def counting():
    device, where = Counting(), torch.device("meta")
    undo = register(where, device)
    choose.cache_clear()
    yield device
    undo()
    choose.cache_clear()


def launched(counting, layers, name="orth-dion", **options):
    """Kernels and products of a step of so many layers of Llama-3-8B."""
    params = []
    for shape in MODELS["llama-3-8b"].with_layers(layers).shapes:
        p = torch.nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
        p.grad = torch.empty_like(p)
        params.append(p)
    kinds = {"momentum_dtype": torch.float32, "q_dtype": torch.float32}
    o = orthdion.create(name, params, lr=0.01, rank_fraction=1 / 8, backend="cupy", **kinds, **options)
    for entry in o._entries.values():
        entry.hollow = False  # its step would be nothing otherwise
    o._count_skipped = lambda: None  # flags hold no numbers either
    counting.kernels, counting.products = [], 0
    o.step()
    return len(counting.kernels) + counting.products


#: What a step of four layers takes at r = d/8 today, and what it may take (the published step: 300).
BARS = {"orth-dion": 300, "dion": 300, "completed-dion": 400}


@pytest.mark.parametrize("name", BARS)
def test_four_layers_of_llama_3_8b_take_few_launches(counting, name):
    assert launched(counting, 4, name) <= BARS[name]
    assert counting.kept_bytes == 0


@pytest.mark.parametrize(("name", "together"), [("orth-dion", 4), ("muon", 1)])
def test_rules_without_factors_hold_little_at_a_time(shim, monkeypatch, name, together):
    """Muon's bodies hold matrices: as few of them run side by side as where something travels."""
    sizes, real = [], runtime._Bucket.__init__

    def watched(self, owner, bodies, results):
        sizes.append(len(bodies))
        real(self, owner, bodies, results)

    params = [parameter(randn(20, 12, seed=i), randn(20, 12, seed=9)) for i in range(4)]
    o = orthdion.create(name, params, lr=0.01, backend="cupy")
    monkeypatch.setattr(runtime, "BUCKET_BYTES", 900)
    monkeypatch.setattr(runtime._Bucket, "__init__", watched)
    o.step()
    assert sizes[-1] == together


def test_launches_do_not_grow_with_the_layers_that_are_stepped_together(counting):
    assert launched(counting, 4) <= 1.25 * launched(counting, 1)

"""How Q starts: orthonormal, the same in every layout, as good as a Gaussian matrix, and made in parts."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from orthdion.core.starts import Orthonormal, generator, start
from orthdion.linalg import qr

SIZES = [(1, 1), (2, 1), (7, 7), (33, 5), (64, 64), (97, 40), (500, 125)]


@pytest.mark.parametrize(("n", "r"), SIZES)
def test_it_is_orthonormal_to_rounding(n, r):
    q = start((3, n, r), 4, 5)
    assert (q.mT @ q - torch.eye(r, dtype=torch.float64)).abs().max() < 1e-14 * n
    assert n < 3 or not torch.equal(q[0], q[1])
    assert n < 3 or not torch.equal(q, start((3, n, r), 4, 6))
    assert torch.equal(q, start((3, n, r), 4, 5))


@pytest.mark.parametrize(("first", "last"), [(0, 97), (0, 1), (31, 33), (40, 97), (50, 50), (96, 97)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_any_rows_of_it_have_the_bits_of_the_whole(first, last, dtype):
    whole = start((1, 97, 20), 1, 2)[0].to(dtype)
    part = torch.empty(last - first, 20, dtype=dtype)
    Orthonormal(97, 20, generator(1, 2)).write(part, first)
    assert torch.equal(part, whole[first:last])


def _bases(n, k):
    """Right singular vectors (n, k) that a transform could be blind to."""
    grid = torch.arange(n, dtype=torch.float64)
    waves = torch.cos(torch.pi * (2 * grid[:, None] + 1) * torch.arange(k, dtype=torch.float64) / (2 * n))
    steps = (grid[:, None] >= torch.arange(k, dtype=torch.float64) * (n // k)).double()
    yield "coordinates", torch.eye(n, dtype=torch.float64)[:, :k]
    yield "low frequencies", waves
    yield "steps", steps
    yield "random", torch.randn(n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_it_sees_every_space_as_well_as_a_gaussian_start_does():
    """σ_min(VᵀQ) decides how fast power iterations find V; r random directions of n have about √r − √k over √n."""
    n, r, k = 384, 96, 24
    for name, basis in _bases(n, k):
        v = torch.linalg.qr(basis)[0]
        least = [torch.linalg.svdvals(v.T @ start((1, n, r), seed, 0)[0])[-1] for seed in range(12)]
        gaussian = [
            torch.linalg.svdvals(v.T @ qr(torch.randn(n, r, generator=generator(seed, 1)).double())[0])[-1]
            for seed in range(12)
        ]
        least, gaussian = torch.stack(least).sort().values, torch.stack(gaussian).sort().values
        assert least.median() > 0.9 * gaussian.median(), name
        assert least[0] > 0.75 * gaussian[0], name


_SHARDED = """
import resource, torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
import orthdion

dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)
mesh = init_device_mesh("cpu", (8,))

def parameter(m, n):
    here = torch.zeros(m // 8, n, dtype=torch.bfloat16)
    return torch.nn.Parameter(DTensor.from_local(here, mesh, [Shard(0)], run_check=False))

orthdion.OrthDion([parameter(64, 64)], rank_fraction=0.25)  # what is imported on the way
shapes = [(8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)]  # of a model with 70 billion parameters
params = [parameter(*shape) for shape in shapes]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
optimizer = orthdion.OrthDion(params, rank_fraction=0.25)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
states = sum(t.to_local().nbytes for s in optimizer.state.values() for t in s.values())
print(grown * (1 if sys.platform == "darwin" else 1024), states)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell the largest memory of a process")
def test_building_takes_no_more_memory_than_the_ranks_own_states():
    run = subprocess.run(
        [sys.executable, "-c", "import sys\n" + _SHARDED],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
    )
    grown, states = map(int, run.stdout.split())
    assert states > 150e6
    assert grown < states + 32e6

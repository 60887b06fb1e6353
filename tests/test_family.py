"""Relatives that normalise in place of orthogonalising, or besides: each against its equations in double."""

import pytest
import torch
from oracles import parameter, randn

import orthdion

#: Zero rows, zero columns and rank 2 in the last one's gradients.
CASES = {
    "tall": (24, 10),
    "wide": (9, 31),
    "square": (16, 16),
    "stacked": (3, 7, 12),
    "tiny": (1, 1),
    "row": (1, 7),
    "column": (7, 1),
    "deficient": (12, 20),
}


def averaged(s, g, ahead=False):
    """The new momentum, or what lies ahead of it."""
    s["momentum"] = 0.95 * s.get("momentum", torch.zeros_like(g)) + 0.05 * g
    return 0.95 * s["momentum"] + 0.05 * g if ahead else s["momentum"]


def rmnp(g, s):
    m = averaged(s, g)
    return torch.stack([row / max(float(row.norm()), 1e-8) for row in m])


def sinkgd(g, s):
    d = averaged(s, g)
    for _ in range(5):
        d = torch.stack([row / (float(row.norm()) or 1.0) for row in d])
        d = torch.stack([column / (float(column.norm()) or 1.0) for column in d.T]).T
    return d * (min(g.shape) / g.shape[1]) ** 0.5


def dion3(g, s):
    m = len(g)
    total = s.get("momentum", torch.zeros_like(g)) + g
    v = s.get("variance", torch.zeros(m, dtype=g.dtype)).clone()
    chosen = total.abs().sum(1).topk(-int(-0.25 * m // 1)).indices
    u = total[chosen] / total[chosen].norm().clamp_min(1e-7)
    for _ in range(5):
        a = u @ u.T
        u = 3.4445 * u + (2.0315 * a @ a - 4.775 * a) @ u
    v[chosen] = 0.95 * v[chosen] + 0.05 * u.square().mean(1)
    even = u / (v[chosen].sqrt() + 1e-7)[:, None]
    d = torch.zeros_like(g)
    d[chosen] = even * u.norm() / even.norm()
    total[chosen] *= 0.95
    s.update(momentum=total, variance=v)
    return d


ORACLES = {"dion3": dion3, "rmnp": rmnp, "sinkgd": sinkgd}


def gradient(case, k):
    shape = CASES[case]
    if case != "deficient":
        return randn(*shape, seed=k + 1, dtype=torch.float64)
    left, right = randn(shape[0], 2, seed=1, dtype=torch.float64), randn(2, shape[1], seed=k, dtype=torch.float64)
    left[3], right[:, 5] = 0.0, 0.0
    return left @ right


@pytest.mark.parametrize("backend", ["rust", "torch"])
@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ORACLES)
def test_it_takes_the_steps_of_its_equations(name, case, steps, backend):
    shape = CASES[case]
    p, x = parameter(randn(*shape, dtype=torch.float64)), randn(*shape, dtype=torch.float64)
    o = orthdion.create(name, [p], lr=0.1, weight_decay=0.2, backend=backend)
    kept = [{} for _ in range(shape[0] if len(shape) == 3 else 1)]
    for k in range(steps):
        p.grad = gradient(case, k)
        o.step()
        parts = p.grad if len(shape) == 3 else p.grad[None]
        d = torch.stack([ORACLES[name](g, s) for g, s in zip(parts, kept, strict=True)]).view(shape)
        x = (1 - 0.1 * 0.2) * x - 0.1 * (shape[-2] / shape[-1]) ** 0.5 * d
    assert (p.detach() - x).norm() < 1e-10 * x.norm()
    assert set(o.state[p]) == set(kept[0])
    for key, t in o.state[p].items():
        expected = torch.stack([s[key] for s in kept]).view(t.shape)
        assert (t - expected).norm() < 1e-10 * expected.norm().clamp_min(1e-3), key


@pytest.mark.parametrize("name", ORACLES)
def test_it_never_divides_by_zero(name):
    """With the smallest ε that it takes, on gradients of zeros, with rows and columns of zeros, and of all sizes."""
    rule = orthdion.optim.OPTIMIZERS[name].rule
    options = {"epsilon": 0.0} if "epsilon" in rule.__dataclass_fields__ else {}
    for dtype in (torch.float32, torch.float64):
        holes = randn(8, 12, seed=1, dtype=dtype)
        holes[2], holes[:, 3] = 0.0, 0.0
        for g in (torch.zeros_like(holes), holes, 1e-42 * holes, 1e35 * holes, torch.zeros_like(holes)):
            p = parameter(torch.zeros(8, 12, dtype=dtype), g.clone())
            o = orthdion.create(name, [p], lr=1.0, weight_decay=0.0, **options)
            for _ in range(3):
                o.step()
                assert torch.isfinite(p).all() and not o.skipped_steps
                assert not p[2].any() and not p[:, 3].any()

"""Muon and NorMuon against what they claim to be."""

import pytest
import torch
from oracles import parameter, randn, with_spectrum

import orthdion
from orthdion.numerics.newton_schulz import JORDAN, POLAR_EXPRESS

SHAPES = [(24, 16), (16, 40), (20, 20), (1, 7), (7, 1)]
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon (before 2.9)")


def by_hand(u, coefficients=JORDAN, divisor=1.0):
    """The published iteration in double."""
    x = u.double() / (u.double().norm() * divisor).clamp_min(1e-7)
    x = x.T if u.shape[0] > u.shape[1] else x
    for a, b, c in coefficients:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if u.shape[0] > u.shape[1] else x


@pytest.mark.parametrize("backend", ["rust", "torch"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_is_torchs_with_products_in_float32(backend, shape, nesterov):
    p, x, m = parameter(randn(*shape)), randn(*shape).double(), torch.zeros(shape, dtype=torch.float64)
    o = orthdion.Muon([p], lr=0.1, weight_decay=0.2, nesterov=nesterov, adjust_lr="original", backend=backend)
    for k in range(4):
        g = randn(*shape, seed=k + 1)
        p.grad = g.clone()
        o.step()
        m = torch.lerp(m, g.double(), 0.05)
        d = by_hand(torch.lerp(g.double(), m, 0.95) if nesterov else m)
        x = (1 - 0.1 * 0.2) * x - 0.1 * max(1.0, shape[0] / shape[1]) ** 0.5 * d
    assert (p.detach().double() - x).abs().max() < 5e-6


@needs_muon
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_muon_is_torchs_to_the_rounding_of_its_bfloat16_products(adjust):
    ours, theirs = ([parameter(randn(*s, seed=i)) for i, s in enumerate(SHAPES)] for _ in range(2))
    o = orthdion.Muon(ours, lr=0.1, weight_decay=0.2, adjust_lr=adjust)
    t = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2, momentum=0.95, adjust_lr_fn=adjust)
    for k in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = randn(*a.shape, seed=k + 1)
            b.grad = a.grad.clone()
        o.step()
        t.step()
    for a, b in zip(ours, theirs, strict=True):
        scale = 0.1 * (0.2 * max(a.shape) ** 0.5 if adjust == "match_rms_adamw" else 1.0)
        assert (a - b).abs().max() < 0.08 * scale


@pytest.mark.parametrize("backend", ["rust", "torch"])
@pytest.mark.parametrize("polar", ["jordan", "polar-express", "exact"])
def test_the_steps_singular_values_are_near_one(backend, polar):
    for shape in [(40, 24), (24, 40), (30, 30)]:
        p = parameter(torch.zeros(shape, dtype=torch.float64))
        p.grad = with_spectrum(*shape, torch.linspace(1.0, 0.3, min(shape), dtype=torch.float64))
        o = orthdion.Muon([p], lr=1.0, weight_decay=0.0, polar=polar, adjust_lr=None, nesterov=False, backend=backend)
        o.step()
        s = torch.linalg.svdvals(p.detach())
        low, high = {"jordan": (0.65, 1.25), "polar-express": (0.85, 1.15), "exact": (1 - 1e-9, 1 + 1e-9)}[polar]
        assert low < float(s.min()) and float(s.max()) < high, s
        if polar == "polar-express":
            expected = -by_hand(0.05 * p.grad, POLAR_EXPRESS, 1.02)
            assert (p.detach() - expected).norm() < 1e-10 * expected.norm()


@pytest.mark.parametrize("backend", ["rust", "torch"])
@pytest.mark.parametrize("shape", SHAPES)
def test_normuon_has_even_rows_at_muons_norm(backend, shape):
    p, x, m = parameter(randn(*shape).double()), randn(*shape).double(), torch.zeros(shape, dtype=torch.float64)
    v = torch.zeros(shape[0], dtype=torch.float64)
    o = orthdion.NorMuon([p], lr=0.1, weight_decay=0.0, backend=backend)
    for k in range(4):
        g = randn(*shape, seed=k + 1, dtype=torch.float64)
        p.grad = g.clone()
        o.step()
        m = torch.lerp(m, g, 0.05)
        d = by_hand(torch.lerp(g, m, 0.95))
        v = 0.95 * v + 0.05 * d.square().mean(1)
        even = d / (v.sqrt() + 1e-7)[:, None]
        x = x - 0.1 * (shape[0] / shape[1]) ** 0.5 * even * d.norm() / even.norm()
    assert (p.detach() - x).norm() < 1e-10 * x.norm()
    assert torch.allclose(o.state[p]["variance"], v, atol=1e-12)


def test_bfloat16_products_stay_near_float32s():
    steps = []
    for compute_dtype in (None, "bfloat16"):
        p = parameter(torch.zeros(48, 32))
        p.grad = randn(48, 32, seed=1)
        orthdion.Muon([p], lr=1.0, weight_decay=0.0, compute_dtype=compute_dtype).step()
        steps.append(p.detach())
    distance = (steps[0] - steps[1]).norm() / steps[0].norm()
    assert 1e-5 < distance < 0.05

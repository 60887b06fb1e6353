"""Dion2 against its equations in double, and the edges of its selection."""

import pytest
import torch
from oracles import parameter, randn

import orthdion

BACKENDS = pytest.mark.parametrize("backend", ["rust", "torch"])


def dion2_step(x, g, m, lr, f, decay, wd):
    """Dion2 (arXiv 2512.16928) in place, in double; columns are the rows of the transposed matrix."""
    m += g
    tall, scale = m.shape[0] > m.shape[1], (m.shape[0] / m.shape[1]) ** 0.5
    view, out = (m.T, x.T) if tall else (m, x)
    chosen = view.abs().sum(1).topk(-int(-f * len(view) // 1)).indices
    d = view[chosen] / view[chosen].norm().clamp_min(1e-7)
    for _ in range(5):
        a = d @ d.T
        d = 3.4445 * d + (2.0315 * a @ a - 4.775 * a) @ d
    x *= 1 - lr * wd
    out[chosen] -= lr * scale * d
    view[chosen] *= decay


@BACKENDS
@pytest.mark.parametrize("shape", [(24, 16), (16, 40), (20, 20), (10, 13), (1, 7), (7, 1)])
@pytest.mark.parametrize(("f", "decay"), [(0.25, 0.95), (0.5, 0.7), (1.0, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_is_the_papers_step(backend, shape, f, decay, dtype):
    p, m = parameter(randn(*shape, dtype=dtype)), torch.zeros(shape, dtype=torch.float64)
    x = p.detach().double().clone()
    o = orthdion.Dion2([p], lr=0.1, weight_decay=0.2, fraction=f, ef_decay=decay, backend=backend)
    for k in range(5):
        p.grad = randn(*shape, seed=k + 1, dtype=dtype)
        o.step()
        dion2_step(x, p.grad.double(), m, 0.1, f, decay, 0.2)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    for ours, theirs in ((p.detach(), x), (o.state[p]["momentum"], m)):
        assert (ours.double() - theirs).norm() < tolerance * theirs.norm().clamp_min(1.0)


@BACKENDS
def test_its_defaults_are_the_papers(backend):
    p, x, m = parameter(randn(9, 30).double()), randn(9, 30).double(), torch.zeros(9, 30, dtype=torch.float64)
    o = orthdion.create("dion2", [p], backend=backend)
    p.grad = randn(9, 30, seed=1, dtype=torch.float64)
    o.step()
    group = o.param_groups[0]
    assert (group["fraction"], group["ef_decay"]) == (0.25, 0.95)
    dion2_step(x, p.grad, m, group["lr"], 0.25, 0.95, group["weight_decay"])
    assert (p.detach() - x).norm() < 1e-12 * x.norm()


@pytest.mark.parametrize("shape", [(10, 30), (30, 10)])
def test_only_the_largest_slices_move_and_ties_go_to_the_first(shape):
    p = parameter(torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64))
    side = p.grad if shape[0] < shape[1] else p.grad.T
    side[7] *= 3.0
    o = orthdion.Dion2([p], lr=1.0, fraction=0.3, weight_decay=0.0)  # 0.3·10 is 3 slices, whatever its rounding
    o.step()
    rows = p.detach() if shape[0] < shape[1] else p.detach().T
    assert rows.abs().sum(1).nonzero().flatten().tolist() == [0, 1, 7]


def test_what_was_not_stepped_is_kept_until_it_is():
    """Error feedback: with decay 0 and a gradient that stays, every row's turn comes."""
    p, g = parameter(torch.zeros(8, 12)), randn(8, 12)
    o = orthdion.Dion2([p], lr=1.0, weight_decay=0.0, fraction=0.25, ef_decay=0.0)
    for _ in range(12):
        p.grad = g.clone()
        o.step()
    assert (p.detach().abs().sum(1) > 0).all()


def test_ascent_stacks_fused_blocks_and_convolutions_are_steps_of_their_matrices():
    def stepped(x, g, **group):
        p = parameter(x, g)
        orthdion.Dion2([{"params": [p], **group}], lr=0.1, weight_decay=0.1).step()
        return p.detach()

    x, g = randn(3, 8, 12, dtype=torch.float64), randn(3, 8, 12, seed=1, dtype=torch.float64)
    each = torch.stack([stepped(a, b) for a, b in zip(x, g, strict=True)])
    assert torch.allclose(stepped(x, g), each, atol=1e-13)
    blocks = stepped(x.reshape(24, 12), g.reshape(24, 12), split_sizes=(8, 8, 8))
    assert torch.allclose(blocks, each.reshape(24, 12), atol=1e-13)
    kernel = stepped(x.view(3, 8, 4, 3), g.view(3, 8, 4, 3))
    assert torch.allclose(kernel.view(3, 96), stepped(x.view(3, 96), g.view(3, 96)), atol=1e-13)
    assert torch.allclose(stepped(x[0], g[0], maximize=True), stepped(x[0], -g[0]), atol=1e-13)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"fraction": 0.0}, "fraction must be in"), ({"fraction": 1.5}, "fraction"), ({"ef_decay": 1.1}, "ef_decay")],
    ids=str,
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        orthdion.Dion2([parameter(randn(4, 4))], **options)

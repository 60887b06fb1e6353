"""Parameters of every form are the matrices they stand for."""

import pytest
import torch
from oracles import parameter, randn
from torch import nn

import orthdion


def stepped(p, **group):
    o = orthdion.OrthDion([{"params": [p], **group}], lr=0.1, weight_decay=0.1)
    for k in range(3):
        p.grad = torch.empty_like(p).copy_(randn(*p.shape, seed=k, dtype=torch.float32))
        o.step()
    return p.detach(), o.state[p]


def alone(x, grads, q, scale):
    """The same steps on one 2-D matrix with a given warm start and scale."""
    p = parameter(x)
    o = orthdion.OrthDion(
        [p],
        lr=0.1 * scale / (x.shape[0] / x.shape[1]) ** 0.5,
        weight_decay=0.1 / scale * (x.shape[0] / x.shape[1]) ** 0.5,
    )
    o.state[p]["Q"] = q.clone()
    for g in grads:
        p.grad = g.clone()
        o.step()
    return p.detach()


def start(shape, seed=0, index=0):
    return orthdion.core.starts.start(shape, seed, index).float()


def test_a_stack_is_its_matrices():
    x = randn(3, 20, 12)
    got, state = stepped(parameter(x))
    assert state["Q"].shape == (3, 12, 3)
    q = start((3, 12, 3))
    for e in range(3):
        want = alone(x[e], [randn(3, 20, 12, seed=k)[e] for k in range(3)], q[e], (20 / 12) ** 0.5)
        assert torch.allclose(got[e], want, atol=1e-6)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_a_matrix_in_either_memory_format(memory_format):
    x = randn(16, 3, 3, 3).contiguous(memory_format=memory_format)
    got, state = stepped(parameter(x))
    assert got.is_contiguous(memory_format=memory_format)
    order = (0, 2, 3, 1) if memory_format == torch.channels_last else (0, 1, 2, 3)
    flat = lambda t: t.permute(order).flatten(1)  # noqa: E731
    q = start((1, 16, state["Q"].shape[1]))[0]
    want = alone(flat(x), [flat(randn(16, 3, 3, 3, seed=k)) for k in range(3)], q, (16 / 27) ** 0.5)
    assert torch.allclose(flat(got), want, atol=1e-6)


def test_a_one_dimensional_convolution_is_flattened_on_request():
    conv = nn.Conv1d(4, 8, 5)
    (group,) = [g for g in orthdion.param_groups(conv) if g["algorithm"] == "matrix"]
    assert group["flatten"] is True
    assert stepped(conv.weight, flatten=True)[1]["Q"].shape == (8, 2)
    assert stepped(nn.Conv1d(4, 8, 5).weight)[1]["Q"].shape == (8, 4, 1)


def test_fused_blocks_are_their_parts():
    x = randn(36, 12)
    got, state = stepped(parameter(x), split_sizes=(12, 12, 12))
    assert state["Q"].shape == (3, 12, 3)
    q = start((3, 12, 3))
    for b in range(3):
        rows = slice(12 * b, 12 * b + 12)
        want = alone(x[rows], [randn(36, 12, seed=k)[rows] for k in range(3)], q[b], 1.0)
        assert torch.allclose(got[rows], want, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (3, 0, 4), (0, 3, 4)])
def test_empty_parameters_are_stepped_without_a_word(shape):
    p = parameter(torch.zeros(shape), torch.zeros(shape))
    o = orthdion.OrthDion([p])
    o.step()
    assert "Q" in o.state[p]
    v = parameter(torch.zeros(shape), torch.zeros(shape))
    orthdion.OrthDion([{"params": [v], "algorithm": "adamw"}]).step()


@pytest.mark.parametrize("backend", ["rust", "torch"])
def test_non_contiguous_parameters_and_gradients(backend):
    base = randn(40, 50)
    views = {
        "transposed": lambda: base.clone().T,
        "columns": lambda: base.clone()[:, 10:30],
        "every second": lambda: base.clone()[::2, ::2],
    }
    for name, view in views.items():
        dense, strided = parameter(view().contiguous()), nn.Parameter(view())
        assert not strided.is_contiguous()
        for p in (dense, strided):
            o = orthdion.CompletedDion([p], backend=backend)
            for k in range(3):
                g = randn(p.shape[1], p.shape[0], seed=k).T
                p.grad = g if k else g.contiguous()
                o.step()
        assert torch.allclose(dense.detach(), strided.detach(), atol=1e-6), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("momentum_dtype", [None, torch.float32, torch.bfloat16])
def test_every_weight_and_state_type(dtype, momentum_dtype):
    results = []
    for backend in ("rust", "torch"):
        p = parameter(randn(40, 24).to(dtype))
        o = orthdion.OrthDion([p], momentum_dtype=momentum_dtype, q_dtype=momentum_dtype, backend=backend)
        for k in range(3):
            p.grad = randn(40, 24, seed=k).to(dtype)
            o.step()
        default = torch.float32 if dtype == torch.float16 else dtype
        assert o.state[p]["momentum"].dtype == (momentum_dtype or default) == o.state[p]["Q"].dtype
        results.append(p.detach().double())
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 2e-2)
    if momentum_dtype == torch.bfloat16 or (momentum_dtype == torch.float32 and dtype == torch.float64):
        tolerance = max(tolerance, 1e-2 if momentum_dtype == torch.bfloat16 else 1e-5)
    assert (results[0] - results[1]).abs().max() < tolerance


@pytest.mark.parametrize(
    ("fraction", "multiple", "rank"),
    [(0.25, 1, 8), (0.25, 16, 16), (0.1, 1, 4), (1.0, 1, 32), (0.5, 64, 32), (0.3, 1, 10)],
)
def test_rank_is_rounded_up_to_the_multiple_and_capped(fraction, multiple, rank):
    p = parameter(randn(48, 32))
    o = orthdion.OrthDion([p], rank_fraction=fraction, rank_multiple_of=multiple)
    assert o.state[p]["Q"].shape == (32, rank)


def test_a_fraction_that_is_exact_in_decimal_is_not_rounded_up():
    assert orthdion.optim.orth_dion.OrthDionRule(rank_fraction=0.1).rank(30, 30) == 3
    assert orthdion.optim.orth_dion.OrthDionRule(rank_fraction=0.07).rank(700, 700) == 49


@pytest.mark.parametrize("algorithm", ["matrix", "adamw", "lion"])
@pytest.mark.parametrize("backend", ["rust", "torch"])
def test_any_memory_layout_is_stepped_like_a_contiguous_copy(algorithm, backend):
    layouts = {
        "channels last": lambda x: x.to(memory_format=torch.channels_last),
        "sliced": lambda x: torch.cat([x, x], dim=2)[:, :, : x.shape[2]],
        "permuted": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    }
    for name, layout in layouts.items():
        x = randn(8, 3, 4, 4)
        results = []
        for p in (nn.Parameter(x.clone()), nn.Parameter(layout(x.clone()))):
            o = orthdion.OrthDion(
                [{"params": [p], "algorithm": algorithm}],
                lr=0.1,
                rank_fraction=1.0,  # then the polar step depends on no order of columns and no start
                right_factor="polar",
                feedback="momentum",
                backend=backend,
            )
            for k in range(3):
                p.grad = randn(8, 3, 4, 4, seed=k)
                o.step()
            results.append((p.detach().clone(), o.state[p]["momentum"].clone()))
        assert results[0][1].norm() > 0.3
        for ours, theirs in zip(*results, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5), name


def test_a_layout_changed_after_construction_loses_nothing():
    conv = nn.Conv2d(4, 8, 3, bias=False)
    o = orthdion.OrthDion([conv.weight], feedback="momentum")
    conv.to(memory_format=torch.channels_last)
    conv.weight.grad = randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    o.step()
    assert torch.allclose(o.state[conv.weight]["momentum"], 0.95 * conv.weight.grad)


def test_a_stack_whose_experts_interleave_in_memory_is_stepped():
    p = nn.Parameter(randn(20, 12, 4).permute(2, 0, 1))
    p.grad = randn(4, 20, 12)
    before = p.detach().clone()
    orthdion.OrthDion([p]).step()
    assert not torch.equal(before, p.detach())


def test_a_lazily_negated_gradient_is_read_as_what_it_is():
    z = torch.complex(randn(6, 4), randn(6, 4, seed=1))
    lazy = torch.imag(z.conj())
    assert lazy.is_neg()
    a, b = parameter(randn(6, 4, seed=2)), parameter(randn(6, 4, seed=2))
    a.grad, b.grad = lazy, lazy.resolve_neg().contiguous()
    for p in (a, b):
        orthdion.OrthDion([p]).step()
    assert torch.allclose(a.detach(), b.detach())


def test_parameters_that_are_slices_of_one_tensor_are_stepped_and_overlapping_ones_refused():
    whole = randn(20, 30)
    left, right = nn.Parameter(whole[:, :10]), nn.Parameter(whole[:, 10:])
    for p in (left, right):
        p.grad = randn(*p.shape, seed=1)
    orthdion.OrthDion([left, right]).step()
    a, b = nn.Parameter(whole[:, :11]), nn.Parameter(whole[:, 10:])
    with pytest.raises(ValueError, match=r"parameter 0 \(20, 11\) and group 1, parameter 0 \(20, 20\) share memory"):
        orthdion.OrthDion([{"params": [a]}, {"params": [b], "algorithm": "adamw"}])
    with pytest.raises(ValueError, match="twice"), pytest.warns(UserWarning, match="duplicate"):
        orthdion.OrthDion([a, a])

"""Rows in one bit or four an entry: what comes back, what it costs, and that nothing becomes of nothing."""

import math

import numpy as np
import pytest
import torch
from oracles import randn

from orthdion.backends import get
from orthdion.numerics.bits import average, average_changes, pack, pack_change, row_bytes, unpack
from orthdion.requests import ALONE, Average, AverageChanges, CompressedMean, Pack, PackChange, Squares, Unpack

SIZES = [(5, 1), (3, 7), (4, 8), (1, 63), (6, 64), (7, 65), (2, 130), (0, 9), (4, 0)]
DTYPES = (torch.float32, torch.float64)


def plain(t, bits):
    """What C leaves of a matrix, entry by entry, as section 7b of docs/algorithms.md has it."""
    a = t.numpy().astype(np.float64)
    out = np.zeros_like(a)
    for i, row in enumerate(a):
        for start in range(0, len(row), max(len(row), 1) if bits == 1 else 64):
            part = row[start:] if bits == 1 else row[start : start + 64]
            if bits == 1:
                out[i] = np.where(part < 0, -1.0, 1.0) * np.abs(part).mean()
            elif np.abs(part).max() > 0:
                scale = np.abs(part).max() / 7
                out[i, start : start + 64] = np.round(part / scale * (1 + 1e-12)) * scale
    return torch.from_numpy(out)


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_comes_back_is_what_the_definition_leaves(shape, bits, dtype):
    t = randn(*shape, dtype=dtype)
    packed = pack(t, bits)
    scales = 1 if bits == 1 else math.ceil(shape[1] / 64)
    assert packed.dtype == torch.uint8
    assert packed.shape == (shape[0], scales * dtype.itemsize + math.ceil(shape[1] * bits / 8))
    assert packed.shape[1] == row_bytes(shape[1], bits, dtype)
    torch.testing.assert_close(unpack(packed, shape[1], bits, dtype).double(), plain(t, bits), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e30])
def test_a_row_of_zeros_stays_zero_beside_any_other(bits, size):
    t = randn(3, 70) * size
    t[1] = 0.0
    back = unpack(pack(t, bits), 70, bits, t.dtype)
    assert back.isfinite().all()
    assert not back[1].any()


@pytest.mark.parametrize("bits", [1, 4])
def test_the_mean_is_that_of_what_came_packed_again(bits):
    parts = [randn(6, 70, seed=k, dtype=torch.float64) for k in range(5)]
    together = average(torch.stack([pack(t, bits) for t in parts]), 70, bits, torch.float64)
    expected = plain(sum(plain(t, bits) for t in parts) / 5, bits)
    torch.testing.assert_close(unpack(together, 70, bits, torch.float64), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_lies_halfway_goes_away_from_zero_however_it_was_rounded(dtype):
    for scale in (1.0, 0.1, 1 / 3, 7e-5):
        t = torch.tensor([[6.0, 3.0, -3.0]], dtype=dtype) * scale  # 7, 3.5 and −3.5 steps of 6/7
        for nudged in (t, t * (1 + torch.finfo(dtype).eps), t * (1 - torch.finfo(dtype).eps)):
            back = unpack(pack(nudged, 4), 3, 4, dtype) / t[0, 0] * 7
            torch.testing.assert_close(back, torch.tensor([[7.0, 4.0, -4.0]], dtype=dtype), rtol=1e-5, atol=0.0)


def test_what_is_packed_is_packed_to_the_same_bytes_again():
    for bits in (1, 4):
        t = unpack(pack(randn(9, 100, dtype=torch.float64), bits), 100, bits, torch.float64)
        torch.testing.assert_close(unpack(pack(t, bits), 100, bits, torch.float64), t, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("backend", ["torch", "rust"])
def test_a_rule_may_ask_for_the_mean_where_it_is_alone(bits, backend):
    t = randn(9, 70, dtype=torch.float64)
    (alone,) = get(backend).answer([CompressedMean(t, ALONE, bits, "residual")])
    torch.testing.assert_close(alone, plain(plain(t, bits), bits))


@pytest.mark.parametrize("shape", [*SIZES, (300, 500)], ids=str)
@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_core_writes_the_references_bytes(shape, bits, dtype):
    """At one bit a scale may differ by a rounding: it is a sum in another order."""
    core = pytest.importorskip("orthdion._core", reason="the Rust core is not built") and get("rust")
    parts = [randn(*shape, seed=k, dtype=dtype).T.contiguous().T for k in range(3)]
    for t in parts:
        t[: shape[0] // 2, :2] = 0.0
    packed = [core.answer([Pack(t, bits)])[0] for t in parts]
    together = torch.stack(packed)
    mean = core.answer([Average(together, shape[1], bits, dtype)])[0]
    back = core.answer([Unpack(mean, shape[1], bits, dtype)])[0]
    assert torch.equal(back, unpack(mean, shape[1], bits, dtype))
    for got, want in [
        *((p, pack(t, bits)) for p, t in zip(packed, parts, strict=True)),
        (mean, average(together, shape[1], bits, dtype)),
    ]:
        head = dtype.itemsize if bits == 1 else 0
        assert torch.equal(got[:, head:], want[:, head:])
        scales = [np.frombuffer(x[:, :head].numpy().tobytes(), str(dtype)[6:]) for x in (got, want)]
        np.testing.assert_allclose(*scales, rtol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("shape", [*SIZES, (300, 500)], ids=str)
@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("backend", ["torch", "rust"])
def test_changes_are_sent_and_remembered(shape, bits, backend):
    """Of three ranks, of which the second owns all rows: by the definition, entry by entry."""
    if backend == "rust":
        pytest.importorskip("orthdion._core", reason="the Rust core is not built")
    ts, hs = ([randn(*shape, seed=10 * j + k, dtype=torch.float64) for k in range(3)] for j in (0, 1))
    sent = [plain(t - h, bits) for t, h in zip(ts, hs, strict=True)]
    packed = []
    for t, h, c in zip(ts, hs, sent, strict=True):
        one, memory = get(backend).answer([PackChange(t, h.T.contiguous().T, bits, 0.75)])[0]
        torch.testing.assert_close(memory, 0.75 * (h + c))
        torch.testing.assert_close(unpack(one, shape[1], bits, torch.float64), c)
        packed.append(one)
    packed[1] = torch.full_like(packed[1], 0xAA)  # is not read
    known = (hs[0] + hs[2]) / 2
    mean, memory = get(backend).answer([AverageChanges(torch.stack(packed), ts[1], known, 1, bits, 0.75)])[0]
    known = known + (sent[0] + sent[2]) / 2
    torch.testing.assert_close(memory, 0.75 * known)
    expected = plain((ts[1] + 2 * known) / 3, bits)
    torch.testing.assert_close(unpack(mean, shape[1], bits, torch.float64), expected)


@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_core_sends_and_remembers_the_references_bits(bits, dtype):
    core = pytest.importorskip("orthdion._core", reason="the Rust core is not built") and get("rust")
    ts, hs = ([randn(70, 130, seed=10 * j + k, dtype=dtype) for k in range(3)] for j in (0, 1))
    packed = [pack_change(t, h, bits, 0.9) for t, h in zip(ts, hs, strict=True)]
    head = dtype.itemsize if bits == 1 else 0
    for t, h, (want, memory) in zip(ts, hs, packed, strict=True):
        got, kept = core.answer([PackChange(t, h, bits, 0.9)])[0]
        assert torch.equal(got[:, head:], want[:, head:])
        torch.testing.assert_close(kept, memory, rtol=0.0, atol=64 * torch.finfo(dtype).eps)
    all_of_them = torch.stack([bytes_ for bytes_, _ in packed])
    want, memory = average_changes(all_of_them, ts[2], hs[2], 2, bits, 0.9)
    got, kept = core.answer([AverageChanges(all_of_them, ts[2], hs[2], 2, bits, 0.9)])[0]
    assert torch.equal(got[:, head:], want[:, head:])
    assert torch.equal(kept, memory)


@pytest.mark.parametrize("shape", [(1, 1), (7, 65), (300, 40), (0, 3), (3, 0)], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_sums_of_squares_on_every_backend(shape, scaled):
    t, columns = randn(*shape), randn(shape[1], 1, dtype=torch.float64)[:, 0] if scaled else None
    wide = t.double() * (1.0 if columns is None else columns)
    for backend in ("torch", "rust"):
        if backend == "rust":
            pytest.importorskip("orthdion._core", reason="the Rust core is not built")
        rows, of_columns = get(backend).answer([Squares(t, columns)])[0]
        torch.testing.assert_close(rows, wide.square().sum(1), rtol=1e-6, atol=0.0)
        assert (of_columns is None) == scaled
        if of_columns is not None:
            torch.testing.assert_close(of_columns, wide.square().sum(0), rtol=1e-6, atol=0.0)

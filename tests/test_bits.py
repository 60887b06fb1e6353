"""Rows in one bit or four an entry: what comes back, what it costs, and that nothing becomes of nothing."""

import math

import numpy as np
import pytest
import torch
from oracles import randn

from orthdion.backends import get
from orthdion.numerics.bits import average, pack, row_bytes, unpack
from orthdion.requests import ALONE, CompressedMean

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

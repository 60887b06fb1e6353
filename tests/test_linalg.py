import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import orth, randn, with_spectrum

from orthdion import _core, linalg


def ratios(a, v, t):
    """Orthogonality on the directions that are not null, and residual, in units of √r·u."""
    unit = (2.0**-53 if a.dtype == torch.float64 else 2.0**-24) * a.shape[1] ** 0.5
    a, v, t = a.double(), v.double(), t.double()
    eye = torch.diag((t.diagonal() > 0).double())
    return float((v.T @ v - eye).norm()) / unit, float((a - v @ t).norm() / a.norm().clamp_min(1e-300)) / unit


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 200),
    r=st.integers(1, 80),
    exponent=st.floats(0, 8),
    scale=st.integers(-30, 30),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    transposed=st.booleans(),
)
def test_qr_reaches_lapack_ratios_for_any_conditioning_scale_and_layout(n, r, exponent, scale, seed, dtype, transposed):
    n = max(n, r)
    a = (with_spectrum(n, r, torch.logspace(0, -exponent, r), seed) * 10.0**scale).to(dtype)
    if transposed:
        a = a.T.contiguous().T
    v, t = linalg.qr(a)
    orthogonality, residual = ratios(a, v, t)
    assert orthogonality <= 30 and residual <= 30
    assert torch.equal(t, t.triu()) and bool((t.diagonal() >= 0).all())


@pytest.mark.parametrize("rank", [0, 1, 3, 7])
def test_qr_of_deficient_input_marks_null_directions_and_loses_nothing(rank):
    a = (randn(90, rank, dtype=torch.float64) @ randn(rank, 10, seed=1, dtype=torch.float64)).double()
    v, t = linalg.qr(a, tol=1e-12)
    assert int((t.diagonal() > 0).sum()) == rank
    assert (a - v @ t).norm() <= 1e-12 * max(a.norm(), 1)


@given(n=st.integers(2, 90), r=st.integers(1, 40), exponent=st.floats(0, 4), seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_polar_is_the_closest_orthonormal_matrix(n, r, exponent, seed):
    n = max(n, r)
    a = with_spectrum(n, r, torch.logspace(0, -exponent, r), seed)
    u, _, wt = torch.linalg.svd(a, full_matrices=False)
    assert (linalg.polar(a) - u @ wt).norm() < 1e-15 * 10**exponent * 50 * r
    assert (linalg.polar(a.float()).double() - u @ wt).norm() < 1e-7 * 10**exponent * 10 * r**0.5


def test_polar_leaves_null_directions_out():
    a = with_spectrum(40, 9, torch.tensor([3.0, 2, 1, 0, 0, 0, 0, 0, 0], dtype=torch.float64))
    u, _, wt = torch.linalg.svd(a)
    assert torch.allclose(linalg.polar(a, tol=1e-12), u[:, :3] @ wt[:3], atol=1e-12)


def test_power_iteration_finds_the_leading_subspace():
    a = with_spectrum(60, 40, torch.tensor([5.0, 4, 3] + [1e-6] * 20, dtype=torch.float64))
    p, r = linalg.power_iteration(a, orth(randn(40, 3, dtype=torch.float64)))
    assert (p @ r.T - a).norm() < 1e-4
    assert torch.allclose(r, a.T @ p, atol=1e-12)


@pytest.mark.parametrize("name", ["qr", "polar", "power_iteration"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numpy_and_torch_give_the_same_bits(name, dtype):
    a, q = randn(70, 30, dtype=dtype), randn(30, 8, seed=1, dtype=dtype)
    args = (a, q) if name == "power_iteration" else (a,)
    ours = getattr(linalg, name)(*args)
    theirs = getattr(linalg, name)(*(x.numpy() for x in args))
    for x, y in zip(*(z if isinstance(z, tuple) else (z,) for z in (ours, theirs)), strict=True):
        assert isinstance(y, np.ndarray) and y.dtype == x.numpy().dtype
        assert np.array_equal(x.numpy(), y)


def test_batches_are_their_matrices():
    a = randn(2, 3, 20, 5)
    v, t = linalg.qr(a)
    assert v.shape == (2, 3, 20, 5) and t.shape == (2, 3, 5, 5)
    assert torch.equal(v[1, 2], linalg.qr(a[1, 2])[0])
    assert torch.equal(linalg.polar(a)[0, 1], linalg.polar(a[0, 1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_factored_in_single(dtype):
    a = randn(50, 8).to(dtype)
    v, _ = linalg.qr(a)
    assert v.dtype == dtype
    assert (v.float() - linalg.qr(a.float())[0]).abs().max() < 2.0**-8


def test_input_is_left_as_it_was_and_strides_do_not_matter():
    big = randn(64, 40)
    a = big[::2, 1::3]
    before = big.clone()
    assert torch.equal(linalg.qr(a)[0], linalg.qr(a.contiguous())[0])
    assert np.array_equal(linalg.qr(a.numpy())[0], linalg.qr(a)[0].numpy())
    assert torch.equal(big, before)
    assert np.array_equal(linalg.qr(a.numpy()[::-1])[0], linalg.qr(a.numpy()[::-1].copy())[0])


def test_fields_of_packed_records_half_arrays_and_no_columns():
    packed = np.zeros(60, [("x", "<f4"), ("p", "<u2")])
    packed["x"] = randn(60).numpy()
    a = packed["x"].reshape(20, 3)
    assert np.array_equal(linalg.qr(a)[0], linalg.qr(a.copy())[0])
    v, _ = linalg.qr(a.astype(np.float16))
    assert v.dtype == np.float16 and np.allclose(v, linalg.qr(a)[0], atol=2e-3)
    v, t = linalg.qr(torch.zeros(5, 0))
    assert v.shape == (5, 0) and t.shape == (0, 0) and linalg.polar(torch.zeros(5, 0)).shape == (5, 0)
    p, r = linalg.power_iteration(torch.ones(5, 4), torch.zeros(4, 0))
    assert p.shape == (5, 0) and r.shape == (4, 0)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: linalg.qr(torch.zeros(3, 5)), ValueError, "transpose"),
        (lambda: linalg.qr(torch.zeros(5)), ValueError, "two axes"),
        (lambda: linalg.qr([[1.0]]), TypeError, "NumPy or CuPy array or a torch tensor"),
        (lambda: linalg.qr(torch.zeros(5, 3, dtype=torch.int64)), TypeError, "int64"),
        (lambda: linalg.qr(torch.zeros(5, 3), tol=-1), ValueError, "tol"),
        (lambda: linalg.qr(torch.full((5, 3), float("nan"))), ValueError, "NaN"),
        (lambda: linalg.polar(torch.full((5, 3), float("inf"))), ValueError, "infinity"),
        (lambda: linalg.power_iteration(torch.zeros(5, 3), torch.zeros(4, 2)), ValueError, "q must have shape"),
        (lambda: linalg.power_iteration(torch.zeros(5, 3), torch.zeros(3, 2).double()), TypeError, "dtype"),
        (lambda: linalg.qr(torch.zeros(0, 5, 3)), ValueError, "empty"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("level", _core.instruction_sets()[1])
def test_every_instruction_set_reaches_the_ratios(level):
    code = (
        "import torch, sys; sys.path.insert(0, 'tests'); from orthdion import linalg, _core;"
        "from oracles import with_spectrum; from test_linalg import ratios;"
        f"assert _core.instruction_sets()[0] == '{level}';"
        "a = with_spectrum(300, 70, torch.logspace(0, -6, 70)).float(); v, t = linalg.qr(a);"
        "assert max(ratios(a, v, t)) < 30; linalg.polar(a)"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "ORTHDION_ISA": level}, check=True, cwd=root)


def test_cupy_arrays_change_hands_and_come_back(monkeypatch):
    """Through DLPack alone; CuPy's place is taken by a module of its name, as its arrays need a device."""
    import sys
    import types

    class NdArray:
        def __init__(self, t):
            self.t = t

        def __dlpack__(self, **kwargs):
            return self.t.__dlpack__(**kwargs)

        def __dlpack_device__(self):
            return self.t.__dlpack_device__()

    NdArray.__module__ = "cupy"
    cupy = types.ModuleType("cupy")
    cupy.from_dlpack = NdArray
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    a, q = randn(20, 6), randn(6, 3, seed=1)
    v, t = linalg.qr(NdArray(a))
    assert all(torch.equal(x.t, y) for x, y in zip((v, t), linalg.qr(a), strict=True))
    assert torch.equal(linalg.polar(a=NdArray(a), tol=1e-6).t, linalg.polar(a, tol=1e-6))
    ours = linalg.power_iteration(NdArray(a), NdArray(q))
    assert all(torch.equal(x.t, y) for x, y in zip(ours, linalg.power_iteration(a, q), strict=True))

"""Who serves CUDA tensors, and what is said where the kernels cannot."""

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch
from oracles import parameter, randn

import orthdion
from orthdion.backends import choose
from orthdion.backends.cupy import cublas, device


def test_without_a_device_plain_torch_serves_and_says_why():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    name, why = choose("auto", torch.device("cuda", 0), torch.float32)
    assert name == "torch"
    assert "cupy" in why.lower()
    with pytest.raises(ValueError, match=r"backend='cupy' cannot serve these parameters: .*use backend='auto'"):
        choose("cupy", torch.device("cuda", 0), torch.float32)


def test_double_weights_on_a_gpu_are_plain_torchs():
    name, why = choose("auto", torch.device("cuda", 0), torch.float64)
    assert name == "torch"
    assert "float32, bfloat16 and float16 weights, not torch.float64" in why


def test_the_kernels_are_no_backend_of_cpu_tensors():
    with pytest.raises(ValueError, match="serve CUDA tensors, these are on cpu"):
        orthdion.OrthDion([parameter(randn(4, 3))], backend="cupy")


class Compiling:
    """Stands for CuPy where torch says that there is a device: ``trouble`` is what compiling a module ends with."""

    def __init__(self, trouble):
        self.trouble, self.compiled = trouble, []
        runtime = SimpleNamespace(getDeviceCount=lambda: 1, CUDARuntimeError=RuntimeError)
        self.cuda = SimpleNamespace(runtime=runtime, Device=lambda index: contextlib.nullcontext())

    def RawModule(self, code, options):
        self.compiled.append(code)
        if self.trouble:
            raise RuntimeError(self.trouble)
        return SimpleNamespace(get_function=lambda name: None)


@pytest.mark.parametrize("trouble", ["Failed to find CUDA headers", None])
def test_a_compiler_that_does_not_work_is_found_out_before_the_first_step(monkeypatch, trouble):
    stand_in = Compiling(trouble)
    monkeypatch.setitem(sys.modules, "cupy", stand_in)
    monkeypatch.setattr(device, "library", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    why = device._cupy_error.__wrapped__(0)
    assert len(stand_in.compiled) == 1
    if trouble is None:
        assert why is None
    else:
        assert "cannot compile here (RuntimeError: Failed to find CUDA headers); pip install" in why


def test_products_on_two_streams_have_two_workspaces(monkeypatch):
    calls = []

    class Library:
        def __getattr__(self, name):
            return lambda *arguments: calls.append((name, arguments)) or 0

    monkeypatch.setattr(cublas, "library", Library)
    monkeypatch.setattr(cublas, "_WORKSPACE", 64)
    products = cublas.Products(torch.device("cpu"))
    for stream in (7, 8, 7):
        products.on(stream)
    spaces = [arguments[1] for name, arguments in calls if name == "cublasSetWorkspace_v2"]
    assert spaces[0] == spaces[2] != spaces[1]
    assert sum(name == "cublasCreate_v2" for name, _ in calls) == 1


def test_repr_and_backends_name_the_kernels(shim):
    o = orthdion.OrthDion([parameter(randn(4, 3))], backend="cupy")
    assert o.backends() == {"cupy: CUDA tensors": "1 parameters"}
    assert repr(o).endswith("backend cupy: CUDA tensors (1 parameters)")


def test_learning_rates_live_on_the_device_and_follow_groups_and_tensors(shim):
    lr = torch.tensor(0.5)
    p, q = parameter(randn(6, 4), torch.zeros(6, 4)), parameter(randn(6, 4), torch.zeros(6, 4))
    groups = [{"params": [p], "weight_decay": 0.1}, {"params": [q], "lr": lr, "weight_decay": 0.1}]
    o = orthdion.OrthDion(groups, lr=0.5, backend="cupy")
    x = p.detach().clone(), q.detach().clone()
    o.step()
    for t, before in zip((p, q), x, strict=True):
        assert torch.allclose(t.detach(), 0.95 * before)
    o.param_groups[0]["lr"] = 1.0
    lr.fill_(1.0)
    o.refresh_rates()
    o.step()
    for t, before in zip((p, q), x, strict=True):
        assert torch.allclose(t.detach(), 0.9 * 0.95 * before)

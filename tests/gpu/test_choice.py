"""Who serves CUDA tensors, and what is said where the kernels cannot."""

import pytest
import torch
from oracles import parameter, randn

import orthdion
from orthdion.backends import choose


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

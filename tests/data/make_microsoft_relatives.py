"""Makes microsoft_relatives.pt with microsoft/dion itself: python make_microsoft_relatives.py path/to/their/checkout

Matrices take some steps with each of their optimizers, one process, on the CPU. What they round to bfloat16 is left in
float32, and they are given the Newton–Schulz iterations of this file, so that only the rules are compared.
"""

import sys
from pathlib import Path

import torch

SHAPES = [(24, 10), (9, 31), (16, 16), (40, 6)]
STEPS = (1, 8)
LR, DECAY = 0.05, 0.1


def weights():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def step(params, optimizer, k):
    generator = torch.Generator().manual_seed(100 + k)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def trajectory(params, optimizer):
    """All weights, one after the other, after so many steps."""
    found = {}
    for k in range(max(STEPS)):
        step(params, optimizer, k)
        if k + 1 in STEPS:
            found[k + 1] = torch.cat([p.detach().flatten() for p in params])
    return found


def iterations(x, epsilon=None):
    """Jordan's five, in the format that comes in."""
    flip = x.size(-2) > x.size(-1)
    x = x.mT if flip else x
    x = x / x.norm(dim=(-2, -1), keepdim=True)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.mT if flip else x


def main(checkout):
    sys.path.insert(0, checkout)
    torch.compile = lambda function=None, **_: function if function is not None else lambda f: f
    half, torch.bfloat16 = torch.bfloat16, torch.float32
    from dion import Dion2, Dion3, Muon, NorMuon

    made = {}
    for name, kind, options in (
        ("dion2", Dion2, {"fraction": 0.25, "ef_decay": 0.9}),
        ("dion3", Dion3, {"fraction": 0.25, "mu": 0.9, "muon_beta2": 0.95}),
        ("muon", Muon, {"mu": 0.9, "nesterov": True, "adjust_lr": "spectral_norm"}),
        ("normuon", NorMuon, {"mu": 0.9, "muon_beta2": 0.95, "nesterov": True, "adjust_lr": "spectral_norm"}),
    ):
        params = weights()
        optimizer = kind(params, lr=LR, weight_decay=DECAY, newton_schulz_func=iterations, **options)
        made[name] = trajectory(params, optimizer)
    torch.bfloat16 = half  # which a file's bytes are counted with
    torch.save(made, Path(__file__).with_name("microsoft_relatives.pt"))


if __name__ == "__main__":
    main(sys.argv[1])

"""Makes microsoft_dion.pt with microsoft/dion itself: python make_microsoft_dion.py path/to/their/checkout

A tiny model takes three steps with their Dion; its state is kept as torch.save and torch.distributed.checkpoint see it.
It then takes two more: its weights after these are what a run that goes on here must reach.
"""

import sys
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import get_state_dict

STEPS, MORE = 3, 2


def model():
    torch.manual_seed(0)
    made = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Linear(10, 5))
    made.register_parameter("gain", torch.nn.Parameter(torch.ones(4)))
    return made


def groups(of):
    return [
        {"params": [of[0].weight, of[1].weight], "algorithm": "dion"},
        {"params": [of[0].bias, of[1].bias], "algorithm": "adamw", "lr": 0.02, "weight_decay": 0.0},
        {"params": [of.gain], "algorithm": "lion", "lr": 0.01},
    ]


def step(of, optimizer, k):
    generator = torch.Generator().manual_seed(100 + k)
    for p in of.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def main(checkout):
    sys.path.insert(0, checkout)
    torch.compile = lambda function=None, **_: function if function is not None else lambda f: f
    from dion import Dion

    of = model()
    optimizer = Dion(groups(of), lr=0.05, rank_fraction=0.6, mu=0.9)
    for k in range(STEPS):
        step(of, optimizer, k)
    weights, states = get_state_dict(of, optimizer)
    kept = {
        "model": {k: v.clone() for k, v in weights.items()},
        "optimizer": {**states, "state": {n: {k: v.clone() for k, v in s.items()} for n, s in states["state"].items()}},
        "torch.save": {**optimizer.state_dict()},
    }
    kept["torch.save"]["state"] = {
        i: {k: v.clone() for k, v in s.items()} for i, s in kept["torch.save"]["state"].items()
    }
    for k in range(STEPS, STEPS + MORE):
        step(of, optimizer, k)
    kept["after"] = {k: v.detach().clone() for k, v in of.state_dict().items()}
    torch.save(kept, Path(__file__).with_name("microsoft_dion.pt"))


if __name__ == "__main__":
    main(sys.argv[1])

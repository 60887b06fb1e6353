"""Fine-tuning a model that AdamW has trained: whole weights, or LoRA adapters (peft), by several optimizers.

A byte-level GPT is trained by AdamW on Python sources, then goes on with English: the texts of Python's own ``help()``.
Every candidate runs at each learning rate, and the best is shown with what was forgotten of the sources. With
``adjust_lr="match_rms_adamw"`` all of them take AdamW's rates::

    pip install peft && python examples/fine_tuning.py          # some ten minutes on two cores
"""

from __future__ import annotations

import argparse
import copy
import inspect
import pydoc_data.topics
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

import orthdion
from orthdion.train import TrainConfig, data, train
from orthdion.train.config import learning_rate
from orthdion.train.gpt import GPT, loss_of

MATCHED = {"adjust_lr": "match_rms_adamw"}
#: name → optimizer, its options, and whether adapters are trained in place of the weights
CANDIDATES = {
    "AdamW": ("adamw", {}, False),
    "Muon": ("muon", MATCHED, False),
    "completed step, r = d/4": ("completed-dion", MATCHED, False),
    "Orth-Dion, r = d/4": ("orth-dion", MATCHED, False),
    "Orth-Dion, r = d/16": ("orth-dion", {**MATCHED, "rank_fraction": 0.0625}, False),
    "LoRA, AdamW": ("adamw", {}, True),
    "LoRA, Muon": ("muon", MATCHED, True),
    "LoRA, completed step": ("completed-dion", {**MATCHED, "rank_fraction": 0.5}, True),
}
RATES = (0.0003, 0.001, 0.003, 0.01)


def english(context: int) -> data.Corpus:
    """The texts of ``help()``, the last tenth for validation."""
    found = np.frombuffer("\n".join(pydoc_data.topics.topics.values()).encode(), dtype=np.uint8)
    cut = len(found) - len(found) // 10
    return data.Corpus(found[:cut], found[cut:], inspect.getfile(pydoc_data.topics))


def with_adapters(model: nn.Module, rank: int) -> nn.Module:
    """LoRA on all hidden matrices; what was there is frozen, embedding and head too."""
    import peft

    hidden = ["query", "key", "value", "output", "up", "down"]
    adapted: nn.Module = peft.inject_adapter_in_model(
        peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=hidden), model
    )
    for name, p in adapted.named_parameters():
        p.requires_grad_("lora_" in name)
    return adapted


@torch.no_grad()
def validation(model: nn.Module, corpus: data.Corpus, config: TrainConfig) -> float:
    """Mean loss of the corpus's validation windows."""
    return float(loss_of(model, *corpus.evaluation(config.eval_windows, config.context)))


def tuned(start: nn.Module, corpus: data.Corpus, config: TrainConfig, name: str, lr: float) -> nn.Module:
    """The model after ``config.steps`` steps of a candidate."""
    kind, options, adapters = CANDIDATES[name]
    model = copy.deepcopy(start)
    if adapters:
        model = with_adapters(model, rank=8)
    optimizer = orthdion.create(kind, model, lr=lr, weight_decay=0.0, **options)
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * learning_rate(config, step)
        model.zero_grad()
        loss_of(model, *corpus.batch(config.batch, config.context, config.seed, step, 0)).backward()
        optimizer.step()
    return model


def main() -> None:
    """Trains, tunes, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150, help="of fine-tuning")
    parser.add_argument("--pretraining", type=int, default=700, help="steps of AdamW before it")
    parser.add_argument("--only", nargs="*", default=list(CANDIDATES), choices=list(CANDIDATES))
    wanted = parser.parse_args()
    config = TrainConfig(steps=wanted.pretraining, optimizer="adamw")
    sources = data.load(None, config.context)
    start = GPT(config.width, config.layers, config.heads, config.context, config.seed)
    with tempfile.TemporaryDirectory() as folder:
        train(config, corpus=sources, out=Path(folder))
        start.load_state_dict(torch.load(Path(folder) / "checkpoint.pt", weights_only=True)["model"])
    config = config.with_(steps=wanted.steps)
    texts = english(config.context)
    before = validation(start, texts, config), validation(start, sources, config)
    print(
        f"| candidate | learning rate | English | Python sources |\n|---|---|---|---|\n"
        f"| before | | {before[0]:.3f} | {before[1]:.3f} |"
    )
    for name in wanted.only:
        found = []
        for lr in RATES:
            model = tuned(start, texts, config, name, lr)
            found.append((validation(model, texts, config), validation(model, sources, config), lr))
        best = min(found)
        print(f"| {name} | {best[2]} | {best[0]:.3f} | {best[1]:.3f} |", flush=True)


if __name__ == "__main__":
    main()

"""A case of transformers' Trainer on every rank."""

from __future__ import annotations

import os
from typing import Any

from tiny import language_model, sentences, weights

from orthdion.integrations import Factory

OPTIONS = {"optimizer": "completed-dion", "lr": 0.02, "scalar_lr": 0.01, "rank_fraction": 0.5}


def run(folder: str, batch: int) -> dict[str, Any]:
    """Five steps; every rank takes its part of the same batches."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from transformers import Trainer, TrainingArguments

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")  # asked for, though the group is there already
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    sizes = {"max_steps": 5, "per_device_train_batch_size": batch, "save_steps": 100, "seed": 3, "max_grad_norm": 0.5}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 100}
    model = language_model().double()
    args = TrainingArguments(output_dir=folder, **sizes, **quiet)
    trainer = Trainer(model, args, train_dataset=sentences(), optimizer_cls_and_kwargs=(Factory, OPTIONS))
    trainer.train()
    return {name: p.numpy() for name, p in weights(model).items()}

"""What a family of models is, and sizes that many share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Family:
    """A model and its routing.

    Attributes:
        build: makes it, given the library that has it.
        matrix: names → group keys of what is stepped as a matrix, "" for none; alternatives are for other sizes.
        rest: names of what has rows and columns, but is for AdamW or Lion.

    Names have # for numbers of layers; braces stand for each of what they hold.
    """

    name: str
    kind: str
    library: str
    build: Callable[[Any], nn.Module]
    matrix: dict[str, str]
    rest: set[str]


def small(t: Any, config: str, model: str, **sizes: Any) -> nn.Module:
    return getattr(t, model)(getattr(t, config)(**sizes))


#: Sizes that most configs of transformers know.
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GQA = {**TINY, "num_key_value_heads": 2}
MOE = {**GQA, "moe_intermediate_size": 24, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
LAYERS = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}


def backbone(t: Any, *widths: int) -> dict[str, Any]:
    """A small ResNet for a detector."""
    stages = [f"stage{k}" for k in range(2, len(widths) + 1)]
    config = t.ResNetConfig(embedding_size=8, hidden_sizes=list(widths), depths=[1] * len(widths), out_features=stages)
    return {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": config}

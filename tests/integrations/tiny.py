"""A language model of a few thousand weights, and sentences for it."""

from __future__ import annotations

import torch

VOCABULARY, LENGTH = 32, 12


def language_model(seed: int = 0):
    """A Llama whose every width is small; no weights are tied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **sizes, **heads))


def sentences(count: int = 48) -> list[dict[str, list[int]]]:
    """Each word follows from the one before it, so that there is something to learn."""
    starts = torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(7)).tolist()
    rows = [[(start + 5 * i) % VOCABULARY for i in range(LENGTH)] for start in starts]
    return [{"input_ids": row, "labels": row} for row in rows]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}

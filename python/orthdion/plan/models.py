"""Models as lists of weights: written down as shapes, or read off a module or a transformers config."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.groups import MATRIX
from ..grouping import param_groups

__all__ = ["PRESETS", "Model", "Weight", "model_of"]


@dataclass(frozen=True)
class Weight:
    """One parameter.

    Attributes:
        name, shape: as in the model.
        keys: its group's keys: ``algorithm`` ("matrix" is the optimizer's own rule), ``split_sizes`` and so on.
        tensor: the axis that tensor parallelism divides; None: every rank has the whole.
    """

    name: str
    shape: tuple[int, ...]
    keys: Mapping[str, Any] = field(default_factory=lambda: {"algorithm": MATRIX})
    tensor: int | None = None

    @property
    def numel(self) -> int:
        """How many elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Model:
    """A name, and its weights in the order of the optimizer's groups."""

    name: str
    weights: tuple[Weight, ...]

    @property
    def numel(self) -> int:
        """How many elements, of all weights."""
        return sum(w.numel for w in self.weights)

    def groups(self, dtype: torch.dtype, alike: bool = False) -> list[tuple[dict[str, Any], list[Weight]]]:
        """Parameter groups on the "meta" device, with the weights of each: those with equal keys in the order in which
        keys first come, as :func:`orthdion.param_groups` makes them. ``alike``: the optimizer's own rule steps all.
        """
        found: dict[str, tuple[dict[str, Any], list[Weight]]] = {}
        for w in self.weights:
            keys = {k: v for k, v in w.keys.items() if not alike or k == "weight_decay"}
            group, named = found.setdefault(repr(sorted(keys.items())), ({**keys, "params": []}, []))
            if alike:
                group["algorithm"] = MATRIX
            group["params"].append(nn.Parameter(torch.empty(w.shape, dtype=dtype, device="meta")))
            named.append(w)
        return list(found.values())


def model_of(model: Any) -> Model:
    """A preset's name, a :class:`Model`, a module, a transformers config, shapes (a list, or a mapping from names), or
    the path of a .json file with such a mapping or a transformers config.

    Raises:
        ValueError: for a name that is no preset. TypeError: for anything else.
    """
    if isinstance(model, Model):
        return model
    if isinstance(model, str):
        if model in PRESETS:
            return PRESETS[model]()
        if Path(model).suffix == ".json":
            return _of_file(Path(model))
        raise ValueError(
            f"model must be one of {', '.join(PRESETS)}, a .json file, a module, a config or shapes; not {model!r}"
        )
    if isinstance(model, nn.Module):
        return _of_module(model)
    if hasattr(model, "model_type") and hasattr(model, "to_dict"):
        return _of_config(model)
    if isinstance(model, Mapping):
        return Model("shapes", tuple(_of_shape(str(name), shape) for name, shape in model.items()))
    if isinstance(model, Iterable):
        return Model("shapes", tuple(_of_shape(f"weight {i}", shape) for i, shape in enumerate(model)))
    raise TypeError(
        f"model must be a preset ({', '.join(PRESETS)}), a module, a transformers config, or shapes such as "
        f"[(768, 768)] or {{'block.up': (3072, 768)}}, not {type(model).__name__}"
    )


#: Matrices whose input is divided over tensor-parallel ranks, by the last part of their names; the others' output is.
_ROWWISE = re.compile(r"(o_proj|out_proj|down_proj|c_proj|wo|w2|fc2|dense_4h_to_h|attention\.dense|output|down)$")
#: What is no hidden matrix, by its name, where there are only names.
_TABLES = re.compile(r"(embed|wte|wpe|lm_head|head$|norm|bias$)", re.IGNORECASE)


def _tensor_axis(name: str, shape: tuple[int, ...], transposed: bool) -> int | None:
    """The axis that tensor parallelism divides, by what the matrix is called."""
    if len(shape) < 2:
        return None
    out, inside = (len(shape) - 1, len(shape) - 2) if transposed else (len(shape) - 2, len(shape) - 1)
    return inside if _ROWWISE.search(name.removesuffix(".weight")) else out


def _of_shape(name: str, shape: Any) -> Weight:
    try:
        sizes = tuple(int(s) for s in shape)
    except (TypeError, ValueError):
        raise TypeError(f"the shape of {name} must be whole numbers such as (768, 768), not {shape!r}") from None
    scalar = len(sizes) < 2 or bool(_TABLES.search(name))
    keys = {"algorithm": "adamw" if scalar else MATRIX}
    return Weight(name, sizes, keys, _tensor_axis(name, sizes, False))


def _of_module(model: nn.Module) -> Model:
    """By :func:`orthdion.param_groups`."""
    weights = []
    for group in param_groups(model, require_matrices=False):
        keys = {k: v for k, v in group.items() if k not in ("params", "param_names", "lr")}
        for name, p in zip(group["param_names"], group["params"], strict=True):
            axis = _tensor_axis(name, tuple(p.shape), bool(keys.get("transposed")))
            weights.append(Weight(name, tuple(p.shape), keys, axis))
    return Model(type(model).__name__, tuple(weights))


def _of_file(path: Path) -> Model:
    found = json.loads(path.read_text())
    if not isinstance(found, dict):
        raise TypeError(f"{path} must have shapes by name, or a transformers config, not {type(found).__name__}")
    if "model_type" not in found:
        return replace(model_of(found), name=path.stem)
    from transformers import AutoConfig

    return _of_config(AutoConfig.for_model(**found))


def _of_config(config: Any) -> Model:
    from transformers import AutoModel, AutoModelForCausalLM

    with torch.device("meta"):
        try:
            module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        except ValueError:  # no language model
            module = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
    return Model(str(config.model_type), _of_module(module).weights)


# ---------------------------------------------------------------- presets


def _plain(name: str, *shape: int, tensor: int | None = None) -> Weight:
    """What AdamW steps without decay: embeddings, norms, biases."""
    return Weight(name, shape, {"algorithm": "adamw", "weight_decay": 0.0}, tensor)


def _head(name: str, *shape: int) -> Weight:
    return Weight(name, shape, {"algorithm": "adamw"}, 0)


def _matrix(name: str, *shape: int, tensor: int | None, **keys: Any) -> Weight:
    return Weight(name, shape, {"algorithm": MATRIX, **keys}, tensor)


def _gpt2() -> Model:
    """GPT-2 small as transformers keeps it: weights are (in, out), queries, keys and values are fused."""
    d, layers = 768, 12
    weights = []
    for i in range(layers):
        weights += [
            _matrix(f"h.{i}.attn.c_attn", d, 3 * d, tensor=1, transposed=True, split_sizes=(d, d, d)),
            _matrix(f"h.{i}.attn.c_proj", d, d, tensor=0, transposed=True),
            _matrix(f"h.{i}.mlp.c_fc", d, 4 * d, tensor=1, transposed=True),
            _matrix(f"h.{i}.mlp.c_proj", 4 * d, d, tensor=0, transposed=True),
        ]
    weights += [_plain("wte", 50257, d, tensor=0), _plain("wpe", 1024, d)]
    for i in range(layers):
        weights += [_plain(f"h.{i}.{name}", d) for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias")]
        biases = {"attn.c_attn": 3 * d, "attn.c_proj": d, "mlp.c_fc": 4 * d, "mlp.c_proj": d}
        weights += [_plain(f"h.{i}.{name}.bias", size) for name, size in biases.items()]
    weights += [_plain("ln_f.weight", d), _plain("ln_f.bias", d)]
    return Model("gpt2", tuple(weights))


def _llama(name: str, d: int, kv: int, hidden: int, layers: int, vocabulary: int) -> Model:
    weights = []
    for i in range(layers):
        weights += [
            _matrix(f"layers.{i}.q_proj", d, d, tensor=0),
            _matrix(f"layers.{i}.k_proj", kv, d, tensor=0),
            _matrix(f"layers.{i}.v_proj", kv, d, tensor=0),
            _matrix(f"layers.{i}.o_proj", d, d, tensor=1),
            _matrix(f"layers.{i}.gate_proj", hidden, d, tensor=0),
            _matrix(f"layers.{i}.up_proj", hidden, d, tensor=0),
            _matrix(f"layers.{i}.down_proj", d, hidden, tensor=1),
        ]
    weights += [_plain("embed_tokens", vocabulary, d, tensor=0), _head("lm_head", vocabulary, d)]
    for i in range(layers):
        weights += [_plain(f"layers.{i}.{norm}", d) for norm in ("input_layernorm", "post_attention_layernorm")]
    return Model(name, (*weights, _plain("norm", d)))


def _moe() -> Model:
    """A mixture of 256 experts in the sizes that DeepSeek-V3's config has, without its extra prediction layer."""
    d, layers, dense, experts, each = 7168, 61, 3, 256, 2048
    weights = []
    for i in range(layers):
        weights += [
            _matrix(f"layers.{i}.q_a_proj", 1536, d, tensor=None),
            _matrix(f"layers.{i}.q_b_proj", 24576, 1536, tensor=0),
            _matrix(f"layers.{i}.kv_a_proj", 576, d, tensor=None),
            _matrix(f"layers.{i}.kv_b_proj", 32768, 512, tensor=0),
            _matrix(f"layers.{i}.o_proj", d, 16384, tensor=1),
        ]
        hidden = 18432 if i < dense else each  # of the dense layers, or of the expert that all tokens share
        for name in ("gate_proj", "up_proj"):
            weights.append(_matrix(f"layers.{i}.{name}", hidden, d, tensor=0))
        weights.append(_matrix(f"layers.{i}.down_proj", d, hidden, tensor=1))
        if i >= dense:
            for name in ("gate_proj", "up_proj"):
                weights.append(_matrix(f"layers.{i}.experts.{name}", experts, each, d, tensor=1))
            weights.append(_matrix(f"layers.{i}.experts.down_proj", experts, d, each, tensor=2))
    weights += [_plain("embed_tokens", 129280, d, tensor=0), _head("lm_head", 129280, d)]
    for i in range(layers):
        weights += [_plain(f"layers.{i}.{norm}", d) for norm in ("input_layernorm", "post_attention_layernorm")]
        weights += [_plain(f"layers.{i}.q_a_layernorm", 1536), _plain(f"layers.{i}.kv_a_layernorm", 512)]
        if i >= dense:
            weights += [_head(f"layers.{i}.router", experts, d), _plain(f"layers.{i}.router.bias", experts)]
    return Model("moe-256", (*weights, _plain("norm", d)))


#: Models that a name stands for.
PRESETS: dict[str, Callable[[], Model]] = {
    "gpt2": _gpt2,
    "llama-3-8b": lambda: _llama("llama-3-8b", 4096, 1024, 14336, 32, 128256),
    "llama-3-70b": lambda: _llama("llama-3-70b", 8192, 1024, 28672, 80, 128256),
    "moe-256": _moe,
}

"""Parameters that a module owns itself, without a Linear or a convolution: tables, tokens, gains, stacks of experts.

Only what is known to be a matrix, its orientation included, is one.
"""

from __future__ import annotations

import re

from torch import Tensor, nn

from .stacks import stack_of
from .survey import Owner, kind_of, number
from .verdict import Verdict, hint, matrix

__all__ = ["bare"]

_EMBEDDING = re.compile(
    r"(^|[._])(wte|wpe|emb(ed)?s?|embeddings?|tok(en)?s?_emb\w*|pos(ition)?(al)?(_emb\w*|_enc\w*)?|codebooks?|codevectors?)"
    r"(\d*)([._]|$)"
)
_TABLE = re.compile(
    r"(^|_)(table|tokens?|latents?|quer(y|ies)|probe|prompts?|memory|slots?|A_log|rel_pos|pos|sinks?|anchors?)(_|\d*$)"
)
_GAIN = re.compile(
    r"(^|_)(bias(es)?|scales?|gains?|gamma|beta|alpha|lambda\w*|temperature|tau|decay|log_\w+|D)(_|\d*$)"
)
_ROUTER = re.compile(r"Router|TopK|MoEGate|MoeGate|Gating", re.I)
_EMBEDDERS = re.compile(r"Embed(ding)?s?($|[A-Z0-9])|Quantizer|Codebook|Positional")
_MATRIX = re.compile(
    r"((in|out|up|down|gate|[qkvo]|proj)_?(proj)?|w[qkvo123]|w_\w+|v1|proj|kernel)(_weight|_kernel)?|weight"
)


def bare(name: str, owner: Owner, p: Tensor) -> Verdict:
    """The verdict on a parameter of at least two axes whose module is no known layer."""
    attribute, kind, leaf = owner.attribute, kind_of(owner.module), owner.place.leaf
    if p.numel() == max(p.shape, default=0):
        named = _EMBEDDING.search(attribute) or _TABLE.search(attribute)
        what = "embedding or token by its name" if named else "vector in the shape of a matrix"
        return Verdict("plain", f"{what}: no decay")
    for known in (_recurrent, _attention, _family):
        if (found := known(owner, p)) is not None:
            return found
    if _EMBEDDERS.search(kind) or _EMBEDDING.search(f"{leaf}.{attribute}"):
        return Verdict("plain", "embedding by its name: no decay")
    if "norm" in kind.lower():
        return Verdict("plain", "norm: no matrix, no decay")
    if _GAIN.search(attribute) or _TABLE.search(attribute):
        return Verdict("plain", "table, tokens or gains by its name: no decay")
    if p.ndim == 2 and attribute == "weight" and (_ROUTER.search(kind) or _ROUTER.search(leaf) or leaf == "gate"):
        return Verdict("decayed", "router: rows are experts, not features")
    if p.ndim == 3 and (stack := stack_of(owner, p)) is not None:
        return matrix(f"stack of {p.shape[0]} hidden matrices, {stack.why}", **stack.keys)
    return _unknown(name, owner, p)


def _recurrent(owner: Owner, p: Tensor) -> Verdict | None:
    if not isinstance(owner.module, (nn.RNNBase, nn.RNNCellBase)):
        return None
    hidden = owner.module.hidden_size
    gates = p.shape[0] // hidden
    if gates > 1 and p.shape[0] == gates * hidden and not owner.attribute.startswith("weight_hr"):
        return matrix(f"recurrent weight: {gates} gates, a matrix each", split_sizes=(hidden,) * gates)
    return matrix("recurrent weight, a hidden matrix")


def _attention(owner: Owner, p: Tensor) -> Verdict | None:
    """nn.MultiheadAttention's own weights, and those of modules that name them so and have its bias."""
    name, parameters = owner.attribute, owner.module._parameters
    if isinstance(owner.module, nn.MultiheadAttention) and name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        return matrix("hidden matrix")
    bias = parameters.get("in_proj_bias")
    by_bias = bias is not None and bias.shape == p.shape[:1] and p.shape[0] != p.shape[-1]
    if name == "in_proj_weight" and p.ndim == 2 and (isinstance(owner.module, nn.MultiheadAttention) or by_bias):
        if p.shape[0] % 3 == 0:
            return matrix("fused QKV: three hidden matrices", split_sizes=(p.shape[0] // 3,) * 3)
        return matrix("hidden matrix")
    return None


def _family(owner: Owner, p: Tensor) -> Verdict | None:
    """Weights whose layout is the class's own."""
    kind, name = kind_of(owner.module), owner.attribute
    if kind.startswith("XLNet") and p.ndim == 3 and name in ("q", "k", "v", "o", "r"):
        if name == "o" or p.shape[0] == p.shape[1] * p.shape[2]:
            return matrix("one matrix, whose axes behind the first are heads", flatten=True)
        return None
    if kind.startswith("Funnel") and name == "r_kernel" and p.ndim == 3 and p.shape[0] == p.shape[1] * p.shape[2]:
        return matrix("one matrix, whose axes behind the first are heads", flatten=True)
    if kind.startswith("ZambaMamba") and name == "x_proj_weight" and p.ndim == 3:
        steps, state = number(owner.place, ("time_step_rank",)), number(owner.place, ("ssm_state_size",))
        known = steps is not None and state is not None and steps + 2 * state == p.shape[1]
        return matrix(
            "Δ, B and C of each head: a matrix each", **({"split_sizes": (steps, state, state)} if known else {})
        )
    if kind == "DbrxExpertGLU" and p.ndim == 2:
        rows = number(owner.place, ("ffn_hidden_size",)) or p.shape[0]
        if name in ("w1", "v1"):
            return matrix("experts below each other, a matrix each", split_sizes=(rows,) * (p.shape[0] // rows))
        return Verdict("decayed", "experts below each other, each kept as (in, out): not stepped as matrices")
    if name == "mm_input_projection_weight":
        return matrix("hidden matrix, kept as (in, out)", transposed=True)
    return None


def _unknown(name: str, owner: Owner, p: Tensor) -> Verdict:
    attribute = owner.attribute
    if p.ndim == 2 and p.shape[0] == p.shape[1] and attribute != "weight" and _MATRIX.fullmatch(attribute):
        return matrix("hidden matrix by its name; square, so either orientation is the same")
    bias = owner.module._parameters.get(f"{attribute.removesuffix('_weight').removesuffix('weight')}bias".lstrip("_"))
    bias = bias if bias is not None else owner.module._parameters.get(f"{attribute.removesuffix('_weight')}_bias")
    if (
        p.ndim == 2
        and bias is not None
        and bias.ndim == 1
        and p.shape[0] != p.shape[1]
        and _MATRIX.fullmatch(attribute)
    ):
        if bias.shape[0] == p.shape[0]:
            return matrix("hidden matrix, (out, in) by its bias")
        if bias.shape[0] == p.shape[1]:
            return matrix("hidden matrix, (in, out) by its bias", transposed=True)
    if p.ndim == 3:
        why = "a stack whose orientation, or a table, is not known: not stepped as matrices, no decay"
        return Verdict("plain", f"{why}; " + hint(name, transposed=True) + " kept as (in, out)")
    return Verdict("plain", "not known to be a matrix: no decay; " + hint(name))

"""Fused weights: which rows are queries, keys and values, which the gate; and how many heads a projection has.

Layouts are read from the module's numbers and its configs. A weight is known to be fused by its name; the order of its
rows follows from the class where families differ. What cannot be known is left as one matrix, and the reason says so.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import nn

from .survey import Place, is_linear, kind_of, number, said, width_in

__all__ = ["Parts", "heads_of", "parts_of"]

_QKV = re.compile(
    r"(to_|attn_)?(qkv|wqkv|in_proj|qkv_proj|qkv_linear|c_attn|query_key_value|qkv_opreact|in_proj_qkv|qkvc?)", re.I
)
_KV = re.compile(r"(to_)?(kv|kv_proj|wkv)", re.I)
_GATED = re.compile(
    r"gate_up(_proj)?|w12|wi|fc1|c_fc|linear1|lin1|input_linear|dense_h_to_4h|fc_in|up_proj|in_proj|intermediate_dense|"
    r"pointwise_conv1|inverted_conv|proj_in|ff_proj|w_in|w1",
    re.I,
)
_PROJECTION = re.compile(
    r"((to_)?[qkv](_proj|_lin|_b_proj)?|w[qkv]|query|key|value|(query|key|value)_proj|linear_[qkv])",
    re.I,
)
#: Names under which a block keeps the layer that does its work.
_TRANSPARENT = frozenset({"linear", "conv", "convolution", "c", "l", "base_layer", "original_layer", "module", "layer"})
#: Classes whose query_key_value or c_attn has the rows of each head side by side: q, k, v of the first, of the second …
_HEAD_BY_HEAD = re.compile(
    r"GPTNeoX(Japanese)?Attention|Bloom\w*Attention|Persimmon\w*Attention|GPTBigCode\w*Attention|"
    r"DisentangledSelfAttention"
)
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead", "encoder_attention_heads")
_KV_HEADS = ("num_kv_heads", "num_key_value_heads", "n_kv_heads", "n_kv_head", "kv_heads")
_HEAD_DIM = ("head_dim", "head_size", "dim_head", "attention_head_size", "d_head", "dim_per_head", "key_value_proj_dim")


class Parts(NamedTuple):
    """Rows of each part in a round, rounds, and what they are; no sizes: fused, but the layout is not known."""

    sizes: tuple[int, ...]
    rounds: int
    what: str


UNKNOWN = Parts((), 1, "fused, layout not known: stepped as one matrix; split_sizes= in overrides splits it")


def parts_of(place: Place, attribute: str, rows: int, cols: int) -> Parts | None:
    """How the rows of a weight are divided; None where it is one matrix."""
    named, parent = _named(place, attribute)
    for family in (_latent, _state_space, _qkv, _kv, _gated_query, _gates):
        parts = family(named, parent, rows, cols)
        if parts is not None:
            return parts if not parts.sizes or sum(parts.sizes) * parts.rounds == rows else UNKNOWN
    return None


def heads_of(place: Place, attribute: str, rows: int, parts: Parts | None) -> int | None:
    """How many heads the rows of a projection of attention are; None where they are not heads of one size."""
    named, parent = _named(place, attribute)
    heads = number(parent, _HEADS)
    if heads is None:
        return None
    size = number(parent, _HEAD_DIM, ()) if _says(parent, _HEAD_DIM) else None
    if parts is not None and parts.sizes and _QKV.fullmatch(named):
        size = size or _common(parts, heads)
        return rows // size if size and not any(piece % size for piece in parts.sizes) else None
    if parts is not None or not _PROJECTION.fullmatch(named):
        return None
    small = re.sub(r"^(to_|w|linear_)", "", named.lower())[:1] in ("k", "v")
    many = (number(parent, _KV_HEADS) or heads) if small else heads
    if size and rows % size == 0:
        return rows // size if rows // size in (many, heads) else None
    return many if rows % many == 0 else None


def _says(place: Place, names: tuple[str, ...]) -> bool:
    return number(place, names) is not None


def _common(parts: Parts, heads: int) -> int | None:
    first = parts.sizes[0] * parts.rounds
    return first // heads if first % heads == 0 else None


def _named(place: Place, attribute: str) -> tuple[str, Place]:
    """The name that says what a weight is, and the module whose part it is."""
    if attribute != "weight":
        return attribute.removesuffix("_weight"), place
    while place.above and (place.leaf in _TRANSPARENT or place.leaf == "0"):
        place = place.above[0]
    return place.leaf, place.above[0] if place.above else place


# ------------------------------------------------------------------ queries, keys and values


def _qkv(named: str, parent: Place, rows: int, cols: int) -> Parts | None:
    if named == "in_proj_qkvz":
        return _qkvz(parent)
    if not _QKV.fullmatch(named):
        return None
    if isinstance(split := said(parent.module, "in_split"), list) and sum(split) == rows:
        return Parts(tuple(split), 1, "fused block: a matrix each")
    heads = number(parent, _HEADS)
    weak = named in ("in_proj", "c_attn")
    for layout in (_known_class, _keys_and_values, _grouped_queries, _equal):
        if (parts := layout(named, parent, rows, cols, heads)) is not None:
            return parts
    if rows == 2 * cols and named == "c_attn":
        return Parts((cols,) * 2, 1, "fused keys and values: a matrix each")
    return None if weak or rows == cols else UNKNOWN


def _known_class(named: str, parent: Place, rows: int, cols: int, heads: int | None) -> Parts | None:
    """Families whose heads, or groups of heads, lie side by side."""
    module, kind = parent.module, kind_of(parent.module)
    if kind.startswith("CodeGen") and rows % 12 == 0:  # four devices' shares
        return Parts((rows // 12,) * 3, 4, "fused QKV, in four shares: three hidden matrices")
    if kind.startswith("Falcon") and heads:
        return _falcon(module, heads, rows)
    if kind.startswith("GPTBigCode") and said(module, "multi_query"):
        shared = said(module, "kv_dim") or 0
        return Parts((rows - 2 * shared, shared, shared), 1, "fused QKV, shared keys: three hidden matrices")
    if kind == "LambdaLayer" and heads:
        keys = said(module, "dim_qk") or 0
        return Parts((keys * heads, keys, rows - keys * (heads + 1)), 1, "fused QKV: three hidden matrices")
    per, d = said(module, "heads_per_kv"), said(module, "head_dim")
    if per and d and said(module, "r_dim") == per + 2 and rows % ((per + 2) * d) == 0:  # torchtitan's FusedQKVLinear
        what = "fused QKV, group by group: three hidden matrices"
        return Parts((per * d, d, d), rows // ((per + 2) * d), what)
    if said(module, "use_global") and rows == 2 * cols:
        return Parts((cols,) * 2, 1, "fused keys and values: two hidden matrices")
    if kind == "LiteMLA" and (d := number(parent, ("dim",), ("-",))) and rows % (3 * d) == 0:
        return Parts((d,) * 3, rows // (3 * d), "fused QKV, head by head: three hidden matrices")
    by_head = _HEAD_BY_HEAD.fullmatch(kind) or said(module, "head_first")
    if by_head and heads and rows % (3 * heads) == 0:
        return Parts((rows // heads // 3,) * 3, heads, "fused QKV, head by head: three hidden matrices")
    return None


def _falcon(module: nn.Module, heads: int, rows: int) -> Parts:
    d = said(module, "head_dim") or 0
    what = "fused QKV, group by group: three hidden matrices"
    if said(module, "new_decoder_architecture"):
        groups = said(module, "num_kv_heads") or heads
        return Parts((heads // groups * d, d, d), groups, what)
    if said(module, "multi_query"):
        return Parts((heads * d, d, d), 1, "fused QKV, shared keys: three hidden matrices")
    return Parts((d, d, d), heads, what)


def _keys_and_values(named: str, parent: Place, rows: int, cols: int, heads: int | None) -> Parts | None:
    """Keys of another size than values: LeViT's head by head, linear attention's one behind the other."""

    def get(name: str) -> int:
        return number(parent, (name,), ("-",)) or 0

    key, value = get("key_dim"), get("val_dim") or get("value_dim")
    if heads and key and value and (2 * key + value) * heads == rows:
        return Parts((key, key, value), heads, "fused QKV, head by head: three hidden matrices")
    if key and value and 2 * key + value == rows:
        return Parts((key, key, value), 1, "fused QKV: three hidden matrices")
    keys = get("dim_out_qk") or get("key_attn_dim") or get("qk_dim")
    values = get("dim_out_v") or get("val_attn_dim") or get("pdim")
    if keys and values and 2 * keys + values == rows:
        return Parts((keys, keys, values), 1, "fused QKV: three hidden matrices")
    width = get("embed_dim")
    if width and 1 + 2 * width == rows:
        return Parts((1, width, width), 1, "fused QKV, one query: three hidden matrices")
    return None


def _grouped_queries(named: str, parent: Place, rows: int, cols: int, heads: int | None) -> Parts | None:
    groups = number(parent, _KV_HEADS)
    if named == "in_proj" and "attention" not in kind_of(parent.module).lower():
        return None
    if not heads or not groups or groups == heads or rows % (heads + 2 * groups):
        return None
    d = rows // (heads + 2 * groups)
    if (size := number(parent, _HEAD_DIM)) is not None and size != d:
        return None
    return Parts((heads * d, groups * d, groups * d), 1, "fused QKV, grouped queries: three hidden matrices")


def _equal(named: str, parent: Place, rows: int, cols: int, heads: int | None) -> Parts | None:
    """q, k and v one behind the other, as is the custom; query_key_value is Megatron's name, which mixes heads."""
    if rows % 3 or named == "query_key_value":
        return None
    d = rows // 3
    if d == cols or (named not in ("in_proj", "c_attn") and heads and d % heads == 0):
        return Parts((d,) * 3, 1, "fused QKV: three hidden matrices" if named != "in_proj" else "fused block of three")
    return None


def _qkvz(parent: Place) -> Parts | None:
    sizes = [number(parent, (n,)) for n in ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim")]
    if None in sizes:
        return UNKNOWN
    keys, values, dk, dv = (s or 0 for s in sizes)
    wide = values // keys * dv
    return Parts((dk, dk, wide, wide), keys, "fused QKV and gate, head by head: four hidden matrices")


def _kv(named: str, parent: Place, rows: int, cols: int) -> Parts | None:
    if not _KV.fullmatch(named):
        return None
    what = "fused keys and values: two hidden matrices"
    heads = number(parent, _HEADS)
    key, value = (
        number(parent, names, ("-",)) or 0 for names in (("key_dim", "dim_head_qk"), ("val_dim", "dim_head_v"))
    )
    if heads and key and value and (key + value) * heads == rows:
        return Parts((key, value), heads, "fused keys and values, head by head: two hidden matrices")
    groups, d = number(parent, _KV_HEADS) or heads, number(parent, _HEAD_DIM)
    if rows == 2 * cols or (d and groups and rows == 2 * groups * d) or (heads and not d and rows % (2 * heads) == 0):
        return Parts((rows // 2,) * 2, 1, what)
    if d and rows == 2 * d:
        return Parts((d, d), 1, what)
    return None if d and rows == d else UNKNOWN


def _gated_query(named: str, parent: Place, rows: int, cols: int) -> Parts | None:
    """Queries and the gate of attention's output in one, of which what follows reads half: head by head in Qwen."""
    behind = parent.module._modules.get("o_proj") if named == "q_proj" else None
    if behind is None or 2 * (width_in(behind) or 0) != rows:
        return None
    d = number(parent, _HEAD_DIM)
    if not kind_of(parent.module).startswith("Qwen") or not d or rows % (2 * d):
        return UNKNOWN
    return Parts((d, d), rows // (2 * d), "fused query and gate, head by head: two hidden matrices")


def _latent(named: str, parent: Place, rows: int, cols: int) -> Parts | None:
    """Multi-head latent attention's compressed keys and values."""
    if named in ("kv_a_proj_with_mqa", "wkv_a"):
        rope = number(parent, ("qk_rope_head_dim",))
        return Parts((rows - rope, rope), 1, "latent and rotary keys: a matrix each") if rope else UNKNOWN
    if named in ("kv_b_proj", "wkv_b"):
        key, value = number(parent, ("qk_nope_head_dim",)), number(parent, ("v_head_dim",))
        if key and value and rows % (key + value) == 0:
            return Parts(
                (key, value), rows // (key + value), "fused keys and values, head by head: two hidden matrices"
            )
        return UNKNOWN
    return None


# ------------------------------------------------------------------ state spaces and gates


def _state_space(named: str, parent: Place, rows: int, cols: int) -> Parts | None:
    """Mamba's projections: x and z; Δ, B and C; Mamba-2 has all in one."""
    if named not in ("in_proj", "x_proj"):
        return None

    def get(*names: str) -> int:
        return number(parent, names, ("-",)) or 0

    state, inner = get("ssm_state_size", "d_state", "state_size"), get("intermediate_size", "d_inner")
    if not state:
        return None
    if named == "x_proj":
        steps = get("time_step_rank", "dt_rank")
        return Parts((steps, state, state), 1, "Δ, B and C: a matrix each") if steps + 2 * state == rows else None
    if rows == 2 * inner:
        return Parts((inner, inner), 1, "x and z: a matrix each")
    groups, heads = get("n_groups", "ngroups"), get("num_heads", "nheads")
    if 2 * inner + 2 * groups * state + heads == rows and groups and heads:
        return Parts((inner, inner, groups * state, groups * state, heads), 1, "z, x, B, C and Δ: a matrix each")
    return UNKNOWN


def _gates(named: str, parent: Place, rows: int, cols: int) -> Parts | None:
    """Gate and up in one weight, one behind the other: known by name, or as what follows reads half of the rows."""
    if rows % 2 or not _GATED.fullmatch(named):
        return None
    certain = named in ("gate_up_proj", "gate_up", "w12")
    if certain or _half_is_read(named, parent, rows):
        return Parts((rows // 2,) * 2, 1, "gate and up: a matrix each")
    return None


def _half_is_read(named: str, parent: Place, rows: int) -> bool:
    behind = False
    widths = set()
    for name, child in parent.module._modules.items():
        if behind and child is not None and len(child._modules) < 8:
            widths |= {width_in(m) for m in child.modules() if is_linear(m) or isinstance(m, (nn.Conv1d, nn.Conv2d))}
        behind = behind or name == named
    return rows // 2 in widths and rows not in widths

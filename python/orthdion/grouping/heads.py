"""Which layers are output layers: rows of theirs are classes, tokens or coordinates, not features.

The model is asked first (``get_output_embeddings``, ``get_classifier``, ``config.num_labels``), then names are, then
the order of layers. Of a head of several layers only the last one is an output layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from .survey import CONV, Place, Survey, is_linear, kind_of, said, width_in

__all__ = ["output_layers"]

#: Heads wherever they are, blocks included.
_ALWAYS = re.compile(r"lm_heads?|unembed(ding)?s?|embed_out")
#: Heads, unless they lie in a block that is repeated.
_STRONG = re.compile(
    r"heads?|head_dist|(aux(iliary)?_)?classifiers?|classif|cls_classifier|scores?|\w*logits?|to_logits|logits_proj|"
    r"logit_out|qa_outputs|class_labels_classifier|class_(embed|predictor)|(\w+_)?bbox_(embed|predictor)|cls_score|"
    r"bbox_(pred|reg)|bbox_ctrness|last_linear|predictions|seq_relationship|to_classes|output_projection\w*|predict_\w+|"
    r"reference_points|ctc_proj|head_linear|decoder_dict|decoder_pred"
)
#: Heads of some task, which may be blocks with features for an output.
_TASK = re.compile(r"(?!\w*(query|pos_|point|feature|scale|project|order|dense))\w+_heads?")
#: Convolutions that make pixels or samples, where they have few rows.
_PICTURE = re.compile(r"conv_(out|last|final)|final_conv(olution)?|to_rgb|out_conv|output_conv")
#: Heads only where they are layers of the model itself, and it says nothing else.
_WEAK = re.compile(
    r"fc|final_layer|final|final_(linear|proj(ection)?)|output(_layer|_proj)?|out(_layer)?|fc_out|proj_out|readout|"
    r"prediction|predictor|dist_head"
)
#: Classes of transformers whose config.num_labels counts: it is 2 where nobody has set it.
_LABELLED = re.compile(r"For\w*(Classification|Segmentation|Detection|MultipleChoice|QuestionAnswering)")
#: Vocabularies are padded by less than this.
_PADDING = 256


def output_layers(survey: Survey) -> dict[int, str]:
    """Identity of a module → why it is an output layer."""
    found: dict[int, str] = {}
    for reason, modules in _claims(survey):
        for module in modules:
            found.setdefault(id(module), reason)
    return found or {id(module): "the last layer of the model" for module in _by_order(survey)}


def _claims(survey: Survey) -> Iterator[tuple[str, list[nn.Module]]]:
    for place in survey.speakers:
        for method in ("get_output_embeddings", "get_classifier"):
            answers = _asked(place.module, method)
            yield f"{method}() returns it", [m for each in answers for m in _outputs(each, True)]
    roots = {id(root) for root in survey.roots}
    classified = {id(p) for p in survey.speakers if hasattr(p.module, "get_classifier")}
    for place in survey.places:
        named = place.leaf and not (classified and any(id(a) in classified for a in place.above))
        if named and (why := _by_name(place, roots)):
            yield why, _outputs(place.module, not survey.speakers)
    for place in survey.speakers:
        labels = _labels(place.module)
        pixels = place.module._modules.get("decoder")
        if kind_of(place.module).endswith("ForMaskedImageModeling") and isinstance(pixels, nn.Sequential):
            yield "it makes the pixels of a masked image", _layers(pixels)[-1:]
        if labels:
            last = [m for m in _outside_base(place) if _rows(m) in (labels, labels + 1)]
            yield f"it has config.num_labels={labels} rows", last
    if not survey.speakers:
        yield from _by_vocabulary(survey, roots)


def _layers(module: nn.Module) -> list[nn.Module]:
    """The Linears and convolutions of a module, in order of registration."""
    return [m for m in module.modules() if _is_layer(m)]


def _outputs(module: nn.Module, certain: bool) -> list[nn.Module]:
    """The output layers of a head.

    Itself; those of each in a list of heads side by side; else the last of its layers whose rows none reads, and those
    of as many rows. If all are read, there is none, as in a pooling head; or it is the last layer, if ``certain``. A
    head that is a network and reads what it makes, as one of diffusion, ends with its last layer.
    """
    if _is_layer(module):
        return [module]
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        each = list(module.children())
        chain = all(_is_layer(m) for m in each) and len({width_in(m) for m in each}) > 1
        if not chain:
            return [m for child in each for m in _outputs(child, certain)]
    layers = _layers(module)
    deep = any(isinstance(m, nn.ModuleList) for m in module.children()) and all(map(is_linear, layers))
    if deep and _rows(layers[-1]) == width_in(layers[0]) != width_in(layers[-1]):
        return layers[-1:]
    read = {width_in(m) for m in layers}
    unread = [m for m in layers if _rows(m) not in read]
    if not unread:
        return layers[-1:] if certain else []
    return [m for m in unread if _rows(m) == _rows(unread[-1])]


def _outside_base(place: Place) -> list[nn.Module]:
    """Layers of a model that are no part of the base model which it says that it has; without one, its last layer."""
    base = getattr(place.module, said(place.module, "base_model_prefix") or "-", None)
    if base is None:
        return _layers(place.module)[-1:]
    if not isinstance(base, nn.Module) or base is place.module:
        return []
    inside = {id(m) for m in base.modules()}
    return [m for m in _layers(place.module) if id(m) not in inside]


def _is_layer(module: nn.Module) -> bool:
    return is_linear(module) or isinstance(module, CONV) or kind_of(module) == "Conv1D"


def _rows(module: nn.Module) -> int | None:
    for name in ("out_features", "out_channels"):
        if isinstance(value := said(module, name), int):
            return value
    return None


def _asked(module: nn.Module, method: str) -> list[nn.Module]:
    """What the model's own method returns; models whose method fails have not said anything."""
    if not hasattr(module, method):
        return []
    try:
        answer: Any = getattr(module, method)()
    except Exception:
        return []
    answers = answer if isinstance(answer, (tuple, list)) else (answer,)
    return [m for m in answers if isinstance(m, nn.Module)]


def _labels(module: nn.Module) -> int | None:
    config = said(module, "config")
    if said(module, "base_model_prefix") is None or not _LABELLED.search(kind_of(module)):
        return None
    value = getattr(config, "num_labels", None) or getattr(config, "num_classes", None)
    return value if isinstance(value, int) and value > 0 else None


@lru_cache(maxsize=4096)
def _kind(leaf: str) -> str:
    """What a name promises; empty for most."""
    for kind, names in (("always", _ALWAYS), ("strong", _STRONG), ("task", _TASK), ("weak", _WEAK)):
        if names.fullmatch(leaf):
            return kind
    return "task" if leaf == "summary" else "picture" if _PICTURE.fullmatch(leaf) else ""


def _by_name(place: Place, roots: set[int]) -> str:
    kind = _kind(place.leaf)
    if not kind:
        return ""
    reason = f"by its name {place.leaf!r}"
    if kind == "always":
        return reason
    if kind == "picture":
        return reason if isinstance(place.module, CONV) and (_rows(place.module) or 8) <= 4 else ""
    repeated = any(a.leaf.isdigit() for a in _below_root(place, roots))
    square = _is_layer(place.module) and _rows(place.module) == width_in(place.module)
    if kind in ("strong", "task") and not repeated and not (kind == "task" and square):
        return reason
    parent = place.above[0] if place.above else None
    if place.leaf == "out" and parent is not None and "out_mid" in parent.module._modules:
        return f"{reason}, which out_mid reads back"
    at_the_end = parent is not None and id(parent) in roots and not _says_of_itself(parent.module)
    if _WEAK.fullmatch(place.leaf) and parent is not None and at_the_end and _nothing_after(place, parent):
        return f"{reason} at the end of the model"
    return ""


def _below_root(place: Place, roots: set[int]) -> Iterator[Place]:
    """What lies between a place and the model that it belongs to."""
    for each in place.above:
        if id(each) in roots:
            return
        yield each


def _nothing_after(place: Place, parent: Place) -> bool:
    """Whether no other large layer of the parent is registered behind it; heads of few values may be."""
    registered = list(parent.module._modules)
    for name in registered[registered.index(place.leaf) + 1 :]:
        child = parent.module._modules[name]
        layers = [m for m in child.modules() if _is_layer(m)] if child is not None else []
        if layers and not _kind(name):
            return False
    return True


def _by_vocabulary(survey: Survey, roots: set[int]) -> Iterator[tuple[str, list[nn.Module]]]:
    """A Linear outside of blocks with a row for every token, or some more."""
    sizes = [p.module.num_embeddings for p in survey.places if isinstance(p.module, nn.Embedding)]
    vocabulary = max(sizes, default=0)
    if not vocabulary:
        return
    found: list[nn.Module] = []
    for place in survey.places:
        module = place.module
        if not is_linear(module) or not place.above or any(a.leaf.isdigit() for a in _below_root(place, roots)):
            continue
        rows, cols = _rows(module) or 0, width_in(module) or 0
        padded = rows > 8 * cols and vocabulary < rows < vocabulary + _PADDING
        if (rows == vocabulary and rows != cols) or padded:
            found.append(module)
    yield f"it has a row for each of {vocabulary} tokens", found


def _by_order(survey: Survey) -> list[nn.Module]:
    """The last layer of a model that says nothing of itself: at the end of its Sequential, or of the model."""
    top = module = survey.roots[0].module
    if _is_layer(module) or any(_says_of_itself(root.module) for root in survey.roots):
        return []
    while True:
        full = [m for m in module._modules.values() if m is not None and any(True for _ in m.parameters())]
        if not full:
            return []
        module = full[-1]
        if is_linear(module):
            return [module] if len(_layers(top)) > 1 and _trained(module) else []
        if not isinstance(module, nn.Sequential):
            return []


def _says_of_itself(module: nn.Module) -> bool:
    return said(module, "base_model_prefix") is not None or callable(said(module, "get_classifier"))


def _trained(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is None or not isinstance(weight, Tensor) or weight.requires_grad

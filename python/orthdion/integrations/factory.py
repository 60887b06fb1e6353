"""What transformers' Trainer, TRL and axolotl call with the model to get an optimizer."""

from __future__ import annotations

import ast
import logging
from typing import Any, Protocol, cast, overload

from torch import nn

from ..core.groups import MATRIX
from ..core.optimizer import MatrixOptimizer
from ..core.rule import Rule
from ..create import create, grouping_of
from ..grouping import param_groups
from ..optim import OPTIMIZERS, AdamW

__all__ = ["Factory", "TrainingArguments"]

_log = logging.getLogger(__name__)

#: YAML's words for Python's.
_WORDS = {"true": True, "false": False, "none": None, "null": None}


class TrainingArguments(Protocol):
    """What is read of a trainer's arguments."""

    learning_rate: float
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float


class Factory:
    """Makes an optimizer of a model. What is no hidden matrix goes to AdamW, as :func:`orthdion.param_groups` says.

    A trainer calls it twice: ``Factory()(model, **options)``. The class will do, and so will an instance that has its
    options already. The decision about every parameter is logged (``orthdion.integrations.factory``, level INFO).

    Args:
        optimizer: a registered name (:func:`orthdion.list_optimizers`), a rule, or an optimizer class.
        training_args: transformers' ``TrainingArguments``, or axolotl's. ``learning_rate`` and ``weight_decay`` are the
            optimizer's unless options say otherwise; ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon`` are those of
            its AdamW groups. transformers does not pass them to a factory by itself; axolotl does.
        options: of the optimizer, and those of :func:`orthdion.param_groups`. ``eps`` is ``epsilon``. Strings that
            spell a number or a truth value are read as such, since that is what comes out of a configuration file.

    Example:
        >>> kw = {"optimizer": "completed-dion", "lr": 0.02, "scalar_lr": 0.003}
        >>> trainer = Trainer(model, args, optimizer_cls_and_kwargs=(orthdion.integrations.Factory, kw))
    """

    def __init__(
        self,
        optimizer: str | type[Rule] | type[MatrixOptimizer] | None = None,
        training_args: TrainingArguments | None = None,
        **options: Any,
    ) -> None:
        self.optimizer, self.training_args, self.options = optimizer, training_args, options

    @overload
    def __call__(self) -> Factory: ...
    @overload
    def __call__(
        self, model: nn.Module, training_args: TrainingArguments | None = None, **options: Any
    ) -> MatrixOptimizer: ...
    def __call__(
        self, model: nn.Module | None = None, training_args: TrainingArguments | None = None, **options: Any
    ) -> MatrixOptimizer | Factory:
        """The optimizer of a model; without any argument the factory itself, for trainers that call it once before.

        Args:
            model: its parameters are stepped.
            training_args: as the constructor's; these count.
            options: more of the constructor's options, ``optimizer`` among them; these count.

        Raises:
            TypeError: if nobody has named the optimizer or the learning rate, for an unknown option, for what is no
                module.
            ValueError: as :func:`orthdion.create`.
        """
        if model is None and training_args is None and not options:
            return self
        wanted = {"optimizer": self.optimizer, **self.options, **options}
        optimizer, given = wanted.pop("optimizer"), {k: _read(v) for k, v in wanted.items()}
        if optimizer is None:
            raise TypeError(
                f"optimizer is missing; name one of {', '.join(OPTIMIZERS)}: "
                'optimizer_cls_and_kwargs=(Factory, {"optimizer": "completed-dion", "lr": 0.02})'
            )
        args = training_args if training_args is not None else self.training_args
        if "eps" in given:
            if "epsilon" in given:
                raise TypeError("eps and epsilon are the same option; pass one of them")
            given["epsilon"] = given.pop("eps")
        if args is not None:
            given.setdefault("lr", args.learning_rate)
            given.setdefault("weight_decay", args.weight_decay)
        if "lr" not in given:
            raise TypeError(
                "lr is missing: transformers does not pass its TrainingArguments to a factory, so their learning_rate "
                'would have no effect; add "lr": 0.02 or "training_args": args to its keywords'
            )
        groups = param_groups(cast(nn.Module, model), **grouping_of(optimizer, given))  # which refuses what is none
        _log.info("%s", groups)
        if args is not None:
            _adam(groups, optimizer, args, given)
        return create(optimizer, groups, **given)


def _adam(groups: list[dict[str, Any]], optimizer: Any, args: TrainingArguments, given: dict[str, Any]) -> None:
    """Gives a trainer's β₁, β₂ and ε to the groups of AdamW, unless the options have their own."""
    found: dict[str, Any] = {}
    if not {"betas", "beta1", "beta2"} & given.keys():
        found |= {"beta1": args.adam_beta1, "beta2": args.adam_beta2}
    if "epsilon" not in given:
        found["epsilon"] = args.adam_epsilon
    all_adam = optimizer in ("adamw", AdamW)
    for group in groups:
        if group["algorithm"] == "adamw" or (all_adam and group["algorithm"] == MATRIX):
            group.update({k: v for k, v in found.items() if k not in group})


def _read(value: Any) -> Any:
    """What a string of a configuration spells; other values, and names, are themselves."""
    if not isinstance(value, str):
        return value
    if value.lower() in _WORDS:
        return _WORDS[value.lower()]
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value

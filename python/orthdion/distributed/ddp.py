"""DistributedDataParallel without its all-reduce: gradients stay each replica's own until the optimizer's step."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

__all__ = ["Replicas", "decouple"]


@dataclass(frozen=True, eq=False)
class Replicas:
    """A DDP model that no longer averages gradients; pass it to an optimizer as ``replicate_mesh``."""

    model: Any
    process_group: Any

    def check_covers(self, params: list[torch.Tensor]) -> None:
        """Refuses an optimizer that would leave some of the model's gradients unsynchronised.

        Raises:
            ValueError: naming the parameters that it lacks.
        """
        held = {id(p) for p in params}
        missing = [n for n, p in self.model.module.named_parameters() if p.requires_grad and id(p) not in held]
        if missing:
            names = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
            raise ValueError(
                f"decouple() was called on a model whose {names} the optimizer does not have: their gradients would "
                "never be averaged; pass all parameters (orthdion.param_groups(model)), or freeze them"
            )


def decouple(model: nn.Module) -> Replicas:
    """Stops a DDP model from averaging gradients, so that the optimizer can send factors instead.

    It registers a communication hook, which holds for every forward and backward pass, with and without ``no_sync()``,
    so gradients accumulate locally as they would in one process.

    Args:
        model: :class:`torch.nn.parallel.DistributedDataParallel`, before its first backward pass.

    Returns:
        What the optimizer needs as its ``replicate_mesh``.

    Raises:
        TypeError: for another kind of model. RuntimeError: if the model has a communication hook already.

    Example:
        >>> model = DistributedDataParallel(model)
        >>> optimizer = orthdion.OrthDion(orthdion.param_groups(model), replicate_mesh=orthdion.decouple(model))
    """
    if not (dist.is_available() and isinstance(model, nn.parallel.DistributedDataParallel)):
        raise TypeError(
            f"model must be a DistributedDataParallel, not {type(model).__name__}; FSDP2 and tensor-parallel "
            "models need no preparation"
        )

    # torch reads the annotations of a hook, so they must be types, not strings.
    def keep(
        state: object,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[torch.Tensor]:
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model.register_comm_hook(None, keep)
    return Replicas(model, model.process_group)

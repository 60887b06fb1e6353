"""The parts in the order in which they are worth having: what makes figures mean something, then what decides, then the
rest. Seconds are limits, not what a part is expected to take.
"""

from __future__ import annotations

from dataclasses import replace

from .conductor import Part

__all__ = ["PARTS", "chosen"]

PARTS = (
    Part("machine", 75, "versions, clocks, first step, registers and double-precision instructions of the kernels"),
    Part("memcheck", 60, "tiny steps under compute-sanitizer: memory"),
    Part("racecheck", 60, "tiny steps under compute-sanitizer: shared memory"),
    Part("synccheck", 45, "tiny steps under compute-sanitizer: barriers"),
    Part(
        "correct", 60, "steps against plain torch: options, formats, several panels, batches, null directions, scales"
    ),
    Part("asynchronous", 40, "no host synchronisation, capture and replay, two streams"),
    Part("llama-3-8b", 60, "four layers at r = d/8, eager and captured, products in bfloat16 and TF32"),
    Part("microsoft-dion", 75, "microsoft/dion's Dion on the same matrices at r = d/8"),
    Part("microsoft-dion2", 60, "microsoft/dion's Dion2 on the same matrices, a quarter of the rows"),
    Part("torch-muon", 40, "torch.optim.Muon on the same matrices"),
    Part("ceilings", 40, "copies and products by format and by the step's shapes"),
    Part("factors", 40, "batched chains of factorizations by r"),
    Part("dram", 60, "DRAM bytes and pipes of a step, by ncu"),
    Part("spectra", 40, "steps of gradients with decaying spectra"),
    Part("forms", 40, "the other forms of the step, and other ranks"),
    Part("kernels", 30, "our kernels one by one against the copy rate"),
    Part("gpt-2-small", 40, "all layers, captured, against fused AdamW"),
    Part("llama-3.2-1b", 40, "four layers, eager and captured"),
    Part("moe", 40, "stacks of experts"),
    Part("layers", 60, "8 and 16 layers of Llama-3-8B"),
    Part("cpu-tests", 240, "the CPU suite on this machine's cores, where the Rust core is built"),
)


def chosen(names: str, dry: bool = False) -> tuple[Part, ...]:
    """The parts of a comma-separated list, in the plan's order; all for "". Rehearsals measure nothing, and may share
    their processor: they get ten times as long.

    Raises:
        ValueError: for a name that is none.
    """
    wanted = [name for name in names.split(",") if name]
    known = [part.name for part in PARTS]
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"--parts {', '.join(unknown)}: known are {', '.join(known)}")
    patience = 10 if dry else 1
    return tuple(replace(p, seconds=patience * p.seconds) for p in PARTS if not wanted or p.name in wanted)

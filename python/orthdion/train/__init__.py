"""The main job: a small byte-level GPT on real text, one optimizer or several from the same start on the same
batches.
"""

from .compare import compare
from .config import PRESETS, TrainConfig
from .loop import train
from .specs import OptimizerSpec

__all__ = ["PRESETS", "OptimizerSpec", "TrainConfig", "compare", "train"]

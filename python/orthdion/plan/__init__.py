"""What a step of any rule costs on any model, mesh and machine, without starting a process.

A rule asks for everything by requests. So its own body is run on tensors without numbers, by the runtime that runs real
steps; a backend that only counts answers, and collectives are counted where they would be posted. A plan can therefore
not disagree with the code about what is sent and kept; its times are a roofline's (docs/plan.md).
"""

from .hardware import HARDWARE, Hardware, measured
from .models import PRESETS, Model, Weight
from .planner import Count, count
from .report import Choice, Plan, Planned, plan

__all__ = [
    "HARDWARE",
    "PRESETS",
    "Choice",
    "Count",
    "Hardware",
    "Model",
    "Plan",
    "Planned",
    "Weight",
    "count",
    "measured",
    "plan",
]

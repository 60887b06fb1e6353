"""Which parameter goes to which algorithm, and why (docs/algorithms.md, section 6)."""

from .groups import Decision, ParamGroups, param_groups

__all__ = ["Decision", "ParamGroups", "param_groups"]

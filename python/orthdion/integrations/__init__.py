"""Other libraries' training loops: what each one calls to get an optimizer (docs/frameworks.md).

No framework is imported before it is used: :class:`Factory` needs none, and ``orthdion.integrations.timm`` and
``orthdion.integrations.torchtitan`` are imported by who wants them.
"""

from .factory import Factory

__all__ = ["Factory"]

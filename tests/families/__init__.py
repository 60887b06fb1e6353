"""Model families with tiny configs, and how each of their weights is to be routed, by what the models' code does."""

from . import experts, images, language, sound
from .family import Family

__all__ = ["FAMILIES", "Family"]

FAMILIES = [*language.FAMILIES, *experts.FAMILIES, *images.FAMILIES, *sound.FAMILIES]

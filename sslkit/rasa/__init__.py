"""Removal of absolute spatial attributes (RASA), from any ViT's patch features.

Franca, arXiv 2507.14137, section 3.3. ``sslkit rasa fit`` and ``fold`` are the commands.
"""

from sslkit.rasa.patches import patch_positions
from sslkit.rasa.planes import removals_in_turn
from sslkit.rasa.projector import RASAProjector
from sslkit.rasa.projector_files import load_rasa, read_planes, save_rasa

__all__ = [
    "RASAProjector",
    "load_rasa",
    "patch_positions",
    "read_planes",
    "removals_in_turn",
    "save_rasa",
]

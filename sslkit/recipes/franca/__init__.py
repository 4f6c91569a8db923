"""What the recipe of Franca stands on: its settings, presets, first weights, scores and report.

The method itself is `examples/franca_recipe.py`, which `sslkit.recipes.franca.recipe` is a link to.
"""

from sslkit.recipes.franca.checks import check
from sslkit.recipes.franca.evaluation import compare_stages, crop_features, online_knn
from sslkit.recipes.franca.exports import last_trained, load_encoder, save_without_position
from sslkit.recipes.franca.initial import FROM_WEIGHTS, fill_from_weights_
from sslkit.recipes.franca.presets import PRESETS
from sslkit.recipes.franca.report import write_report
from sslkit.recipes.franca.settings import Losses, Model, Settings

__all__ = [
    "FROM_WEIGHTS",
    "PRESETS",
    "Losses",
    "Model",
    "Settings",
    "check",
    "compare_stages",
    "crop_features",
    "fill_from_weights_",
    "last_trained",
    "load_encoder",
    "online_knn",
    "save_without_position",
    "write_report",
]

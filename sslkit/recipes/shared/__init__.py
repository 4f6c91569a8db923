"""What several recipes share: sections of settings, small presets, two stages, and scores.

Each public name is imported from its own module on first use, as in `sslkit.training`: settings and
presets do not need PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "CIFAR10": "presets",
    "DEMO": "presets",
    "SMOKE": "presets",
    "Crops": "settings",
    "Evaluation": "settings",
    "Losses": "settings",
    "Settings": "settings",
    "evaluate_encoders": "evaluation",
    "online_knn": "evaluation",
    "online_scores": "evaluation",
    "rates": "stages",
    "recipe_of": "stages",
}

__all__ = [
    "CIFAR10",
    "DEMO",
    "SMOKE",
    "Crops",
    "Evaluation",
    "Losses",
    "Settings",
    "evaluate_encoders",
    "online_knn",
    "online_scores",
    "rates",
    "recipe_of",
]

if TYPE_CHECKING:
    from sslkit.recipes.shared.evaluation import evaluate_encoders, online_knn, online_scores
    from sslkit.recipes.shared.presets import CIFAR10, DEMO, SMOKE
    from sslkit.recipes.shared.settings import Crops, Evaluation, Losses, Settings
    from sslkit.recipes.shared.stages import rates, recipe_of


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(
            f"module 'sslkit.recipes.shared' has no attribute {name!r}; it has {__all__}"
        )
    return getattr(import_module(f"sslkit.recipes.shared.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]

"""The engine: what every method needs around its step. It knows no method.

Each public name is imported from its own module on first use: settings and their help texts do not
need PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "CheckpointError": "sslkit.training.checkpoint",
    "Checkpoints": "sslkit.training.checkpoint",
    "CollapseMonitor": "sslkit.training.monitor",
    "Method": "sslkit.training.loop",
    "MetricsWriter": "sslkit.training.metrics",
    "NonFiniteLoss": "sslkit.training.finite",
    "Replica": "sslkit.training.replica",
    "Run": "sslkit.training.run",
    "RunSettings": "sslkit.training.settings",
    "SettingsError": "sslkit.training.settings",
    "StepReport": "sslkit.training.step",
    "TrainingProgress": "sslkit.progress",
    "Watched": "sslkit.training.step",
    "atomic_write": "sslkit.files",
    "clip_gradients": "sslkit.training.optim",
    "distribute": "sslkit.training.replica",
    "feature_std": "sslkit.training.monitor",
    "micro_batches": "sslkit.training.step",
    "moments": "sslkit.training.optim",
    "parameter_groups": "sslkit.training.optim",
    "read_metrics": "sslkit.training.metrics",
    "require_finite": "sslkit.training.finite",
    "set_hyperparameters": "sslkit.training.optim",
    "standardise": "sslkit.training.batch_norm",
    "track": "sslkit.progress",
    "train": "sslkit.training.loop",
}

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "CollapseMonitor",
    "Method",
    "MetricsWriter",
    "NonFiniteLoss",
    "Replica",
    "Run",
    "RunSettings",
    "SettingsError",
    "StepReport",
    "TrainingProgress",
    "Watched",
    "atomic_write",
    "clip_gradients",
    "distribute",
    "feature_std",
    "micro_batches",
    "moments",
    "parameter_groups",
    "read_metrics",
    "require_finite",
    "set_hyperparameters",
    "standardise",
    "track",
    "train",
]

if TYPE_CHECKING:
    from sslkit.files import atomic_write
    from sslkit.progress import TrainingProgress, track
    from sslkit.training.batch_norm import standardise
    from sslkit.training.checkpoint import CheckpointError, Checkpoints
    from sslkit.training.finite import NonFiniteLoss, require_finite
    from sslkit.training.loop import Method, train
    from sslkit.training.metrics import MetricsWriter, read_metrics
    from sslkit.training.monitor import CollapseMonitor, feature_std
    from sslkit.training.optim import (
        clip_gradients,
        moments,
        parameter_groups,
        set_hyperparameters,
    )
    from sslkit.training.replica import Replica, distribute
    from sslkit.training.run import Run
    from sslkit.training.settings import RunSettings, SettingsError
    from sslkit.training.step import StepReport, Watched, micro_batches


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(
            f"module 'sslkit.training' has no attribute {name!r}; it has {__all__}"
        )
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]

"""The engine: what every method needs around its step. It knows no method."""

from sslkit.files import atomic_write
from sslkit.progress import TrainingProgress, track
from sslkit.training.checkpoint import CheckpointError, Checkpoints
from sslkit.training.distribute import Replica, distribute
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
from sslkit.training.run import Run
from sslkit.training.settings import RunSettings, SettingsError
from sslkit.training.step import StepReport, Watched, micro_batches

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
    "track",
    "train",
]

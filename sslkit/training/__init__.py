"""What a training loop needs around the method: optimizer, checkpoints, metrics, progress."""

from sslkit.files import atomic_write
from sslkit.progress import TrainingProgress, track
from sslkit.training.checkpoint import CheckpointError, Checkpoints
from sslkit.training.finite import NonFiniteLoss, require_finite
from sslkit.training.metrics import MetricsWriter, read_metrics
from sslkit.training.monitor import CollapseMonitor, feature_std
from sslkit.training.optim import (
    clip_gradients,
    moments,
    parameter_groups,
    set_hyperparameters,
)

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "CollapseMonitor",
    "MetricsWriter",
    "NonFiniteLoss",
    "TrainingProgress",
    "atomic_write",
    "clip_gradients",
    "feature_std",
    "moments",
    "parameter_groups",
    "read_metrics",
    "require_finite",
    "set_hyperparameters",
    "track",
]

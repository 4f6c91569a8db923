"""What a training loop needs around the method: optimizer, checkpoints, metrics, progress."""

from sslkit.training.checkpoint import CheckpointError, Checkpoints, atomic_write, load_strictly
from sslkit.training.metrics import MetricsWriter, read_metrics
from sslkit.training.monitor import CollapseMonitor, NonFiniteLoss, feature_std, require_finite
from sslkit.training.optim import (
    clip_gradients,
    load_optimizer_strictly,
    parameter_groups,
    set_hyperparameters,
)
from sslkit.training.progress import TrainingProgress, track
from sslkit.training.random_state import get_random_state, set_random_state

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
    "get_random_state",
    "load_optimizer_strictly",
    "load_strictly",
    "parameter_groups",
    "read_metrics",
    "require_finite",
    "set_hyperparameters",
    "set_random_state",
    "track",
]

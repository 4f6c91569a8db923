"""Adapters of PyTorch's own average of weights."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sslkit.testing import EMA


def averaged(student: nn.Module, momentum: float, *, buffers: bool = False) -> AveragedModel:
    """Average of weights after its first update, which copies."""
    average = get_ema_multi_avg_fn(momentum)
    teacher = AveragedModel(student, torch.device("cpu"), multi_avg_fn=average, use_buffers=buffers)
    teacher.update_parameters(student)
    return teacher


pytorch_averaged_model = EMA(
    averaged, AveragedModel.update_parameters, lambda teacher: teacher.module, frozen=False
)
pytorch_averaged_model_with_buffers = EMA(
    lambda student, momentum: averaged(student, momentum, buffers=True),
    AveragedModel.update_parameters,
    lambda teacher: teacher.module,
    buffers="average",
    frozen=False,
)

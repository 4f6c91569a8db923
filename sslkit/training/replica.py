"""A student and its teacher on the processes of a run: replicated, sharded, compiled."""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslkit.training.parallel import (
    Kind,
    Parallel,
    choose,
    gradients_synchronised,
    replicate,
    shard_,
    whole,
)
from sslkit.training.run import Run
from sslkit.training.settings import SettingsError


class Replica:
    """The network that all processes train together.

    Call it instead of the network: its gradients are those of all processes. :func:`distribute`
    makes it.
    """

    def __init__(
        self, network: nn.Module, parallel: Parallel, kind: Kind, skeleton: nn.Module
    ) -> None:
        self.network, self.parallel, self.kind = network, parallel, kind
        self._skeleton = skeleton
        self._called = replicate(network, parallel) if kind == "ddp" else network

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the network."""
        return self._called(*args, **kwargs)

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """A forward and backward pass of several, the ``last`` of which averages the gradients."""
        return gradients_synchronised(self._called, last=last)

    def freeze_(self, part: str, frozen: bool) -> None:
        """Tell that a submodule gets no gradients, or gets them again, from now on.

        DDP waits for a gradient of every parameter that required one when it was made, so it is
        made again. The forward pass of the network has to run the part without gradients.
        """
        module = self.network.get_submodule(part)
        if self.kind == "ddp" and next(module.parameters()).requires_grad == frozen:
            module.requires_grad_(not frozen)
            self._called = replicate(self.network, self.parallel)

    def whole(self, network: nn.Module, part: str = "") -> Any:
        """A copy on the CPU of a network of the same structure, or of a ``part`` of it.

        It is in eval mode, and no longer sharded. All processes have to call this.
        """
        weights = whole(network.get_submodule(part))
        found = copy.deepcopy(self._skeleton.get_submodule(part))
        found.load_state_dict(weights, assign=True)
        return found.cpu().eval()


def distribute(
    networks: Sequence[nn.Module],
    run: Run,
    *,
    blocks: Sequence[str],
    float32: Sequence[str] = (),
) -> Replica:
    """Share networks of one structure over the processes of a run, as its settings say.

    Call it before the optimizer is made: sharded parameters are other tensors. Layers of batch
    normalisation take the mean and variance over the images of all processes, which PyTorch can do
    on GPUs.

    Args:
        networks: the student first, then its teacher, if there is one.
        run: its settings ``parallel``, ``hsdp_replicas`` and ``compile_blocks`` decide.
        blocks: names of the submodules whose children are compiled, and gathered, one at a time.
        float32: names of the submodules that compute in float32 whatever the precision is.

    Raises:
        SettingsError: ``hsdp_replicas`` is set and the networks are not sharded; or several
            processes on CPUs have a network with batch normalisation.
    """
    student, settings, parallel = networks[0], run.settings, run.parallel
    skeleton = _without_weights(student)
    for network in networks:
        synchronise_batch_norms_(network, parallel)
    if settings.compile_blocks:
        for network in networks:
            for name in blocks:
                for block in network.get_submodule(name).children():
                    block.compile()
    kind = settings.parallel
    if kind == "auto":
        kind = choose(sum(p.numel() for p in student.parameters()), parallel)
    if settings.hsdp_replicas > 1 and kind != "fsdp":
        raise SettingsError(
            f"--hsdp-replicas {settings.hsdp_replicas} is for --parallel fsdp, not {kind}"
        )
    if kind == "fsdp":
        shard_(
            networks,
            parallel,
            blocks=blocks,
            heads=float32,
            replicas=settings.hsdp_replicas,
            dtype=torch.bfloat16 if run.in_bfloat16 else None,
        )
    return Replica(student, parallel, kind, skeleton)


def synchronise_batch_norms_(network: nn.Module, parallel: Parallel) -> None:
    """Let batch normalisation use the images of all processes. ``network`` is not a layer of it.

    Raises:
        SettingsError: the processes compute on CPUs, where PyTorch has no such layer.
    """
    layers = [name for name, m in network.named_modules() if isinstance(m, _BatchNorm)]
    if parallel.group is None or not layers:
        return
    if parallel.device.type == "cpu":
        raise SettingsError(
            f"batch normalisation ({layers[0]}) cannot take the images of {parallel.world_size} "
            "processes together on CPUs, so that the result would depend on their number: use one "
            "process, GPUs, or a network with norm_layer='groupnorm'"
        )
    convert_sync_batchnorm(network, parallel.group)


def _without_weights(network: nn.Module) -> nn.Module:
    """A copy whose parameters are on the meta device; buffers are copied."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in network.parameters()
    }
    return copy.deepcopy(network, memo)

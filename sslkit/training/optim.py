"""Parameter groups of AdamW, their hyper-parameters at each step, gradient clipping.

The rules are those of the released DINOv2, which the released Franca configuration keeps
(layer-wise decay 1.0, patch-embedding rate x 0.2, clip 3.0 per submodule).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

_TOKENS = {
    "cls_token",
    "mask_token",
    "reg_token",
    "register_tokens",
    "storage_tokens",
    "pos_embed",
}
_EMBEDDING = {"patch_embed", "norm_pre"} | _TOKENS
_LAST_LAYERS = {"prototypes", "last_layer"}
_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
_GROUP_KEYS = ("lr_scale", "weight_decay_scale", "is_last_layer", "part")


def parameter_groups(
    model: nn.Module,
    *,
    layer_decay: float = 1.0,
    patch_embed_lr_scale: float = 0.2,
    parts: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Sort the trainable parameters of a student into a few groups for an optimizer.

    Parameters with the same three settings share a group, so that an optimizer handles them in one
    foreach call. The rules read the dotted name of a parameter, wherever in ``model`` it is:

    ``lr_scale``
        ``layer_decay ** (depth + 1 - layer)`` where the embedding (``patch_embed``, ``pos_embed``,
        class, mask and register tokens, ``norm_pre``) is layer 0, ``blocks.i`` is layer i + 1, and
        everything else (the final norm, the heads) is layer depth + 1. ``depth`` is the number of
        blocks. Times ``patch_embed_lr_scale`` for weight and bias of ``patch_embed``.
    ``weight_decay_scale``
        0 for biases and for every other vector or scalar: norms and LayerScale. 1 for the rest: all
        matrices, ``pos_embed`` and, as in DINOv2, the class, mask and register tokens (ours are
        partly stored as vectors).
    ``is_last_layer``
        True for what lies under ``prototypes`` (:class:`~sslkit.matryoshka.MatryoshkaProjector`)
        or ``last_layer`` (a DINO head): :func:`set_hyperparameters` gives it a rate of its own.

    Args:
        model: the student; ``backbone``, ``dino_head``, ``ibot_head`` or any other submodules.
        layer_decay: above 0, at most 1. Franca pretrains with 1.0; fine-tuning uses about 0.75.
        patch_embed_lr_scale: not negative.
        parts: submodules of ``model``, by name, that :func:`set_hyperparameters` can give a rate of
            their own: their parameters are in groups apart from the rest.

    Returns:
        Groups with the keys ``params``, ``names`` (of the parameters, in the same order), the
        three above and ``part`` (one of ``parts``, or ""), in the order in which their first
        parameters appear in ``model``.

    Raises:
        ValueError: an argument is out of range; nothing is trainable, as a whole or in one of
            ``parts``; ``layer_decay`` is below 1
            and the model has no ``blocks.i``, or several stacks of them, so that a layer's number
            would have no meaning.

    >>> model = nn.ModuleDict({"patch_embed": nn.Linear(3, 4), "prototypes": nn.Linear(4, 9)})
    >>> for group in parameter_groups(model):
    ...     print(*group["names"], *(group[key] for key in list(group)[2:5]))
    patch_embed.weight 0.2 1.0 False
    patch_embed.bias 0.2 0.0 False
    prototypes.weight 1.0 1.0 True
    prototypes.bias 1.0 0.0 True
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be above 0 and at most 1, got {layer_decay}")
    if patch_embed_lr_scale < 0:
        raise ValueError(f"patch_embed_lr_scale must not be negative, got {patch_embed_lr_scale}")
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("model has no parameter with requires_grad=True, so nothing to optimize")
    depth = _depth([name for name, _ in named], layer_decay)

    for part in parts:
        if not any(name.startswith(f"{part}.") for name, _ in named):
            raise ValueError(f"parts: model has no trainable parameter under {part!r}")

    groups: dict[tuple[float, float, bool, str], dict[str, Any]] = {}
    for name, parameter in named:
        words = set(name.split("."))
        lr_scale = layer_decay ** (depth + 1 - _layer(name, depth))
        if "patch_embed" in words:
            lr_scale *= patch_embed_lr_scale
        decay_scale = _weight_decay_scale(name, parameter)
        part = next((part for part in parts if name.startswith(f"{part}.")), "")
        key = (lr_scale, decay_scale, bool(words & _LAST_LAYERS), part)
        empty = {"params": [], "names": [], **dict(zip(_GROUP_KEYS, key, strict=True))}
        group = groups.setdefault(key, empty)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def set_hyperparameters(
    optimizer: Optimizer,
    *,
    lr: float,
    weight_decay: float,
    last_layer_lr: float,
    part_lr_scales: Mapping[str, float] | None = None,
) -> None:
    """Give each group its learning rate and weight decay for the coming step.

    ``lr * lr_scale`` (``last_layer_lr * lr_scale`` where ``is_last_layer``) and
    ``weight_decay * weight_decay_scale``. ``last_layer_lr=0`` freezes the last layers exactly
    (AdamW also multiplies its decay by the rate); their moments go on being averaged, as in DINOv2.
    The rates of the groups of a part are also multiplied by its ``part_lr_scales``, if it has one.

    Raises:
        ValueError: a group does not come from :func:`parameter_groups`; or ``last_layer_lr``
            differs from ``lr`` and no group is a last layer, or no group is of a part that has a
            scale, so that it would have no effect.

    >>> from torch.optim import AdamW
    >>> model = nn.ModuleDict({"trunk": nn.Linear(2, 2), "prototypes": nn.Linear(2, 9)})
    >>> optimizer = AdamW(parameter_groups(model))
    >>> set_hyperparameters(optimizer, lr=1e-3, weight_decay=0.04, last_layer_lr=0.0)
    >>> [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    [(0.001, 0.04), (0.001, 0.0), (0.0, 0.04), (0.0, 0.0)]
    """
    _require_groups(optimizer)
    groups = optimizer.param_groups
    if last_layer_lr != lr and not any(group["is_last_layer"] for group in groups):
        raise ValueError(
            f"last_layer_lr={last_layer_lr} would have no effect: no group has is_last_layer, "
            f"as no parameter lies under {' or '.join(sorted(_LAST_LAYERS))}; pass last_layer_lr=lr"
        )
    part_lr_scales = part_lr_scales or {}
    unknown = set(part_lr_scales) - {group["part"] for group in groups}
    if unknown:
        raise ValueError(
            f"part_lr_scales: no group is of {', '.join(sorted(unknown))}; name it among the parts "
            "of parameter_groups"
        )
    for group in groups:
        rate = (last_layer_lr if group["is_last_layer"] else lr) * group["lr_scale"]
        group["lr"] = rate * part_lr_scales.get(group["part"], 1.0)
        group["weight_decay"] = weight_decay * group["weight_decay_scale"]


def moments(optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """The state of an AdamW by the names of its parameters: what a checkpoint keeps of it.

    The tensors themselves, so that filling them restores the optimizer. A parameter that has had no
    step yet gets the state that its first step would give it: zeros. Settings (betas, scales,
    ``fused``, ...) are not part of it, and parameters may be grouped differently in the run that
    reads it: a changed ``layer_decay`` takes effect.

    Args:
        optimizer: AdamW over groups of :func:`parameter_groups`.

    Returns:
        For each parameter ``step`` (0-dimensional float32), ``exp_avg`` and ``exp_avg_sq`` (shape,
        type and sharding of the parameter).

    >>> model = nn.Linear(2, 1)
    >>> optimizer = torch.optim.AdamW(parameter_groups(model))
    >>> moments(optimizer)["bias"]
    {'step': tensor(0.), 'exp_avg': tensor([0.]), 'exp_avg_sq': tensor([0.])}
    """
    _require_groups(optimizer)
    found = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            state = optimizer.state[parameter]
            if not state:
                on_device = group["fused"] or group["capturable"]
                device = parameter.device if on_device else torch.device("cpu")
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                state["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
                state["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)
            found[name] = dict(state)
    return found


def clip_gradients(modules: Mapping[str, nn.Module], max_norm: float) -> dict[str, Tensor]:
    """Scale the gradients of each module so that their joint L2 norm is at most ``max_norm``.

    ``grad *= min(1, max_norm / (norm + 1e-6))`` with one norm per module. Nothing is copied to the
    host. A non-finite norm makes the gradients of its module NaN or zero: give the norms to
    :func:`~sslkit.training.finite.require_finite` before the optimizer's step.

    Args:
        modules: by name; modules that share parameters would clip them twice.
        max_norm: positive; 3.0 for each of backbone, DINO head, iBOT head in DINOv2 and Franca.

    Returns:
        The norm of each module before clipping, a 0-dimensional tensor; 0 without gradients. Of
        sharded gradients it is that of the whole, in every process.

    >>> module = nn.Linear(1, 2, bias=False)
    >>> module.weight.grad = Tensor([[3.0], [4.0]])
    >>> clip_gradients({"backbone": module}, 1.0), module.weight.grad.norm().round(decimals=4)
    ({'backbone': tensor(5.)}, tensor(1.))
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}")
    norms = {
        name: nn.utils.clip_grad_norm_(list(module.parameters()), max_norm)
        for name, module in modules.items()
    }
    return {
        name: norm.full_tensor() if isinstance(norm, DTensor) else norm
        for name, norm in norms.items()
    }


def _depth(names: list[str], layer_decay: float) -> int:
    """The number of blocks in the one stack of them; 0 without any."""
    blocks = [(name, match) for name in names if (match := _BLOCK.search(name))]
    stacks = sorted({name[: match.start(1)] for name, match in blocks})
    if layer_decay < 1 and len(stacks) != 1:
        raise ValueError(
            f"layer_decay={layer_decay} needs exactly one stack of parameters named 'blocks.0...', "
            f"'blocks.1...', found {stacks or 'none'}; pass layer_decay=1.0"
        )
    return 1 + max((int(match.group(1)) for _, match in blocks), default=-1)


def _layer(name: str, depth: int) -> int:
    match = _BLOCK.search(name)
    if match:
        return int(match.group(1)) + 1
    return 0 if _EMBEDDING & set(name.split(".")) else depth + 1


def _weight_decay_scale(name: str, parameter: Tensor) -> float:
    leaf = name.rsplit(".", 1)[-1]
    if leaf in _TOKENS:
        return 1.0
    return 0.0 if parameter.ndim < 2 or leaf.endswith("bias") else 1.0


def _require_groups(optimizer: Optimizer) -> None:
    for i, group in enumerate(optimizer.param_groups):
        missing = [key for key in ("names", *_GROUP_KEYS) if key not in group]
        if missing:
            raise ValueError(
                f"group {i} of the optimizer has no {', '.join(missing)}; build the optimizer from "
                "parameter_groups(model)"
            )

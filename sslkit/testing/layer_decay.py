"""Learning rates that fall from layer to layer of a ViT: what parameter groups are held to."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
from torch import nn

from sslkit.testing import strategies
from sslkit.testing.conformance import check
from sslkit.testing.properties import Draw, Property, require
from sslkit.testing.references.training import dinov2_decays, dinov2_lr_scale


@dataclass(frozen=True)
class LayerDecay:
    """How somebody's parameter groups are made.

    Args:
        call: ``call(vit, layer_decay) -> groups``, of a timm ``VisionTransformer`` with a linear
            head, for a weight decay of 1; a group has ``"params"``, ``"lr_scale"`` and
            ``"weight_decay"``.
        final_norm: whether the norm after the last block has the full rate, as the ``"head"``
            (DINOv2), or the rate of the last ``"block"`` (timm).
        patch_embed_lr_scale: what the rate of the patch embedding is multiplied by.
        tokens_decay: whether weights of class token and positions decay (DINOv2).
    """

    call: Callable[[nn.Module, float], Iterable[dict[str, Any]]]
    final_norm: Literal["head", "block"] = "head"
    patch_embed_lr_scale: float = 1.0
    tokens_decay: bool = True

    @property
    def properties(self) -> tuple[Property, ...]:
        """What it is held to."""
        return PROPERTIES


def check_layer_decay(
    groups: LayerDecay | Callable[[nn.Module, float], Iterable[dict[str, Any]]],
) -> None:
    """Hold parameter groups to their properties; raise `NotHeld` with those that fail."""
    check(groups if isinstance(groups, LayerDecay) else LayerDecay(groups))


def rates_are_those_of_the_layers(groups: LayerDecay, draw: Draw) -> None:
    """A parameter's rate falls by the decay for each layer between it and the head."""
    depth, layer_decay, vit = _inputs(draw)
    found = _by_name(groups, vit, layer_decay, "lr_scale")
    for name, scale in found.items():
        other = name
        if groups.final_norm == "block" and name.startswith("norm."):
            other = f"blocks.{depth - 1}.{name}"
        expected = dinov2_lr_scale(
            f"backbone.{other}", depth, layer_decay, groups.patch_embed_lr_scale
        )
        require(abs(scale - expected) <= 1e-9, f"{name}: {expected:.6g}", f"{scale:.6g}")


def every_parameter_is_in_one_group(groups: LayerDecay, draw: Draw) -> None:
    """Each parameter that is trained is in exactly one group, and a frozen one in none."""
    _, layer_decay, vit = _inputs(draw)
    frozen = draw(strategies.choices(["", "cls_token", "blocks.0.attn.qkv.weight"]), "frozen")
    if frozen:
        vit.get_parameter(frozen).requires_grad_(False)
    names = {id(parameter): name for name, parameter in vit.named_parameters()}
    made = groups.call(vit, layer_decay)
    found = sorted(names[id(p)] for group in made for p in group["params"])
    expected = sorted(name for name, p in vit.named_parameters() if p.requires_grad)
    require(found == expected, f"each of the {len(expected)} once", _difference(found, expected))


def matrices_alone_decay(groups: LayerDecay, draw: Draw) -> None:
    """Weights of linear layers decay; biases, norms and layer scales do not."""
    _, layer_decay, vit = _inputs(draw)
    found = _by_name(groups, vit, layer_decay, "weight_decay")
    for name, decay in found.items():
        decays = dinov2_decays(name)
        if name in ("cls_token", "pos_embed", "reg_token"):
            decays = groups.tokens_decay
        expected = "a decayed weight" if decays else "a weight that does not decay"
        require((decay > 0) == decays, f"{name}: {expected}", f"{name}: a weight decay of {decay}")


def later_layers_are_not_slower(groups: LayerDecay, draw: Draw) -> None:
    """The nearer a block is to the head, the higher is its rate."""
    depth, layer_decay, vit = _inputs(draw)
    found = _by_name(groups, vit, layer_decay, "lr_scale")
    rates = [found[f"blocks.{i}.attn.qkv.weight"] for i in range(depth)]
    rates = [found["cls_token"], *rates, found["head.weight"]]
    require(rates == sorted(rates), "rates that rise", rates)


def no_decay_is_one_rate(groups: LayerDecay, draw: Draw) -> None:
    """With a layer decay of 1 all layers have one rate."""
    _, _, vit = _inputs(draw)
    found = _by_name(groups, vit, 1.0, "lr_scale")
    others = {name: x for name, x in found.items() if not name.startswith("patch_embed")}
    require(set(others.values()) == {1.0}, "a scale of 1", sorted(set(others.values())))


def leaves_the_model_alone(groups: LayerDecay, draw: Draw) -> None:
    """Making groups changes no parameter, and not which of them are trained."""
    _, layer_decay, vit = _inputs(draw)
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in vit.named_parameters()}
    list(groups.call(vit, layer_decay))
    for name, parameter in vit.named_parameters():
        value, trained = before[name]
        same = torch.equal(value, parameter) and trained == parameter.requires_grad
        require(same, f"{name} as it was", "it has changed")


def _inputs(draw: Draw) -> tuple[int, float, nn.Module]:
    """Depth, layer decay, and a ViT of that depth with layer scales, a register and a head."""
    depth = draw(strategies.choices([1, 2, 12]), "depth")
    layer_decay = draw(strategies.choices([0.75, 0.5, 0.9]), "layer_decay")
    vit = timm.models.VisionTransformer(
        img_size=16,
        patch_size=8,
        embed_dim=4,
        depth=depth,
        num_heads=1,
        num_classes=3,
        init_values=1e-5,
        reg_tokens=1,
    )
    return depth, layer_decay, vit


def _by_name(groups: LayerDecay, vit: nn.Module, layer_decay: float, key: str) -> dict[str, float]:
    values = {
        id(parameter): float(group[key])
        for group in groups.call(vit, layer_decay)
        for parameter in group["params"]
    }
    missing = [name for name, p in vit.named_parameters() if id(p) not in values]
    require(not missing, "every parameter in a group", f"not in any: {missing}")
    return {name: values[id(parameter)] for name, parameter in vit.named_parameters()}


def _difference(found: list[str], expected: list[str]) -> str:
    missing = sorted(set(expected) - set(found))
    twice = sorted({name for name in found if found.count(name) > 1})
    frozen = sorted(set(found) - set(expected))
    return f"missing {missing}, twice {twice}, frozen {frozen}"


PROPERTIES = (
    Property(rates_are_those_of_the_layers, max_examples=9),
    Property(every_parameter_is_in_one_group, max_examples=6),
    Property(matrices_alone_decay, max_examples=3),
    Property(later_layers_are_not_slower, max_examples=6),
    Property(no_decay_is_one_rate, max_examples=3),
    Property(leaves_the_model_alone, max_examples=2),
)

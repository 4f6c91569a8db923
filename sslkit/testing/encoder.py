"""Encoders of crops of several resolutions in one pass: what every implementation is held to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sslkit.testing import strategies
from sslkit.testing.conformance import check
from sslkit.testing.invariances import rounding
from sslkit.testing.properties import Draw, Property, agree, require

Crops = Sequence[Tensor]
Masks = Sequence[Tensor]


@dataclass(frozen=True)
class Encoder:
    """How somebody's encoder is made and called.

    Args:
        make: ``make() -> nn.Module`` in eval mode, float32, the same weights each time.
        call: ``call(module, crops, masks) -> tokens``; crops are images [B, 3, h, w], a tensor for
            each resolution, masks bool [B, H, W] for each of them, True = masked, or None. Tokens
            are [B, 1 + H W, D] for each: the class token, then the patches row by row.
        patch_size: sides of the crops are multiples of it.
        masked: whether it takes masks; a masked patch is replaced by a learned token.
    """

    make: Callable[[], nn.Module]
    call: Callable[[nn.Module, Crops, Masks | None], Sequence[Tensor]]
    patch_size: int
    masked: bool = True

    @property
    def properties(self) -> tuple[Property, ...]:
        """What it is held to."""
        return PROPERTIES


def check_encoder(encoder: Encoder) -> None:
    """Hold an encoder to its properties; raise `NotHeld` with those that fail."""
    check(encoder)


def has_a_token_for_each_patch(encoder: Encoder, draw: Draw) -> None:
    """Each image has a class token and a token for each patch, on grids that are not square too."""
    crops = _crops(encoder, draw)
    found = [tuple(tokens.shape[:2]) for tokens in encoder.call(encoder.make(), crops, None)]
    expected = [(len(x), 1 + _patches(encoder, x)) for x in crops]
    require(found == expected, f"tokens of shapes {expected}", found)


def each_crop_is_encoded_as_if_alone(encoder: Encoder, draw: Draw) -> None:
    """Crops of several resolutions in one pass have the tokens of each resolution alone."""
    module, crops = encoder.make(), _crops(encoder, draw)
    together = encoder.call(module, crops, None)
    for tokens, x in zip(together, crops, strict=True):
        (alone,) = encoder.call(module, [x], None)
        agree(tokens, alone, _tolerance(alone))


def images_do_not_mix(encoder: Encoder, draw: Draw) -> None:
    """An image's tokens do not depend on the other images of its batch."""
    module, x = encoder.make(), _crops(encoder, draw)[0]
    (tokens,) = encoder.call(module, [torch.cat([x, -2 * x])], None)
    (alone,) = encoder.call(module, [x], None)
    agree(tokens[: len(x)], alone, _tolerance(alone))


def masked_patches_are_not_seen(encoder: Encoder, draw: Draw) -> None:
    """The pixels of a masked patch change no token, and those of a visible one change some."""
    module, crops = encoder.make(), _crops(encoder, draw)
    masks = []
    for x in crops:
        B, _, h, w = x.shape
        mask = draw(strategies.masks(B, _patches(encoder, x)), "mask")
        masks.append(mask.view(B, h // encoder.patch_size, w // encoder.patch_size))
    tokens = encoder.call(module, crops, masks)
    p = encoder.patch_size
    for seen in (False, True):
        others = []
        for x, mask in zip(crops, masks, strict=True):
            changed = (~mask if seen else mask).repeat_interleave(p, 1).repeat_interleave(p, 2)
            others.append(torch.where(changed[:, None], 1 - x, x))
        found = encoder.call(module, others, masks)
        for mask, each, expected in zip(masks, found, tokens, strict=True):
            if not seen:
                agree(each, expected, _tolerance(expected), "with other pixels that are masked")
            elif not mask.all():
                distance = float((each - expected).detach().abs().max())
                require(distance > 1e-4, "tokens that depend on visible pixels", distance)


def gradients_of_crops_add_up(encoder: Encoder, draw: Draw) -> None:
    """The gradient of crops in one pass is the sum of the gradients of each resolution alone."""
    crops = _crops(encoder, draw)
    found = _gradients(encoder, [crops])
    expected = _gradients(encoder, [[x] for x in crops])
    for name, gradient in expected.items():
        largest = max(float(gradient.abs().max()), 1e-3)
        agree(found[name], gradient, 1e-4 * largest, f"gradient of {name}")


def leaves_no_trace(encoder: Encoder, draw: Draw) -> None:
    """A call changes neither pixels nor weights and buffers, nor what the next call gives."""
    module, crops = encoder.make(), _crops(encoder, draw)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    pixels = [x.clone() for x in crops]
    first = [tokens.clone() for tokens in encoder.call(module, crops, None)]
    for found, expected in zip(encoder.call(module, crops, None), first, strict=True):
        agree(found, expected, what="the second call")
    for found, expected in zip(crops, pixels, strict=True):
        agree(found, expected, what="pixels after the call")
    for name, value in module.state_dict().items():
        agree(value, before[name], what=f"{name} after two calls")


def _crops(encoder: Encoder, draw: Draw) -> list[Tensor]:
    return draw(strategies.crops(encoder.patch_size, resolutions=strategies.sizes(1, 3)), "crops")


def _patches(encoder: Encoder, x: Tensor) -> int:
    return (x.shape[2] // encoder.patch_size) * (x.shape[3] // encoder.patch_size)


def _gradients(encoder: Encoder, calls: Sequence[Crops]) -> dict[str, Tensor]:
    module = encoder.make()
    for crops in calls:
        loss = torch.zeros(())
        for tokens in encoder.call(module, crops, None):
            # A sum of a layer norm's outputs is constant; weights break that.
            weights = torch.linspace(-1, 1, tokens[0].numel()).view_as(tokens[0])
            loss = loss + (tokens * weights).sum()
        loss.backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in module.named_parameters()
    }


def _tolerance(tokens: Tensor) -> float:
    return 64 * rounding(tokens)


PROPERTIES = (
    Property(has_a_token_for_each_patch, max_examples=5),
    Property(each_crop_is_encoded_as_if_alone, max_examples=10),
    Property(images_do_not_mix, max_examples=5),
    Property(masked_patches_are_not_seen, needs="masked", max_examples=8),
    Property(gradients_of_crops_add_up, max_examples=5),
    Property(leaves_no_trace, max_examples=3),
)

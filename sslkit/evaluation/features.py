"""Frozen features: run a token encoder over images once, so that every protocol can share them.

The view is that of DINOv2's and Franca's evaluations: shorter side resized (bicubic, antialiased),
centre crop, ImageNet normalisation.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sslkit.data.crops import normalisation
from sslkit.data.sources import Source, UnreadableImage

_RESIZE_OVER_CROP = 256 / 224


@dataclass(frozen=True)
class EvalTransform:
    """The deterministic view of an image that evaluations use.

    The shorter side is resized to ``resize`` (bicubic, antialiased; the default is 256/224 of the
    crop's shorter side), the centre ``crop`` is cut out, and the channels are normalised. An image
    that would not fill the crop is enlarged just enough to fill it; nothing is ever padded.

    Args:
        crop: side of the square crop, or ``(height, width)``, in pixels.
        resize: length of the shorter side before the crop, in pixels.
        mean, std: see `sslkit.data.crops.normalisation`; by default ImageNet's.

    >>> view = EvalTransform(crop=(28, 56))
    >>> view(torch.zeros(3, 100, 300, dtype=torch.uint8)).shape
    torch.Size([3, 28, 56])
    >>> view.mask(torch.zeros(100, 300, dtype=torch.uint8)).shape
    torch.Size([28, 56])
    """

    crop: int | tuple[int, int]
    resize: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if min(*self.crop_size, 1 if self.resize is None else self.resize) < 1:
            raise ValueError(
                f"crop and resize must be positive, got crop={self.crop}, resize={self.resize}"
            )

    @property
    def crop_size(self) -> tuple[int, int]:
        """Height and width of the result, in pixels."""
        return (self.crop, self.crop) if isinstance(self.crop, int) else self.crop

    def __call__(self, image: Tensor) -> Tensor:
        """Turn a uint8 image [C, h, w] into a normalised float32 view [C, *crop_size]."""
        if image.ndim != 3 or image.dtype != torch.uint8:
            raise TypeError(
                f"image must be uint8 [C, h, w], got {image.dtype} {list(image.shape)}; "
                "convert floats in 0..1 with (image * 255).round().to(torch.uint8)"
            )
        mean, std = normalisation(len(image), self.mean, self.std)
        size = self._resized(image.shape[1], image.shape[2])
        # Bicubic weights are negative in places, so that values can leave 0..255.
        pixels = F.interpolate(image[None].float(), size, mode="bicubic", antialias=True)[0]
        return (self._centre(pixels.clamp(0, 255)) / 255 - mean) / std

    def mask(self, mask: Tensor) -> Tensor:
        """Cut the same region out of an integer label mask [h, w], by nearest neighbour."""
        if mask.ndim != 2:
            raise ValueError(f"mask must be [h, w], got {list(mask.shape)}")
        size = self._resized(mask.shape[0], mask.shape[1])
        resized = F.interpolate(mask[None, None].double(), size, mode="nearest-exact")[0, 0]
        return self._centre(resized).to(mask.dtype)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        crop_h, crop_w = self.crop_size
        shorter = self.resize or round(min(crop_h, crop_w) * _RESIZE_OVER_CROP)
        scale = max(shorter / min(height, width), crop_h / height, crop_w / width)
        return max(crop_h, int(height * scale + 1e-6)), max(crop_w, int(width * scale + 1e-6))

    def _centre(self, pixels: Tensor) -> Tensor:
        crop_h, crop_w = self.crop_size
        top, left = (
            (full - cut) // 2 for full, cut in zip(pixels.shape[-2:], self.crop_size, strict=True)
        )
        return pixels[..., top : top + crop_h, left : left + crop_w]


@dataclass(frozen=True)
class Features:
    """Frozen features of B images, on the CPU.

    Attributes:
        tokens: ``"cls"`` [B, D] and ``"patches"`` [B, H, W, D], as far as they were asked for.
        labels: int64 [B]; -1 where the image has none.
        indices: int64 [B]: the place of each image in its source (to align masks, say).
        num_unreadable: how many images were skipped because they could not be read.
    """

    tokens: dict[str, Tensor]
    labels: Tensor
    indices: Tensor
    num_unreadable: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def cls(self) -> Tensor:
        """Class tokens [B, D]."""
        return self._get("cls")

    @property
    def patches(self) -> Tensor:
        """Patch tokens [B, H, W, D]."""
        return self._get("patches")

    def _get(self, name: str) -> Tensor:
        if name not in self.tokens:
            raise ValueError(
                f"these features hold {sorted(self.tokens)}, not {name!r}: "
                f"extract them with want=(..., {name!r})"
            )
        return self.tokens[name]


@contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """Put a module in eval mode without gradients; afterwards each part has its mode back."""
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield module
    finally:
        for part, mode in training.items():
            part.training = mode


def extract(
    encoder: nn.Module,
    source: Source,
    *,
    transform: Callable[[Tensor], Tensor],
    batch_size: int = 64,
    want: Sequence[str] = ("cls", "patches"),
    indices: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    num_workers: int = 0,
) -> Features:
    """Features of the images of a source, in the source's order.

    Images that raise `UnreadableImage` are left out, counted in ``num_unreadable``, and warned of
    once; ``Features.indices`` says which images the rows belong to.

    Args:
        encoder: any module whose output has ``.cls`` [B, D] and ``.patches`` [B, H, W, D].
        source: see `sslkit.data.sources.Source`; only its length and items are used, so that a list
            of (image, label) pairs will do.
        transform: uint8 [C, h, w] -> float [C, h', w'], the same size for every image.
        batch_size: images a forward pass.
        want: the tokens to keep, of ``"cls"`` and ``"patches"``.
        indices: which images to take; all of them by default.
        device: where the encoder is run; it must already be there.
        dtype: of the kept features; float16 halves their memory.
        num_workers: processes that read images.

    Raises:
        ValueError: no image, or none that can be read.
    """
    items = _Items(source, transform, range(len(source)) if indices is None else indices)
    if not len(items):
        raise ValueError("nothing to extract: the source, or the list of indices, is empty")
    # A generator of its own: a loader otherwise draws its workers' seed from the global one.
    loader = DataLoader(
        items,
        batch_size,
        num_workers=num_workers,
        collate_fn=list,
        generator=torch.Generator(),
    )
    kept: list[int] = []
    unreadable: list[str] = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in loader:
            good = [item for item in batch if not isinstance(item, str)]
            unreadable.extend(item for item in batch if isinstance(item, str))
            if good:
                kept.extend(index for _, _, index in good)
                images = torch.stack([image for image, _, _ in good])
                yield images, torch.tensor([label for _, label, _ in good])
        if not kept:
            raise ValueError(f"none of the {len(items)} images can be read; {unreadable[0]}")

    features = extract_batches(encoder, batches(), want=want, device=device, dtype=dtype)
    if unreadable:
        warnings.warn(
            f"{len(unreadable)} of {len(items)} images could not be read and were left out; "
            f"the first: {unreadable[0]}",
            stacklevel=2,
        )
    return Features(features.tokens, features.labels, torch.tensor(kept), len(unreadable))


def extract_batches(
    encoder: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    want: Sequence[str] = ("cls", "patches"),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Features:
    """Features of batches ``(images [B, C, h, w], labels [B])`` that are ready for the encoder.

    The encoder runs in eval mode without gradients and has its modes back afterwards.

    >>> from types import SimpleNamespace
    >>> class Mean(nn.Module):
    ...     def forward(self, images):
    ...         patches = F.avg_pool2d(images, 4).movedim(1, -1)
    ...         return SimpleNamespace(cls=patches.mean((1, 2)), patches=patches)
    >>> features = extract_batches(Mean(), [(torch.rand(2, 3, 8, 16), torch.tensor([0, 1]))] * 3)
    >>> features.cls.shape, features.patches.shape, features.labels.tolist()
    (torch.Size([6, 3]), torch.Size([6, 2, 4, 3]), [0, 1, 0, 1, 0, 1])
    """
    unknown = set(want) - {"cls", "patches"}
    if unknown or not want:
        raise ValueError(f"want must name 'cls', 'patches' or both, got {tuple(want)}")
    tokens: dict[str, list[Tensor]] = {name: [] for name in want}
    labels = []
    with frozen(encoder):
        for images, batch_labels in batches:
            output = encoder(images.to(device))
            for name, parts in tokens.items():
                parts.append(getattr(output, name).to("cpu", dtype))
            labels.append(batch_labels.to("cpu", torch.int64))
    if not labels:
        raise ValueError("there is nothing to extract features of: batches is empty")
    joined = {name: torch.cat(parts) for name, parts in tokens.items()}
    all_labels = torch.cat(labels)
    return Features(joined, all_labels, torch.arange(len(all_labels)))


class _Items(Dataset):
    """(view, label, index) of each image of a source; the reason, a string, for a broken file."""

    def __init__(
        self, source: Source, transform: Callable[[Tensor], Tensor], indices: Sequence[int]
    ) -> None:
        self.source, self.transform, self.indices = source, transform, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Any:
        index = self.indices[position]
        try:
            image, label = self.source[index]
        except UnreadableImage as error:
            return str(error)
        return self.transform(image), label, index

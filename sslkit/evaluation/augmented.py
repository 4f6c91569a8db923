"""Augmented views of images as a source, and their features."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor

from sslkit.data.crops import MultiCrop
from sslkit.data.fingerprint import digest, names_digest
from sslkit.data.image_source import Source
from sslkit.data.rendering import View
from sslkit.data.seeds import sample_seed
from sslkit.evaluation.subject import Subject


class AugmentedImages:
    """A source of augmented views of some images of another source.

    Item ``i * num_views + v`` is view v of image ``indices[i]``. The views are the global ones that
    a training draws for an image, over and over; they are a function of the image, its index and
    ``seed``. The normalisation is left out: a view is uint8, as an image is.

    Args:
        source: the images.
        indices: which of them.
        crops: of the training; local views are left out.
        num_views: views of an image.
        seed: seed of the views.
    """

    def __init__(
        self,
        source: Source,
        indices: Sequence[int],
        crops: MultiCrop,
        *,
        num_views: int,
        seed: int = 0,
    ) -> None:
        self.source, self.indices, self.num_views, self.seed = source, indices, num_views, seed
        self.crops = replace(crops, num_local=0)
        self._place = -1  # of the image read last: its views are neighbours
        self._image, self._label = torch.empty(0), -1
        self._views: list[View] = []

    @property
    def num_classes(self) -> int:
        """Classes of the source."""
        return self.source.num_classes

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Class names of the source."""
        return self.source.class_names

    def __len__(self) -> int:
        return len(self.indices) * self.num_views

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        place, number = divmod(item, self.num_views)
        if place != self._place:
            self._read(place)
        size = self.crops.size_of(0)
        pixels = self.crops.render(self._image, self._views[number], size)
        return pixels.round().clamp(0, 255).to(torch.uint8), self._label

    def name(self, item: int) -> str:
        """Name of the image, and the number of the view."""
        place, number = divmod(item, self.num_views)
        return f"{self.source.name(self.indices[place])}, view {number}"

    def names_digest(self) -> str:
        """Digest of the images' names, of which of them there are, and of how views are made."""
        made = repr((list(self.indices), self.crops, self.num_views, self.seed))
        return digest([names_digest(self.source), made])

    def _read(self, place: int) -> None:
        """Read an image, and draw its views."""
        self._place = -1
        image, self._label = self.source[self.indices[place]]
        self._image = self.crops.checked(image)
        generator = torch.Generator().manual_seed(sample_seed(self.seed, self.indices[place]))
        self._views = []
        while len(self._views) < self.num_views:
            self._views += self.crops.draw(*self._image.shape[1:], generator=generator)
        self._place = place


def view_features(
    subject: Subject, crops: MultiCrop, *, num_images: int, num_views: int, token: str = "cls"
) -> Tensor:
    """Features [n, q, D] of q augmented views of each of n training images, for LiDAR.

    Args:
        subject: the encoder and the images. Images that cannot be read are left out.
        crops: of the training; its global views are as large as the encoder sees them.
        num_images: largest n; the images are evenly spaced.
        num_views: q.
        token: a name of `sslkit.evaluation.tokens.IMAGE_TOKENS`.
    """
    indices = subject.limited("train", num_images).indices("train")
    views = AugmentedImages(subject.train, indices, crops, num_views=num_views, seed=subject.seed)
    as_they_are = replace(
        subject.with_source("views", views), global_size=crops.global_size, resize_over_crop=1.0
    )
    features = as_they_are.features("views", token)[token]
    return rearrange(features, "(n q) d -> n q d", q=num_views)

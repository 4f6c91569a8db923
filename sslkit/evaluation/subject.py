"""A subject: one encoder on one data set, which hands every protocol the features it needs."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Generator, Tensor, nn

from sslkit.data.channels import with_channels
from sslkit.data.fingerprint import names_digest
from sslkit.data.labels import NO_LABEL
from sslkit.data.seeds import sample_seed
from sslkit.data.sources import Source, UnreadableImage
from sslkit.evaluation.feature_cache import cached_features
from sslkit.evaluation.features import Features, evenly_spaced, extract, model_channels
from sslkit.evaluation.labels import labelled_rows
from sslkit.evaluation.tokens import Unsuitable
from sslkit.evaluation.views import RESIZE_OVER_CROP, EvalTransform, PaddedView
from sslkit.progress import WorkProgress
from sslkit.rasa import RASAProjector

View = Literal["global", "dense", "padded"]

_DATA_WITH = {
    "mask": "a folder of images and masks, voc:PATH, ade20k:PATH, coco-stuff:PATH or scenes",
    "boxes": "a folder of images and masks, voc-boxes:PATH or scenes",
    "depth": "nyu:PATH or scenes",
    "pair": "spair:PATH",
}

_PROJECTED = ("cls", "mean_patch", "patches")  # what RASA and nesting apply to: final tokens


@dataclass(frozen=True)
class Subject:
    """An encoder, images, and how the one sees the other.

    There are three views of an image:

    - ``"global"``, for class tokens: shorter side resized to ``global_size * resize_over_crop``,
      centre crop of ``global_size``;
    - ``"dense"``, for patch tokens with masks: shorter side resized to ``dense_size``, centre crop
      of that;
    - ``"padded"``: the whole image in its own size, with zeros up to a multiple of the patch size.

    Attributes:
        name: of the model, for tables and pictures.
        encoder: see `sslkit.evaluation.encoders`.
        sources: by name: ``"train"``, ``"test"``, and whatever a protocol adds (`with_source`).
        identity: what tells this model and these images from others on the disk: the file and its
            digest, the data set's name.
        global_size, dense_size: pixels, one number or (height, width).
        resize_over_crop: see above.
        nesting: number of features of the final tokens to keep, the first ones.
        rasa: projects position out of the final tokens, before the nesting.
        cache: folder of the model's features on the disk, in float16. They are computed once for
            all protocols, with and without RASA and nesting, which are applied to what is read.
            None keeps features in memory, in float32, and computes them each time.
        limits: largest number of images of a source, evenly spaced; by source name.
        batch_size, device, num_workers: of the extraction.
        seed: of every generator a protocol asks for.
        progress: whether to show bars.
    """

    name: str
    encoder: nn.Module
    sources: Mapping[str, Source]
    identity: Mapping[str, str]
    global_size: int | tuple[int, int] = 224
    dense_size: int | tuple[int, int] = 448
    resize_over_crop: float = RESIZE_OVER_CROP
    nesting: int | None = None
    rasa: RASAProjector | None = None
    cache: Path | None = None
    limits: Mapping[str, int] = field(default_factory=dict)
    batch_size: int = 64
    device: str = "cpu"
    num_workers: int = 0
    seed: int = 0
    progress: bool = False

    @property
    def train(self) -> Source:
        """Images to learn from, or to look neighbours up in."""
        return self.source("train")

    @property
    def test(self) -> Source:
        """Held-out images."""
        return self.source("test")

    @property
    def patch_size(self) -> tuple[int, int]:
        """Patch size of the encoder, in pixels."""
        size = getattr(self.encoder, "patch_size", None)
        if size is None:
            raise Unsuitable(
                f"{self.name}: the encoder has no patch_size, which this protocol needs; give "
                "as_encoder(function, patch_size=...)"
            )
        return size[0], size[1]

    def num_layers(self, most: int) -> int:
        """How many of the last ``most`` blocks have tokens to be asked for.

        One where the encoder does not show its blocks, and after RASA and nesting, which are of the
        last block alone.
        """
        if self.rasa is not None or self.nesting is not None:
            return 1
        if not hasattr(self.encoder, "intermediate"):
            return 1
        return min(most, cast(int, self.encoder.depth))

    def source(self, name: str) -> Source:
        """A source by its name."""
        if name not in self.sources:
            raise ValueError(f"there is no {name!r} data here, only {sorted(self.sources)}")
        return self.sources[name]

    def with_source(self, name: str, source: Source) -> "Subject":
        """The same with one more source."""
        return replace(self, sources={**self.sources, name: source})

    def limited(self, source: str, count: int) -> "Subject":
        """The same with at most ``count`` images of a source."""
        return replace(self, limits={**self.limits, source: min(count, len(self.indices(source)))})

    def indices(self, source: str) -> Sequence[int]:
        """Which images of a source are used: as many as its limit says, evenly spaced."""
        total = len(self.source(source))
        limit = self.limits.get(source, total)
        return evenly_spaced(total, limit) if limit < total else range(total)

    def generator(self, *words: int) -> Generator:
        """A CPU generator that depends on the seed and on ``words``."""
        return torch.Generator().manual_seed(sample_seed(self.seed, *words))

    @contextmanager
    def bar(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar, where bars are wanted: what it yields is told how much is done."""
        title = f"{self.name}: {description}"
        with WorkProgress(title, total, mode="auto" if self.progress else "none") as shown:
            yield shown.reach

    def view(self, view: View) -> EvalTransform | PaddedView:
        """The transform of a view, from uint8 images to the encoder's input."""
        if view == "padded":
            return PaddedView(self.patch_size)
        size = self.global_size if view == "global" else self.dense_size
        shorter = size if isinstance(size, int) else min(size)
        ratio = self.resize_over_crop if view == "global" else 1.0
        return EvalTransform(size, resize=round(shorter * ratio))

    def features(
        self,
        source: str,
        *want: str,
        view: View = "global",
        block: int = -1,
        num_layers: int = 4,
    ) -> Features:
        """Features of a source's images, from the cache where they are there.

        Args:
            source: ``"train"``, ``"test"``, ...
            want, block, num_layers: see `sslkit.evaluation.tokens.encode`. Class tokens, patches
                and their mean have gone through ``rasa`` and ``nesting``; other tokens are as the
                encoder gives them.
            view: see the class.
        """
        images, indices = self.source(source), self.indices(source)
        names = "" if self.cache is None else names_digest(images)
        request = {"want": want, "block": block, "num_layers": num_layers}
        with self.bar(f"{source} {', '.join(want)}", len(indices)) as reach:
            return self._extracted(
                images, source, names, self.view(view), indices=indices, progress=reach, **request
            )

    def image_features(
        self, image: Tensor, name: str, transform: Callable[[Tensor], Tensor], *want: str
    ) -> Features:
        """Features of one image that is in no source, from the cache if it has a name.

        Args:
            image: uint8 [C, h, w].
            name: tells the image from all others of the data; "" is no name.
            transform: from an image to the encoder's input; its ``repr`` says what it does.
            want: see `features`.
        """
        subject = self if name else replace(self, cache=None)
        return subject._extracted([(image, NO_LABEL)], "image", name, transform, want=want)

    def _extracted(
        self,
        images: Any,
        source: str,
        names: str,
        transform: Callable[[Tensor], Tensor],
        *,
        progress: Callable[[int], None] | None = None,
        **request: Any,
    ) -> Features:
        """Features of images that ``source`` and ``names`` tell from others, projected."""
        request |= {"transform": transform, "batch_size": self.batch_size, "device": self.device}
        request["num_workers"] = self.num_workers if len(images) > 1 else 0
        if self.cache is None:
            features = extract(self.encoder, images, **request)
            if progress is not None:
                progress(len(features) + features.num_unreadable)
        else:
            identity = {
                **self.identity,
                "source": source,
                "names": names,
                "view": repr(transform),
            }
            words = json.dumps([identity, len(request.get("indices", images))], default=str)
            digest = hashlib.sha256(words.encode()).hexdigest()[:12]
            features = cached_features(
                self.cache / f"{source}-{digest}".replace("/", "_"),
                self.encoder,
                images,
                identity=identity,
                progress=progress,
                **request,
            )
        return replace(features, tokens=self._projected(features.tokens))

    def images(self, source: str, indices: Sequence[int], view: View = "dense") -> list[Tensor]:
        """Normalised views [C, h, w] of some images, for pictures."""
        transform = self.view(view)
        images = (self.source(source)[index][0] for index in indices)
        return [transform(self.to_model(image)) for image in images]

    def to_model(self, image: Tensor) -> Tensor:
        """Convert an image, uint8 [C, h, w], to the channels that the encoder takes."""
        channels = model_channels(self.encoder)
        return image if channels is None else with_channels(image, channels)

    def masks(self, source: str, features: Features) -> Tensor:
        """True classes under the ``"dense"`` views that features are of, int64 [B, h, w]."""
        return self._maps(source, "mask", features).long()

    def depths(self, source: str, features: Features) -> Tensor:
        """True depths under the ``"dense"`` views that features are of, [B, h, w]; 0: unknown."""
        return self._maps(source, "depth", features)

    def annotated(self, source: str, annotation: str) -> Any:
        """A source that has a method of that name (``mask``, ``boxes``, ``depth``, ``pair``).

        Raises:
            Unsuitable: it has not; the message names data that has.
        """
        images = self.source(source)
        if not hasattr(images, annotation):
            raise Unsuitable(
                f"the {source} data ({type(images).__name__}) has no {annotation}, which this "
                f"protocol needs: choose other --data, such as {_DATA_WITH[annotation]}"
            )
        return images

    def _maps(self, source: str, annotation: str, features: Features) -> Tensor:
        read = getattr(self.annotated(source, annotation), annotation)
        view = cast(EvalTransform, self.view("dense"))
        try:
            return torch.stack([view.mask(read(i)) for i in features.indices.tolist()])
        except UnreadableImage as error:
            raise ValueError(
                f"a {annotation} of the {source} data cannot be used: {error}"
            ) from error

    def _projected(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """RASA, then the first features, of the final tokens."""
        found = dict(tokens)
        for name in _PROJECTED:
            if name not in found:
                continue
            if self.rasa is not None:
                rasa, rows = self.rasa, found[name]
                with torch.no_grad():
                    parts = [rasa(x.float()).to(x.dtype) for x in rows.split(65_536)]
                found[name] = torch.cat(parts)
            if self.nesting is not None:
                D = found[name].shape[-1]
                if not 1 <= self.nesting <= D:
                    raise ValueError(
                        f"{self.name}: nesting {self.nesting} must be between 1 and the {D} "
                        "features of a token"
                    )
                found[name] = found[name][..., : self.nesting]
        return found


def labelled(features: Features, source: str) -> Features:
    """Select the features of the images that have a label; a warning says how many have none.

    Raises:
        Unsuitable: no image has a label.
        ValueError: a label is below -1.
    """
    if bool((features.labels == NO_LABEL).all()):
        raise Unsuitable(
            f"the {source} data has no image with a label, which this protocol needs: class "
            "folders (DATA/train/CLASS/x.jpg, DATA/val/CLASS/y.jpg), or another labelled --data"
        )
    rows = labelled_rows(features.labels, name=f"labels of the {source} data", stacklevel=2)
    return features if rows is None else features.select(rows)

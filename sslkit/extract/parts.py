"""Features in parts, each a store of its own, so that any process can make any of them.

The images are cut into parts of ``part_size``; a part is a store of the model's tokens in float32
(`sslkit.evaluation.feature_store`). Which process made it, in which run, leaves no trace in it: the
work is shared by giving process r of W the parts r, r + W, ..., and continued by making what is
missing. RASA, nesting and the type of the output are applied to what is read.

    .OUTPUT.parts/  or a folder in ``cache``
      lock          held by the process that writes the output
      00000000/     the store of images 0, 1, ..., part_size - 1
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from sslkit.data.fingerprint import names_digest
from sslkit.data.local import resolved
from sslkit.data.sources import Source, Split, open_source
from sslkit.evaluation.feature_journal import JOURNAL
from sslkit.evaluation.feature_store import FeatureStore, require_same
from sslkit.evaluation.models import Model, open_model
from sslkit.evaluation.tokens import Unsuitable
from sslkit.evaluation.views import EvalTransform, PaddedView
from sslkit.extract.feature_files import (
    Part,
    output_is_complete,
    read_description,
    require_format,
    write_features,
)
from sslkit.files import file_digest
from sslkit.rasa import RASAProjector, load_rasa
from sslkit.training.parallel import Parallel

Token = Literal["cls", "mean_patch", "cls_and_mean_patch", "layer_cls"]
Progress = Callable[[int, int], None]
"""Told how many images this process has done, and how many it has to do."""

_WANT: dict[str, tuple[str, ...]] = {
    "cls": ("cls",),
    "mean_patch": ("mean_patch",),
    "cls_and_mean_patch": ("cls", "mean_patch"),
    "layer_cls": ("layer_cls",),
}


@dataclass(frozen=True)
class Extraction:
    """Which features of which images.

    Attributes:
        weights: the model; see `sslkit.evaluation.models.open_model`.
        data: see `sslkit.data.sources.open_source`.
        split: of data that has splits of its own; other data is taken as a whole.
        token: ``cls``, the class token; ``mean_patch``, the mean of the patch tokens;
            ``cls_and_mean_patch``, the one behind the other; ``layer_cls``, the class tokens of the
            last ``num_layers`` blocks, shallow to deep, one behind the other.
        num_layers: of ``layer_cls``.
        rasa: file of a projector, applied to the final tokens; not to ``layer_cls``.
        nesting: numbers of first features of each token to keep; several sizes give several arrays.
        view: ``crop``: resized and the centre cut out (`sslkit.evaluation.views.EvalTransform`);
            ``padded``: the whole image in its own size, padded to whole patches.
        image_size: pixels a side, or height and width, of the crop; () is the model's own.
        resize_over_crop: the shorter side before the crop, over the crop's.
        dtype: of the stored features.
        batch_size: images a forward pass.
        part_size: images a part, which one process makes.
        seed: of ``random:`` weights.
        cache: folder in which the model's tokens stay, in float32, for other outputs of the same
            images: another rasa, nesting, dtype or format computes nothing again. None: they are
            beside the output until it is complete.
    """

    weights: str
    data: str
    split: Split = "train"
    token: Token = "cls"
    num_layers: int = 4
    rasa: Path | None = None
    nesting: tuple[int, ...] = ()
    view: Literal["crop", "padded"] = "crop"
    image_size: tuple[int, ...] = ()
    resize_over_crop: float = 256 / 224
    dtype: Literal["float32", "float16"] = "float32"
    batch_size: int = 64
    part_size: int = 1024
    seed: int = 0
    cache: Path | None = None

    def __post_init__(self) -> None:
        for name in ("num_layers", "batch_size", "part_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        types = get_type_hints(Extraction)
        for name in ("token", "view", "dtype"):
            if getattr(self, name) not in (choices := get_args(types[name])):
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.rasa is not None and self.token == "layer_cls":
            raise ValueError("rasa is of the final tokens: it cannot be applied to layer_cls")
        if len(self.image_size) > 2 or any(size < 1 for size in self.image_size):
            raise ValueError(
                f"image_size must be a side, or height and width, got {self.image_size}"
            )
        if len(set(self.nesting)) < len(self.nesting) or any(size < 1 for size in self.nesting):
            raise ValueError(f"nesting must be different sizes of at least 1, got {self.nesting}")


def extract_to_file(
    extraction: Extraction,
    output: Path,
    *,
    parallel: Parallel,
    num_workers: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any] | None:
    """This process's share of the features; in the first process, then the file of all of them.

    What an earlier run left is not made again, whatever the number of its processes. The file does
    not depend on that number either.

    Args:
        extraction: what to extract.
        output: a ``.npy`` or ``.parquet`` file; see `sslkit.extract.feature_files.write_features`.
        parallel: this process among the others, which all call this with the same arguments.
        num_workers: processes of this process that read images.
        progress: see `Progress`.

    Returns:
        In the first process what the file's description holds; None in the others.

    Raises:
        ValueError: the output, or the parts of an unfinished one, are of something else; or no
            image can be read; or RASA or nesting do not fit the model.
        FileNotFoundError: weights or data are not there.
        RuntimeError: another run is writing the same output, or a process did not finish.
    """
    require_format(output)
    job = _Job(extraction, output)
    lock = FileLock(job.folder / "lock")
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        if parallel.is_main:
            lock.acquire(timeout=0)
            job.check()
        complete = output_is_complete(output, job.settings)
        parallel.wait()
        parts = [] if complete else job.parts[parallel.rank :: parallel.world_size]
        total = sum(map(len, parts))
        done = 0
        for images in parts:
            for count in job.make(images, parallel.device, num_workers):
                done += count
                if progress is not None:
                    progress(done, total)
        parallel.wait()
        if not parallel.is_main:
            return None
        description = read_description(output) if complete else job.finish()
        if extraction.cache is None:
            shutil.rmtree(job.folder)
        return description
    except Timeout:
        raise RuntimeError(
            f"another process is writing {job.folder}: wait for it, or choose another output"
        ) from None
    finally:
        if lock.is_locked and not any(job.folder.glob(f"*/{JOURNAL}")):
            shutil.rmtree(job.folder, ignore_errors=True)  # nothing in it to continue from
        lock.release()


class _Job:
    """An extraction with its model and data open."""

    def __init__(self, extraction: Extraction, output: Path) -> None:
        self.extraction, self.output = extraction, output
        self._want = _WANT[extraction.token]
        self.model: Model = open_model(extraction.weights, seed=extraction.seed)
        self.rasa: RASAProjector | None = None
        if extraction.rasa is not None:
            self.rasa = load_rasa(extraction.rasa)
        self.transform = _transform(extraction, self.model)
        dim = getattr(self.model.encoder, "embed_dim", None)
        if dim is not None:
            self._project(torch.zeros(1, dim))  # complains before anything is computed
        self.source: Source = open_source(
            extraction.data, split=extraction.split, test_fraction=0.0, seed=extraction.seed
        )
        images, size = range(len(self.source)), extraction.part_size
        self.parts = [images[start : start + size] for start in images[::size]]
        self.identity = {
            "weights": self.model.identity,
            "data": resolved(extraction.data),
            "split": extraction.split,
            "names": names_digest(self.source),
            "view": repr(self.transform),
            "part_size": extraction.part_size,
        }
        if extraction.cache is None:
            self.folder = output.with_name(f".{output.name}.parts")
        else:
            words = json.dumps([self.identity, self._want, extraction.num_layers])
            digest = hashlib.sha256(words.encode()).hexdigest()[:12]
            self.folder = extraction.cache / f"{'+'.join(self._want)}-{digest}"

    @property
    def settings(self) -> dict[str, Any]:
        """What the output is of, as plain values."""
        extraction = self.extraction
        settings = {
            **asdict(extraction),
            **self.identity,
            "weights": resolved(extraction.weights),
            "weights_identity": self.model.identity,
            "nesting": list(extraction.nesting),
            "image_size": list(extraction.image_size),
            "rasa": None if extraction.rasa is None else file_digest(extraction.rasa),
            "num_images": len(self.source),
        }
        del settings["batch_size"]  # a run that ran out of memory continues with a smaller one
        del settings["cache"]
        return settings

    def check(self) -> None:
        """Raise a ValueError if there are parts of something else."""
        for store in map(self._store, self.parts):
            there = store.described_there()
            if there is not None:
                what = f"the unfinished {self.output} in {self.folder}"
                require_same(there, store.described, what, "output")

    def make(self, images: range, device: torch.device, num_workers: int) -> Iterator[int]:
        """Make what is missing of a part; gives how many images are done, batch after batch."""
        yield from self._store(images).fill(
            self.model.encoder.to(device),
            self.source,
            transform=self.transform,
            batch_size=self.extraction.batch_size,
            device=device,
            num_workers=num_workers,
        )
        self._read(images)  # complains if it is damaged, or beyond the type of the output

    def finish(self) -> dict[str, Any]:
        """The file of all parts."""
        missing = [images for images in self.parts if self._store(images).read() is None]
        if missing:
            raise RuntimeError(
                f"{len(missing)} of {len(self.parts)} parts are not in {self.folder}: do all "
                "processes see that folder? Run the command again to make what is missing"
            )
        return write_features(
            self.output,
            lambda: map(self._read, self.parts),
            nesting=self.extraction.nesting,
            name=self.source.name,
            settings=self.settings,
        )

    def _store(self, images: range) -> FeatureStore:
        return FeatureStore(
            self.folder / f"{images.start:08d}",
            identity=self.identity,
            want=self._want,
            indices=images,
            num_layers=self.extraction.num_layers,
            dtype=torch.float32,
        )

    def _read(self, images: range) -> Part:
        """A part as the output has it."""
        found = self._store(images).read(check_all=True)
        assert found is not None
        features, unreadable = found
        if not len(features):
            return Part(torch.zeros(0), features.labels, features.indices, unreadable)
        named = [features[name] for name in self._want]
        tokens = named[0] if named[0].ndim == 3 else torch.stack(named, dim=1)  # [n, P, D]
        rows = self._project(tokens)
        stored = rows.to(getattr(torch, self.extraction.dtype))
        if not stored.isfinite().all() and rows.isfinite().all():
            raise ValueError(
                f"features are up to {rows.abs().max().item():.3g}, beyond float16: take float32"
            )
        return Part(stored, features.labels, features.indices, unreadable)

    def _project(self, tokens: Tensor) -> Tensor:
        """Tokens [..., D] without what RASA removes, the first features of them: [..., D']."""
        if self.rasa is not None:
            tokens = self.rasa(tokens)
        D, nesting = tokens.shape[-1], self.extraction.nesting
        if max(nesting, default=0) > D:
            raise ValueError(f"nesting {max(nesting)} is more than the {D} features of a token")
        return tokens[..., : max(nesting, default=D)]


def _transform(extraction: Extraction, model: Model) -> EvalTransform | PaddedView:
    patch = getattr(model.encoder, "patch_size", None)
    if extraction.view == "padded":
        if patch is None:
            raise Unsuitable(f"{model.name} has no patch_size, which view=padded needs")
        return PaddedView((patch[0], patch[1]))
    size = extraction.image_size or getattr(model.encoder, "img_size", (224, 224))
    crop = (size[0], size[-1])
    if patch is not None and (crop[0] % patch[0] or crop[1] % patch[1]):
        raise ValueError(
            f"image_size {crop} must be multiples of {patch}, the patch size of {model.name}"
        )
    return EvalTransform(crop, round(min(crop) * extraction.resize_over_crop))

"""Features in parts that are there or not there, so that any process can make any of them.

The images are cut into parts of ``part_size``; a part is one file, written under its name only when
it is complete. Which process made it, in which run, leaves no trace in it: the work is shared by
giving process r of W the parts r, r + W, ..., and continued by making those that are missing.

    .OUTPUT.parts/
      settings.json         what the features are of
      00000000.safetensors  rows [n, P, D], labels [n], indices [n]; the unreadable in the header
"""

import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sslkit.data.fingerprint import names_digest
from sslkit.data.sources import Source, Split, open_source
from sslkit.evaluation.features import Unsuitable, encoded_batches
from sslkit.evaluation.models import Model, open_model
from sslkit.evaluation.views import EvalTransform, PaddedView
from sslkit.extract.files import (
    Part,
    output_is_complete,
    read_description,
    require_format,
    require_same,
    write_features,
)
from sslkit.files import atomic_write, file_digest
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
        weights: the model, as of `sslkit.evaluation.models.open_model`.
        data: as of `sslkit.data.sources.open_source`.
        split: of data that has splits of its own; other data is taken as a whole.
        token: ``cls``, the class token; ``mean_patch``, the mean of the patch tokens;
            ``cls_and_mean_patch``, the one behind the other; ``layer_cls``, the class tokens of the
            last ``num_layers`` blocks, shallow to deep, one behind the other.
        num_layers: of ``layer_cls``.
        rasa: file of a projector, applied to the final tokens; not to ``layer_cls``.
        nesting: of each token, only the first so many features; several sizes give several arrays.
        view: ``crop``: resized and the centre cut out (`sslkit.evaluation.views.EvalTransform`);
            ``padded``: the whole image in its own size, padded to whole patches.
        image_size: pixels a side, or height and width, of the crop; () is the model's own.
        resize_over_crop: the shorter side before the crop, over the crop's.
        dtype: of the stored features.
        batch_size: images a forward pass.
        part_size: images a part: what a killed process loses at most.
        seed: of ``random:`` weights.
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

    def __post_init__(self) -> None:
        for name in ("num_layers", "batch_size", "part_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, choices in (
            ("token", get_args(Token)),
            ("view", ("crop", "padded")),
            ("dtype", ("float32", "float16")),
        ):
            if getattr(self, name) not in choices:
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
        output: a ``.npy`` or ``.parquet`` file; see `sslkit.extract.files.write_features`.
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
            job.require_settings()
        complete = output_is_complete(output, job.settings)
        parallel.wait()
        starts = [] if complete else job.starts[parallel.rank :: parallel.world_size]
        total = sum(job.size(start) for start in starts)
        done = 0
        for start in starts:
            for count in job.make(start, parallel.device, num_workers):
                done += count
                if progress is not None:
                    progress(done, total)
        parallel.wait()
        if not parallel.is_main:
            return None
        description = read_description(output) if complete else job.finish()
        shutil.rmtree(job.folder)
        return description
    except Timeout:
        raise RuntimeError(
            f"another process is writing {output}: wait for it, or choose another output"
        ) from None
    finally:
        if lock.is_locked and not any(job.folder.glob("*.safetensors")):
            shutil.rmtree(job.folder, ignore_errors=True)  # nothing in it to continue from
        lock.release()


class _Job:
    """An extraction with its model and data open."""

    def __init__(self, extraction: Extraction, output: Path) -> None:
        self.extraction, self.output = extraction, output
        self.folder = output.with_name(f".{output.name}.parts")
        self.model: Model = open_model(extraction.weights, seed=extraction.seed)
        self.rasa: RASAProjector | None = None
        if extraction.rasa is not None:
            self.rasa = load_rasa(extraction.rasa)
        self.transform = _transform(extraction, self.model)
        self.source: Source = open_source(
            extraction.data, split=extraction.split, test_fraction=0.0, seed=extraction.seed
        )
        self.starts = range(0, len(self.source), extraction.part_size)

    @property
    def settings(self) -> dict[str, Any]:
        """What the features are of, as plain values."""
        extraction = self.extraction
        settings = {
            **asdict(extraction),
            "weights": _resolved(extraction.weights),
            "data": _resolved(extraction.data),
            "nesting": list(extraction.nesting),
            "image_size": list(extraction.image_size),
            "rasa": None if extraction.rasa is None else file_digest(extraction.rasa),
            "weights_identity": self.model.identity,
            "view": repr(self.transform),
            "num_images": len(self.source),
            "names": names_digest(self.source),
        }
        del settings["batch_size"]  # a run that ran out of memory continues with a smaller one
        return settings

    def require_settings(self) -> None:
        """That the parts, if there are any, are of the same."""
        path, settings = self.folder / "settings.json", self.settings
        if not any(self.folder.glob("*.safetensors")):
            with atomic_write(path) as file:
                file.write(json.dumps(settings, indent=2).encode())
            return
        try:
            there = dict(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"{path} does not say what the parts beside it are of ({type(error).__name__}: "
                f"{error}): remove {self.folder}"
            ) from error
        require_same(there, settings, f"the unfinished {self.output} in {self.folder}")

    def size(self, start: int) -> int:
        """How many images the part from image ``start`` has."""
        return min(self.extraction.part_size, len(self.source) - start)

    def make(self, start: int, device: torch.device, num_workers: int) -> Iterator[int]:
        """Make a part unless it is there; gives how many images are done, batch after batch."""
        if self._path(start).exists():
            self._read(start)  # complains if it was damaged
            yield self.size(start)
            return
        rows: list[Tensor] = []
        labels: list[int] = []
        indices: list[int] = []
        unreadable: list[str] = []
        batches = encoded_batches(
            self.model.encoder.to(device),
            self.source,
            transform=self.transform,
            indices=range(start, start + self.size(start)),
            want=_WANT[self.extraction.token],
            num_layers=self.extraction.num_layers,
            batch_size=self.extraction.batch_size,
            device=device,
            num_workers=num_workers,
        )
        for encoded, errors in batches:
            for batch in encoded:
                rows.append(self._rows(batch.tokens))
                labels += batch.labels
                indices += batch.indices
            unreadable += errors
            yield len(errors) + sum(len(batch.labels) for batch in encoded)
        tensors = {
            "rows": torch.cat(rows) if rows else torch.zeros(0),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "indices": torch.tensor(indices, dtype=torch.int64),
        }
        checksum = _checksum(tensors)
        with atomic_write(self._path(start)) as file:
            said = {"unreadable": json.dumps(unreadable), "crc32": str(checksum)}
            file.write(safetensors.torch.save(tensors, said))

    def finish(self) -> dict[str, Any]:
        """The file of all parts."""
        missing = [start for start in self.starts if not self._path(start).exists()]
        if missing:
            raise RuntimeError(
                f"{len(missing)} of {len(self.starts)} parts are not in {self.folder}: do all "
                "processes see that folder? Run the command again to make what is missing"
            )
        return write_features(
            self.output,
            self._parts,
            nesting=self.extraction.nesting,
            name=self.source.name,
            settings=self.settings,
        )

    def _parts(self) -> Iterator[Part]:
        for start in self.starts:
            yield self._read(start)

    def _read(self, start: int) -> Part:
        """A part that is there; a ValueError if it is not as it was written."""
        path = self._path(start)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in ("rows", "labels", "indices")}
                said = file.metadata()
            errors = json.loads(said["unreadable"])
            part = Part(tensors["rows"], tensors["labels"], tensors["indices"], errors)
            if len(part.labels) + len(part.unreadable) != self.size(start):
                raise ValueError(f"it is not of {self.size(start)} images")
            following = iter(range(start, start + self.size(start)))
            if not all(index in following for index in part.indices.tolist()):
                raise ValueError("it is of other images")
            if said.get("crc32", str(_checksum(tensors))) != str(_checksum(tensors)):
                raise ValueError("its checksum is another")
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"the part {path} is damaged ({type(error).__name__}: {error}): remove it, and run "
                "the command again to make it anew"
            ) from error
        return part

    def _path(self, start: int) -> Path:
        return self.folder / f"{start:08d}.safetensors"

    def _rows(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """Tokens [b, D] or [b, n, D] as rows [b, P, D'] with RASA, D' as long as is needed."""
        named = [tokens[name] for name in _WANT[self.extraction.token]]
        rows = named[0] if named[0].ndim == 3 else torch.stack(named, dim=1)
        if self.rasa is not None:
            rows = self.rasa(rows)
        D, nesting = rows.shape[-1], self.extraction.nesting
        if max(nesting, default=0) > D:
            raise ValueError(f"nesting {max(nesting)} is more than the {D} features of a token")
        rows = rows[..., : max(nesting, default=D)]
        stored = rows.to(getattr(torch, self.extraction.dtype))
        if not stored.isfinite().all() and rows.isfinite().all():
            raise ValueError(
                f"features are up to {rows.abs().max().item():.3g}, beyond float16: take float32"
            )
        return stored


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(tensors[name].contiguous().numpy().tobytes(), checksum)
    return checksum


def _resolved(text: str) -> str:
    """The whole path of what is a path."""
    path = Path(text)
    return str(path.resolve()) if path.exists() else text


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

"""`sslkit rasa fit|fold`: remove position from the patch tokens of any ViT."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, cast

import tyro

from sslkit.progress import WorkProgress

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from sslkit.data.sources import Source
    from sslkit.evaluation.features import Features
    from sslkit.evaluation.models import Model
    from sslkit.rasa import RASAProjector

_FIT_BATCH = 128  # images whose patches the solver takes at once
_NUM_PICTURES = 4


@dataclass(frozen=True)
class Fit:
    """Find what encodes position in a model's patch tokens, measure it, and write the projector."""

    weights: str
    """Model: a file, a folder, hf:ORG/NAME, timm:NAME, sslkit:NAME or random:NAME."""
    data: str
    """Images: a folder, shards, an array file, ... (sslkit.data.sources.open_source)."""
    output: Path
    """The projector's file, *.safetensors: for --rasa of sslkit evaluate and sslkit extract."""
    num_iterations: int = 9
    """Planes at most; fewer where position cannot be predicted any more."""
    num_images: int = 1000
    """Training images to fit on, a random crop of each; the probe of position learns from them."""
    num_test: int = 200
    """Held-out images on which position is measured before and after."""
    image_size: tuple[int, ...] = ()
    """Pixels a side, or height and width, of the crops; default: the model's own size."""
    crop_scale: tuple[float, float] = (0.32, 1.0)
    """Range of a crop's area as a share of the image."""
    solver: Literal["auto", "adamw"] = "auto"
    """`adamw` is the paper's schedule, which needs many images."""
    ridge: float = 0.1
    """Ridge of the `auto` solver; a larger one removes more at once, and more of the content."""
    tolerance: float = 0.01
    """Stop when linear regression explains less than this share of the positions."""
    fold: Path | None = None
    """Also write the model with the projection folded in, an encoder file like any other."""
    figures: Path | None = None
    """Also write a page with pictures to this folder."""
    test_fraction: float = 0.2
    """Share of images held out, of data without a test split of its own."""
    seed: int = 0
    """Seed of fresh weights, of the crops, and of the solver."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model."""
    batch_size: int = 64
    """Images that the model sees at once."""


@dataclass(frozen=True)
class Fold:
    """Write a model with a projector folded in: an encoder file like any other."""

    weights: str
    """Model: a file, a folder, hf:ORG/NAME, timm:NAME, sslkit:NAME or random:NAME."""
    rasa: Path
    """The projector: of `fit`, of the recipe, or a released RASA head (.pth)."""
    output: Path
    """The encoder's file, *.safetensors."""
    seed: int = 0
    """Seed of the weights of random:NAME."""


def main(arguments: Sequence[str]) -> None:
    """Fit a projector, or fold one into a model."""
    either = Union[Fit, Fold]  # noqa: UP007 - tyro 0.9 knows no other union
    chosen: Fit | Fold = tyro.cli(
        cast(Any, Annotated[either, tyro.conf.arg(name="")]),
        args=arguments,
        prog="sslkit rasa",
        description="Remove position from the patch tokens of any ViT.",
    )
    if isinstance(chosen, Fit):
        fit(chosen)
    else:
        fold(chosen)


def fit(run: Fit) -> None:
    """Fit, measure and write, as the command line says."""
    import torch

    from sslkit.data.crops import random_crop
    from sslkit.data.sources import open_source
    from sslkit.evaluation import figures
    from sslkit.evaluation.markdown_report import format_table, write_report
    from sslkit.evaluation.models import open_model
    from sslkit.evaluation.position import position_probe
    from sslkit.evaluation.views import EvalTransform
    from sslkit.rasa import RASAProjector, patch_positions, save_rasa
    from sslkit.training.parallel import local_device

    model = open_model(run.weights, seed=run.seed)
    size = _size(run, model)
    if run.fold is not None:
        _require_foldable(model)
    opened = partial(open_source, run.data, seed=run.seed, test_fraction=run.test_fraction)
    train, test = opened(split="train"), opened(split="test")
    view = EvalTransform(size)
    generator = torch.Generator().manual_seed(run.seed)
    crop = random_crop(size, run.crop_scale, generator=generator)
    device = local_device(run.device)
    encode = partial(_encode, model.encoder.to(device), device, run.batch_size)
    fitted = encode(train, crop, run.num_images, "crops to fit on").patches
    rasa = RASAProjector(fitted.shape[-1], num_iterations=run.num_iterations)
    chance = patch_positions(*fitted.shape[1:3]).flatten(0, 1).var(0, correction=0).mean().item()
    with WorkProgress("iterations", run.num_iterations) as bar:

        def told(iteration: int, error: float) -> None:
            bar.message(f"iteration {iteration}: position error {error:.5f} (chance {chance:.5f})")
            bar.reach(iteration)

        errors = rasa.fit(
            fitted.split(_FIT_BATCH),
            solver=run.solver,
            ridge=run.ridge,
            tolerance=run.tolerance,
            generator=torch.Generator().manual_seed(run.seed),
            progress=told,
        )
    del fitted
    seen = encode(train, view, run.num_images, "training images to measure on").patches
    held_out = encode(test, view, run.num_test, "held-out images to measure on")
    patches = {"before": held_out.patches, "after": _removed(rasa, held_out.patches)}
    before = position_probe(seen, patches["before"]).r2
    after = position_probe(_removed(rasa, seen), patches["after"]).r2
    removed = int((rasa.basis.norm(dim=1) > 0).sum())
    rows = [
        ("directions removed", f"{removed} of {rasa.dim}, in {-(-removed // 2)} planes"),
        (f"position R² on {len(held_out)} held-out images", f"{before:.3f} -> {after:.3f}"),
    ]
    found = {
        "weights": model.identity,
        "data": run.data,
        "position_errors": json.dumps(errors),
        "position_r2": json.dumps([before, after]),
    }
    save_rasa(rasa, run.output, found)
    rows.append(("projector", str(run.output)))
    if run.fold is not None:
        _write_folded(model, rasa, run.fold)
        rows.append(("encoder with it folded in", str(run.fold)))
    if run.figures is not None:
        images = [view(test[i][0]) for i in held_out.indices[:_NUM_PICTURES].tolist()]
        r2 = {"linear": (before, after)}
        page = write_report(
            run.figures,
            title=f"RASA: {model.name} on {run.data}",
            results=rows,
            figures={
                "position": figures.position_error(errors, r2=r2, chance=chance),
                "pca": _pca_before_and_after(torch.stack(images), patches),
            },
            settings=dataclasses.asdict(run),
        )
        rows.append(("pictures", str(page)))
    print(format_table(rows))


def fold(run: Fold) -> None:
    """Fold and write, as the command line says."""
    from sslkit.evaluation.models import open_model
    from sslkit.rasa import load_rasa

    model = open_model(run.weights, seed=run.seed)
    _require_foldable(model)
    _write_folded(model, load_rasa(run.rasa), run.output)
    print(f"{run.output}: {model.name} with {run.rasa} folded in")


def _encode(
    encoder: "nn.Module",
    device: "torch.device",
    batch_size: int,
    source: "Source",
    transform: "Callable[[Tensor], Tensor]",
    count: int,
    title: str,
) -> "Features":
    """Patch tokens of views of a source, in memory, in float16."""
    import torch

    from sslkit.evaluation.features import (
        encoded_batches,
        evenly_spaced,
        joined,
        report_unreadable,
    )

    indices = evenly_spaced(len(source), count)
    batches, unreadable, done = [], [], 0
    with WorkProgress(title, len(indices)) as bar:
        for encoded, errors in encoded_batches(
            encoder,
            source,
            transform=transform,
            indices=indices,
            want=("patches",),
            batch_size=batch_size,
            device=device,
            dtype=torch.float16,
        ):
            batches += encoded
            unreadable += errors
            done += len(errors) + sum(len(batch.labels) for batch in encoded)
            bar.reach(done)
    report_unreadable(unreadable, len(indices), all_of_them=not batches)
    return joined(batches)


def _size(run: Fit, model: "Model") -> tuple[int, int]:
    """Height and width of the views; numbers of the command line checked before images are read."""
    for name in ("num_images", "num_test", "batch_size"):
        if getattr(run, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} must be at least 1, got {getattr(run, name)}"
            )
    given = run.image_size or getattr(model.encoder, "img_size", (224, 224))
    if len(given) > 2:
        raise ValueError(f"--image-size takes a side, or height and width, got {given}")
    height, width = given[0], given[-1]
    patch = getattr(model.encoder, "patch_size", (1, 1))
    if min(height, width) < 1 or height % patch[0] or width % patch[1]:
        raise ValueError(
            f"--image-size {height} {width} must be positive multiples of {patch[0]} and "
            f"{patch[1]}, the patch size of {model.name}"
        )
    return height, width


def _removed(rasa: "RASAProjector", patches: "Tensor") -> "Tensor":
    """The patch tokens [B, H, W, D] without position."""
    import torch

    return torch.cat([rasa(x.float()).to(x.dtype) for x in patches.split(_FIT_BATCH)])


def _pca_before_and_after(images: "Tensor", patches: "Mapping[str, Tensor]") -> "Figure":
    """Each image twice: beside its patches' colours before RASA, and after."""
    import torch

    from sslkit.evaluation import figures
    from sslkit.evaluation.figures.style import styled
    from sslkit.evaluation.pca import pca_maps

    @styled
    def draw() -> "Figure":
        maps = [pca_maps(x[: len(images)].float(), threshold=None).rgb for x in patches.values()]
        beside = torch.stack(maps, dim=1).flatten(0, 1)
        figure = figures.pca_maps(images.repeat_interleave(2, 0), beside, pairs_per_row=2)
        for axes, stage in zip(figure.axes[1:4:2], patches, strict=True):
            axes.set_title(f"PCA {stage} RASA")
        return figure

    return draw()


def _require_foldable(model: "Model") -> None:
    """Raise a ValueError if the model has no final norm that can carry the projection."""
    from sslkit import backbones

    encoder = model.encoder
    if not isinstance(encoder, backbones.ViTEncoder) or encoder.settings is None:
        raise ValueError(
            f"RASA cannot be folded into {model.name}, a {type(encoder).__name__}: an encoder file "
            "needs a network of sslkit.backbones.create. Leave out --fold and give the projector "
            "to sslkit evaluate or sslkit extract as --rasa, or apply it to the patch tokens"
        )


def _write_folded(model: "Model", rasa: "RASAProjector", path: Path) -> None:
    from sslkit import backbones

    encoder = model.encoder.cpu()
    assert isinstance(encoder, backbones.ViTEncoder)
    encoder.vit = rasa.fold_into_vit(encoder.vit)
    backbones.save(encoder, path, {"rasa_folded_into": model.identity})

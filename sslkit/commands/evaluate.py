"""`sslkit evaluate PROTOCOL`: score models on data, side by side, as a table and a report."""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import tyro

from sslkit.command_line import refuse
from sslkit.commands.main import table
from sslkit.evaluation.options import OPTIONS

if TYPE_CHECKING:
    from sslkit.evaluation.models import Model
    from sslkit.evaluation.subject import Subject

USAGE = """usage: sslkit evaluate PROTOCOL --weights W ... --data D --output O ...

Score models on data, side by side, as a table and a report.

{protocols}

sslkit evaluate PROTOCOL --help says more."""

# By name: what it is.
SUMMARIES = {
    "all": "Every protocol that the data and the models are fit for.",
    **{name: str(options.__doc__) for name, options in OPTIONS.items()},
}
_NEED_MORE = ("robustness", "ood", "matryoshka", "feat2gs")  # than the data alone: not in `all`
_GLOBAL_SIZE, _DENSE_OVER_GLOBAL = 224, 2


@dataclass(frozen=True)
class Run:
    """Which models on which images, and where the results go."""

    weights: tuple[str, ...]
    """Models, each as W or NAME=W: a file, a folder, hf:ORG/NAME, timm:NAME, sslkit:NAME,
    random:NAME, or floor (colours and positions without a network). The others are compared with
    the first."""
    data: str
    """Class folders, a folder of images and masks, voc:PATH, ade20k:PATH, coco-stuff:PATH,
    spair:PATH, nyu:PATH, scenes, ... (sslkit.data.annotated.open)."""
    output: Path
    """Folder of results.json, report.md, figures/ and, unless --cache says otherwise, features/."""
    nesting: tuple[int, ...] = ()
    """Also evaluate each model with only its first N features, for each N given."""
    rasa: tuple[Path, ...] = ()
    """Remove position by these projectors: one for all models, or one a model."""
    global_size: int | None = None
    """Pixels a side of the centre crop for class tokens; default: the first encoder's size."""
    dense_size: int | None = None
    """Pixels a side of the crop for patch tokens; default: twice that."""
    resize_over_crop: float = 256 / 224
    """Images are resized to this multiple of --global-size before the crop."""
    num_train: int | None = None
    """Largest number of training images; they are evenly spaced."""
    num_test: int | None = None
    """Largest number of test images; they are evenly spaced."""
    scene_size: int = 64
    """Pixels a side of an image of `--data scenes`."""
    num_scenes: int = 2000
    """Images of each split of `--data scenes`."""
    floor_patch_size: int = 8
    """Pixels a side of a patch of `--weights floor`."""
    cache: Path | None = None
    """Folder of the features; default: features/ in --output."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    encode_batch_size: int = 64
    """Images that the encoder sees at once."""
    workers: int = 0
    """Processes that read images."""
    seed: int = 0
    """Seed of fresh weights, of scenes, and of all random numbers of protocols and resamples."""
    level: float = 0.95
    """Share of the bootstrap resamples inside an interval."""
    num_resamples: int = 1000
    """Resamples of the test images that an interval is taken from."""


def subjects(run: Run) -> "list[Subject]":
    """One for each model, and for each of its nesting sizes."""
    from sslkit.data.annotated.open import open_annotated
    from sslkit.data.sources import Split, source_arguments
    from sslkit.evaluation.models import open_model
    from sslkit.evaluation.subject import Subject
    from sslkit.rasa import load_rasa
    from sslkit.training.parallel import local_device

    sources: dict[str, Any] = {
        split: open_annotated(**source_arguments(run, split)) for split in get_args(Split)
    }
    models = [
        open_model(spec, seed=run.seed, floor_patch_size=run.floor_patch_size)
        for spec in run.weights
    ]
    if len(run.rasa) not in (0, 1, len(models)):
        raise ValueError(
            f"--rasa names {len(run.rasa)} files for {len(models)} models: give one, or one each"
        )
    device = str(local_device(run.device))
    trained_size = getattr(models[0].encoder, "img_size", (_GLOBAL_SIZE, _GLOBAL_SIZE))
    global_size = run.global_size or min(trained_size)
    dense_size = run.dense_size or _DENSE_OVER_GLOBAL * global_size
    limits = {"train": run.num_train, "test": run.num_test}
    if problems := _problems(run, models, {"global": global_size, "dense": dense_size}):
        raise ValueError("; ".join(problems))
    found = []
    for i, model in enumerate(models):
        subject = Subject(
            model.name + (" + RASA" if run.rasa else ""),
            model.encoder.to(device),
            sources,
            {"weights": model.identity, "data": _identity(run)},
            global_size=global_size,
            dense_size=dense_size,
            resize_over_crop=run.resize_over_crop,
            rasa=load_rasa(run.rasa[i % len(run.rasa)]) if run.rasa else None,
            cache=run.cache or run.output / "features",
            limits={split: limit for split, limit in limits.items() if limit is not None},
            batch_size=run.encode_batch_size,
            device=device,
            num_workers=run.workers,
            seed=run.seed,
            progress=True,
        )
        found.append(subject)
        found += [
            replace(subject, name=f"{subject.name}[:{size}]", nesting=size) for size in run.nesting
        ]
    return found


def _problems(run: Run, models: "Sequence[Model]", sizes: dict[str, int]) -> list[str]:
    """What is wrong with numbers of the command line, said before any image is read."""
    problems = [
        f"--{name.replace('_', '-')} must be at least 1, got {getattr(run, name)}"
        for name in ("num_train", "num_test", "num_scenes", "encode_batch_size", "num_resamples")
        if getattr(run, name) is not None and getattr(run, name) < 1
    ]
    for model in models:
        patch = max(getattr(model.encoder, "patch_size", (1, 1)))
        problems += [
            f"--{view}-size {size} must be a positive multiple of {patch}, the patch size of "
            f"{model.name}"
            for view, size in sizes.items()
            if size < 1 or size % patch
        ]
        dim = getattr(model.encoder, "embed_dim", None)
        problems += [
            f"--nesting {size} must be between 1 and the {dim} features of {model.name}"
            for size in run.nesting
            if size < 1 or (dim is not None and size > dim)
        ]
    return problems


def _identity(run: Run) -> str:
    from sslkit.data.local import resolved

    return f"{resolved(run.data)}, scenes {run.num_scenes} of {run.scene_size}, seed {run.seed}"


def main(arguments: Sequence[str]) -> None:
    """Run one protocol, or all, with the options of the command line."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE.format(protocols=table(SUMMARIES)))
        return
    chosen, *words = arguments
    if chosen not in SUMMARIES:
        refuse("protocol", chosen, list(SUMMARIES), "sslkit evaluate --help")
    flat = tyro.conf.arg(name="")
    fields: list[tuple[str, Any]] = [("run", Annotated[Run, flat])]
    if chosen == "all":  # --linear.num-steps 1000
        protocols = [name for name in OPTIONS if name not in _NEED_MORE]
        fields += [(_field(name), OPTIONS[name]) for name in protocols]
    else:
        protocols = [chosen]
        fields.append((_field(chosen), Annotated[OPTIONS[chosen], flat]))
    settings: Any = tyro.cli(
        dataclasses.make_dataclass("Settings", fields, frozen=True),
        args=words,
        prog=f"sslkit evaluate {chosen}",
        description=SUMMARIES[chosen],
    )
    options = {name: getattr(settings, _field(name)) for name in protocols}
    from sslkit.data.decode import UnreadableImage

    try:
        evaluate(settings.run, options, skip_unsuitable=chosen == "all")
    except UnreadableImage as error:
        sys.exit(f"error: {error}")


def _field(protocol: str) -> str:
    """A protocol's name as that of a dataclass's field."""
    return protocol.replace("-", "_")


def evaluate(run: Run, options: dict[str, Any], *, skip_unsuitable: bool = False) -> None:
    """Run protocols, by name with their options, and write the results."""
    from sslkit.evaluation.comparison import compare, table, write
    from sslkit.evaluation.markdown_report import format_table
    from sslkit.evaluation.tokens import Unsuitable

    comparison = compare(
        subjects(run),
        options,
        level=run.level,
        num_resamples=run.num_resamples,
        skip_unsuitable=skip_unsuitable,
    )
    if not comparison.outcomes:
        raise Unsuitable(f"no protocol could run on {run.data}; the reasons are above")
    settings = {
        **dataclasses.asdict(run),
        **{name: dataclasses.asdict(chosen) for name, chosen in options.items()},
    }
    title = f"{', '.join(comparison.outcomes)} on {run.data}"
    page = write(comparison, run.output, title=title, settings=settings)
    print(format_table([("", *comparison.models), *table(comparison)]))
    print(f"report: {page}")

"""The report of a run: its scores in a table, and pictures of what was learned."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from einops import rearrange
from matplotlib.figure import Figure
from torch import Tensor

from sslkit import CyclicMaskGenerator, MatryoshkaProjector, backbones
from sslkit.data import MultiCrop, Source, UnreadableImage
from sslkit.data.channels import with_channels
from sslkit.evaluation import figures as draw
from sslkit.evaluation import markdown_report
from sslkit.evaluation.attention import cls_attention
from sslkit.evaluation.cluster_entropy import position_entropy, shuffled
from sslkit.evaluation.features import evenly_spaced, extract
from sslkit.evaluation.pca import pca_maps
from sslkit.evaluation.views import EvalTransform
from sslkit.files import DamagedFile, parse_json, read_json_object
from sslkit.rasa import patch_positions
from sslkit.recipes.franca.evaluation import SCORES
from sslkit.recipes.franca.exports import finished_stages, last_trained, load_encoder
from sslkit.recipes.franca.settings import Settings
from sslkit.training.data import open_sources
from sslkit.training.metrics import read_metrics
from sslkit.training.run import Run
from sslkit.training.settings import SettingsError


def write_report(run: Run[Settings]) -> None:
    """Write ``report.md``: the scores, and pictures of what was learned.

    Raises:
        SettingsError: there are no scores, or scores of other stages.
        DamagedFile: a file of the run cannot be read.
    """
    settings = run.settings
    path = run.output / "results.json"
    if not path.exists():
        raise SettingsError(f"{path} is missing; run --stages evaluate first")
    last = last_trained(run)
    results = read_results(path, finished_stages(run))
    rows = summary(results, last, settings.evaluation.knn)
    sources = open_sources(run)
    figures = {
        **training_pictures(run, results, last),
        **view_pictures(run, sources.train),
        **feature_pictures(run, results, last, sources.test),
    }
    columns = ("Score", "Value [95 % interval over test images]")
    page = markdown_report.write_report(
        run.output,
        title=f"Franca on {settings.data}",
        settings=dataclasses.asdict(settings),
        results=rows,
        columns=columns,
        figures=figures,
    )
    print(markdown_report.format_table([columns, *rows]))
    print(f"report: {page}")


def summary(results: dict[str, Any], last: str, k: int) -> list[tuple[str, str]]:
    """The short table: every score, from the untrained network to the last stage."""

    def models(kind: str) -> list[tuple[str, str]]:
        return [
            (f"- {name}", f"{100 * score:.1f} % [{100 * low:.1f}, {100 * high:.1f}]")
            for name, score in results[kind].items()
            for low, high in [results["intervals"][kind][name]]
        ]

    def r2(name: str) -> str:
        low, high = results["intervals"]["position_r2"][name]
        return f"{results['position_r2'][name]:.3f} [{low:.3f}, {high:.3f}]"

    rows = []
    images = {kind: f"{count} test images" for kind, count in results["test_images"].items()}
    if results["knn"]:
        chance = f"{images['knn']}, chance {100 * results['chance']['knn']:.1f} %"
        rows += [(f"k-NN accuracy (k = {k})", chance), *models("knn")]
        curve = results["matryoshka"][last].items()
        sizes = ", ".join(f"{size}: {100 * score:.1f} %" for size, score in curve)
        rows.append((f"k-NN accuracy by embedding size ({last})", sizes))
    if results["in_context"]:
        rows += [("in-context segmentation, mIoU", images["in_context"]), *models("in_context")]
    if "rasa" in results["position_r2"]:
        value = f"{r2(last)} -> {r2('rasa')}, {images['position_r2']}, chance 0"
        rows.append(("position R2, before -> after RASA", value))
    return rows


def read_results(path: Path, stages: Sequence[str]) -> dict[str, Any]:
    """Read the scores of these stages, and of what they are compared with, from `results.json`."""
    remedy = "run --stages evaluate report"
    results = read_json_object(path, remedy)
    for name in SCORES:
        scores = results.get(name)
        has_kind = scores_by_size if name == "matryoshka" else is_number
        if not isinstance(scores, dict) or not all(map(has_kind, scores.values())):
            raise DamagedFile(f"{path} has no scores {name!r} by encoder: {remedy}")
    needed = dict.fromkeys(("knn", "matryoshka", "in_context", "position_r2"), stages)
    for name, encoders in (needed | {"online_knn": ("raw pixels",)}).items():
        missing = [each for each in ("random init", *encoders) if each not in results[name]]
        optional = name == "in_context" or not results["knn"]
        if missing and (results[name] or name == "position_r2" or not optional):
            raise SettingsError(f"{path} is older than {missing[0]}; {remedy}")
    for kind in ("intervals", "test_images", "chance"):
        if not isinstance(results.get(kind), dict):
            raise SettingsError(f"{path} is older than the {kind} of scores; {remedy}")
    for kind in ("knn", "in_context", "position_r2"):
        ends = results["intervals"].get(kind)
        fits = isinstance(ends, dict) and all(is_interval(ends.get(name)) for name in results[kind])
        if results[kind] and not (fits and is_number(results["test_images"].get(kind))):
            raise DamagedFile(f"{path} has no interval of each score {kind!r}: {remedy}")
    if results["knn"] and not is_number(results["chance"].get("knn")):
        raise DamagedFile(f"{path} has no chance of the score 'knn': {remedy}")
    return results


def is_interval(value: Any) -> bool:
    """Whether a JSON value is the two ends of an interval."""
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number."""
    return type(value) in (int, float)


def scores_by_size(value: Any) -> bool:
    """Whether a JSON value maps embedding sizes to numbers."""
    return isinstance(value, dict) and all(
        size.isdecimal() and is_number(score) for size, score in value.items()
    )


def some_images(source: Source, count: int) -> list[Tensor]:
    """At most `count` images, evenly spaced; for a broken one, the next that can be read."""
    images = []
    for first in evenly_spaced(len(source), count):
        for i in range(first, len(source)):
            try:
                images.append(source[i][0])
            except UnreadableImage:
                continue
            break
    return images


def training_pictures(run: Run[Settings], results: dict[str, Any], last: str) -> dict[str, Figure]:
    """Curves of the losses, of the online k-NN, and over embedding sizes."""
    settings = run.settings
    path = run.output / "pretrain" / "metrics.jsonl"
    records = read_metrics(path) if path.exists() else []
    figures = {}
    if any("loss" in record for record in records):
        num_prototypes = run.read_export("pretrain", read_num_prototypes)
        figures["losses"] = draw.loss_curves(records, num_prototypes=num_prototypes)
    else:
        print(f"report: {path} has no losses: their curves are left out")
    key = f"knn/{settings.evaluation.knn}"
    if online := [(record["step"], record[key]) for record in records if key in record]:
        steps, accuracy = zip(*online, strict=True)
        floor = "init" if settings.init_from else "raw pixels"
        figures["online_knn"] = draw.online_knn(
            steps,
            accuracy,
            k=settings.evaluation.knn,
            random_init=results["online_knn"]["random init"],
            floor=results["online_knn"][floor],
            floor_name=floor,
        )
    if curves := results["matryoshka"]:
        names = {last: "trained", "random init": "random initialisation"}
        figures["matryoshka"] = draw.matryoshka(
            {names[k]: {int(m): score for m, score in curves[k].items()} for k in names}
        )
    return figures


def view_pictures(run: Run[Settings], train: Source) -> dict[str, Figure]:
    """What the student sees: crops, masks, and how often each position is masked."""
    settings, generator = run.settings, run.generator("report")
    crop = MultiCrop(**vars(settings.crops), channels=settings.model.in_chans)
    views = [crop(image, generator=generator) for image in some_images(train, 4)]
    grid = load_encoder(run, "pretrain").grid_size
    masked = vars(settings.masks) | {"mask_probability": 1.0}
    masks = CyclicMaskGenerator(grid, **masked)(2 * len(views), generator=generator)
    exposure = [
        CyclicMaskGenerator(grid, **masked | {"shift": shift})(2000, generator=generator)
        for shift in (True, False)
    ]
    crops = "image view ... -> view image ..."
    return {
        "crops_and_masks": draw.crops_and_masks(
            list(rearrange([view.globals_ for view in views], crops)),
            list(rearrange([view.locals_ for view in views], crops)),
            list(rearrange(masks, "(view image) H W -> view image H W", image=len(views))),
        ),
        "mask_exposure": draw.mask_exposure(*(m.float().mean(0) for m in exposure)),
    }


def feature_pictures(
    run: Run[Settings], results: dict[str, Any], last: str, test: Source
) -> dict[str, Figure]:
    """What the last encoder sees in held-out images, before and after RASA."""
    view = _view(run, last)
    encoder = load_encoder(run, last)
    shown = (with_channels(image, encoder.in_chans) for image in some_images(test, 6))
    images = torch.stack([view(image) for image in shown])
    with torch.no_grad():
        patches = encoder(images).patches
        q, k, _ = encoder.queries_keys_values(images)
    H, W = patches.shape[1:3]
    attention = cls_attention(q, k, num_prefix_tokens=encoder.num_prefix_tokens, grid=(H, W))
    figures = {"attention": draw.attention_maps(images, attention)}
    try:
        figures["pca"] = draw.pca_maps(images, pca_maps(patches, threshold=None).rgb)
    except ValueError as error:  # patches without a difference
        print(f"report: no map of principal components: {error}")
    if run.is_exported("rasa"):
        errors = run.read_export("rasa", read_position_errors)
        r2 = results["position_r2"]
        positions = rearrange(patch_positions(H, W), "h w yx -> (h w) yx")
        figures["rasa"] = draw.position_error(
            errors,
            r2={"linear": (r2[last], r2["rasa"])},
            chance=positions.var(0, correction=0).mean().item(),
        )
        figures["cluster_entropy"] = cluster_entropy_picture(run, last, test)
    return figures


def read_position_errors(path: Path) -> list[float]:
    """The position error of each of RASA's iterations, from the header of its export."""
    errors = json.loads(backbones.read_metadata(path)["position_errors"])
    return [float(error) for error in errors]


def read_num_prototypes(path: Path) -> dict[str, int]:
    """Prototypes by the names of their losses, from the header of an export."""
    found = parse_json(backbones.read_metadata(path)["num_prototypes"], "num_prototypes")
    return {str(name): int(count) for name, count in found.items()}


def cluster_entropy_picture(run: Run[Settings], last: str, test: Source) -> Figure:
    """Where in the image the teacher's patch clusters fire, before and after RASA.

    At the finest level that has, on average, a patch for each cluster and position.
    """
    options = run.settings.evaluation
    pretrained = run.read_export(last, backbones.load_pretrained)
    head = cast(MatryoshkaProjector, pretrained.heads["ibot_head"])
    counts = head.num_prototypes_per_level
    images = evenly_spaced(len(test), options.num_dense)
    level = max((level for level, k in enumerate(counts) if k <= len(images)), default=0)
    ids = []
    for stage in (last, "rasa"):
        patches = extract(
            load_encoder(run, stage),
            test,
            transform=_view(run, last),
            indices=images,
            batch_size=options.batch_size,
            want=("patches",),
        ).patches
        with torch.no_grad():
            nearest = [head(x)[level].argmax(-1) for x in patches.split(8)]
        ids.append(torch.cat(nearest))  # [B, H, W]
    generator = run.generator("cluster entropy")
    entropies = [
        position_entropy(x, counts[level], minimum_count=x[0].numel())
        for x in (*ids, shuffled(ids[0], generator=generator))
    ]
    return draw.cluster_entropy(entropies[0], entropies[1], shuffled=entropies[2])


def _view(run: Run[Settings], stage: str) -> EvalTransform:
    """The deterministic view of an image that evaluations use."""
    size = run.settings.global_size(stage)
    return EvalTransform(size, resize=round(size * run.settings.evaluation.resize_over_crop))

"""`sslkit duplicates`: find near-duplicate images of a folder or of shards."""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from sslkit.progress import WorkProgress, track

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from sslkit.data.sources import Source


@dataclass(frozen=True)
class Settings:
    """Find near-duplicate images of a folder or of shards.

    Groups images by the similarity of their features, and reports which image of each group to
    keep. Nothing is deleted; --write-list writes the names of the images to keep and to remove.
    """

    output: Path
    """Folder of report.md, figures/ and duplicates.json; features.npy where --weights is given."""
    features: Path | None = None
    """A file of sslkit extract; or an .npy whose row i is image i of --data."""
    weights: str | None = None
    """Model that extracts features from --data, instead of --features: a file, a folder,
    hf:ORG/NAME, timm:NAME, sslkit:NAME or random:NAME."""
    data: str | None = None
    """The images (sslkit.data.sources.open_source); default: what --features are of."""
    threshold: float = 0.9
    """Cosine similarity from which on two images are duplicates; it depends on the model."""
    keep: Literal["largest", "first"] = "largest"
    """Image of a group that is kept: the one with the most pixels, or the first."""
    write_list: bool = False
    """Write keep.txt and remove.txt, a name a line."""
    num_pictures: int = 12
    """Pairs that the report shows."""
    nesting: int | None = None
    """Which array, of features of several nesting sizes."""
    image_size: tuple[int, ...] = ()
    """Image size for --weights: pixels a side, or height and width; default: the model's own."""
    processes: int = 1
    """Processes that extract features with --weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device that extracts features with --weights."""
    num_neighbours: int = 64
    """Neighbours looked up at first; rows with more duplicates are searched again for all."""


def main(arguments: Sequence[str]) -> None:
    """Search the images of the command line."""
    run(tyro.cli(Settings, args=arguments, prog="sslkit duplicates"))


def run(settings: Settings) -> None:
    """Search, report, and write the lists that are asked for."""
    import numpy as np

    from sslkit.data.sources import UnreadableImage
    from sslkit.duplicates import figures
    from sslkit.duplicates.search import (
        find_duplicates,
        keep_one,
        kept_rows,
        similarity_to_rows,
    )
    from sslkit.evaluation.markdown_report import format_table, write_report
    from sslkit.files import atomic_write

    features, names, source = _open(settings)
    if settings.write_list and any("\n" in name for _, name in names):
        raise ValueError("a name has a line break in it: the lists would not say which is which")
    with WorkProgress("similar images", len(features)) as bar:
        found = find_duplicates(
            features,
            settings.threshold,
            num_neighbours=settings.num_neighbours,
            progress=bar.reach,
        )
    sizes = np.bincount(found.groups)
    pixels = np.zeros(len(features), np.int64)
    if settings.keep == "largest":
        in_group = np.flatnonzero(sizes[found.groups] > 1)
        for row in track(in_group, "image sizes"):
            pixels[row] = _num_pixels(source, names[row][0])
    keep = keep_one(found.groups, pixels)
    kept = kept_rows(found.groups, keep)
    similarity = similarity_to_rows(features, kept)
    removed = np.flatnonzero(~keep)
    removed = removed[np.argsort(similarity[removed], kind="stable")]
    results = [
        ("images", len(features)),
        (f"pairs of similarity {settings.threshold:g} or more", found.num_pairs),
        ("groups of duplicates", int((sizes > 1).sum())),
        ("images in the largest group", int(sizes.max())),
        ("images to keep", int(keep.sum())),
        ("images to remove", len(removed)),
        (
            "of these less alike to the kept one than that",
            int((similarity[removed] < settings.threshold).sum()),
        ),
    ]
    pictures = {"similarity": figures.similarities(found.nearest, settings.threshold)}
    num_shown = min(settings.num_pictures, len(removed))
    pairs: list[tuple[Tensor, Tensor, float]] = []
    for row in removed[np.linspace(0, len(removed) - 1, num_shown, dtype=int)].tolist():
        with contextlib.suppress(UnreadableImage):  # since the features were extracted
            one, other = source[names[kept[row]][0]][0], source[names[row][0]][0]
            pairs.append((one, other, float(similarity[row])))
    if pairs:
        pictures["pairs"] = figures.pairs(pairs)
    table = [(name, str(value)) for name, value in results]
    page = write_report(
        settings.output,
        title=f"Near-duplicates at {settings.threshold:g}",
        results=table,
        columns=("Number of", "Value"),
        figures=pictures,
        settings=dataclasses.asdict(settings),
    )
    members: dict[int, list[int]] = {}
    for row in removed[::-1].tolist():
        members.setdefault(int(found.groups[row]), []).append(row)
    groups = [
        {
            "keep": names[kept[rows[0]]][1],
            "remove": [
                {"name": names[row][1], "similarity": round(float(similarity[row]), 6)}
                for row in rows
            ],
        }
        for _, rows in sorted(members.items())
    ]
    with atomic_write(settings.output / "duplicates.json") as file:
        file.write(json.dumps({**dict(results), "groups": groups}, indent=2).encode())
    print(format_table([*table, ("report", str(page))]))
    if not settings.write_list:
        print("nothing else is written: --write-list writes keep.txt and remove.txt")
        return
    for name, chosen in (("keep.txt", keep), ("remove.txt", ~keep)):
        lines = "".join(f"{names[row][1]}\n" for row in np.flatnonzero(chosen))
        with atomic_write(settings.output / name) as file:
            file.write(lines.encode("utf-8", "surrogateescape"))
    print(f"lists: {settings.output / 'keep.txt'}, {settings.output / 'remove.txt'}")


def _open(settings: Settings) -> "tuple[np.ndarray, list[tuple[int, str]], Source]":
    """Features [N, D], (index, name) of each row, and the images."""
    from sslkit.data.local import is_local
    from sslkit.data.sources import open_source
    from sslkit.extract import Extraction, read_description, read_features, read_names
    from sslkit.extract.feature_files import description_path, require_whole
    from sslkit.extract.processes import extract_with_processes

    if (settings.features is None) == (settings.weights is None):
        raise ValueError("give either --features, or --weights and --data")
    path = settings.features or settings.output / "features.npy"
    if settings.weights is not None:
        if settings.data is None:
            raise ValueError("--weights needs --data")
        extraction = Extraction(
            weights=settings.weights,
            data=settings.data,
            image_size=settings.image_size,
            resize_over_crop=1.0,
        )
        extract_with_processes(
            extraction, path, processes=settings.processes, device=settings.device
        )
    features = read_features(path, size=settings.nesting)
    described = description_path(path)
    if described.exists():
        description = read_description(path)
        require_whole(path, description)
        of = description["settings"]
        if settings.data is None and not is_local(str(of["data"])):
            raise ValueError(
                f"{described} names data that may start a program or ask another machine: "
                f"{str(of['data'])!r}. If you trust that, give it as --data"
            )
        source = open_source(
            settings.data or str(of["data"]), split=of["split"], test_fraction=0.0, seed=of["seed"]
        )
        names = read_names(path)
        changed = len(source) != of["num_images"]
    elif settings.data is None:
        raise ValueError(f"{path} does not say which images it is of ({described}): give --data")
    else:
        source = open_source(settings.data, test_fraction=0.0)
        names = [(i, source.name(i)) for i in range(len(source))]
        changed = len(source) != len(features)
    if changed:
        raise ValueError(
            f"{path} has {len(features)} rows and is not of the {len(source)} images that are "
            "there now: extract the features again"
        )
    return features, names, source


def _num_pixels(source: "Source", index: int) -> int:
    """Number of pixels of an image; 0 if it cannot be read any more."""
    from sslkit.data.sources import UnreadableImage

    try:
        return source[index][0][0].numel()
    except UnreadableImage:
        return 0

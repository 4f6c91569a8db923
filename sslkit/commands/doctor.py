"""`sslkit doctor`: examine a data set, and propose a command to train on it."""

import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from sslkit.progress import WorkProgress

if TYPE_CHECKING:
    from sslkit.data.examination import Examination, ExaminedSplit, Spread
    from sslkit.recipes.franca.proposal import Machine, Proposal

_MOST_CLASSES = 12  # that are listed one by one
_OF_LABELS = ("images of a class", "images without a label")


@dataclass(frozen=True)
class Settings:
    """Examine images before training on them, and propose a command for it.

    Prints the number, sizes, channels and labels of the images of each split, the unreadable files,
    and the images that are there twice. Then proposes a preset and its main settings for the data
    and for this machine, each with its reason. Nothing is written.
    """

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A folder, tar shards, hf:NAME, hf-stream:NAME, a torchvision data set, .npz or `scenes`."""
    num_images: int = 20_000
    """Images read of each split; of larger ones, a random sample is read."""
    all: bool = False
    """Read every image, however many there are."""
    shown: int = 5
    """Unreadable files and copies that are named."""
    seed: int = 0
    """Seed of the sample, and of the division into splits, as in the recipe."""
    test_fraction: float = 0.1
    """Share of the images held out where the data have no test split, as in the recipe."""
    workers: int | None = None
    """Processes that read images; by default one for each CPU core, at most 8."""


def main(arguments: Sequence[str]) -> None:
    """Examine the data of the command line."""
    run(tyro.cli(Settings, args=arguments, prog="sslkit doctor"))


def run(settings: Settings) -> None:
    """Examine the data, and print what was found and what is proposed."""
    from sslkit.data.examination import examine
    from sslkit.recipes.franca.proposal import propose, this_machine

    for flag, value, least in (
        ("num-images", settings.num_images, 1),
        ("shown", settings.shown, 0),
    ):
        if value < least:
            raise ValueError(f"--{flag} must be at least {least}, got {value}")
    machine = this_machine()
    with warnings.catch_warnings(record=True) as caught, ExitStack() as bars:
        shown: dict[str, WorkProgress] = {}

        def progress(split: str, done: int, total: int | None) -> None:
            if split not in shown:
                bars.close()  # that of the other split
                shown[split] = bars.enter_context(WorkProgress(f"{split} images", total))
            shown[split].reach(done)

        found = examine(
            settings.data,
            limit=None if settings.all else settings.num_images,
            shown=settings.shown,
            seed=settings.seed,
            test_fraction=settings.test_fraction,
            num_workers=min(machine.cores, 8) if settings.workers is None else settings.workers,
            progress=progress,
        )
    notes = dict.fromkeys(f"Note: {warning.message}\n" for warning in caught)
    print("\n".join([*notes, *describe(found)]), end="\n\n")
    print("\n".join(advise(propose(found, machine), machine)))


def describe(found: "Examination") -> Iterator[str]:
    """The lines that say what was found."""
    from sslkit.evaluation.markdown_report import format_table

    splits = (found.train, found.test)
    rows = [
        ("images", *map(_number_of_images, splits)),
        ("images read", *(f"{split.num_read:,}" for split in splits)),
        ("width in pixels", *(_spread(split.width) for split in splits)),
        ("height in pixels", *(_spread(split.height) for split in splits)),
        ("width / height", *(_spread(split.aspect, digits=2) for split in splits)),
        ("channels", *map(_channels, splits)),
        ("classes", *(str(split.num_classes or "none") for split in splits)),
        ("images of a class", *map(_class_sizes, splits)),
        ("images without a label", *(f"{split.label_counts.get(-1, 0):,}" for split in splits)),
        ("unreadable images", *(f"{split.num_unreadable:,}" for split in splits)),
        ("copies of another image", *(f"{split.num_copies:,}" for split in splits)),
        ("copies of a training image", "", f"{found.num_leaked:,}"),
    ]
    labelled = found.train.num_classes > 0 or found.test.num_classes > 0
    if not labelled:
        rows = [row for row in rows if row[0] not in _OF_LABELS]
    yield found.data
    yield format_table([("", "train", "test"), *rows])
    yield "(sizes: smallest .. median .. largest)"
    if any(split.num_read != split.num_images for split in splits):
        yield ""
        yield _filled(
            "Not all images were read. Sizes, unreadable images and copies are those of a random "
            "sample; --all reads every image."
        )
    if found.divided:
        yield ""
        yield _filled(
            "The data have no test split of their own. The images' names decide which of them are "
            f"held out for tests (--test-fraction {found.test_fraction:g})."
        )
    if found.annotations:
        yield ""
        yield f"Annotations: {', '.join(found.annotations)}."
    if labelled:
        yield ""
        read = "" if found.train.all_labels_known else " among those read"
        yield _filled(f"Training images by class{read}: {_classes(found.train)}.")
    for name, split in (("training", found.train), ("test", found.test)):
        yield from _listed(
            f"unreadable {name} images",
            split.num_unreadable,
            [f"{each.name}: {each.reason}" for each in split.unreadable],
        )
    num_copies = found.train.num_copies + found.test.num_copies + found.num_leaked
    pairs = [f"{copy} = {original}" for original, copy in found.copies]
    yield from _listed("copies, with exactly the same pixels", num_copies, pairs)


def advise(proposal: "Proposal", machine: "Machine") -> Iterator[str]:
    """The lines that propose a command."""
    from sslkit.evaluation.markdown_report import format_table

    yield f"Proposed for this machine ({machine}):"
    yield ""
    rows = [(f"{choice.flag} {choice.value}", choice.reason) for choice in proposal.choices]
    yield format_table(rows)
    yield ""
    yield proposal.command()
    for remark in proposal.remarks:
        yield ""
        yield _filled(f"Note: {remark}.")


def _number_of_images(split: "ExaminedSplit") -> str:
    return "unknown (a stream)" if split.num_images is None else f"{split.num_images:,}"


def _spread(spread: "Spread | None", *, digits: int = 0) -> str:
    if spread is None:
        return "unknown"
    shown = [f"{value:.{digits}f}" for value in spread]
    return shown[0] if len(set(shown)) == 1 else " .. ".join(shown)


def _channels(split: "ExaminedSplit") -> str:
    if len(split.channels) <= 1:
        return "".join(map(str, split.channels)) or "unknown"
    return ", ".join(f"{channels} ({count:,} images)" for channels, count in split.channels.items())


def _class_sizes(split: "ExaminedSplit") -> str:
    counts = _counts_by_class(split)
    if not counts:
        return ""
    least, most = min(counts.values()), max(counts.values())
    return f"{least:,}" if least == most else f"{least:,} .. {most:,}"


def _counts_by_class(split: "ExaminedSplit") -> dict[str, int]:
    """The number of images of each class, in the order of the labels; of unread images too."""
    names = split.class_names or tuple(map(str, range(split.num_classes)))
    return {name: split.label_counts.get(label, 0) for label, name in enumerate(names)}


def _classes(split: "ExaminedSplit") -> str:
    counts = _counts_by_class(split)
    if len(counts) <= _MOST_CLASSES:
        return _joined(counts)
    ordered = dict(sorted(counts.items(), key=lambda item: item[1]))
    names, half = list(ordered), _MOST_CLASSES // 2
    fewest, most = ({n: ordered[n] for n in part} for part in (names[:half], names[-half:]))
    return f"the fewest {_joined(fewest)}; the most {_joined(most)}"


def _joined(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count:,})" for name, count in counts.items())


def _filled(text: str) -> str:
    """The text in lines of at most 100 characters."""
    return textwrap.fill(text, width=100, break_on_hyphens=False)


def _listed(title: str, count: int, lines: list[str]) -> Iterator[str]:
    if count == 0:
        return
    yield ""
    yield f"{count:,} {title}:"
    yield from (f"  {line}" for line in lines)
    if count > len(lines):
        yield f"  and {count - len(lines):,} more (--shown)"

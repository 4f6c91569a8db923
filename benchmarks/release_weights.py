"""Put the network of a finished run into the package, as `sslkit:NAME`, with its model card.

    python -m benchmarks.release_weights runs/cifar10 --name cifar10 --license apache-2.0 \\
        --dataset cifar10 --commands commands.sh --results runs/eval_cifar10/results.json

Writes `sslkit/weights/NAME/model.safetensors`, with the heads, and `README.md`. The scores are
those of the run's own `results.json` and of each `--results`, of `sslkit evaluate`, in which the
model is called `--model`. The settings of the run are kept in the file, absolute paths shortened to
their last part. A file of more than 10 MB is refused. Afterwards run
`pytest tests/test_packaged_weights.py`, which tests every network of the package, and commit the
folder.
"""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sslkit import backbones
from sslkit.backbones.packaged import CARD, FOLDER, PREFIX, WEIGHTS
from sslkit.export.beside import read_run
from sslkit.export.card import Card, Format, Score, read_scores, without_paths, write_card
from sslkit.export.hub import projectors
from sslkit.files import atomic_write, file_digest, parse_json

MOST_BYTES = 10_000_000
FORMAT = Format(
    library="sslkit",
    usage="""from sslkit import backbones

encoder = backbones.load("{name}").eval()
tokens = encoder(images)  # [B, C, h, w]: tokens.cls [B, D], tokens.patches [B, H, W, D]
heads = backbones.load_pretrained("{name}").heads  # MatryoshkaProjector by name""",
    notes="The weights come with sslkit; nothing is downloaded.",
)


@dataclass(frozen=True)
class Release:
    """What goes into the package, and under which name."""

    run: Path
    name: str
    license: str
    datasets: tuple[str, ...]
    commands: str
    stage: str = "pretrain"
    results: tuple[Path, ...] = ()
    model: str | None = None


def release(what: Release) -> Path:
    """Write the folder of `sslkit:NAME`, and return it.

    Raises:
        ValueError: the name is no word, a head cannot be kept, the file is too large, or a results
            file has no scores of the model.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", what.name):
        raise ValueError(f"--name {what.name!r} must be of small letters, digits, '_', '-' and '.'")
    weights = what.run / f"{what.stage}.safetensors"
    loaded = backbones.load_pretrained(weights)
    heads = projectors(loaded.heads)
    if lost := loaded.heads.keys() - heads.keys():
        raise ValueError(f"{weights}: heads {sorted(lost)} are no MatryoshkaProjector")
    metadata = read_run(str(weights))
    if "settings" in metadata:
        settings = without_paths(parse_json(metadata["settings"], f"the settings in {weights}"))
        metadata["settings"] = json.dumps(settings)
    scores, scored_on = _scores(what, metadata)
    if (size := weights.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{weights} has {size / 1e6:.1f} MB; the most is {MOST_BYTES / 1e6:.0f}")
    folder = FOLDER / what.name
    backbones.save(loaded.encoder, folder / WEIGHTS, metadata, heads=heads)
    card = Card(
        title=PREFIX + what.name,
        license=what.license,
        datasets=what.datasets,
        scores=scores,
        scored_on=scored_on,
        source=(weights.name, file_digest(weights)),
        commands=what.commands,
    )
    digest = file_digest(folder / WEIGHTS)
    text = write_card(card, loaded.encoder, form=FORMAT, metadata=metadata, digest=digest)
    with atomic_write(folder / CARD) as file:
        file.write(text.encode())
    return folder


def _scores(what: Release, metadata: dict[str, str]) -> tuple[tuple[Score, ...], str | None]:
    """Scores of the run and of evaluations, and the data of the first."""
    sources = [(what.run / "results.json", what.stage)]
    sources += [(path, what.model or what.stage) for path in what.results]
    found = [read_scores(path, model) for path, model in sources if path.is_file()]
    missing = [str(path) for path, _ in sources if not path.is_file()]
    if missing:
        raise ValueError(f"no results at {', '.join(missing)}: a model card needs numbers")
    settings = parse_json(metadata.get("settings", "{}"), "the settings beside the weights")
    scored_on = next((data for _, data in found if data), None) or settings.get("data")
    return tuple(score for scores, _ in found for score in scores), scored_on


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.release_weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--name", required=True, help="NAME of sslkit:NAME")
    parser.add_argument("--license", required=True, help="as the Hub names it: apache-2.0, ...")
    parser.add_argument("--dataset", required=True, nargs="+", help="training data, by Hub names")
    parser.add_argument("--commands", required=True, type=Path, help="file of shell commands")
    parser.add_argument("--stage", default="pretrain", help="stage whose network it is")
    parser.add_argument("--results", type=Path, nargs="*", default=(), help="more results.json")
    parser.add_argument("--model", help="name of the model in --results")
    options = parser.parse_args(arguments)
    try:
        folder = release(
            Release(
                options.run,
                options.name,
                options.license,
                tuple(options.dataset),
                options.commands.read_text(),
                options.stage,
                tuple(options.results),
                options.model,
            )
        )
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{PREFIX}{options.name}: {(folder / WEIGHTS).stat().st_size / 1e6:.1f} MB in {folder}")
    print("now: pytest tests/test_packaged_weights.py, then commit the folder")


if __name__ == "__main__":
    main()

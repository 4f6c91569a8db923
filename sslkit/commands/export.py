"""python -m sslkit.export timm|hf|onnx|torch --weights FILE --output DIR: encoders for others."""

import dataclasses
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from sslkit import backbones
from sslkit.backbones import Loaded
from sslkit.backbones.checkpoint import HEADER_KEY
from sslkit.backbones.files import read_header
from sslkit.command_line import run_command
from sslkit.export import HubEncoder, save_for_timm, save_onnx, save_program
from sslkit.export.card import Card, read_scores, write_card
from sslkit.export.hub import projectors
from sslkit.export.timm_weights import FORMAT as TIMM_FORMAT
from sslkit.files import atomic_write, file_digest, parse_json, read_json_object
from sslkit.rasa import load_rasa


@dataclass(frozen=True)
class Export:
    """Which encoder goes where."""

    weights: str
    """A file or folder of weights, hf:ORG/NAME or timm:NAME: all that sslkit.backbones.load reads,
    the recipe's exports among them."""
    output: Path
    """The folder to write, made if missing; earlier files of the same names are replaced."""
    rasa: Path | None = None
    """Fold this projector into the encoder's final norm."""
    img_size: tuple[int, int] | None = None
    """Height and width of the images that the stored positions are for; default: as they are."""


@dataclass(frozen=True)
class Described(Export):
    """An encoder with a model card."""

    name: str | None = None
    """Name of the model, ORG/NAME on the Hub; default: the name of --output."""
    license: str | None = None
    """License of the weights, as the Hub names it: apache-2.0, cc-by-nc-4.0, ..."""
    datasets: tuple[str, ...] = ()
    """What the encoder was trained on, by names of the Hub."""
    results: Path | None = None
    """Scores: results.json of the recipe or of sslkit.evaluation; default: the one beside
    --weights, if there is one with scores of this model."""
    model: str | None = None
    """Its name in --results; default: the stage of the recipe, or else the name of --weights."""


@dataclass(frozen=True)
class Timm(Described):
    """A folder for timm: timm.create_model("local-dir:DIR", pretrained=True)."""

    mean: tuple[float, ...] | None = None
    """What images in 0..1 are normalised with, one value a channel; default: ImageNet's."""
    std: tuple[float, ...] | None = None
    """Likewise."""


@dataclass(frozen=True)
class HuggingFace(Described):
    """A folder for the Hub: sslkit.export.HubEncoder.from_pretrained("DIR"), heads included."""

    push: bool = False
    """Also upload it to --name, with the token of `hf auth login`."""
    private: bool = False
    """The repository that --push makes is not public."""


@dataclass(frozen=True)
class Onnx(Export):
    """encoder.onnx, of any batch, height and width."""


@dataclass(frozen=True)
class Torch(Export):
    """encoder.pt2 for torch.export.load, of any batch, height and width."""


_COMMANDS: dict[str, Any] = {"timm": Timm, "hf": HuggingFace, "onnx": Onnx, "torch": Torch}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    chosen: Export = tyro.extras.subcommand_cli_from_dict(
        _COMMANDS, args=words, prog="python -m sslkit.export", description=__doc__
    )
    try:
        with warnings.catch_warnings(record=True) as caught:
            run(chosen)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    for warning in caught:
        if warning.category is UserWarning and "sslkit" in warning.filename:
            print(f"warning: {warning.message}", file=sys.stderr)


def run(export: Export) -> None:
    """Read, fold and write, as the command line says."""
    loaded = backbones.read(export.weights, img_size=export.img_size)
    encoder = loaded.encoder.eval()
    metadata = read_run(export.weights)
    if export.rasa is not None:
        encoder.vit = load_rasa(export.rasa).fold_into_vit(encoder.vit)
        metadata = {**metadata, "rasa": export.rasa.name}
    output = export.output
    match export:
        case Onnx():
            save_onnx(encoder, output / "encoder.onnx")
            print(f"{output / 'encoder.onnx'}")
        case Torch():
            save_program(encoder, output / "encoder.pt2")
            print(f"{output / 'encoder.pt2'}")
        case Timm():
            card = describe(export, metadata)
            save_for_timm(encoder, output, mean=export.mean, std=export.std)
            text = write_card(
                card,
                encoder,
                form=TIMM_FORMAT,
                metadata=metadata,
                digest=file_digest(output / "model.safetensors"),
            )
            with atomic_write(output / "README.md") as file:
                file.write(text.encode())
            print(f'timm.create_model("local-dir:{output}", pretrained=True)')
        case HuggingFace():
            write_for_hub(export, loaded, metadata)
        case _:
            raise TypeError(f"no export for {type(export).__name__}")


def write_for_hub(export: HuggingFace, loaded: Loaded, metadata: dict[str, str]) -> None:
    """The folder of `HubEncoder`, and perhaps its upload."""
    if export.push and export.name is None:
        raise ValueError("--push needs --name ORG/NAME, the repository to upload to")
    encoder = HubEncoder(
        loaded.encoder,
        heads=projectors(loaded.heads),
        metadata=metadata,
        card=describe(export, metadata),
    )
    (export.output / "README.md").unlink(missing_ok=True)  # save_pretrained keeps an old one
    encoder.save_pretrained(export.output)
    print(f'HubEncoder.from_pretrained("{export.output}")')
    if left := sorted(loaded.heads.keys() - encoder.heads.keys()):
        print(f"left out, for they are no MatryoshkaProjector: {', '.join(left)}", file=sys.stderr)
    if export.push and export.name is not None:
        print(encoder.push_to_hub(export.name, private=export.private))


def read_run(weights: str) -> dict[str, str]:
    """What the run that wrote the weights said beside them.

    The text in the file's header, and the recipe's ``settings.json`` in the same folder where the
    header has no settings (an encoder with RASA).
    """
    path = Path(weights)
    if path.is_dir():
        path = path / "model.safetensors"
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    header = read_header(path)
    if HEADER_KEY not in header:
        return {}
    metadata = {key: value for key, value in header.items() if key != HEADER_KEY}
    settings = path.parent / "settings.json"
    if "stage" in metadata and "settings" not in metadata and settings.is_file():
        if settings.is_symlink():  # what it leads to would be published with the weights
            raise ValueError(f"{settings} is a link; replace it by the file")
        metadata["settings"] = json.dumps(read_json_object(settings, "restore or remove it"))
    return metadata


def describe(export: Described, metadata: dict[str, str]) -> Card:
    """What the command line and the files beside the weights say for a model card."""
    weights = Path(export.weights)
    model = export.model or metadata.get("stage") or weights.stem
    card = Card(
        title=export.name or export.output.resolve().name,
        license=export.license,
        datasets=export.datasets,
        source=(weights.name, file_digest(weights)) if weights.is_file() else None,
    )
    beside = weights.parent / "results.json"
    if export.results is None and not beside.is_file():
        return card
    try:
        scores, scored_on = read_scores(export.results or beside, model)
    except ValueError as error:
        if export.results is not None:
            raise
        print(f"no scores in the card: {error}", file=sys.stderr)
        return card
    if scored_on is None:  # the recipe's scores are of the data that it trained on
        settings = parse_json(metadata.get("settings", "{}"), "the settings beside the weights")
        scored_on = settings.get("data") if isinstance(settings, dict) else None
    return dataclasses.replace(card, scores=scores, scored_on=scored_on)


if __name__ == "__main__":
    run_command(main)

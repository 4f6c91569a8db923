"""`sslkit export FORM`: encoders for timm, the Hugging Face Hub, ONNX and torch.export."""

import dataclasses
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import tyro

if TYPE_CHECKING:
    from sslkit.backbones import Pretrained
    from sslkit.export.card import Card


@dataclass(frozen=True)
class Export:
    """Which encoder goes where."""

    weights: str
    """Model: a file, a folder, hf:ORG/NAME, timm:NAME, sslkit:NAME or random:NAME."""
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
    """Scores: results.json of the recipe or of sslkit evaluate; default: the one beside
    --weights, if there is one with scores of this model."""
    model: str | None = None
    """Its name in --results; default: the stage of the recipe, or else the name of --weights."""


@dataclass(frozen=True)
class Timm(Described):
    """Write a folder for timm: timm.create_model("local-dir:DIR", pretrained=True)."""

    mean: tuple[float, ...] | None = None
    """Mean that images in 0..1 are normalised with, one value a channel; default: ImageNet's."""
    std: tuple[float, ...] | None = None
    """Standard deviation that images are normalised with; default: ImageNet's."""


@dataclass(frozen=True)
class HuggingFace(Described):
    """Write a folder for the Hub, with heads: sslkit.export.HubEncoder.from_pretrained("DIR")."""

    push: bool = False
    """Also upload it to --name, with the token of `hf auth login`."""
    private: bool = False
    """The repository that --push makes is not public."""


@dataclass(frozen=True)
class Onnx(Export):
    """Write encoder.onnx, for any batch, height and width."""


@dataclass(frozen=True)
class Torch(Export):
    """Write encoder.pt2 for torch.export.load, for any batch, height and width."""


_form = partial(tyro.conf.subcommand, prefix_name=False)
FORMS = Annotated[
    Annotated[Timm, _form("timm")]
    | Annotated[HuggingFace, _form("hf")]
    | Annotated[Onnx, _form("onnx")]
    | Annotated[Torch, _form("torch")],
    tyro.conf.arg(name=""),
]


def main(arguments: Sequence[str]) -> None:
    """Read the weights and write them in the form of the command line."""
    export: Export = tyro.cli(
        cast(Any, FORMS),
        args=arguments,
        prog="sslkit export",
        description="Write an encoder for timm, the Hugging Face Hub, ONNX or torch.export.",
    )
    with warnings.catch_warnings(record=True) as caught:
        run(export)
    for warning in caught:
        if warning.category is UserWarning and "sslkit" in warning.filename:
            print(f"warning: {warning.message}", file=sys.stderr)


def run(export: Export) -> None:
    """Read, fold and write, as the command line says."""
    from sslkit import backbones
    from sslkit.export import save_for_timm, save_onnx, save_program
    from sslkit.export.beside import read_run
    from sslkit.export.card import write_card
    from sslkit.export.timm_weights import FORMAT
    from sslkit.files import atomic_write, file_digest
    from sslkit.rasa import load_rasa

    loaded = backbones.load_pretrained(export.weights, img_size=export.img_size)
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
                form=FORMAT,
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


def write_for_hub(export: HuggingFace, loaded: "Pretrained", metadata: dict[str, str]) -> None:
    """The folder of `HubEncoder`, and perhaps its upload."""
    from sslkit.export import HubEncoder
    from sslkit.export.hub import projectors

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


def describe(export: Described, metadata: dict[str, str]) -> "Card":
    """What the command line and the files beside the weights say for a model card."""
    from sslkit.export.card import Card, read_scores
    from sslkit.files import file_digest, parse_json

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

"""Model cards: what a run's settings and scores say about its weights, as Markdown with YAML."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCardData

from sslkit import __version__
from sslkit.backbones import ViTEncoder
from sslkit.files import parse_json

_TASK = "image-feature-extraction"
_TAGS = ("self-supervised-learning", "vision-transformer", "sslkit")


@dataclass(frozen=True)
class Score:
    """One number of a results file, a fraction where the score is a share.

    Attributes:
        name: with its protocol, for people.
        value: as in the file.
        interval: both ends of the 95 % interval, where the file has one.
    """

    name: str
    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Card:
    """What a model card says beyond what the encoder itself does.

    Attributes:
        title: the model's name.
        license: of the weights, as the Hub names it (``"apache-2.0"``, ...). None: the card says
            that none was stated, and others may then not use them.
        datasets: what it was trained on, by their names on the Hub.
        scores: from `read_scores`.
        scored_on: the data of the scores.
        source: the file that the weights come from, and its SHA-256.
        commands: shell commands that made the weights and the scores, one a line.
    """

    title: str = "encoder"
    license: str | None = None
    datasets: tuple[str, ...] = ()
    scores: tuple[Score, ...] = ()
    scored_on: str | None = None
    source: tuple[str, str] | None = None
    commands: str = ""


@dataclass(frozen=True)
class Format:
    """How one kind of folder is read: for a card's usage section.

    Attributes:
        library: the Hub's ``library_name``.
        usage: Python, with ``{name}`` in place of the model's.
        notes: what the folder does and does not hold.
        tags: of the Hub, beside those that every card has.
    """

    library: str
    usage: str
    notes: str
    tags: tuple[str, ...] = ()


def read_scores(path: str | Path, model: str) -> tuple[tuple[Score, ...], str | None]:
    """The scores of one model, and the data that they are of where the file says it.

    Args:
        path: ``results.json``, of the recipe or of ``sslkit evaluate``.
        model: the stage (``"pretrain"``, ``"rasa"``, ...) or the model's name in the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file, or has no scores of the model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no results at {path}")
    results = parse_json(path.read_bytes(), str(path))
    if not isinstance(results, Mapping):
        raise ValueError(f"{path} holds no results by name, but a {type(results).__name__}")
    evaluated = "protocols" in results
    scores, known = (_of_evaluation if evaluated else _of_recipe)(results, model)
    if not scores:
        raise ValueError(f"{path} has no scores of {model!r}; it has {', '.join(known) or 'none'}")
    data = results["settings"].get("data") if evaluated else None
    return tuple(scores), data


def _of_evaluation(results: Mapping[str, Any], model: str) -> tuple[list[Score], list[str]]:
    scores = []
    for protocol, models in results["protocols"].items():
        for name, score in models.get(model, {}).get("scores", {}).items():
            interval = score["interval"]
            pair = None if interval is None else (interval[0], interval[1])
            scores.append(Score(f"{protocol} {name}", score["value"], pair))
    return scores, list(results["models"])


def _of_recipe(results: Mapping[str, Any], model: str) -> tuple[list[Score], list[str]]:
    titles = {
        "knn": "k-NN accuracy",
        "matryoshka": "k-NN accuracy, first {} features",
        "in_context": "in-context mIoU",
        "position_r2": "position R2",
    }
    scores, known = [], dict.fromkeys(m for k in titles for m in results.get(k, {}))
    for key, title in titles.items():
        found = results.get(key, {}).get(model)
        if isinstance(found, Mapping):
            scores += [Score(title.format(size), value) for size, value in found.items()]
        elif found is not None:
            interval = results.get("intervals", {}).get(key, {}).get(model)
            scores.append(Score(title, found, None if interval is None else tuple(interval)))
    return scores, list(known)


def write_card(
    card: Card,
    encoder: ViTEncoder,
    *,
    form: Format,
    metadata: Mapping[str, str],
    digest: str | None = None,
) -> str:
    """The text of ``README.md``.

    Its parts are the Hub's YAML header, a usage snippet, the network's size, a table of scores, the
    commands, the training settings and where the weights come from. Absolute paths in the settings
    are shortened to their last part: a card is public.

    Args:
        card: what to say.
        encoder: whose sizes to state.
        form: of the folder that the card lies in.
        metadata: text beside the weights (`sslkit.backbones.read_metadata`): the recipe's has
            ``stage``, ``step`` and ``settings``, a JSON text.
        digest: SHA-256 of ``model.safetensors``.
    """
    header = ModelCardData(
        license=card.license,
        library_name=form.library,
        pipeline_tag=_TASK,
        tags=[*_TAGS, *form.tags],
        datasets=list(card.datasets) or None,
        metrics=list(dict.fromkeys(score.name for score in card.scores)) or None,
        model_name=card.title if card.scores else None,
        eval_results=_eval_results(card) or None,
    )
    sections = [
        f"---\n{header.to_yaml()}\n---",
        f"# {card.title}",
        _summary(card, encoder),
        f"## Usage\n\n```python\n{form.usage.format(name=card.title)}\n```\n\n{form.notes}",
    ]
    if card.scores:
        sections.append(_scores(card))
    if card.commands:
        sections.append(f"## How it was made\n\n```bash\n{card.commands.strip()}\n```")
    if settings := metadata.get("settings"):
        text = json.dumps(
            without_paths(parse_json(settings, "the settings beside the weights")), indent=2
        )
        sections.append(f"## Training\n\nSettings of the run:\n\n```json\n{text}\n```")
    sections.append(_provenance(card, metadata, digest))
    return "\n\n".join(sections) + "\n"


def _summary(card: Card, encoder: ViTEncoder) -> str:
    ph, pw = encoder.patch_size
    h, w = encoder.img_size
    millions = sum(p.numel() for p in encoder.vit.parameters()) / 1e6
    folded = isinstance(encoder.vit.norm, torch.nn.Sequential)
    lines = [
        f"A Vision Transformer, written by sslkit: {millions:.1f} M parameters, width "
        f"{encoder.embed_dim}, {encoder.depth} blocks of {encoder.num_heads} heads, patches of "
        f"{ph} x {pw} pixels, {encoder.in_chans} channel(s), positions for {h} x {w} pixels.",
        f"Licence of the weights: {card.license or 'none was stated'}.",
    ]
    if folded:
        lines.insert(1, "RASA is folded into its final norm: position is removed from all tokens.")
    return "\n\n".join(lines)


def _scores(card: Card) -> str:
    rows = ["| Score | Value | 95 % interval |", "| :-- | --: | :-- |"]
    for score in card.scores:
        interval = "" if score.interval is None else "{:.4f} to {:.4f}".format(*score.interval)
        rows.append(f"| {score.name} | {score.value:.4f} | {interval} |")
    data = f"Data: {_last_part(card.scored_on)}. " if card.scored_on else ""
    return f"## Scores\n\n{data}Shares are fractions of 1.\n\n" + "\n".join(rows)


def _provenance(card: Card, metadata: Mapping[str, str], digest: str | None) -> str:
    rows = [("sslkit", __version__), ("commit", _commit()), ("torch", torch.__version__)]
    rows.append(("timm", version("timm")))
    if card.source is not None:
        rows += [("from", card.source[0]), ("its SHA-256", card.source[1])]
    rows += [(k, v) for k, v in metadata.items() if k != "settings"]
    if digest is not None:
        rows.append(("SHA-256 of model.safetensors", digest))
    listed = [f"- {name}: `{_last_part(value)}`" for name, value in rows if value]
    return "## Where it comes from\n\n" + "\n".join(listed)


def _eval_results(card: Card) -> list[EvalResult]:
    data = _last_part(card.scored_on) if card.scored_on else "not stated"
    return [
        EvalResult(
            task_type=_TASK,
            dataset_type=data,
            dataset_name=data,
            metric_type=score.name,
            metric_value=round(score.value, 6),
        )
        for score in card.scores
    ]


def without_paths(settings: Any) -> Any:
    """Settings of a run in which an absolute path is shortened to its last part."""
    if isinstance(settings, Mapping):
        return {key: without_paths(value) for key, value in settings.items()}
    if isinstance(settings, Sequence) and not isinstance(settings, str):
        return [without_paths(value) for value in settings]
    return _last_part(settings) if isinstance(settings, str) else settings


def _last_part(text: str) -> str:
    """The name at the end of an absolute path, perhaps behind ``kind:``; other text as it is."""
    kind, colon, path = text.rpartition(":")
    return f"{kind}{colon}{PurePath(path).name}" if PurePath(path).is_absolute() else text


def _commit() -> str:
    """Commit of the checkout that sslkit runs from; nothing where it was installed."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        tracked = subprocess.run(
            ["git", "-C", str(here), "ls-files", "--error-unmatch", __file__],
            capture_output=True,
            check=False,
        )
        if tracked.returncode != 0:
            return ""
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""

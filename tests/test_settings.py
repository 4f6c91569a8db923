"""Settings as JSON and back, and what differs between two."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sslkit.training.settings import as_json, differences, from_json


@dataclass(frozen=True)
class Optim:
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Settings:
    steps: int = 9
    resume: bool = False
    output: Path = Path("runs")
    optim: Optim = field(default_factory=Optim)


OTHER = Settings(3, True, Path("a/b"), Optim(2.0, (0.5, 0.5), (1, 2)))


def test_a_round_trip_over_any_default() -> None:
    for default in (Settings(), OTHER):
        for settings in (Settings(), OTHER):
            assert from_json(as_json(settings), default) == settings


def test_a_field_that_is_not_there_is_the_defaults() -> None:
    older = json.dumps({"steps": 3, "optim": {"lr": 1}})
    restored = from_json(older, OTHER)
    assert restored == Settings(3, True, Path("a/b"), Optim(1.0, (0.5, 0.5), (1, 2)))
    assert type(restored.optim.lr) is float  # as JSON of others writes 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ("[1]", r"the text is no JSON object but \[1\]"),
        ('{"speed": 1}', "there is no setting speed"),
        ('{"optim": {"speed": 1}}', r"there is no setting optim\.speed"),
        ('{"optim": 1}', "optim is no JSON object but 1"),
        ('{"steps": [1]}', "steps: int"),
        ('{"optim": {"betas": 1}}', r"optim\.betas: .*not iterable"),
    ],
)
def test_what_is_no_such_text(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_json(text, Settings())


def test_differences_are_told_by_dotted_names() -> None:
    assert list(differences(OTHER, OTHER)) == []
    assert list(differences(Settings(), OTHER)) == [
        ("steps", 9, 3),
        ("resume", False, True),
        ("output", Path("runs"), Path("a/b")),
        ("optim.lr", 0.1, 2.0),
        ("optim.betas", (0.9, 0.999), (0.5, 0.5)),
        ("optim.sizes", (), (1, 2)),
    ]

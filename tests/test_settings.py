"""Settings as JSON and back, and what differs between two."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

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
    mode: Literal["fast", "slow"] = "fast"
    optim: Optim = field(default_factory=Optim)


OTHER = Settings(3, True, Path("a/b"), "slow", Optim(2.0, (0.5, 0.5), (1, 2)))


def test_a_round_trip_over_any_default() -> None:
    for default in (Settings(), OTHER):
        for settings in (Settings(), OTHER):
            assert from_json(as_json(settings), default) == settings


def test_a_field_that_is_not_there_is_the_defaults() -> None:
    older = json.dumps({"steps": 3, "optim": {"lr": 1}})
    restored = from_json(older, OTHER)
    assert restored == Settings(3, True, Path("a/b"), "slow", Optim(1.0, (0.5, 0.5), (1, 2)))
    assert type(restored.optim.lr) is float  # as JSON of others writes 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ("[1]", "the text is not a JSON object but a list"),
        ("[" * 100_000, "the text is nested too deep"),
        ('{"speed": 1}', "there is no setting speed"),
        ('{"optim": {"speed": 1}}', r"there is no setting optim\.speed"),
        ('{"optim": 1}', "optim is not a JSON object but 1"),
        ('{"steps": [1]}', "steps: expected int, found a list"),
        ('{"steps": true}', "steps: expected int, found True"),
        ('{"steps": 1.5}', "steps: expected int, found 1.5"),
        ('{"steps": "9"}', "steps: expected int, found '9'"),
        ('{"steps": 1' + 30 * "0" + "}", "steps: expected int, found a number of too many digits"),
        ('{"resume": "false"}', "resume: expected bool, found 'false'"),
        ('{"output": 1}', "output: expected Path, found 1"),
        ('{"mode": "fastest"}', r"mode: expected Literal\['fast', 'slow'\], found 'fastest'"),
        ('{"mode": ["fast"]}', r"mode: expected Literal\['fast', 'slow'\], found a list"),
        ('{"optim": {"lr": NaN}}', r"optim\.lr: expected float, found nan"),
        ('{"optim": {"lr": null}}', r"optim\.lr: expected float, found None"),
        ('{"optim": {"betas": 1}}', r"optim\.betas: expected tuple\[float, float\], found 1"),
        ('{"optim": {"betas": [1]}}', r"optim\.betas: expected tuple\[float, float\], found a"),
        ('{"optim": {"sizes": "12"}}', r"optim\.sizes: expected tuple\[int, \.\.\.\], found '12'"),
        ('{"optim": {"sizes": ["1"]}}', r"optim\.sizes: expected int, found '1'"),
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
        ("mode", "fast", "slow"),
        ("optim.lr", 0.1, 2.0),
        ("optim.betas", (0.9, 0.999), (0.5, 0.5)),
        ("optim.sizes", (), (1, 2)),
    ]

"""Presets of Franca: the recipe takes each of them, its networks can be built, the guide has it."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sslkit.recipes.franca.checks import check
from sslkit.recipes.franca.presets import PRESETS
from sslkit.recipes.franca.recipe import FrancaNetwork, schedule
from sslkit.recipes.franca.settings import PresetName

RECIPE_PAGE = Path(__file__).parents[1] / "docs" / "recipe.md"


@pytest.mark.parametrize("name", PRESETS)
def test_the_recipe_takes_every_preset(name: PresetName) -> None:
    settings = PRESETS[name]
    assert settings.preset == name
    if settings.init.crops == "file":  # it needs weights to begin with
        settings = replace(settings, init=replace(settings.init, crops="settings"))
    assert check(settings, world_size=1) == []
    with torch.device("meta"):
        for stage in ("pretrain", "highres"):
            network = FrancaNetwork(settings.model, settings.global_size(stage))
            assert network.dino_head.num_prototypes_per_level[-1] == settings.model.num_prototypes


@pytest.mark.parametrize("name", PRESETS)
def test_the_guide_has_every_preset(name: PresetName) -> None:
    assert f"\n| `{name}` | " in RECIPE_PAGE.read_text()


def test_photos_is_as_its_comments_say() -> None:
    settings = PRESETS["photos"]
    with torch.device("meta"):
        network = FrancaNetwork(settings.model, settings.crops.global_size)
    encoder, heads = network.backbone, (network.dino_head, network.ibot_head)
    assert (encoder.embed_dim, encoder.depth, encoder.grid_size) == (384, 12, (16, 16))
    assert encoder.vit.blocks[0].ls1.init_values == 0.1
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(22, abs=0.5)
    in_heads = sum(p.numel() for head in heads for p in head.parameters())
    assert in_heads / 1e6 == pytest.approx(16, abs=0.5)
    rows = 2 * settings.batch_size + settings.targets.queue
    assert rows == 2 * settings.model.num_prototypes
    assert settings.steps * settings.batch_size == pytest.approx(5e6, rel=0.05)
    assert schedule(1999, settings).lr == pytest.approx(5e-4)
    assert schedule(0, settings).teacher_temperature == 0.04
    assert schedule(15_000, settings).teacher_temperature == 0.04
    momentum = settings.optim.momentum[0]
    assert 1 / (1 - momentum) == pytest.approx(500)
    # The queue is far younger than the teacher's memory.
    steps_in_queue = settings.targets.queue / (2 * settings.batch_size)
    assert steps_in_queue == 3
    # A micro-batch of the second stage has no more patches than one of the first.
    patches = [
        batch * (2 * (size // 14) ** 2 + settings.crops.num_local * (local // 14) ** 2)
        for batch, size, local in (
            (settings.batch_size, settings.crops.global_size, settings.crops.local_size),
            (
                settings.highres.batch_size,
                settings.highres.global_size,
                settings.highres.local_size,
            ),
        )
    ]
    assert patches[1] <= patches[0]
    assert math.isclose(settings.highres.steps / settings.steps, 0.05)

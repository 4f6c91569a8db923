"""Proposals: which preset for which data and machine, and that the recipe takes all of them."""

import re
import shlex
from pathlib import Path

import pytest

from sslkit.backbones import create, save
from sslkit.data.examination import Examination, ExaminedSplit, Spread
from sslkit.data.unreadable import Unreadable
from sslkit.recipes.franca import proposal
from sslkit.recipes.franca.presets import PRESETS
from sslkit.recipes.franca.proposal import GIB, Machine, Proposal, propose
from tests.recipe import check, parse

LAPTOP = Machine(cores=2)


def with_gpu(gib: int, number: int = 1) -> Machine:
    return Machine(cores=16, gpu="GPU", gpu_memory=gib * GIB, num_gpus=number)


def split(
    count: int | None, side: int, channels: int = 3, num_unreadable: int = 0
) -> ExaminedSplit:
    num_read = 500 if count is None else min(count, 20_000)
    broken = Unreadable(0, "a.jpg", "the file is empty (0 bytes)")
    readable = num_read > num_unreadable
    sides = Spread(side, side, 2 * side) if readable else None
    return ExaminedSplit(
        num_images=count,
        num_read=num_read,
        width=sides,
        height=sides,
        shorter_side=sides,
        aspect=Spread(1, 1, 2) if readable else None,
        channels={channels: num_read - num_unreadable} if readable else {},
        num_classes=0,
        class_names=None,
        label_counts={-1: num_read},
        all_labels_known=True,
        num_unreadable=num_unreadable,
        unreadable=(broken,) * min(num_unreadable, 5),
        num_copies=0,
    )


def found(
    count: int | None,
    side: int,
    *,
    channels: int = 3,
    test_channels: int = 3,
    num_unreadable: int = 0,
    num_leaked: int = 0,
    data: str = "images",
) -> Examination:
    return Examination(
        data=data,
        train=split(count, side, channels, num_unreadable),
        test=split(20, side, test_channels),
        divided=True,
        test_fraction=0.1,
        seed=0,
        annotations=(),
        num_leaked=num_leaked,
        copies=(),
    )


def value_of(proposed: Proposal, flag: str) -> str | None:
    return next((choice.value for choice in proposed.choices if choice.flag == flag), None)


@pytest.mark.parametrize(
    ("count", "side", "machine", "preset"),
    [
        (20_000, 32, LAPTOP, "cifar10"),
        (20_000, 32, with_gpu(80), "cifar10"),
        (300, 32, LAPTOP, "cifar10"),  # weights of 224 pixels know nothing of thumbnails
        (999, 400, LAPTOP, "adapt"),
        (999, 400, with_gpu(24), "adapt"),
        (1000, 400, LAPTOP, "cifar10"),
        (1000, 400, with_gpu(24), "photos"),
        (1000, 400, with_gpu(2), "cifar10"),
        (2_000_000, 400, with_gpu(80), "photos"),
        (2_000_000, 400, with_gpu(80, 8), "vitb14_in21k"),
        (None, 400, with_gpu(80), "photos"),
    ],
)
def test_the_preset_follows_from_images_and_machine(
    count: int | None, side: int, machine: Machine, preset: str
) -> None:
    assert value_of(propose(found(count, side), machine), "--preset") == preset


COUNTS = (2, 17, 999, 1500, 60_000, None)
SIDES = (1, 28, 47, 63, 64, 130, 187, 210, 300, 4096)
MACHINES = (LAPTOP, with_gpu(4), with_gpu(24), with_gpu(140, 8))


@pytest.fixture
def small_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small network with the patches of the weights that are proposed."""
    path = str(tmp_path / "weights.safetensors")
    save(create("sslkit_vit_micro", patch_size=14, img_size=56), path)
    monkeypatch.setattr(proposal, "SMALL_WEIGHTS", path)
    return path


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_the_recipe_takes_every_proposal(
    machine: Machine, small_weights: str, tmp_path: Path
) -> None:
    """The command is parsed and checked as in a run; commands that differ in little, once."""
    seen = set()
    for count in COUNTS:
        for side in SIDES:
            proposed = propose(found(count, side), machine)
            flags = [c for c in proposed.choices if c.flag not in ("--steps", "--batch-size")]
            key = tuple((choice.flag, choice.value) for choice in flags)
            if key in seen:
                continue
            seen.add(key)
            words = shlex.split(proposed.command().replace("\\\n", " "))
            assert words[:3] == ["sslkit", "run", "franca"]
            settings = parse([*words[3:], "--output", str(tmp_path / f"{len(seen)}")])
            check(settings)
            batch = settings.batch_size
            assert count is None or batch <= count
            if settings.preset != "vitb14_in21k":
                rows = 2 * batch + settings.targets.queue
                assert settings.model.num_prototypes <= max(rows, 32)
            assert all(choice.reason for choice in proposed.choices)


def test_photographs_on_one_gpu_are_what_the_preset_is_for() -> None:
    """Nothing has to be changed but what depends on the number of images."""
    proposed = propose(found(50_000, 480), with_gpu(16))
    preset = PRESETS["photos"]
    assert value_of(proposed, "--crops.global-size") == str(preset.crops.global_size)
    assert value_of(proposed, "--crops.local-size") == str(preset.crops.local_size)
    assert value_of(proposed, "--highres.global-size") == str(preset.highres.global_size)
    assert value_of(proposed, "--batch-size") == str(preset.batch_size)
    assert value_of(proposed, "--model.num-prototypes") == str(preset.model.num_prototypes)
    assert value_of(proposed, "--steps") == str(preset.steps)
    assert value_of(proposed, "--accumulation") is None


def test_memory_decides_about_the_micro_batches() -> None:
    counts = [
        int(value_of(propose(found(50_000, 480), with_gpu(gib)), "--accumulation") or 4)
        for gib in (4, 8, 16, 32, 80)
    ]
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[-1]) == (32, 1), counts


def test_fewer_images_get_fewer_prototypes_and_more_passes() -> None:
    few, many = (propose(found(count, 480), with_gpu(24)) for count in (1200, 50_000))
    assert value_of(few, "--model.num-prototypes") == "256"
    assert value_of(many, "--model.num-prototypes") == "1024"
    assert int(value_of(few, "--steps") or 0) < int(value_of(many, "--steps") or 0)
    assert re.fullmatch(r"7\d\d passes over the images", few.choices[-1].reason)


def test_small_patches_keep_what_the_preset_says_of_the_network() -> None:
    settings = value_of(propose(found(5000, 128), with_gpu(24)), "--model.backbone-settings")
    assert settings is not None
    own = PRESETS["photos"].model.backbone_settings.strip("{}")
    assert own in settings
    assert '"patch_size": 8' in settings


def test_images_too_small_for_a_second_stage() -> None:
    proposed = propose(found(5000, 24), LAPTOP)
    assert value_of(proposed, "--highres.global-size") == "24"
    proposed = propose(found(5000, 18), LAPTOP)
    assert value_of(proposed, "--stages") == "pretrain rasa evaluate report"


def test_channels_and_division_are_passed_on() -> None:
    bands = found(300, 80, channels=5, test_channels=5)
    assert value_of(propose(bands, LAPTOP), "--model.in-chans") == "5"
    other = Examination(**{**vars(bands), "test_fraction": 0.25, "seed": 3})
    assert value_of(propose(other, LAPTOP), "--test-fraction") == "0.25"
    assert value_of(propose(other, LAPTOP), "--seed") == "3"


@pytest.mark.parametrize(
    ("data", "folder"),
    [
        ("/data/my images/", "runs/my-images"),
        ("cifar10.npz", "runs/cifar10"),
        ("hf:uoft-cs/cifar100#label=fine_label", "runs/cifar100"),
        ("train-{000000..000099}.tar", "runs/train-000000..000099"),
        ("/", "runs/franca"),
    ],
)
def test_the_output_is_named_after_the_data(data: str, folder: str) -> None:
    proposed = propose(found(5000, 300, data=data), LAPTOP)
    assert proposed.output == folder
    words = shlex.split(proposed.command().replace("\\\n", " "))
    assert words[words.index("--data") + 1] == data


def test_lines_are_short_enough_to_copy() -> None:
    command = propose(found(5000, 128), with_gpu(8)).command(width=80)
    assert max(map(len, command.splitlines())) <= 80
    assert command.count("--crops.global-size") == 1


def test_what_a_user_should_know() -> None:
    text = " ".join(propose(found(500, 300, num_unreadable=50, num_leaked=3), LAPTOP).remarks)
    assert "10.0% of the training images are unreadable, and a run stops above 5%" in text
    assert "3 test images are copies of training images" in text
    assert "no k-NN score" in text
    text = " ".join(propose(found(5000, 300), with_gpu(80, 4)).remarks)
    assert "torchrun --standalone --nproc-per-node 4" in text


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (found(30, 300, num_unreadable=30), "none of the 30 .* is readable, such as a.jpg: the fi"),
        (found(3000, 300, channels=1), r"the images have 1, 3 channels"),
    ],
)
def test_what_nothing_can_be_proposed_for(images: Examination, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        propose(images, LAPTOP)

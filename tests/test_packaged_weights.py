"""sslkit:NAME: weights of the package, how they are made, and every network that is there."""

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import release_weights
from sslkit import MatryoshkaProjector, backbones
from sslkit.backbones import packaged
from sslkit.commands.main import run as sslkit_command
from sslkit.data.crops import MultiCrop
from sslkit.data.scenes import Scenes
from sslkit.evaluation.augmented import view_features
from sslkit.evaluation.knn import knn_accuracy
from sslkit.evaluation.models import open_model
from sslkit.evaluation.subject import Subject
from sslkit.export.beside import read_run


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run of a tiny network; the package's weights are in a folder of the test."""
    monkeypatch.setattr(packaged, "FOLDER", tmp_path / "weights")
    monkeypatch.setattr(release_weights, "FOLDER", tmp_path / "weights")
    folder = tmp_path / "run"
    torch.manual_seed(7)
    encoder = backbones.create("sslkit_vit_micro", img_size=16)
    head = MatryoshkaProjector(encoder.embed_dim, 64, hidden_dim=16, bottleneck_dim=8)
    settings = {"data": "/home/somebody/cifar10.npz", "steps": 40}
    metadata = {"stage": "pretrain", "step": "40", "settings": json.dumps(settings)}
    backbones.save(encoder, folder / "pretrain.safetensors", metadata, heads={"dino_head": head})
    (folder / "results.json").write_text(
        json.dumps({"knn": {"pretrain": 0.5}, "intervals": {"knn": {"pretrain": [0.4, 0.6]}}})
    )
    (folder / "commands.sh").write_text("sslkit run franca --preset cifar10 --output run\n")
    return folder


def release(run: Path, name: str = "cifar10", *more: str) -> Path:
    words = [str(run), "--name", name, "--license", "apache-2.0", "--dataset", "cifar10"]
    release_weights.main([*words, "--commands", str(run / "commands.sh"), *more])
    return packaged.FOLDER / name


def test_a_released_network_is_read_by_its_name(run):
    folder = release(run)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "model.safetensors"]
    expected = backbones.load_pretrained(run / "pretrain.safetensors")
    found = backbones.load_pretrained("sslkit:cifar10", img_size=16)
    assert found.report.paths == (folder / "model.safetensors",)
    for one, other in (
        (found.encoder, expected.encoder),
        (found.heads["dino_head"], expected.heads["dino_head"]),
    ):
        state = other.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in one.state_dict().items())
    assert torch.equal(backbones.load("sslkit:cifar10").mask_token, expected.encoder.mask_token)
    fresh = backbones.load("random:sslkit:cifar10")
    assert fresh.settings == expected.encoder.settings
    key = "vit.blocks.0.attn.qkv.weight"
    assert not torch.equal(fresh.state_dict()[key], expected.encoder.state_dict()[key])
    assert open_model("sslkit:cifar10").name == "sslkit:cifar10"
    assert open_model("mine=sslkit:cifar10").name == "mine"


def test_the_card_has_numbers_and_commands_and_no_path_of_the_machine(run):
    folder = release(run)
    card = (folder / "README.md").read_text()
    assert "# sslkit:cifar10" in card
    assert "| k-NN accuracy | 0.5000 | 0.4000 to 0.6000 |" in card
    assert "```bash\nsslkit run franca --preset cifar10 --output run\n```" in card
    assert "license: apache-2.0" in card
    assert 'backbones.load("sslkit:cifar10")' in card
    assert '"data": "cifar10.npz"' in card
    stored = (folder / "model.safetensors").read_bytes()
    assert b"somebody" not in stored + card.encode()
    assert json.loads(read_run("sslkit:cifar10")["settings"])["data"] == "cifar10.npz"


def test_scores_of_evaluations_join_those_of_the_run(run):
    words = ["evaluate", "rankme", "--weights", f"mine={run / 'pretrain.safetensors'}"]
    words += ["--data", "scenes", "--num-scenes", "12", "--scene-size", "20"]
    sslkit_command([*words, "--global-size", "16", "--output", str(run / "eval")])
    results = str(run / "eval" / "results.json")
    card = (release(run, "b", "--results", results, "--model", "mine") / "README.md").read_text()
    assert "| k-NN accuracy | 0.5000 |" in card
    assert re.search(r"\| rankme RankMe \| \d", card)


def test_what_cannot_be_released(run, monkeypatch):
    with pytest.raises(SystemExit, match="--name 'A b' must be of small letters"):
        release(run, "A b")
    with pytest.raises(SystemExit, match="has no scores of 'other'"):
        release(run, "c", "--results", str(run / "results.json"), "--model", "other")
    monkeypatch.setattr(release_weights, "MOST_BYTES", 1000)
    with pytest.raises(SystemExit, match=r"pretrain.safetensors has 0\.\d MB"):
        release(run)
    (run / "results.json").unlink()
    with pytest.raises(SystemExit, match=r"no results at .*: a model card needs numbers"):
        release(run)
    assert not packaged.FOLDER.exists()


def test_evaluate_takes_the_name(run, tmp_path, capsys):
    release(run)
    words = ["evaluate", "knn", "--weights", "sslkit:cifar10", "random:sslkit:cifar10"]
    words += ["--data", "scenes", "--num-scenes", "24", "--scene-size", "20", "--ks", "5"]
    sslkit_command([*words, "--num-resamples", "20", "--output", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["models"] == ["sslkit:cifar10", "random"]
    assert sslkit_command(["backbones", "sslkit:cifar10"]) == 0
    assert "dino_head: MatryoshkaProjector" in capsys.readouterr().out


def test_an_unknown_name_lists_those_that_there_are(run):
    with pytest.raises(FileNotFoundError, match="this version of sslkit comes without any"):
        backbones.load("sslkit:cifar10")
    release(run)
    release(run, "photos")
    assert packaged.packaged_names() == ["cifar10", "photos"]
    second = packaged.FOLDER / "photos" / "model.safetensors"
    assert backbones.load_pretrained("sslkit:photos").report.paths == (second,)
    message = (
        r"no weights 'sslkit:cifar': did you mean sslkit:cifar10\? sslkit comes with "
        "sslkit:cifar10, sslkit:photos"
    )
    with pytest.raises(FileNotFoundError, match=message):
        backbones.load("sslkit:cifar")
    with pytest.raises(FileNotFoundError, match=r"'sslkit:\.\./x': sslkit comes with"):
        backbones.load("sslkit:../x")
    words = ["evaluate", "knn", "--weights", "sslkit:cifar", "--data", "scenes", "--output", "none"]
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        sslkit_command(words)
    with pytest.raises(FileNotFoundError, match="did you mean sslkit:cifar10"):
        backbones.load("sslki:cifar10")


# --- every network of the package ----------------------------------------------------------------


@pytest.mark.parametrize("name", packaged.packaged_names())
def test_a_packaged_network_is_small_and_documented(name):
    folder = packaged.FOLDER / name
    assert (folder / "model.safetensors").stat().st_size <= release_weights.MOST_BYTES
    card = (folder / "README.md").read_text()
    assert "## Scores" in card
    assert "## How it was made" in card
    assert "/home/" not in card
    assert all(
        isinstance(head, MatryoshkaProjector)
        for head in backbones.load_pretrained(f"sslkit:{name}").heads.values()
    )


@pytest.mark.parametrize("name", packaged.packaged_names())
def test_a_packaged_network_knows_images_again_better_than_fresh_weights(name):
    """What it was trained for: the nearest view to an augmented view is of the same image.

    Rendered scenes and seeds are fixed, so the result is the same each time but for rounding.
    """
    trained, fresh = (recognised(f"{kind}sslkit:{name}") for kind in ("", "random:"))
    assert trained > fresh + 0.1


def recognised(weights: str) -> float:
    """Share of images one of whose augmented views has another as its nearest neighbour."""
    encoder = backbones.load(weights).eval()
    size = min(encoder.img_size)
    images = Subject("", encoder, {"train": Scenes(60, size=(size, size))}, {}, global_size=size)
    crops = MultiCrop(global_size=size, global_scale=(0.5, 1.0))
    views = view_features(images, crops, num_images=60, num_views=2)
    own = torch.arange(60)
    return knn_accuracy(views[:, 0], own, views[:, 1], own, ks=(1,))[1]

"""Runs of every stage of the recipe, on rendered scenes and on a user's own images."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sslkit import backbones
from sslkit.commands.main import run as sslkit_command
from sslkit.evaluation.floor import Pixels
from sslkit.rasa import load_rasa
from sslkit.recipes.shared import online_knn
from sslkit.recipes.shared.evaluation import subject
from sslkit.training import Run
from sslkit.training.checkpoint import Checkpoints
from sslkit.training.data import open_sources
from sslkit.training.metrics import read_metrics
from tests.recipe import ALONE, main, parse, saved_tensors, smoke


def evaluation(words: list[str]) -> int:
    return sslkit_command(["evaluate", *words])


SHORT = "--steps 4 --highres.steps 2 --evaluation.num-train 40 --evaluation.num-test 20"
SHORT += " --evaluation.num-dense 20 --evaluation.online-train 40 --evaluation.online-test 20"
SHORT += " --evaluation.online-every 2 --rasa.num-images 20 --rasa.num-iterations 2"
FIGURES = {
    *("losses", "online_knn", "matryoshka", "crops_and_masks", "mask_exposure", "attention"),
    *("pca", "rasa", "cluster_entropy"),
}
LEVELS = [f"{kind}/level_{level}" for kind in ("dino", "ibot") for level in range(5)]


def run_all(output: Path, *arguments: str) -> None:
    main(smoke(output, *SHORT.split(), *arguments))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    run_all(output)
    return output


def figures(output: Path) -> set[str]:
    """The pictures that the report shows, each of them read and not of one colour."""
    names = set()
    for path in (output / "figures").iterdir():
        pixels = np.asarray(Image.open(path).convert("L"))
        assert pixels.shape[1] > 400, path
        assert pixels.std() > 5, path
        assert f"figures/{path.name}" in (output / "report.md").read_text()
        names.add(path.stem)
    return names


def test_encoders_are_exported_with_their_settings(finished: Path) -> None:
    images = torch.rand(2, 3, 32, 48)
    outputs = {}
    for stage in ("pretrain", "highres", "rasa"):
        path = finished / f"{stage}.safetensors"
        assert backbones.read_metadata(path)["stage"] == stage
        with torch.no_grad():
            outputs[stage] = backbones.load(path).eval()(images).patches
        assert outputs[stage].shape == (2, 8, 12, 32)
    settings = json.loads(backbones.read_metadata(finished / "pretrain.safetensors")["settings"])
    assert (settings["steps"], settings["model"]["backbone"]) == (4, "sslkit_vit_micro")
    assert not torch.equal(outputs["pretrain"], outputs["highres"])
    assert not torch.allclose(outputs["highres"], outputs["rasa"])
    projector = load_rasa(finished / "rasa_projector.safetensors")
    torch.testing.assert_close(projector(outputs["highres"]), outputs["rasa"], atol=1e-5, rtol=1e-4)


def test_the_evaluation_command_takes_what_a_run_leaves(finished: Path, tmp_path: Path) -> None:
    words = ["position", "--hidden-dim", "0", "--data", "scenes", "--num-scenes", "24"]
    words += ["--weights", str(finished / "highres.safetensors"), "--output", str(tmp_path)]
    evaluation([*words, "--rasa", str(finished / "rasa_projector.safetensors")])
    scores = json.loads((tmp_path / "results.json").read_text())["protocols"]["position"]
    assert set(scores["highres + RASA"]["scores"]) == {"linear R²", "before RASA: linear R²"}


@pytest.mark.parametrize("stage", ["pretrain", "highres"])
def test_checkpoints_hold_the_heads(finished: Path, stage: str) -> None:
    state = saved_tensors(Checkpoints(finished / stage / "checkpoints").latest())
    for network in ("student", "teacher"):
        for head in ("dino_head", "ibot_head"):
            sizes = [len(state[f"{network}.{head}.prototypes.{i}.weight"]) for i in range(5)]
            assert sizes == [4, 8, 16, 32, 64]
    exported = backbones.load(finished / f"{stage}.safetensors").state_dict()
    for name, value in exported.items():
        assert torch.equal(value, state[f"teacher.backbone.{name}"]), name


def test_metrics_have_everything_that_is_watched(finished: Path) -> None:
    rows = read_metrics(finished / "pretrain" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    expected = {"step", "loss", "loss/koleo", "lr", "last_layer_lr", "weight_decay", "momentum"}
    expected |= {"teacher_temperature", "student_temperature", "images_per_second", "feature_std"}
    expected |= {"backbone_lr_scale"}
    expected |= {f"gradient_norm/{name}" for name in ("backbone", "dino_head", "ibot_head")}
    expected |= {
        f"{kind}{name}"
        for name in LEVELS
        for kind in ("loss/", "target_entropy/", "prototypes_used/")
    }
    weights = json.loads((finished / "settings.json").read_text())["losses"]
    for row in rows:
        knn = {"knn/20", "rankme", "lidar"} if row["step"] % 2 == 0 else set()
        timed = {"loader_images_per_second", "data_wait"} if row["step"] > 1 else set()
        assert set(row) == expected | knn | timed
        assert all(math.isfinite(value) for value in row.values())
        terms = [weights[name.split("/")[0]] * row[f"loss/{name}"] for name in (*LEVELS, "koleo")]
        assert row["loss"] == pytest.approx(sum(terms), rel=1e-5)
    assert list((finished / "pretrain" / "tensorboard").glob("events.out.tfevents.*"))


def test_results_have_every_score_of_every_stage(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    stages = {"random init", "pretrain", "highres", "rasa"}
    scores = {"knn", "online_knn", "matryoshka", "in_context", "position_r2"}
    assert set(results) == scores | {"intervals", "test_images", "chance"}
    assert results["test_images"] == dict.fromkeys(("knn", "in_context", "position_r2"), 20)
    assert results["chance"] == {"knn": pytest.approx(1 / 12)}
    for score, intervals in results["intervals"].items():
        for model, (low, high) in intervals.items():
            assert low <= results[score][model] <= high
    assert set(results["online_knn"]) == {"raw pixels", "standardised pixels", "random init"}
    assert set(results["knn"]) == stages | {"raw pixels", "standardised pixels"}
    for score in ("matryoshka", "in_context", "position_r2"):
        assert set(results[score]) == stages, score
    for stage in stages:
        curve = results["matryoshka"][stage]
        assert list(curve) == ["2", "4", "8", "16", "32"]
        assert curve["32"] == results["knn"][stage]  # all features
        assert 0 <= results["in_context"][stage] <= 1
        assert results["position_r2"][stage] <= 1


def test_the_report_shows_every_figure(finished: Path) -> None:
    assert figures(finished) == FIGURES
    page = (finished / "report.md").read_text()
    assert re.search(r"model\.backbone\s+sslkit_vit_micro", page)
    assert "| position R2, before -> after RASA |" in page
    assert "| Score | Value [95 % interval over test images] |" in page
    assert "| k-NN accuracy (k = 20) | 20 test images, chance 8.3 % |" in page
    assert re.search(r"\| - pretrain \| [\d.]+ % \[[\d.]+, [\d.]+\] \|", page)


def test_report_and_evaluate_can_be_run_alone(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (finished / "report.md").unlink()
    results = (finished / "results.json").read_text()
    (finished / "results.json").unlink()
    main(["--output", str(finished), "--stages", "evaluate"])
    assert (finished / "results.json").read_text() == results  # it is a function of the weights
    main(["--output", str(finished), "--stages", "report"])
    assert figures(finished) == FIGURES
    printed = capsys.readouterr().out
    for row in (
        "k-NN accuracy (k = 20)",
        "k-NN accuracy by embedding size (highres)",
        "in-context segmentation, mIoU",
        "position R2, before -> after RASA",
    ):
        assert f"\n{row} " in printed
    assert f"report: {finished / 'report.md'}" in printed


def test_a_report_of_older_scores_is_refused(finished: Path) -> None:
    path = finished / "results.json"
    before = path.read_text()
    try:
        for lost, words in (("rasa", "rasa"), (None, "the intervals of scores")):
            results = json.loads(before)
            del (results["position_r2"] if lost else results)[lost or "intervals"]
            path.write_text(json.dumps(results))
            with pytest.raises(SystemExit, match=f"is older than {words}; run --stages evaluate"):
                main(["--output", str(finished), "--stages", "report"])
    finally:
        path.write_text(before)


def test_a_rasa_of_an_older_encoder_is_refused(finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    path = output / "rasa.safetensors"
    described = {"stage": "rasa", "of": "pretrain", "position_errors": "[0.1]"}
    backbones.save(backbones.load(path), path, described)
    for stage in ("evaluate", "report"):
        with pytest.raises(SystemExit, match="was fitted on pretrain, and highres has been"):
            main(["--output", str(output), "--stages", stage])


def write_images(folder: Path, count: int) -> None:
    """Not square, of different sizes, grey and colour, the first of them broken."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i in range(count):
        shape = (40 + i, 60, 3) if i % 2 else (40 + i, 60)
        pixels = generator.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "0.png").write_bytes(b"no image")


def test_a_folder_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images"
    write_images(folder / "train", 24)
    write_images(folder / "test", 10)
    output = tmp_path / "run"
    stages = ("--stages", "pretrain", "rasa", "evaluate", "report")
    arguments = ("--data", str(folder), *stages, "--batch-size", "4")
    with pytest.warns(RuntimeWarning, match=r"skipped unreadable image .*0\.png"):
        run_all(output, *arguments, "--accumulation", "2")
    printed = capsys.readouterr().out
    assert "KoLeo sees the neighbours within each micro-batch" in printed
    assert "k-NN" not in printed
    assert "position R2, before -> after RASA" in printed
    results = json.loads((output / "results.json").read_text())
    assert (results["knn"], results["in_context"]) == ({}, {})
    assert set(results["position_r2"]) == {"random init", "pretrain", "rasa"}
    assert figures(output) == FIGURES - {"online_knn", "matryoshka"}
    rows = read_metrics(output / "pretrain" / "metrics.jsonl")
    assert not any("knn/20" in row for row in rows)
    assert 1 <= rows[-1]["rankme"] <= 23  # images that can be read; there are 32 features
    assert 1 <= rows[-1]["lidar"] <= 22


def test_an_array_file_with_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    path = tmp_path / "images.npz"
    labels = generator.integers(0, 3, 60)
    images = generator.integers(0, 80, (60, 24, 32, 3), dtype=np.uint8)
    images[np.arange(60), ..., labels] += 120  # a class is a colour
    np.savez(path, images=images, labels=labels)
    output = tmp_path / "run"
    stages = ("--stages", "pretrain", "evaluate", "report")
    run_all(output, "--data", str(path), "--test-fraction", "0.3", *stages)
    results = json.loads((output / "results.json").read_text())
    assert results["knn"]["raw pixels"] == 1.0
    assert results["in_context"] == {}
    assert "k-NN accuracy (k = 20)  " in capsys.readouterr().out
    assert figures(output) == FIGURES - {"rasa", "cluster_entropy"}


@pytest.mark.parametrize(
    ("test_labels", "warning"),
    [([0, -1, 1, 1], "1 of 4 items have no label"), ([-1] * 4, "no online k-NN: none of the sam")],
    ids=["some", "none"],
)
def test_online_scores_of_images_of_which_some_have_labels(
    test_labels: list[int], warning: str, tmp_path: Path
) -> None:
    images = np.random.default_rng(0).integers(0, 255, (28, 32, 32, 3), dtype=np.uint8)
    train = np.arange(24) % 2
    train[::3] = -1
    arrays = {"train_images": images[:24], "test_images": images[24:]}
    labels = {"train_labels": train, "test_labels": np.array(test_labels)}
    np.savez(tmp_path / "images.npz", **arrays, **labels)
    output, data = tmp_path / "run", str(tmp_path / "images.npz")
    words = "--stages pretrain --steps 1 --evaluation.online-every 1 --evaluation.knn 3"
    with pytest.warns(UserWarning, match=warning):
        run_all(output, "--data", data, *words.split())
    (row,) = read_metrics(output / "pretrain" / "metrics.jsonl")
    assert ("knn/3" in row) == (max(test_labels) >= 0)


def test_broken_images_do_not_stop_the_scores_of_pixels(tmp_path: Path) -> None:
    for label in ("a", "b"):
        write_images(tmp_path / label, 12)
    words = ("--data", str(tmp_path), "--test-fraction", "0.4", "--evaluation.knn", "3")
    settings = parse(smoke(tmp_path, *words))
    sources = open_sources(Run(settings, ALONE))
    for pixels in (Pixels(), Pixels(standardised=False)):
        with pytest.warns(UserWarning, match="could not be read"):
            [score] = online_knn(
                pixels, Run(settings, ALONE), sources, 32, settings.evaluation
            ).values()
        assert 0 <= score <= 1


@pytest.mark.parametrize(("num_scenes", "num_workers"), [(799, 0), (800, 3)])
def test_large_samples_are_read_by_the_workers_of_the_run(
    num_scenes: int, num_workers: int, tmp_path: Path
) -> None:
    words = ("--num-scenes", str(num_scenes), "--workers", "3")
    settings = parse(smoke(tmp_path, *words))
    run = Run(settings, ALONE)
    counts = (900, 200)  # the first is more than there are
    images = subject(Pixels(), run, open_sources(run), 32, counts, settings.evaluation)
    assert images.num_workers == num_workers


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_online_knn_encodes_in_the_precision_of_the_training(precision, tmp_path: Path) -> None:
    settings = parse(smoke(tmp_path, "--device", "cpu", "--precision", precision))
    run, products = Run(settings, ALONE), []

    class Encoder(Pixels):
        def forward(self, images):
            products.append((images.flatten(1) @ images.flatten(1).T).dtype)
            return super().forward(images)

    [score] = online_knn(Encoder(), run, open_sources(run), 32, settings.evaluation).values()
    assert set(products) == {getattr(torch, precision)}
    assert 0 <= score <= 1
    assert not torch.is_autocast_enabled("cpu")

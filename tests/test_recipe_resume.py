"""A run of the recipe that is killed, resumed, poisoned or watched ends where it should."""

import json
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sslkit import backbones
from sslkit.recipes.franca.recipe import STAGES, Franca
from sslkit.training.checkpoint import Checkpoints, step_of
from sslkit.training.metrics import read_metrics
from tests.recipe import (
    RECIPE,
    last_step,
    main,
    saved_tensors,
    smoke,
    start_process,
    stored_settings,
)

# Stochastic depth makes the weights depend on the random state; EMACentering adds a state.
TRAINING = "--stages pretrain highres --model.drop-path-rate 0.3 --targets.kind centering"
TRAINING += " --checkpoint-every 3 --highres.steps 5 --evaluation.num-train 20"
TRAINING += " --evaluation.online-train 20 --evaluation.online-test 10 --evaluation.knn 5"
ENDS = {"pretrain": 12, "highres": 5}


def train(output: Path, *arguments: str) -> Path:
    main(smoke(output, *TRAINING.split(), *arguments))
    return output


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("uninterrupted") / "run")


def assert_same_run(output: Path, expected: Path, *, stages: dict[str, int] = ENDS) -> None:
    """The last checkpoint, the exported encoder and the metrics, bit by bit."""
    for stage, last in stages.items():
        states = []
        for run in (output, expected):
            checkpoints = Checkpoints(run / stage / "checkpoints")
            assert checkpoints.latest() == checkpoints.directory / f"step_{last:08d}"
            states.append(saved_tensors(checkpoints.latest()))
        own, other = states
        assert own.keys() == other.keys()
        for name, value in own.items():
            assert torch.equal(value, other[name]), f"{stage}: {name}"
        assert {name.split(".")[0] for name in own} == {
            "student",
            "teacher",
            "targets",
            "optimizer",
        }

        name = f"{stage}.safetensors"
        own, other = (backbones.load(run / name).state_dict() for run in (output, expected))
        assert own.keys() == other.keys()
        assert all(torch.equal(own[key], other[key]) for key in own)

        own, other = (read_metrics(run / stage / "metrics.jsonl") for run in (output, expected))
        assert [row["step"] for row in own] == list(range(1, last + 1))
        for a, b in zip(own, other, strict=True):
            for row in (a, b):
                assert row.pop("images_per_second") != 0
                for timing in ("loader_images_per_second", "data_wait"):
                    row.pop(timing, None)
            assert a == b


def kill_after(
    output: Path, stage: str, step: int, *arguments: str, with_checkpoint: bool = False
) -> None:
    """Run the recipe in a process and SIGKILL it once it has logged ``step`` of ``stage``."""
    checkpoints = Checkpoints(output / stage / "checkpoints")
    process = start_process(smoke(output, *TRAINING.split(), *arguments))
    try:
        while last_step(output, stage) < step:
            assert process.poll() is None, f"the run ended before step {step} of {stage}"
            time.sleep(0.002)
        while with_checkpoint and checkpoints.latest() is None:
            assert process.poll() is None, f"the run ended without a checkpoint of {stage}"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_a_run_killed_four_times_ends_like_an_uninterrupted_one(
    uninterrupted: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    kill_after(output, "pretrain", 2)  # before the first checkpoint
    kill_after(output, "pretrain", 9, "--resume", "--workers", "1")  # while it writes one
    kill_after(output, "highres", 1, "--resume")
    kill_after(output, "highres", 3, "--resume", "--workers", "1", with_checkpoint=True)
    assert Checkpoints(output / "highres" / "checkpoints").latest() is not None
    train(output, "--resume", "--workers", "1")
    assert_same_run(output, uninterrupted)


def test_online_knn_does_not_disturb_the_training(uninterrupted: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    main(smoke(output, *TRAINING.split(), "--stages", "pretrain", "--evaluation.online-every", "3"))
    path = output / "pretrain" / "metrics.jsonl"
    rows = read_metrics(path)
    assert [row["step"] for row in rows if "knn/5" in row] == [3, 6, 9, 12]
    scores = ("knn/5", "rankme", "lidar")
    lines = [{k: v for k, v in row.items() if k not in scores} for row in rows]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert_same_run(output, uninterrupted, stages={"pretrain": 12})


def test_finished_stages_are_left_alone(
    uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("rank_*")}
    assert before
    train(uninterrupted, "--resume")
    assert capsys.readouterr().out.count("finished already") == 2
    assert before == {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("rank_*")}


def test_a_resumed_run_needs_no_settings_but_the_output(
    uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--output", str(uninterrupted), "--resume"])
    assert capsys.readouterr().out.count("finished already") == 2


def test_a_poisoned_weight_stops_the_run_by_name_and_spares_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_as_it_is = Franca.step

    def poisoned(self: Any, step: int, batch: Any, *, watch: bool) -> Any:
        if step == 4:
            with torch.no_grad():
                self.student.dino_head.prototypes[2].weight[0, 0] = torch.nan
        return step_as_it_is(self, step, batch, watch=watch)

    monkeypatch.setattr(Franca, "step", poisoned)
    with pytest.raises(SystemExit, match=r"error: step 4: not finite: dino/level_2,") as exit_:
        train(tmp_path / "run")
    assert "dino/level_1" not in str(exit_.value)
    assert "ibot" not in str(exit_.value).split("The step")[0]

    checkpoints = Checkpoints(tmp_path / "run" / "pretrain" / "checkpoints")
    assert step_of(checkpoints.latest()) == 3
    assert all(x.isfinite().all() for x in saved_tensors(checkpoints.latest()).values())
    assert not (tmp_path / "run" / "pretrain.safetensors").exists()
    monkeypatch.undo()
    train(tmp_path / "run", "--resume")


def test_a_collapsing_run_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A teacher that gives every image the uniform target.
    hot = "--stages pretrain --targets.start-temperature 100 --targets.temperature 100"
    few = ("--num-scenes", "6")  # and a batch of 8
    main(smoke(tmp_path / "run", *hot.split(), "--optim.lr-warmup", "0", *few))
    printed = capsys.readouterr().out.splitlines()
    warnings = [line for line in printed if line.startswith("warning: ")]
    assert [line for line in warnings if "larger" in line] == [
        "warning: the batch of 8 is larger than the data set: each step sees some of its 6 images "
        "more than once. Give at most 6, or more images"
    ]
    assert [line[:34] for line in warnings[1:]] == ["warning: step 3: uniform targets: "]
    assert all(len(line) <= 160 for line in warnings)


def test_a_healthy_run_warns_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(smoke(tmp_path / "run", "--stages", "pretrain", "--optim.lr-warmup", "0"))
    assert "warning: " not in capsys.readouterr().out


def test_resume_does_what_the_run_was_asked_for_with_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[tuple[str, int]] = []
    for name, stage in STAGES.items():

        def recorded(run: Any, name: str = name, stage: Any = stage) -> None:
            ran.append((name, run.settings.steps))
            if name in ("pretrain", "highres"):
                stage.run(run)
            else:
                Path(run.output, RECIPE.result(name)).write_text("{}")

        monkeypatch.setitem(STAGES, name, replace(stage, run=recorded))

    output = tmp_path / "run"
    words = "--steps 4 --checkpoint-every 2 --highres.steps 2 --stages pretrain highres evaluate"
    main(smoke(output, *words.split()))
    assert [name for name, _ in ran] == ["pretrain", "highres", "evaluate"]
    ran.clear()
    capsys.readouterr()

    # Interrupted in the second stage. Neither --steps nor --stages is said again.
    (output / "highres.safetensors").unlink()
    shutil.rmtree(output / "highres" / "checkpoints" / "step_00000002")
    for preset in ([], ["--preset", "smoke"]):
        main(["--output", str(output), "--resume", *preset])
        said = capsys.readouterr().out
        if not preset:
            expected = f"resuming {output}: highres (at step 0 of 2), evaluate. Data: scenes. Set"
            assert expected in said
            assert f"not given here come from {output}/settings.json" in said
            assert [name for name, _ in ran] == ["pretrain", "highres", "evaluate"]
        else:
            assert f"resuming {output}: all is finished." in said
            assert [name for name, _ in ran] == ["pretrain", "highres"]  # which see that they are
        assert {steps for _, steps in ran} == {4}
        ran.clear()

    # A later stage is one more that the run was asked for; one alone does not forget the others.
    main(["--output", str(output), "--stages", "rasa"])
    main(["--output", str(output), "--resume", "--stages", "pretrain"])
    stored = stored_settings(output).stages
    assert stored == ("pretrain", "highres", "rasa", "evaluate")
    ran.clear()
    main(["--output", str(output), "--resume"])  # the scores are older than RASA
    assert [name for name, _ in ran] == ["pretrain", "highres", "evaluate"]


def test_other_data_are_refused(tmp_path: Path) -> None:
    images, output = tmp_path / "images", tmp_path / "run"
    for i in range(60):
        (images / f"class {i % 2}").mkdir(parents=True, exist_ok=True)
        Image.effect_noise((32, 32), 50).convert("RGB").save(images / f"class {i % 2}" / f"{i}.png")
    words = ["--data", str(images), "--test-fraction", "0.4", "--steps", "2"]
    main(smoke(output, *words, "--checkpoint-every", "1", "--stages", "pretrain"))
    record = json.loads((output / "data.json").read_text())
    assert record["train"]["images"] + record["test"]["images"] == 60
    assert record["test"]["class_names"] == ["class 0", "class 1"]

    moved = tmp_path / "moved"
    images.rename(moved)
    moved.rename(images)
    main(["--output", str(output), "--resume"])  # the same

    (images / "class 0" / "0.png").unlink()
    (output / "pretrain.safetensors").rename(tmp_path / "export")
    shutil.rmtree(output / "pretrain" / "checkpoints" / "step_00000002")
    with pytest.raises(SystemExit, match=r"error: --data .*(train|test): \d+ images, now \d+"):
        main(["--output", str(output), "--resume"])
    (tmp_path / "export").rename(output / "pretrain.safetensors")
    with pytest.raises(SystemExit, match=r"is not what the run in .* began with"):
        main(["--output", str(output), "--stages", "evaluate"])
    (output / "pretrain.safetensors").unlink()
    main(["--output", str(output), "--resume", "--accept-changes"])
    assert json.loads((output / "data.json").read_text()) != record
    (output / "pretrain.safetensors").unlink()
    (output / "data.json").write_text("[")
    with pytest.raises(SystemExit, match=r"data\.json is not JSON: .*; restore it, or remove it"):
        main(["--output", str(output), "--resume"])

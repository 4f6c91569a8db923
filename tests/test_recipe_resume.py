"""A run of the recipe that is killed, resumed, poisoned or watched ends where it should."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sslkit.training.checkpoint import Checkpoints, step_of
from sslkit.training.metrics import read_metrics
from tests.recipe import last_step, recipe, saved_tensors, smoke, start_process

# Stochastic depth makes the weights depend on the random state; EMACentering adds a state.
TRAINING = "--stages pretrain highres --model.drop-path 0.3 --targets.kind centering"
TRAINING += " --checkpoint-every 3 --highres.steps 5 --evaluation.num-train 20"
TRAINING += " --evaluation.online-train 20 --evaluation.online-test 10 --evaluation.knn 5"
ENDS = {"pretrain": 12, "highres": 5}


def train(output: Path, *arguments: str) -> Path:
    recipe.main(smoke(output, *TRAINING.split(), *arguments))
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
        own, other = (recipe.backbones.load(run / name).state_dict() for run in (output, expected))
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
    recipe.main(
        smoke(output, *TRAINING.split(), "--stages", "pretrain", "--evaluation.online-every", "3")
    )
    path = output / "pretrain" / "metrics.jsonl"
    rows = read_metrics(path)
    assert [row["step"] for row in rows if "knn/5" in row] == [3, 6, 9, 12]
    lines = [{k: v for k, v in row.items() if k != "knn/5"} for row in rows]
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
    recipe.main(["--output", str(uninterrupted), "--resume"])
    assert capsys.readouterr().out.count("finished already") == 2


def test_a_poisoned_weight_stops_the_run_by_name_and_spares_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_as_it_is = recipe.Trainer.step

    def poisoned(self: Any, step: int, batch: Any) -> Any:
        if step == 4:
            with torch.no_grad():
                self.student.dino_head.prototypes[2].weight[0, 0] = torch.nan
        return step_as_it_is(self, step, batch)

    monkeypatch.setattr(recipe.Trainer, "step", poisoned)
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
    recipe.main(smoke(tmp_path / "run", *hot.split(), "--optim.lr-warmup", "0"))
    assert "warning: step 3: uniform targets" in capsys.readouterr().out

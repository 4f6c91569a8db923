import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sslkit.training.metrics import MetricsWriter, read_metrics

ROOT = Path(__file__).parents[1]


def log_steps(directory: Path, steps, **settings) -> None:
    with MetricsWriter(directory, tensorboard=False, **settings) as metrics:
        for step in steps:
            metrics.log(step, {"loss": 1.0 / (step + 1)})


def steps_in(path: Path) -> list[int]:
    return [row["step"] for row in read_metrics(path)]


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_values_of_all_kinds_in_their_order(tmp_path):
    values = {
        "dino/level0": torch.tensor(0.1, requires_grad=True),
        "double": torch.tensor([[0.1]], dtype=torch.float64),
        "count": torch.tensor(3),
        "lr": 1e-6,
        "images": 2**40,
        "numpy": np.float32(0.5),
        "bfloat16": torch.tensor(1.5, dtype=torch.bfloat16),
    }
    with MetricsWriter(tmp_path / "made", tensorboard=False) as metrics:
        metrics.log(0, values)
    (row,) = read_metrics(tmp_path / "made" / "metrics.jsonl")
    assert list(row) == ["step", *values]
    float32_tenth = 0.10000000149011612
    assert list(row.values()) == [0, float32_tenth, 0.1, 3, 1e-6, 2**40, 0.5, 1.5]


def test_each_line_is_strict_json_and_there_at_once(tmp_path):
    metrics = MetricsWriter(tmp_path, tensorboard=False)
    metrics.log(3, {"a": math.nan, "b": torch.tensor(-math.inf), "c": 1})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()  # before it is closed
    metrics.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(line, parse_constant=refuse) == {"step": 3, "a": None, "b": None, "c": 1}


@pytest.mark.parametrize(
    ("resume_step", "kept"), [(-1, []), (4, [0, 2, 4]), (5, [0, 2, 4]), (9, [0, 2, 4, 6])]
)
def test_resuming_drops_what_comes_after_the_checkpoint(tmp_path, resume_step, kept):
    log_steps(tmp_path, [0, 2, 4, 6])
    log_steps(tmp_path, [10, 11], resume_step=resume_step)
    assert steps_in(tmp_path / "metrics.jsonl") == [*kept, 10, 11]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_a_torn_last_line_is_left_out_and_overwritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log_steps(tmp_path, [0, 1])
    complete = path.read_text()
    for end in range(1, len('{"step": 2, "loss": 0.25}')):
        path.write_text(complete + '{"step": 2, "loss": 0.25}'[:end])
        assert steps_in(path) == [0, 1]
    log_steps(tmp_path, [2, 3], resume_step=1)
    assert steps_in(path) == [0, 1, 2, 3]


def test_a_killed_process_loses_no_line_that_was_logged(tmp_path):
    code = """if True:
        import sys
        from sslkit.training.metrics import MetricsWriter
        metrics = MetricsWriter(sys.argv[1], tensorboard=False)
        for step in range(10**9):
            metrics.log(step, {"loss": 0.5})
            print(step, flush=True)
    """
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        told = [int(process.stdout.readline()) for _ in range(50)]
        os.kill(process.pid, signal.SIGKILL)
        told += [int(line) for line in process.stdout if line.endswith("\n")]
    steps = steps_in(tmp_path / "metrics.jsonl")
    assert steps == list(range(len(steps)))
    assert steps[-1] >= told[-1]


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path):
    log_steps(tmp_path, [0])
    with pytest.raises(FileExistsError, match=r"metrics\.jsonl has the metrics of another run"):
        log_steps(tmp_path, [0])
    assert steps_in(tmp_path / "metrics.jsonl") == [0]


@pytest.mark.parametrize(
    ("step", "values", "error", "message"),
    [
        (4, {}, ValueError, "step 4 is not above step 4, which is already logged"),
        (5, {"step": 1}, ValueError, '"step" is the name of the step'),
        (5, {"a": torch.ones(2)}, ValueError, r"a must be one number, got shape \(2,\)"),
        (5, {"a": "0.5"}, TypeError, "a must be a number or a tensor, got '0.5'"),
    ],
)
def test_bad_values(tmp_path, step, values, error, message):
    log_steps(tmp_path, [4])
    with (
        MetricsWriter(tmp_path, tensorboard=False, resume_step=4) as metrics,
        pytest.raises(error, match=message),
    ):
        metrics.log(step, values)
    assert steps_in(tmp_path / "metrics.jsonl") == [4]


@pytest.mark.parametrize("line", ["{", "\0\0\0", "[1]", '{"step": 1.5}', '{"loss": 1}', ""])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*metrics.jsonl"):
        read_metrics(path)


def test_tensorboard_has_each_step_once_after_resuming(tmp_path):
    for resume_step, steps in ((None, [0, 1, 2, 3]), (1, [2, 3, 4])):
        with MetricsWriter(tmp_path, resume_step=resume_step) as metrics:
            for step in steps:
                metrics.log(step, {"dino/level0": step + 0.5, "lr": torch.tensor(0.25)})
    assert scalars(tmp_path) == {
        "dino/level0": [(step, step + 0.5) for step in range(5)],
        "lr": [(step, 0.25) for step in range(5)],
    }


def test_without_tensorboard_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        ImportError, match=r"pip install 'sslkit\[recipe\]', or pass tensorboard=Fa"
    ):
        MetricsWriter(tmp_path)
    MetricsWriter(tmp_path, tensorboard=False).close()

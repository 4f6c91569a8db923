"""The figure that asks whether RankMe and LiDAR follow k-NN."""

import math
import sys

import pytest

from benchmarks import label_free
from sslkit.training import MetricsWriter


def write(run, knn, rankme, lidar, steps=(10, 20, 30, 40)):
    with MetricsWriter(run / "pretrain", tensorboard=False) as metrics:
        metrics.log(5, {"loss": 3.0})
        for step, *scores in zip(steps, knn, rankme, lidar, strict=True):
            metrics.log(step, dict(zip(("knn/20", "rankme", "lidar"), scores, strict=True)))
    return run


def test_a_rank_that_follows_and_one_that_does_not(tmp_path, monkeypatch, capsys):
    a = write(tmp_path / "a", [0.2, 0.4, 0.3, 0.5], [5, 9, 7, 20], [9, 4, 6, 3])
    b = write(tmp_path / "b", [0.1, 0.2, 0.3, 0.6], [3, 3, 3, 3], [1, 2, 3, math.nan])
    c = write(tmp_path / "c", [0.1, 0.2, 0.35], [4, 5, 9], [4, 5, 6], steps=(10, 20, 30))
    picture = tmp_path / "figure.png"
    words = [str(a), str(b), str(c), "--output", str(picture)]
    monkeypatch.setattr(sys, "argv", ["label_free", *words])
    label_free.main()
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert rows["a"] == ["a", "4", "50.0", "+1.00", "(+1.00)", "-1.00", "(-1.00)"]
    assert rows["b"] == ["b", "3", "30.0", "-", "+1.00", "(+1.00)"]  # one step has no LiDAR
    # At step 30: k-NN .3, .3, .35; RankMe 7, 3, 9; LiDAR 6, 3, 6.
    assert rows["between"][:5] == ["between", "runs,", "step", "30", "3"]
    assert rows["between"][5] == "+0.87"


def test_runs_that_were_not_scored_are_refused(tmp_path):
    with MetricsWriter(tmp_path / "pretrain", tensorboard=False) as metrics:
        metrics.log(1, {"loss": 1.0, "rankme": 3.0})
    with pytest.raises(SystemExit, match="has 0 k-NN scores: no labels"):
        label_free.read_curve(tmp_path, "pretrain")
    with MetricsWriter(tmp_path / "older" / "pretrain", tensorboard=False) as metrics:
        metrics.log(1, {"knn/20": 0.5})
    with pytest.raises(SystemExit, match="has no step with knn/20, rankme, lidar"):
        label_free.read_curve(tmp_path / "older", "pretrain")

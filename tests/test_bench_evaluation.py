"""The benchmark of evaluation runs from its command line, and notices other neighbours."""

import json
import sys

import pytest
import torch

from benchmarks import bench_evaluation
from benchmarks.bench_evaluation import compare, run_task


@pytest.mark.parametrize("name", ["k-NN, sslkit", "memory search, sslkit", "masks, sslkit"])
def test_tasks(name):
    threads = torch.get_num_threads()
    row = run_task(name, 0.001, threads)
    assert row["seconds"] > 0
    assert 0.1 < row["peak_gib"] < 8
    if name == "k-NN, sslkit":
        similarities = torch.tensor(row["similarities"])
        assert similarities.shape == (64, 200)
        assert (similarities.diff() <= 0).all()


def test_command_line(tmp_path, monkeypatch, capsys):
    arguments = ["--scale", "0.001", "--only", "masks, sslkit", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["", *arguments])
    threads = torch.get_num_threads()
    assert bench_evaluation.main() == 0  # in a process of its own
    assert torch.get_num_threads() == threads
    assert "PASS masks" in capsys.readouterr().out
    (file,) = tmp_path.iterdir()
    (row,) = (json.loads(line) for line in file.read_text().splitlines())
    assert row["task"] == "masks, sslkit"
    assert torch.__version__.startswith(row["versions"]["torch"])


def test_a_task_that_fails_says_why(tmp_path, monkeypatch, capsys):
    broken = {"task": "k-NN, sslkit", "failed": "MemoryError"}
    monkeypatch.setattr(bench_evaluation, "measure", lambda *_: iter([broken]))
    monkeypatch.setattr(sys, "argv", ["", "--results", str(tmp_path)])
    assert bench_evaluation.main() == 1
    assert "FAILED: MemoryError" in capsys.readouterr().out


def test_other_neighbours_are_noticed():
    ours = {"seconds": 3.0, "similarities": [[0.9, 0.8]]}
    peer = {"seconds": 2.0, "similarities": [[0.9, 0.7]]}
    rows = {"k-NN, sslkit": ours, "k-NN, faiss": peer}
    compare(rows)
    assert ours["times_faiss"] == 1.5
    assert ours["difference_to_faiss"] == pytest.approx(0.1)
    assert "similarities" not in peer

"""Runs killed twenty times, and on two nodes; minutes, so run with `make test-slow`."""

import os
import random
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from sslkit.training.metrics import read_metrics
from tests.recipe import last_step, main, smoke, start_process
from tests.test_faults import TORCHRUN, assert_same_end, process_of

pytestmark = pytest.mark.slow

KILLS, STEPS = 20, 100
# Stochastic depth depends on the random numbers of a step, EMA centering is a state of its own.
TRAINING = f"--stages pretrain --steps {STEPS} --checkpoint-every 2 --model.drop-path-rate 0.3"
TRAINING += " --targets.kind centering --workers 1"


def wait_for_steps(output: Path, steps: int, process: subprocess.Popen, delay: float) -> None:
    """Until there is a step that was not there before, some more, and a moment."""
    goal = last_step(output) + steps
    while last_step(output) < goal:
        assert process.poll() is None, "the run ended too early to be killed as often as planned"
        time.sleep(0.005)
    time.sleep(delay)


def test_one_process_ends_bit_identical(tmp_path: Path) -> None:
    main(smoke(tmp_path / "whole", *TRAINING.split()))
    output, moments = tmp_path / "killed", random.Random(0)
    words = smoke(output, *TRAINING.split())
    for kill in range(KILLS):
        process = start_process([*words, *(["--resume"] if kill else [])])
        try:
            wait_for_steps(output, moments.randint(1, 5), process, moments.uniform(0, 0.15))
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    main([*words, "--resume"])
    assert_same_end(output, tmp_path / "whole", steps=STEPS, atol=0)


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds ranks in /proc")
def test_two_processes_under_torchrun_end_the_same(tmp_path: Path) -> None:
    whole = start_process(smoke(tmp_path / "whole", *TRAINING.split()), launcher=TORCHRUN)
    assert whole.wait(timeout=300) == 0
    output, moments = tmp_path / "killed", random.Random(1)
    torchrun = start_process(
        smoke(output, *TRAINING.split()), launcher=(*TORCHRUN, f"--max-restarts={KILLS}")
    )
    try:
        for _ in range(KILLS):
            wait_for_steps(output, moments.randint(1, 5), torchrun, moments.uniform(0, 0.15))
            os.kill(process_of(moments.randint(0, 1), torchrun), signal.SIGKILL)
        assert torchrun.wait(timeout=300) == 0
    finally:
        torchrun.kill()
    assert_same_end(output, tmp_path / "whole", steps=STEPS, atol=1e-6)


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds ranks in /proc")
def test_two_nodes_restart_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two agents of torchrun, as on two nodes; one loses its process, both go on."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = "-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d"
    launcher += f" --rdzv-endpoint localhost:{port} --local-addr localhost --max-restarts 3"
    output = tmp_path / "run"
    words = smoke(output, *TRAINING.split())
    agents = [
        start_process(words, launcher=(*launcher.split(), "--node-rank", str(node)))
        for node in range(2)
    ]
    try:
        wait_for_steps(output, 10, agents[0], 0)
        os.kill(process_of(1, agents[1]), signal.SIGKILL)
        assert [agent.wait(timeout=200) for agent in agents] == [0, 0]
    finally:
        for agent in agents:
            agent.kill()
    rows = read_metrics(output / "pretrain" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))

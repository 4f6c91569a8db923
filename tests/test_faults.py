"""What a cluster does to a run: processes killed, machines taken away, other numbers of ranks."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sslkit import backbones
from sslkit.recipes.franca.recipe import Franca
from sslkit.training import command
from sslkit.training.checkpoint import Checkpoints, step_of
from sslkit.training.failures import explain
from sslkit.training.metrics import read_metrics
from sslkit.training.parallel import Parallel, choose, local_device, lost_contact, restarted, start
from sslkit.training.settings import SettingsError
from tests.recipe import RECIPE, SCRIPT, last_step, main, parse, saved_tensors, smoke, start_process

TRAINING = "--stages pretrain --steps 24 --checkpoint-every 4 --optim.lr-warmup 0"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def launch(output: Path, *arguments: str, restarts: int | None = None) -> subprocess.Popen:
    launcher = () if restarts is None else (*TORCHRUN, f"--max-restarts={restarts}")
    return start_process(
        smoke(output, *TRAINING.split(), *arguments), launcher=launcher, piped=True
    )


def finish(process: subprocess.Popen, *, seconds: float = 120) -> str:
    try:
        return process.communicate(timeout=seconds)[0]
    finally:
        process.kill()


def wait_for_step(output: Path, step: int, process: subprocess.Popen) -> None:
    while last_step(output) < step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)


def process_of(rank: int, torchrun: subprocess.Popen) -> int:
    """The process of a rank, among the children of torchrun."""
    children = children_of(torchrun.pid)
    for child in children:
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return child
    raise AssertionError(f"torchrun has no rank {rank} among {children}")


def children_of(process: int) -> list[int]:
    return [
        int(child)
        for task in Path(f"/proc/{process}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


def below(process: int) -> list[int]:
    """Children and their children: torchrun gives each rank a session of its own."""
    return [each for child in children_of(process) for each in (child, *below(child))]


def is_running(process: int) -> bool:
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def assert_gone(processes: list[int]) -> None:
    """Within seconds; the ranks of two and a worker of each are what torchrun started."""
    assert len(processes) >= 4
    wait_until(lambda: not any(map(is_running, processes)))


def last_state(output: Path) -> dict[str, torch.Tensor]:
    return saved_tensors(Checkpoints(output / "pretrain" / "checkpoints").latest())


def assert_same_end(output: Path, expected: Path, *, steps: int = 24, atol: float = 1e-6) -> None:
    """Weights, teacher, centers and moments to ``atol``, and a line of metrics for each step."""
    own, other = last_state(output), last_state(expected)
    assert own.keys() == other.keys()
    largest = max((own[name].double() - other[name].double()).abs().max() for name in own)
    print(f"largest difference of any weight, moment or center: {largest.item():g}")
    for name, value in own.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=atol, msg=name)
    for run in (output, expected):
        rows = read_metrics(run / "pretrain" / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
        assert backbones.load(run / "pretrain.safetensors").embed_dim == 32


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    text = finish(launch(output, "--workers", "1", restarts=0))
    assert (output / "pretrain.safetensors").exists(), text
    return output


needs_proc = pytest.mark.skipif(not Path("/proc").exists(), reason="finds ranks in /proc")


@needs_proc
def test_a_killed_rank_ends_the_job_on_all_ranks_with_words(tmp_path: Path) -> None:
    process = launch(tmp_path / "run", "--steps", "1000", "--workers", "1", restarts=0)
    wait_for_step(tmp_path / "run", 9, process)  # at step 8 the checkpoint of step 4 is waited for
    processes = below(process.pid)
    killed = time.monotonic()
    os.kill(process_of(1, process), signal.SIGKILL)
    text = finish(process, seconds=60)
    assert time.monotonic() - killed < 60
    assert process.returncode != 0
    assert_gone(processes)
    assert "error: another process of this job is gone" in text
    assert "Signal 9 (SIGKILL)" in text  # torchrun, of the rank that died
    assert step_of(Checkpoints(tmp_path / "run" / "pretrain" / "checkpoints").latest()) >= 4


def ends(process: subprocess.Popen, *, status: int) -> str:
    """What a run of one process with workers has printed, once it and they have ended by itself."""
    text = finish(process)
    assert process.returncode == status, text
    assert "Traceback" not in text, text
    if Path("/proc").exists():
        wait_until(lambda: not processes_of_session(process.pid))
    return text


def wait_until(holds: Callable[[], bool], *, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def processes_of_session(session: int) -> list[int]:
    """Those that have not ended; ``launch`` makes each run a session of its own."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, _, own = stat.read_text().rpartition(")")[2].split()[:4]
            if int(own) == session and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


@pytest.mark.parametrize("everybody", [False, True], ids=["the main process", "its group"])
def test_ctrl_c_saves_and_says_how_to_resume(tmp_path: Path, everybody: bool) -> None:
    output = tmp_path / "run"
    process = launch(output, "--steps", "1000", "--workers", "2")
    wait_for_step(output, 2, process)
    (os.killpg if everybody else os.kill)(process.pid, signal.SIGINT)
    text = ends(process, status=0)
    latest = step_of(Checkpoints(output / "pretrain" / "checkpoints").latest())
    assert (
        f"pretrain: stopped by SIGINT and saved at step {latest}; continue with --resume: " in text
    )
    assert f"--output {output} --resume" in text.splitlines()[-1]


@needs_proc
def test_a_stop_does_not_wait_for_images_that_never_come(tmp_path: Path) -> None:
    """The worker is stopped, as one that a file system keeps waiting; the first step is enough."""
    output = tmp_path / "run"
    process = launch(output, "--steps", "1000", "--workers", "1")
    wait_for_step(output, 2, process)
    (worker,) = set(processes_of_session(process.pid)) - {process.pid}
    os.kill(worker, signal.SIGSTOP)
    time.sleep(2)  # until what it had made already is used up; if not, this tests less
    os.kill(process.pid, signal.SIGTERM)
    assert "stopped by SIGTERM and saved at step" in ends(process, status=0)


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else the run waits for: its worker never answers, and nothing is saved.

    ``run_command`` makes status 130 of it (tests/test_command_line.py).
    """

    asked = 0

    def step(*_: object, **__: object) -> None:
        nonlocal asked
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # sent to all of a job and passed on by torchrun
        assert multiprocessing.active_children()  # the first one only asks
        asked = 2
        time.sleep(1.1)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr(Franca, "step", step)
    with pytest.raises(KeyboardInterrupt):
        main(smoke(tmp_path / "run", *TRAINING.split(), "--workers", "1"))
    assert asked == 2
    assert not multiprocessing.active_children()
    assert Checkpoints(tmp_path / "run" / "pretrain" / "checkpoints").latest() is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_while_the_script_imports(tmp_path: Path) -> None:
    """Ends it as a signal does, without a traceback: here in place of ``import torch``."""
    (tmp_path / "torch.py").write_text("import os\nos.kill(os.getpid(), 2)\nos._exit(3)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), "--preset", "smoke"],
        env=environment,
        capture_output=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, b"", b"")


@needs_proc
def test_a_killed_worker_ends_the_run(tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = launch(output, "--steps", "1000", "--workers", "2")
    wait_for_step(output, 2, process)
    worker = max(set(processes_of_session(process.pid)) - {process.pid})
    os.kill(worker, signal.SIGKILL)
    text = ends(process, status=1)
    assert "error: a process that loads images is gone (DataLoader worker (pid" in text
    assert "continue with --resume" in text


def test_closed_output_ends_the_run(tmp_path: Path) -> None:
    """As by ``| head -1``."""
    process = launch(tmp_path / "run", "--steps", "1000", "--workers", "1")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    process.wait(120)
    assert process.returncode not in (0, None)
    if Path("/proc").exists():
        wait_until(lambda: not processes_of_session(process.pid))


@needs_proc
def test_torchrun_restarts_a_job_that_then_ends_the_same(undisturbed: Path, tmp_path: Path) -> None:
    process = launch(tmp_path / "run", "--workers", "1", restarts=1)
    wait_for_step(tmp_path / "run", 6, process)
    processes = below(process.pid)
    os.kill(process_of(1, process), signal.SIGKILL)
    text = finish(process)
    assert process.returncode == 0, text
    assert_gone(processes)
    assert_same_end(tmp_path / "run", undisturbed)


def test_a_run_of_two_goes_on_alone_and_in_shards(undisturbed: Path, tmp_path: Path) -> None:
    """Six steps in two processes, then one, then two with sharded networks."""
    output = tmp_path / "run"
    for step, restarts, arguments in ((5, 0, []), (9, None, ["--resume"])):
        process = launch(output, "--workers", "1", *arguments, restarts=restarts)
        wait_for_step(output, step, process)
        # One of two is enough for both to stop.
        os.kill(process.pid if restarts is None else process_of(1, process), signal.SIGTERM)
        text = finish(process)
        assert "stopped by SIGTERM and saved at step" in text
    stages = "--stages pretrain highres --highres.steps 2 --resume --parallel fsdp"
    text = finish(launch(output, *stages.split(), restarts=0))
    for stage in ("pretrain", "highres"):
        assert (output / f"{stage}.safetensors").exists(), text
    moments = saved_tensors(Checkpoints(output / "highres" / "checkpoints").latest())
    steps = {n: x.item() for n, x in moments.items() if n.endswith(".step")}
    fresh = {n: steps.pop(n) for n in list(steps) if "pos_embed" in n}
    assert set(fresh.values()) == {2}  # a new shape, so that its moments began anew
    assert set(steps.values()) == {24 + 2}
    own, other = last_state(output), last_state(undisturbed)
    for name, value in own.items():
        # AdamW divides gradients by their size: of what is near zero it keeps the rounding. That of
        # the keys' bias is zero, as a softmax over keys does not change with it.
        pairs = [(value, other[name])]
        if name.endswith("attn.qkv.bias"):
            pairs = list(zip(value.chunk(3), other[name].chunk(3), strict=True))[::2]
        for a, b in pairs:
            assert (a - b).norm() / b.norm().clamp(min=1e-3) < 1e-3, name


@needs_proc
@pytest.mark.parametrize("restarts", [None, 0])
def test_sigterm_saves_and_leaves(undisturbed: Path, tmp_path: Path, restarts: int | None) -> None:
    """Sent to every process, those that load data too, as schedulers do."""
    output = tmp_path / "run"
    process = launch(output, "--workers", "2", restarts=restarts)
    wait_for_step(output, 6, process)
    processes = [process.pid, *below(process.pid)]
    for each in processes:
        os.kill(each, signal.SIGTERM)
    text = finish(process, seconds=60)
    latest = step_of(Checkpoints(output / "pretrain" / "checkpoints").latest())
    said = f"pretrain: stopped by SIGTERM and saved at step {latest}; continue with --resume"
    assert text.count(said) == 1
    wait_until(lambda: not any(map(is_running, processes)))
    assert latest >= 6
    assert not (output / "pretrain.safetensors").exists()
    if restarts is None:
        assert process.returncode == 0
    else:
        text = finish(launch(output, "--resume", restarts=0))
        assert_same_end(output, undisturbed)


def test_a_flipped_byte_is_refused_and_the_checkpoint_before_it_offered(tmp_path: Path) -> None:
    arguments = smoke(tmp_path / "run", *TRAINING.split(), "--workers", "1")
    main(arguments)
    (tmp_path / "run" / "pretrain.safetensors").unlink()
    checkpoints = Checkpoints(tmp_path / "run" / "pretrain" / "checkpoints")
    damaged, before = checkpoints.latest(), checkpoints.paths()[-2]
    content = bytearray((damaged / "rank_0.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / "rank_0.safetensors").write_bytes(content)
    with pytest.raises(SystemExit, match=rf"error: .*{damaged.name} is damaged: .*{before.name}$"):
        main([*arguments, "--resume"])
    damaged.rename(tmp_path / "set aside")
    main([*arguments, "--resume"])
    assert checkpoints.latest() == damaged


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OUT_OF_MEMORY, r"error: CUDA out of memory\. Raise --accumulation .*--resume"),
        (MemoryError(), r"error: out of memory\. Raise --accumulation"),
        (OSError(28, "No space left on device"), r"error: No space left on device\. Free space"),
        (OSError(122, "Disk quota exceeded"), r"error: Disk quota exceeded\. Free space"),
        (OSError(27, "File too large"), r"error: File too large\. Free space"),
        (ZeroDivisionError("a bug"), "a bug"),
        (KeyboardInterrupt(), "^$"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_whatever_ends_the_training_ends_its_workers(
    error: BaseException, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_: object, **__: object) -> None:
        assert multiprocessing.active_children()
        raise error

    monkeypatch.setattr(Franca, "step", step)
    known = not isinstance(error, ZeroDivisionError | KeyboardInterrupt)
    with pytest.raises(SystemExit if known else type(error), match=message):
        main(smoke(tmp_path / "run", *TRAINING.split(), "--workers", "2"))
    assert not multiprocessing.active_children()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ------------------------------------------------------------------------------ the small questions


def test_what_says_that_a_process_is_gone() -> None:
    closed = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]"
    assert lost_contact(RuntimeError(closed))
    assert not lost_contact(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not lost_contact(ValueError("gloo"))
    advice = ":1751. This is typically caused by a remote worker crashing. Check the logs. GLHF!"
    assert explain(RuntimeError(closed + advice)) == (
        "another process of this job is gone (Connection closed by peer [::1]:1751). Its own "
        "message says why; start all again with --resume, as torchrun --max-restarts does"
    )


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_restarted(variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same command then means --resume, also where nothing is there yet."""
    words = smoke(tmp_path, "--stages", "pretrain", "--steps", "2")
    for count in ("0", "1"):
        monkeypatch.setenv(variable, count)
        assert restarted() == (count == "1")
    main(words)
    main(words)
    monkeypatch.setenv(variable, "0")
    with pytest.raises(SystemExit, match="holds a run already"):
        main(words)


def test_each_process_has_the_gpu_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert local_device("cpu").type == "cpu"
    assert [local_device("auto"), local_device("cuda")] == [torch.device("cuda:0")] * 2
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert local_device("auto") == torch.device("cuda:3")
    assert current == [0, 0, 3]
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(ValueError, match="needs GPU 4 for this process, and PyTorch sees 4; start"):
        local_device("auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert local_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="device must be auto, cpu or cuda, got 'mps'"):
        local_device("mps")


def test_small_networks_are_replicated_and_large_ones_sharded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Properties:
        total_memory = 80 * 10**9

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(Parallel, "gather", lambda self, memory: memory[None])
    group: object = "a group"
    gpu = Parallel(0, 8, torch.device("cuda:0"), group)
    assert choose(10**12, start("cpu")) == "none"
    assert choose(10**12, Parallel(0, 2, torch.device("cpu"), group)) == "ddp"
    assert choose(500_000_000, gpu) == "ddp"  # 10 GB
    assert choose(1_500_000_000, gpu) == "fsdp"  # 30 GB


@pytest.mark.parametrize(
    ("arguments", "world_size", "message"),
    [
        ("--parallel ddp", 1, r"--parallel ddp: there are 1 process\(es\)"),
        ("--parallel fsdp", 1, r"--parallel fsdp: there are 1 process\(es\)"),
        ("--parallel none", 2, r"--parallel none: there are 2 process\(es\)"),
        ("--hsdp-replicas 3", 2, r"--hsdp-replicas 3 does not divide the 2 process\(es\)"),
        (
            "--parallel fsdp --model.factored --model.no-normalize",
            2,
            "--model.factored needs --model.normalize",
        ),
    ],
)
def test_refused_parallelism(arguments: str, world_size: int, message: str, tmp_path: Path) -> None:
    settings = parse(smoke(tmp_path / "run", *arguments.split()))
    with pytest.raises(SettingsError, match=message):
        command.check(RECIPE, settings, world_size)

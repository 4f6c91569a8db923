import hashlib
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from sslkit.training import checkpoint, tensor_storage
from sslkit.training.checkpoint import CheckpointError, Checkpoints, step_of

ROOT = Path(__file__).parents[1]


def state_of(step: int, size: int = 100) -> dict:
    return {"step": torch.tensor(step), "net": {"weights": torch.full((size,), float(step))}}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def save(checkpoints: Checkpoints, step: int, size: int = 100) -> Path:
    checkpoints.save(step, state_of(step, size))
    checkpoints.wait()
    return checkpoints.latest()


def load(checkpoints: Checkpoints, path: Path, size: int = 100) -> dict:
    state = state_of(-1, size)
    checkpoints.load_(path, state)
    return state


def assert_holds(checkpoints: Checkpoints, step: int, size: int = 100) -> None:
    path = checkpoints.directory / f"step_{step:08d}"
    torch.testing.assert_close(load(checkpoints, path, size), state_of(step, size), rtol=0, atol=0)


# ---------------------------------------------------------------------------------- saving, pruning


def test_round_trip_of_tensors_of_every_kind(tmp_path):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model(torch.randn(4, 2))
    state = {
        "model": model.state_dict(),
        "parameter": {"a.b": {"c": model[0].weight}},
        "bfloat16": torch.randn(2, 3, dtype=torch.bfloat16),
        "strided": torch.arange(12).view(3, 4).T,
        "empty": torch.empty(0, 3),
        "nothing": {},
        "scalar": torch.tensor(3.5),
    }
    checkpoints = Checkpoints(tmp_path / "made" / "on demand")
    checkpoints.save(7, state)
    checkpoints.wait()
    fresh = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    found = {
        "model": fresh.state_dict(),
        "parameter": {"a.b": {"c": torch.zeros(3, 2)}},
        "bfloat16": torch.zeros(2, 3, dtype=torch.bfloat16),
        "strided": torch.zeros(4, 3, dtype=torch.int64),
        "empty": torch.empty(0, 3),
        "nothing": {},
        "scalar": torch.tensor(0.0),
    }
    checkpoints.load_(checkpoints.latest(), found)
    assert torch.equal(fresh[1].running_mean, model[1].running_mean)
    torch.testing.assert_close(found, state, rtol=0, atol=0)


def test_what_is_written_is_what_the_state_was_when_it_was_saved(tmp_path, monkeypatch):
    """Training goes on while a thread writes."""
    may_write = threading.Event()
    write = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *a, **k: may_write.wait(60) and write(*a, **k))
    checkpoints = Checkpoints(tmp_path)
    state = state_of(5)
    checkpoints.save(5, state)
    state["net"]["weights"].zero_()
    assert checkpoints.latest() is None
    may_write.set()
    checkpoints.wait()
    assert_holds(checkpoints, 5)


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=8, unique=True),
    st.integers(1, 4),
    st.sampled_from([0, 1, 7, 20]),
)
@hypothesis_settings(max_examples=15, deadline=None)
def test_pruning_keeps_the_last_and_every_mth(tmp_path_factory, steps, keep_last, keep_every):
    steps = sorted(steps)
    checkpoints = Checkpoints(
        tmp_path_factory.mktemp("run"), keep_last=keep_last, keep_every=keep_every
    )
    for step in steps:
        checkpoints.save(step, state_of(step, size=1))
    checkpoints.wait()
    kept = [s for s in steps if s in steps[-keep_last:] or (keep_every and s % keep_every == 0)]
    assert names(checkpoints.directory) == [f"step_{step:08d}" for step in kept]
    assert step_of(checkpoints.latest()) == steps[-1]


def test_latest_looks_at_complete_checkpoints_only(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.latest() is None
    assert checkpoints.paths() == []
    save(checkpoints, 99_999_999)
    newest = save(checkpoints, 100_000_000)  # more digits, still the later one
    for other in (".step_99999999.tmp", "step_best", "step_00000001.part", "notes.txt"):
        (tmp_path / "run" / other).mkdir()
    assert checkpoints.latest() == newest


def test_leftovers_of_killed_runs_go_at_the_next_save(tmp_path):
    (tmp_path / ".step_00000003.tmp").mkdir()
    (tmp_path / ".step_00000003.tmp" / "half").write_bytes(b"half")
    (tmp_path / ".mine.tmp").write_bytes(b"not ours")
    save(Checkpoints(tmp_path), 5)
    assert names(tmp_path) == [".mine.tmp", "step_00000005"]


def test_what_refuses_to_be_deleted_does_not_stop_the_run(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    save(checkpoints, 1)
    rmtree = shutil.rmtree

    def busy(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(39, "Directory not empty", str(path))

    monkeypatch.setattr(shutil, "rmtree", busy)
    for step in (2, 3):
        save(checkpoints, step)
    assert [step_of(path) for path in checkpoints.paths()] == [3]
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    save(checkpoints, 4)
    assert names(tmp_path) == ["step_00000004"]


@pytest.mark.parametrize("step", [9, 10])
def test_a_step_is_above_the_latest(tmp_path, step):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    save(checkpoints, 10)
    with pytest.raises(ValueError, match=rf"step {step}: .*step_00000010 is there. Resume from th"):
        checkpoints.save(step, state_of(step))
    assert_holds(checkpoints, 10)


@pytest.mark.parametrize("value", [1.5, np.zeros(3), Path("x"), [torch.ones(1)], None])
def test_only_tensors_are_written(tmp_path, value):
    with pytest.raises(TypeError, match=r"state has 'a\.b', which is a .*: convert it"):
        Checkpoints(tmp_path).save(0, {"a": {"b": value}})
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: Checkpoints(path, keep_last=0), "keep_last must be at least 1, got 0"),
        (lambda path: Checkpoints(path, keep_every=-5), "keep_every must not be negative, got -5"),
        (lambda path: Checkpoints(path).save(-1, {}), "step must not be negative, got -1"),
    ],
)
def test_bad_settings(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path)


# ------------------------------------------------------------------------------------ failed writes


@contextmanager
def files_of_at_most(size: int):
    """A real short write: the kernel refuses to let a file grow further."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 700, 100_000])
def test_a_write_cut_short_leaves_the_previous_checkpoint(tmp_path, room):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 10)
    with files_of_at_most(room):
        checkpoints.save(20, state_of(20, size=100_000))
        with pytest.raises(
            CheckpointError,
            match=r"could not write .*step_00000020: .*File too large.*Free space.*"
            r"step_00000010 is unharmed",
        ):
            checkpoints.wait()
    assert names(tmp_path) == ["step_00000010"]
    assert_holds(checkpoints, 10)
    save(checkpoints, 20, size=100_000)  # there is space again
    assert_holds(checkpoints, 20, size=100_000)


def test_the_next_save_tells_of_a_failed_one(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with files_of_at_most(0):
        checkpoints.save(1, state_of(1))
        with pytest.raises(CheckpointError, match="there is no earlier checkpoint"):
            checkpoints.save(2, state_of(2))


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failure_at_the_end_leaves_nothing_either(tmp_path, monkeypatch, failing):
    def full(*_):
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, failing, full)
        with pytest.raises(CheckpointError, match=r"No space left .* there is no earlier checkp"):
            save(checkpoints, 1)
    assert names(tmp_path) == []


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"could not write .*choose another directory"):
        save(Checkpoints(tmp_path / "file" / "run"), 1)


# The state of a disk at every moment is one between two of these calls, or within a write.
MOMENTS = ("mkdir", "open", "fsync", "replace", "rename", "rmdir", "unlink")

KILLED = """
import builtins, io, os, sys
import torch
from sslkit.training.checkpoint import Checkpoints, step_of

directory, names = sys.argv[1], sys.argv[2].split()
torch.set_num_threads(1)

def save(steps, moment):
    '''In a process of its own, which dies at its moment-th call.'''
    child = os.fork()
    if child == 0:
        calls = 0

        def dying(call):
            def counted(*arguments, **options):
                nonlocal calls
                calls += 1
                if calls == moment:
                    os._exit(9)
                return call(*arguments, **options)

            return counted

        for name in names:
            setattr(os, name, dying(getattr(os, name)))
        checkpoints = Checkpoints(directory)
        for step in steps:
            checkpoints.save(step, {"weights": torch.full((500,), float(step))})
        checkpoints.wait()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

assert save(range(5), 0) == 0
moment, reached, interrupted, ended = 0, 4, 0, False
while not ended:
    moment += 1
    ended = save([reached + 1, reached + 2, reached + 3], moment) == 0
    interrupted += any(name.endswith(".tmp") for name in os.listdir(directory))
    checkpoints = Checkpoints(directory)
    latest, weights = checkpoints.latest(), torch.zeros(500)
    checkpoints.load_(latest, {"weights": weights})
    assert weights.eq(step_of(latest)).all()
    assert step_of(latest) >= reached, "a checkpoint was lost"
    reached = step_of(latest)
    assert len(checkpoints.paths()) <= 3, "pruning may be one behind"
print(moment, interrupted)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the process that it kills")
def test_killed_between_any_two_calls_the_latest_checkpoint_is_whole(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path), " ".join(MOMENTS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    moments, interrupted = map(int, done.stdout.split())
    assert moments > 15
    assert interrupted > 8  # most of them lie within a write


# ---------------------------------------------------------------------------------- damaged files


@pytest.fixture
def two_checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    return checkpoints, save(checkpoints, 2)


FILES = ("tensors.json", "rank_0.safetensors", "manifest.json")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_named_and_the_previous_one_offered(two_checkpoints, file, share):
    checkpoints, path = two_checkpoints
    content = (path / file).read_bytes()
    (path / file).write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=rf"00002 is damaged: .*{file}.*{ways_out(path)}"):
        load(checkpoints, path)


def ways_out(path: Path) -> str:
    return rf"Delete it and resume from the one before it: .*{path.with_name('step_00000001').name}"


@pytest.mark.parametrize("file", FILES[:2])
@pytest.mark.parametrize("share", [0, 0.2, 0.4, 0.6, 0.8, 0.999])
def test_a_flipped_bit_is_found(two_checkpoints, file, share):
    checkpoints, path = two_checkpoints
    content = bytearray((path / file).read_bytes())
    content[int(share * len(content))] ^= 1
    (path / file).write_bytes(content)
    message = rf"{file} does not have the checksum it was written with.*{ways_out(path)}"
    with pytest.raises(CheckpointError, match=message):
        load(checkpoints, path)


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named(two_checkpoints, file):
    checkpoints, path = two_checkpoints
    (path / file).unlink()
    with pytest.raises(CheckpointError, match=rf"{file}.*{ways_out(path)}"):
        load(checkpoints, path)


def test_an_empty_folder_is_no_checkpoint(tmp_path):
    (tmp_path / "step_00000004").mkdir()
    with pytest.raises(CheckpointError, match=r"00004 is damaged: .*There is no earlier"):
        load(Checkpoints(tmp_path), tmp_path / "step_00000004")


def test_a_missing_checkpoint_lists_those_that_exist(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    with pytest.raises(FileNotFoundError, match=r"there are: step_00000001"):
        load(checkpoints, tmp_path / "step_00000002")


# --------------------------------------------------------------------------------------- strictness


def test_every_difference_is_reported_and_nothing_changed(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    saved = {"a": torch.ones(2, 3), "b": torch.ones(4), "c": torch.ones(5), "d": torch.ones(1)}
    checkpoints.save(1, {"net": saved})
    checkpoints.wait()
    own = {
        "a": torch.zeros(2, 3, dtype=torch.float64),
        "b": torch.zeros(1, 4),
        "d": torch.zeros(1),
        "e": torch.zeros(1),
    }
    with pytest.raises(ValueError, match=r"step_00000001 does not fit:") as error:
        checkpoints.load_(checkpoints.latest(), {"net": own})
    assert str(error.value).splitlines()[1:] == [
        "  different: net.a is float32 [2, 3], expected float64 [2, 3]",
        "  different: net.b is float32 [4], expected float32 [1, 4]",
        "  missing: net.e",
        "  unexpected: net.c",
    ]
    assert not any(tensor.any() for tensor in own.values())


def test_a_part_is_read_when_asked_for(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"net": {"a": torch.ones(2)}, "other": torch.ones(3)})
    checkpoints.wait()
    own = {"net": {"a": torch.zeros(2)}}
    with pytest.raises(ValueError, match="unexpected: other"):
        checkpoints.load_(checkpoints.latest(), own)
    checkpoints.load_(checkpoints.latest(), own, partial=True)
    assert own["net"]["a"].eq(1).all()
    with pytest.raises(ValueError, match=r"missing: net\.b"):
        checkpoints.load_(checkpoints.latest(), {"net": {"b": torch.zeros(2)}}, partial=True)


# ------------------------------------------------------------------------- files of somebody else


def forge(path: Path, **files: bytes) -> None:
    """Write files of a checkpoint, with checksums that are right."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name, content in files.items():
        name = {"description": "tensors.json", "tensors": "rank_0.safetensors"}[name]
        (path / name).write_bytes(content)
        manifest[name] = hashlib.sha256(content).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))


def described(path: Path) -> dict:
    return json.loads((path / "tensors.json").read_text())


def test_nothing_in_a_checkpoint_is_a_pickle(two_checkpoints):
    _, path = two_checkpoints
    assert names(path) == ["manifest.json", "rank_0.safetensors", "tensors.json"]
    tensors = load_file(path / "rank_0.safetensors")  # of the safetensors package
    assert tensors.keys() == described(path).keys() == {"net.weights", "step"}
    assert tensors["net.weights"].eq(2).all()


class Bomb:
    def __init__(self, hit: Path) -> None:
        self.hit = hit

    def __reduce__(self) -> tuple:
        return Path.touch, (self.hit,)


def test_pickles_of_earlier_versions_are_refused_unread(two_checkpoints, tmp_path):
    checkpoints, path = two_checkpoints
    bomb = pickle.dumps(Bomb(tmp_path / "hit"))
    (path / ".metadata").write_bytes(bomb)
    digest = hashlib.sha256(bomb).hexdigest()
    (path / "manifest.json").write_text(json.dumps({".metadata": digest}))
    with pytest.raises(CheckpointError, match=r"sslkit 0\.1 wrote it, as a pickle"):
        load(checkpoints, path)
    for file in path.iterdir():
        file.unlink()
    for name in ("tensors.json", "rank_0.safetensors"):
        (path / name).write_bytes(bomb)
    digests = dict.fromkeys(("tensors.json", "rank_0.safetensors"), digest)
    (path / "manifest.json").write_text(json.dumps(digests))
    with pytest.raises(CheckpointError, match=r"tensors\.json does not describe tensors"):
        load(checkpoints, path)
    assert not (tmp_path / "hit").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "holds list, expected an object"),
        ("[" * 100_000, "cannot be read"),
        ('{"tensors.json": "0", "../../secret": "0"}', "'../../secret', which is not a file"),
        ('{"tensors.json": "0", "/etc/passwd": "0"}', "'/etc/passwd', which is not a file"),
        ("{}", r"does not list tensors\.json"),
    ],
)
def test_a_forged_manifest(two_checkpoints, content, message):
    checkpoints, path = two_checkpoints
    (path / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"is damaged: its manifest\.json .*{message}"):
        load(checkpoints, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t["parts"][0].update(file="../step_00000001/rank_0.safetensors"),
            "not the name",
        ),
        (lambda t: t["parts"][0].update(file="/etc/passwd"), "is not the name of a file"),
        (lambda t: t["parts"][0].update(file=["rank_0.safetensors"]), "is not the name of a file"),
        (lambda t: t["parts"][0].update(offsets=[1]), "lies outside"),
        (lambda t: t["parts"][0].update(offsets=[-1]), "expected a list of sizes"),
        (lambda t: t["parts"][0].update(offsets=[0, 0]), "zip"),
        (lambda t: t.update(shape=[10**12]), "not the whole of it"),
        (lambda t: t.update(shape=[10**30]), "larger than any can be"),
        (lambda t: t.update(shape=[1.5]), "expected a list of sizes"),
        (lambda t: t.update(dtype="PICKLE"), "KeyError"),
        (lambda t: t.update(parts=[]), "not the whole of it"),
        (lambda t: t.pop("parts"), "KeyError"),
    ],
)
def test_a_forged_description(two_checkpoints, change, message):
    checkpoints, path = two_checkpoints
    content = described(path)
    change(content["net.weights"])
    forge(path, description=json.dumps(content).encode())
    with pytest.raises(CheckpointError, match=rf"tensors\.json does not describe.*{message}"):
        load(checkpoints, path)


def test_a_description_that_claims_more_than_the_file_has(two_checkpoints):
    """Memory is the state's own, which has to be of the claimed size already."""
    checkpoints, path = two_checkpoints
    content = described(path)
    content["net.weights"]["shape"] = content["net.weights"]["parts"][0]["shape"] = [10**12]
    forge(path, description=json.dumps(content).encode())
    with pytest.raises(ValueError, match=r"float32 \[1000000000000\], expected float32 \[100\]"):
        load(checkpoints, path)
    content["net.weights"]["shape"] = content["net.weights"]["parts"][0]["shape"] = [200]
    forge(path, description=json.dumps(content).encode())
    with pytest.raises(CheckpointError, match="could not read"):
        load(checkpoints, path, size=200)


@pytest.mark.parametrize(
    "header",
    [
        {"net.weights": {"dtype": "F32", "shape": [100], "data_offsets": [0, 400]}},  # no step
        {"net.weights": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}},
        {"net.weights": {"dtype": "I32", "shape": [100], "data_offsets": [0, 400]}},
        {},
    ],
)
def test_forged_tensors(two_checkpoints, header):
    checkpoints, path = two_checkpoints
    text = json.dumps(header).encode()
    forge(path, tensors=len(text).to_bytes(8, "little") + text + bytes(400))
    with pytest.raises(CheckpointError, match="could not read"):
        load(checkpoints, path)


def test_a_link_is_not_a_file_of_a_checkpoint(two_checkpoints):
    checkpoints, path = two_checkpoints
    (path / "rank_0.safetensors").rename(path.parent / "elsewhere")
    (path / "rank_0.safetensors").symlink_to(path.parent / "elsewhere")
    with pytest.raises(CheckpointError, match=r"rank_0\.safetensors is missing"):
        load(checkpoints, path)


def test_a_network_is_compared_without_memory(two_checkpoints):
    checkpoints, path = two_checkpoints
    with torch.device("meta"):
        checkpoints.require_fit(path, state_of(0))
        with pytest.raises(ValueError, match=r"expected float32 \[1000000000000\]"):
            checkpoints.require_fit(path, {"net": {"weights": torch.empty(10**12)}}, partial=True)


def test_types_that_files_do_not_have(tmp_path):
    with pytest.raises(TypeError, match=r"'a' of type torch\.complex64"):
        Checkpoints(tmp_path).save(0, {"a": torch.zeros(1, dtype=torch.complex64)})


def parts_of(path: Path, *boxes: tuple[list[int], list[int]]) -> None:
    """Give the first tensor of net's weights, [100], other parts: (offsets, shape)."""
    changed = described(path)
    changed["net.weights"]["parts"] = [
        {"file": "rank_0.safetensors", "offsets": offsets, "shape": shape}
        for offsets, shape in boxes
    ]
    forge(path, description=json.dumps(changed).encode())


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([([0], [50]), ([0], [50])], "parts of net.weights overlap"),
        ([([0], [60]), ([40], [40])], "parts of net.weights overlap"),
        ([([0], [50]), ([100], [0])], "the parts of net.weights are not the whole of it"),
    ],
)
def test_parts_leave_nothing_of_a_tensor_unfilled(two_checkpoints, boxes, message):
    """The old code left what no part fills as it was in memory."""
    checkpoints, path = two_checkpoints
    parts_of(path, *boxes)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load_(path, state_of(0))


@pytest.mark.parametrize("kind", ["file", "link", "pipe"])
def test_a_file_that_the_manifest_lacks_is_not_read(two_checkpoints, tmp_path, kind):
    checkpoints, path = two_checkpoints
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["rank_0.safetensors"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    if kind != "file":
        shutil.move(path / "rank_0.safetensors", tmp_path / "elsewhere")
    if kind == "link":
        (path / "rank_0.safetensors").symlink_to(tmp_path / "elsewhere")
    if kind == "pipe":
        os.mkfifo(path / "rank_0.safetensors")
    with pytest.raises(CheckpointError, match=r"manifest\.json does not list rank_0\.safetensors"):
        checkpoints.load_(path, state_of(0))
    (path / "manifest.json").unlink()
    os.mkfifo(path / "manifest.json")
    with pytest.raises(CheckpointError, match=r"its manifest\.json is a link, or not a file"):
        checkpoints.load_(path, state_of(0))


def test_parts_that_divide_several_axes_may_meet(two_checkpoints):
    grid = [
        ChunkStorageMetadata(torch.Size([r, c]), torch.Size([2, 3])) for r in (0, 2) for c in (0, 3)
    ]
    tensor_storage._require_disjoint(grid, "w")
    shifted = [*grid[:3], ChunkStorageMetadata(torch.Size([2, 2]), torch.Size([2, 3]))]
    with pytest.raises(ValueError, match="parts of w overlap"):
        tensor_storage._require_disjoint(shifted, "w")

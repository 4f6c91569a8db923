"""Checkpoints of a run: sharded, written in the background, complete or not there at all."""

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from sslkit.files import atomic_write, file_digest, flush_directory, parse_json
from sslkit.training.finite import require_finite_tensors
from sslkit.training.tensor_storage import (
    DESCRIPTION,
    DTYPES,
    Described,
    TensorReader,
    TensorWriter,
)

_NAME = re.compile(r"step_[0-9]{8,}")
_TEMPORARY = ".tmp"
_MANIFEST = "manifest.json"
_FILE = re.compile(rf"{re.escape(DESCRIPTION)}|rank_\d+\.safetensors")
_PICKLE = ".metadata"  # of torch.distributed.checkpoint, in checkpoints of sslkit 0.1

# A run of one process asks for no group, even if torch.distributed has one of other processes. Each
# save and load then warns of what is meant.
_ALONE = {"no_dist": True}
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")

State = Mapping[str, Any]
"""Nested dicts of tensors, sharded or not, by name."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says what to do."""


class Checkpoints:
    """The checkpoints of one run: a folder ``step_00000100`` for each in one directory.

    They are written by `torch.distributed.checkpoint`, each process its own shards, and can be read
    by another number of processes, with other sharding or none. :meth:`save` copies the state to
    the host's memory and returns; a thread writes it.

    A checkpoint appears under its name complete or not at all: it is written to a temporary folder
    beside it, flushed to the disk with the SHA-256 of every file (``manifest.json``), and renamed.
    A process killed at any moment, or a full disk, leaves the earlier checkpoints as they were, and
    :meth:`latest` a good one.

    After each save, what is neither among the ``keep_last`` latest nor at a step divisible by
    ``keep_every`` is deleted.

    A checkpoint holds safetensors files and JSON (:mod:`sslkit.training.tensor_storage`). Reading
    one runs no code, opens no file outside of it, and takes no memory beyond the state to fill.
    Checkpoints of sslkit 0.1, which are pickles, are refused.

    Importing this module silences the note of `torch.distributed.checkpoint` that there is no
    process group.

    Args:
        directory: made if missing; seen by all processes.
        keep_last: how many of the latest checkpoints to keep, at least 1; 2 survive a damaged file.
        keep_every: steps between two checkpoints that are kept for good; 0: none.
        group: the processes that save and load together, each calling every method; a group of
            its own, since a thread communicates in it while training goes on
            (:func:`checkpoint_group`). None: this process alone.

    >>> import tempfile, torch
    >>> checkpoints = Checkpoints(tempfile.mkdtemp(), keep_last=1, keep_every=20)
    >>> for step in (10, 20, 30, 40, 50):
    ...     checkpoints.save(step, {"weights": {"a": torch.full((2,), step)}})
    >>> checkpoints.wait()
    >>> [path.name for path in checkpoints.paths()]
    ['step_00000020', 'step_00000040', 'step_00000050']
    >>> weights = torch.zeros(2, dtype=torch.int64)
    >>> checkpoints.load_(checkpoints.latest(), {"weights": {"a": weights}})
    >>> weights
    tensor([50, 50])
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_last: int = 2,
        keep_every: int = 0,
        group: ProcessGroup | None = None,
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {keep_last}")
        if keep_every < 0:
            raise ValueError(f"keep_every must not be negative, got {keep_every}")
        self.directory = Path(directory)
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.group = group
        self._together: dict[str, Any] = _ALONE if group is None else {"process_group": group}
        self._rank = 0 if group is None else dist.get_rank(group)
        self._world_size = 1 if group is None else dist.get_world_size(group)
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def paths(self) -> list[Path]:
        """All complete checkpoints, by rising step; other files and folders are not looked at."""
        if not self.directory.is_dir():
            return []
        named = (path for path in self.directory.iterdir() if _NAME.fullmatch(path.name))
        return sorted((path for path in named if path.is_dir()), key=step_of)

    def latest(self) -> Path | None:
        """The checkpoint of the highest step; None if there is none.

        In a group what its first process sees: file systems do not show a file to all at once.
        """
        found = [self._newest()]
        if self.group is not None:
            first = dist.get_global_rank(self.group, 0)
            dist.broadcast_object_list(found, src=first, group=self.group)
        return found[0]

    def _newest(self) -> Path | None:
        return next(reversed(self.paths()), None)

    def save(self, step: int, state: State) -> None:
        """Copy ``state``, write it as the checkpoint of ``step``, delete what need not be kept.

        Returns when the copy is made. No other method may be called while a thread writes, but
        for :meth:`wait` and :meth:`save`, which waits for the last one. :meth:`wait` before the end
        of the program.

        Args:
            step: above the latest step in the directory: a later checkpoint left of another run
                would otherwise be taken for the latest one of this run.
            state: what to keep.

        Raises:
            TypeError: something in ``state`` is not a tensor; the message says where.
            ValueError: the step is out of order.
            CheckpointError: the *last* save failed, see :meth:`wait`.
        """
        self.wait()
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        latest = self.latest()
        if latest is not None and step <= step_of(latest):
            raise ValueError(
                f"cannot save step {step}: {latest} is there. Resume from that one, or move it "
                "away to continue from an earlier step"
            )
        _require_tensors(state, "state")
        staged = BlockingAsyncStager().stage(dict(state))
        self._pending = self._writer.submit(self._write, step, staged)

    def wait(self) -> None:
        """Return once the last save is on the disk.

        Raises:
            CheckpointError: writing failed, for example because the disk is full. The earlier
                checkpoints are as they were and nothing half-written is left.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def load_(
        self,
        path: str | os.PathLike[str],
        state: State,
        *,
        partial: bool = False,
        finite: bool = False,
    ) -> None:
        """Fill the tensors of ``state`` with those of a checkpoint, by name, in place.

        Names, types and shapes are compared first, then the checksums of all files.

        Args:
            path: a folder that :meth:`save` wrote.
            state: tensors of the shapes and types that were saved, sharded in any way.
            partial: do not mind what the checkpoint holds beside.
            finite: refuse infinite numbers and NaN.

        Raises:
            FileNotFoundError: no such checkpoint; the message lists those that exist.
            CheckpointError: a file is missing, truncated or damaged, or a number is not finite. The
                message names the checkpoint before it, if there is one.
            ValueError: names are missing or, unless ``partial``, unexpected, or shapes or types
                differ; all are listed. Nothing has been changed then.
        """
        path = Path(path)
        self.require_fit(path, state, partial=partial)
        self._attempt(lambda: self._verify(path), f"{path} is damaged: ", self._way_out(path))
        self._attempt(
            lambda: load(dict(state), storage_reader=TensorReader(path), **self._together),
            f"could not read {path}: ",
            self._way_out(path),
        )
        if finite:
            self._attempt(
                lambda: require_finite_tensors(dict(_flat(state))),
                f"{path} is damaged: ",
                self._way_out(path),
            )

    def require_fit(
        self, path: str | os.PathLike[str], state: State, *, partial: bool = False
    ) -> None:
        """Raise an error unless :meth:`load_` could fill ``state``.

        Only the description is read, and the tensors of ``state`` may be on the ``meta`` device, so
        that a network can be compared with a checkpoint before it takes memory.

        Raises:
            FileNotFoundError, CheckpointError, ValueError: see :meth:`load_`.
        """
        _require_fit(self.described(path), dict(_flat(state)), Path(path), partial=partial)

    def described(self, path: str | os.PathLike[str]) -> dict[str, Tensor]:
        """Types and shapes of a checkpoint: tensors without data, on ``meta``, by dotted name.

        Raises:
            FileNotFoundError, CheckpointError: see :meth:`load_`.
        """
        path = Path(path)
        if not path.is_dir():
            names = ", ".join(existing.name for existing in self.paths()) or "none"
            raise FileNotFoundError(f"no checkpoint {path}; in {self.directory} there are: {names}")

        tensors: dict[str, Tensor] = {}

        def read() -> None:
            self._verify(path, only=DESCRIPTION)
            saved = cast(Described, TensorReader(path).read_metadata().state_dict_metadata)
            for name, tensor in saved.items():
                dtype = tensor.properties.dtype
                tensors[name] = torch.empty(tensor.size, dtype=dtype, device="meta")

        self._attempt(read, f"{path} is damaged: ", self._way_out(path))
        return tensors

    def _write(self, step: int, state: dict[str, Any]) -> None:
        """In the thread of the writer: a temporary folder, its files, its manifest, its name."""
        path = self.directory / f"step_{step:08d}"
        temporary = path.with_name(f".{path.name}{_TEMPORARY}")
        latest = self._newest()
        unharmed = f"{latest} is unharmed" if latest else "there is no earlier checkpoint"
        what = f"could not write {path}: "
        remedy = f"Free space or choose another directory, then resume; {unharmed}"

        def attempt(action: Callable[[], Any]) -> list[Any]:
            try:
                return self._attempt(action, what, remedy)
            except CheckpointError:
                if self._rank == 0:
                    shutil.rmtree(temporary, ignore_errors=True)
                raise

        attempt(lambda: self._make(temporary) if self._rank == 0 else None)
        attempt(lambda: self._write_tensors(temporary, state))
        sums = attempt(lambda: _checksums(temporary, self._rank))
        files = {name: digest for own in sums for name, digest in own.items()}
        attempt(lambda: self._publish(temporary, path, files) if self._rank == 0 else None)
        if self._rank == 0:
            self._prune()

    def _make(self, temporary: Path) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        if temporary.exists():  # of a writer that was killed
            shutil.rmtree(temporary)
        temporary.mkdir()

    def _write_tensors(self, temporary: Path, state: dict[str, Any]) -> None:
        save(state, storage_writer=TensorWriter(temporary, self._rank), **self._together)

    def _publish(self, temporary: Path, path: Path, files: dict[str, str]) -> None:
        for name in files:
            if not (temporary / name).exists():
                raise OSError(
                    f"{name}, which another process wrote, is not here: all nodes must see the "
                    "same directory"
                )
        with atomic_write(temporary / _MANIFEST) as file:
            file.write(json.dumps(files, indent=1).encode())
        os.replace(temporary, path)
        flush_directory(self.directory)

    def _prune(self) -> None:
        """Delete what need not be kept, and what writers left that were killed."""
        for old in self.paths()[: -self.keep_last]:
            if self.keep_every == 0 or step_of(old) % self.keep_every != 0:
                # First its name, so that nobody takes the rest for a checkpoint.
                os.replace(old, old.with_name(f".{old.name}{_TEMPORARY}"))
        for leftover in self.directory.glob(f".step_*{_TEMPORARY}"):
            # What somebody still reads may refuse to go; the next time will do.
            shutil.rmtree(leftover, ignore_errors=True)

    def _verify(self, folder: Path, *, only: str | None = None) -> None:
        """Raise OSError unless every file is as it was written; each process looks at its share."""
        if (folder / _MANIFEST).exists() and not _is_own_file(folder / _MANIFEST):
            raise OSError(f"its {_MANIFEST} is a link, or not a file")
        try:
            files = parse_json((folder / _MANIFEST).read_bytes(), "it")
        except (OSError, ValueError) as error:
            raise OSError(f"its {_MANIFEST} cannot be read ({error})") from error
        if not isinstance(files, dict):
            raise OSError(f"its {_MANIFEST} holds {type(files).__name__}, expected an object")
        if _PICKLE in files:
            raise OSError(
                f"sslkit 0.1 wrote it, as a pickle, which can run code when it is read. If you "
                f"trust {folder}, continue this run with sslkit 0.1"
            )
        if DESCRIPTION not in files:
            raise OSError(f"its {_MANIFEST} does not list {DESCRIPTION}")
        for name in files:
            if not _FILE.fullmatch(name):
                raise OSError(f"its {_MANIFEST} lists {name!r}, which is not a file of checkpoints")
        named = (path.name for path in folder.iterdir() if _FILE.fullmatch(path.name))
        if unlisted := sorted(set(named) - files.keys()):
            raise OSError(f"its {_MANIFEST} does not list {unlisted[0]}")
        own = sorted(files)[self._rank :: self._world_size]
        for name in own if only is None else [only]:
            if not _is_own_file(folder / name):
                raise OSError(f"{name} is missing")
            if file_digest(folder / name) != files[name]:
                raise OSError(f"{name} does not have the checksum it was written with")

    def _attempt(self, action: Callable[[], Any], what: str, remedy: str) -> list[Any]:
        """The results of ``action`` in all processes; it fails in all if it does in one."""
        result: Any = None
        problem: BaseException | None = None
        try:
            result = action()
        except (OSError, RuntimeError, ValueError) as error:
            problem = error
        except CheckpointException as error:
            problem = next((first for first, _ in error.failures.values()), error)
        outcomes = [(result, None if problem is None else str(problem))]
        if self.group is not None:
            outcomes = outcomes * self._world_size
            dist.all_gather_object(outcomes, outcomes[0], group=self.group)
        problems = [text for _, text in outcomes if text is not None]
        if problems:
            raise CheckpointError(f"{what}{problems[0]}. {remedy}") from problem
        return [own for own, _ in outcomes]

    def _way_out(self, path: Path) -> str:
        """What to do about a checkpoint that cannot be read."""
        earlier = [other for other in self.paths() if step_of(other) < step_of(path)]
        if earlier:
            return f"Delete it and resume from the one before it: {earlier[-1]}"
        return f"There is no earlier checkpoint in {self.directory}: start again"


def checkpoint_group(group: ProcessGroup | None) -> ProcessGroup | None:
    """A group of the same processes for `Checkpoints` alone, on CPUs; None for None."""
    if group is None:
        return None
    ranks = dist.get_process_group_ranks(group)
    return cast(ProcessGroup, dist.new_group(ranks, backend="gloo"))


def step_of(path: Path) -> int:
    """The step of a checkpoint, from its name.

    >>> step_of(Path("run/step_00000100"))
    100
    """
    return int(path.name.removeprefix("step_"))


def _checksums(folder: Path, rank: int) -> dict[str, str]:
    """Checksums of the files that process ``rank`` wrote; the first also writes the description."""
    own = [folder / f"rank_{rank}.safetensors"] + [folder / DESCRIPTION] * (rank == 0)
    return {path.name: file_digest(path) for path in own if path.exists()}


def _is_own_file(path: Path) -> bool:
    """Whether it is a file, and not a link to one."""
    return path.is_file() and not path.is_symlink()


def _flat(state: State, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor by its dotted name, as `torch.distributed.checkpoint` flattens dicts."""
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _require_tensors(state: State, where: str) -> None:
    for name, value in _flat(state):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{where} has {name!r}, which is a {type(value).__module__}."
                f"{type(value).__qualname__}; a checkpoint holds dicts of tensors: convert it"
            )
        if value.dtype not in DTYPES:
            raise TypeError(
                f"{where} has {name!r} of type {value.dtype}, which a checkpoint cannot hold"
            )


def _require_fit(
    saved: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path, *, partial: bool
) -> None:
    """Raise ValueError with all that is missing, unexpected or different."""
    problems = [f"missing: {name}" for name in state if name not in saved]
    if not partial:
        problems += [f"unexpected: {name}" for name in saved if name not in state]
    for name in state.keys() & saved.keys():
        found, expected = _describe(saved[name]), _describe(state[name])
        if found != expected:
            problems.append(f"different: {name} is {found}, expected {expected}")
    if problems:
        raise ValueError(f"{path} does not fit:\n  " + "\n  ".join(sorted(problems)))


def _describe(value: Tensor) -> str:
    """Type and shape of a tensor."""
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"

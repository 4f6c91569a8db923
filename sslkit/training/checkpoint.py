"""Checkpoints of a run: written atomically, pruned, read without ever unpickling code."""

import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

_NAME = re.compile(r"step_(\d{8,})\.pt")
_TEMPORARY = ".tmp"
_PLAIN = (bool, int, float, str, type(None))


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says what to do."""


class Checkpoints:
    """The checkpoints of one run, in one directory, as ``step_00000100.pt``.

    A checkpoint appears under its name complete or not at all: it is written to a temporary file
    beside it, flushed to the disk, renamed, and the directory is flushed. A process killed at any
    moment, or a full disk, leaves the earlier checkpoints as they were. One process writes.

    After each save, what is neither among the ``keep_last`` latest nor at a step divisible by
    ``keep_every`` is deleted.

    Args:
        directory: made if missing.
        keep_last: how many of the latest checkpoints to keep, at least 1; 2 survive a damaged file.
        keep_every: steps between two checkpoints that are kept for good; 0: none.

    >>> import tempfile
    >>> checkpoints = Checkpoints(tempfile.mkdtemp(), keep_last=1, keep_every=20)
    >>> for step in (10, 20, 30, 40, 50):
    ...     _ = checkpoints.save(step, {"step": step, "weights": [torch.ones(2)]})
    >>> [path.name for path in checkpoints.paths()]
    ['step_00000020.pt', 'step_00000040.pt', 'step_00000050.pt']
    >>> checkpoints.load(checkpoints.latest())
    {'step': 50, 'weights': [tensor([1., 1.])]}
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, keep_last: int = 2, keep_every: int = 0
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {keep_last}")
        if keep_every < 0:
            raise ValueError(f"keep_every must not be negative, got {keep_every}")
        self.directory = Path(directory)
        self.keep_last = keep_last
        self.keep_every = keep_every

    def paths(self) -> list[Path]:
        """All complete checkpoints, by rising step; files with other names are not looked at."""
        if not self.directory.is_dir():
            return []
        return sorted((path for path in self.directory.iterdir() if _step(path) >= 0), key=_step)

    def latest(self) -> Path | None:
        """The checkpoint of the highest step; None if there is none."""
        return next(reversed(self.paths()), None)

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write ``state`` as the checkpoint of ``step``, then delete what need not be kept.

        Args:
            step: not negative, and not below the latest step in the directory: a later checkpoint
                left of another run would otherwise be taken for the latest one of this run.
            state: nested dicts (keys str or int), lists and tuples of tensors, bool, int, float,
                str and None: exactly what ``torch.load(weights_only=True)`` reads back.

        Returns:
            The path of the file.

        Raises:
            TypeError: something else is in ``state``; the message says where.
            ValueError: the step is out of order.
            CheckpointError: writing failed, for example because the disk is full. The earlier
                checkpoints are as they were and nothing half-written is left.
        """
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        latest = self.latest()
        if latest is not None and step < _step(latest):
            raise ValueError(
                f"cannot save step {step}: {latest} is later. Resume from that one, or move it "
                "away to continue from an earlier step"
            )
        _require_plain(dict(state), "state")
        path = self.directory / f"step_{step:08d}.pt"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            with atomic_write(path) as file:
                torch.save(dict(state), file)
        except (OSError, RuntimeError) as error:
            # torch.save reports a failed write as a RuntimeError raised from the OSError.
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            kept = f"{latest} is unharmed" if latest else "there is no earlier checkpoint"
            raise CheckpointError(
                f"could not write {path}: {cause}. Free space or choose another directory, then "
                f"resume; {kept}"
            ) from error
        self._prune()
        return path

    def load(
        self,
        path: str | os.PathLike[str],
        *,
        map_location: str | torch.device = "cpu",
    ) -> dict[str, Any]:
        """Read a checkpoint; no code in the file is ever run.

        The checksums of the whole file are verified first, which ``torch.load`` does not do.

        Args:
            path: a file that :meth:`save` wrote.
            map_location: device of the tensors.

        Raises:
            FileNotFoundError: no such file; the message lists those that exist.
            CheckpointError: the file is truncated or damaged, or holds something other than tensors
                and plain values. The message names the checkpoint before it, if there is one.
        """
        path = Path(path)
        if not path.is_file():
            names = ", ".join(existing.name for existing in self.paths()) or "none"
            raise FileNotFoundError(f"no checkpoint {path}; in {self.directory} there are: {names}")
        if not _is_intact(path):
            raise CheckpointError(f"{path} is truncated or damaged. {self._way_out(path)}")
        try:
            state = torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path} holds Python objects other than tensors and plain values, so sslkit did "
                f"not write it, and reading it could run foreign code: it was not read. "
                f"{self._way_out(path)}"
            ) from error
        if not isinstance(state, dict):
            raise CheckpointError(
                f"{path} holds a {type(state).__name__} where a checkpoint holds a dict, so "
                f"Checkpoints.save did not write it. {self._way_out(path)}"
            )
        return state

    def _way_out(self, path: Path) -> str:
        """What to do about a checkpoint that cannot be read."""
        earlier = [other for other in self.paths() if _step(other) < _step(path)]
        if earlier:
            return f"Delete it and resume from the one before it: {earlier[-1]}"
        return f"There is no earlier checkpoint in {self.directory}: start again"

    def _prune(self) -> None:
        for path in self.paths()[: -self.keep_last]:
            if self.keep_every == 0 or _step(path) % self.keep_every != 0:
                path.unlink()

    def _remove_leftovers(self) -> None:
        """Temporary files of writers that were killed."""
        for path in self.directory.glob(f".step_*{_TEMPORARY}"):
            path.unlink()


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A binary file to write to that replaces ``path`` when the block ends without an error.

    Readers see the old content or the new one, never a part, whenever the process or the machine
    stops. The content is first in ``.{name}.tmp`` in the same directory; an error removes that.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.txt"
    >>> with atomic_write(path) as file:
    ...     _ = file.write(b"complete")
    >>> path.read_bytes(), [other.name for other in path.parent.iterdir()]
    (b'complete', ['a.txt'])
    """
    temporary = path.with_name(f".{path.name}{_TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a directory cannot be opened, and renames need no flush
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def load_strictly(module: nn.Module, state_dict: Mapping[str, Any], *, what: str) -> None:
    """``module.load_state_dict`` of tensors that fit exactly: names, shapes and types.

    ``nn.Module.load_state_dict`` converts a different float type without a word.

    Args:
        module: changed in place, unless there is an error: then not at all.
        state_dict: names to tensors.
        what: how error messages name the module, e.g. ``"teacher of runs/x/step_00000100.pt"``.

    Raises:
        ValueError: names are missing or unexpected, or shapes or types differ; all are listed.

    >>> state = {"weight": torch.ones(2, 3), "gain": torch.ones(1)}
    >>> load_strictly(nn.Linear(2, 3), state, what="it")
    Traceback (most recent call last):
        ...
    ValueError: it does not fit Linear:
      missing: bias
      unexpected: gain
      different: weight is float32 [2, 3], expected float32 [3, 2]
    """
    own = module.state_dict()
    problems = [f"missing: {name}" for name in own if name not in state_dict]
    problems += [f"unexpected: {name}" for name in state_dict if name not in own]
    for name, expected in own.items():
        found = state_dict.get(name, expected)
        if isinstance(expected, Tensor) and _describe(found) != _describe(expected):
            problems.append(
                f"different: {name} is {_describe(found)}, expected {_describe(expected)}"
            )
    if problems:
        raise ValueError(
            f"{what} does not fit {type(module).__name__}:\n  " + "\n  ".join(problems)
        )
    module.load_state_dict(state_dict)


def _step(path: Path) -> int:
    """The step in the name of a checkpoint; -1 for any other file."""
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def _is_intact(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, EOFError):
        return False


def _require_plain(value: Any, where: str) -> None:
    """Raise TypeError unless weights_only loading gives ``value`` back."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in (str, int):
                raise TypeError(f"{where} has the key {key!r}; keys must be str or int")
            _require_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            _require_plain(item, f"{where}[{i}]")
    elif not isinstance(value, Tensor) and type(value) not in _PLAIN:
        raise TypeError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}; a checkpoint holds "
            "tensors, bool, int, float, str, None, and dicts, lists and tuples of them: convert it"
        )


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"

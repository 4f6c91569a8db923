"""Metrics of a run: one JSON line a logged step, and TensorBoard."""

import json
import math
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslkit.files import DamagedFile, atomic_write, describe_value, parse_json

Number = float | int | Tensor


class MetricsWriter:
    """Writes ``metrics.jsonl`` and, in ``tensorboard/``, TensorBoard scalars.

    A line is ``{"step": 120, "loss": 5.25, "dino/level0": null, ...}``. JSON has no NaN and no
    infinity: a value that is not finite is written as null (TensorBoard gets the value itself);
    stopping the run is the business of :func:`~sslkit.training.finite.require_finite`. Each line
    is handed to the operating system when it is logged, so that a killed process loses none, at
    most the end of the one being written.

    Args:
        directory: made if missing.
        tensorboard: also write TensorBoard scalars, one per name.
        resume_step: None for a new run. A resumed run passes the step of its checkpoint: what an
            interrupted run logged after that step is dropped, so that the file has each step once.
            -1 drops everything.

    Raises:
        FileExistsError: ``resume_step`` is None and the directory has metrics of another run.
        ImportError: TensorBoard is asked for and not installed.

    >>> import tempfile
    >>> directory = Path(tempfile.mkdtemp())
    >>> with MetricsWriter(directory, tensorboard=False) as metrics:
    ...     metrics.log(10, {"loss": torch.tensor(0.5), "lr": math.nan})
    >>> read_metrics(directory / "metrics.jsonl")
    [{'step': 10, 'loss': 0.5, 'lr': None}]
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        tensorboard: bool = True,
        resume_step: int | None = None,
    ) -> None:
        directory = Path(directory)
        path = directory / "metrics.jsonl"
        self._last_step = -1
        if path.exists():
            if resume_step is None:
                raise FileExistsError(
                    f"{path} has the metrics of another run; choose another directory, delete it, "
                    "or resume the run"
                )
            rows = [row for row in read_metrics(path) if row["step"] <= resume_step]
            with atomic_write(path) as kept:
                kept.writelines(_line(row).encode() for row in rows)
            self._last_step = max((row["step"] for row in rows), default=-1)
        purge_step = None if resume_step is None else resume_step + 1
        self._tensorboard = (
            _summary_writer(directory / "tensorboard", purge_step) if tensorboard else None
        )
        directory.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, Number]) -> None:
        """Write one line; all tensors come to the host in one copy per device and type.

        Args:
            step: above every step logged before.
            values: numbers and one-element tensors by name; a slash groups names in TensorBoard.

        Raises:
            ValueError: the step does not rise, a tensor has several elements, or a value is named
                "step".
            TypeError: a value is not a number.
        """
        if step <= self._last_step:
            raise ValueError(
                f"step {step} is not above step {self._last_step}, which is already logged; log "
                "all values of a step in one call"
            )
        if "step" in values:
            raise ValueError('"step" is the name of the step itself; rename the value')
        numbers = _to_numbers(values)
        finite = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        self._file.write(_line({"step": step, **finite}))
        self._file.flush()
        self._last_step = step
        if self._tensorboard is not None:
            for name, number in numbers.items():
                self._tensorboard.add_scalar(name, number, step)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``, as dicts; values that were not finite are None.

    A last line without its newline is one that a killed process did not finish: it is left out.

    Raises:
        DamagedFile: another line is not UTF-8, or not a JSON object with an integer ``step`` whose
            other values are numbers or null.
    """
    *lines, _unfinished = Path(path).read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        row = parse_json(line, f"line {number} of {path}", "delete that line")
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise DamagedFile(
                f'line {number} of {path} has no integer "step": {line[:80]!r}; delete that line'
            )
        for name, value in row.items():
            if value is not None and type(value) not in (int, float):
                raise DamagedFile(
                    f"line {number} of {path} has {name!r}: {describe_value(value)}, which is not "
                    "a number; delete that line"
                )
        rows.append(row)
    return rows


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _to_numbers(values: Mapping[str, Number]) -> dict[str, float | int]:
    numbers: dict[str, float | int] = {}
    batches: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"{name} must be one number, got shape {tuple(value.shape)}")
            batches.setdefault((value.device, value.dtype), []).append(name)
            numbers[name] = math.nan  # keeps the order of the names
        elif isinstance(value, Integral):
            numbers[name] = int(value)
        elif isinstance(value, Real):
            numbers[name] = float(value)
        else:
            raise TypeError(f"{name} must be a number or a tensor, got {value!r}")
    for names in batches.values():
        stacked = torch.stack(
            [torch.as_tensor(values[name]).detach().reshape(()) for name in names]
        )
        numbers.update(zip(names, stacked.tolist(), strict=True))
    return numbers


def _summary_writer(directory: Path, purge_step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "TensorBoard is not installed: pip install 'sslkit[recipe]', or pass tensorboard=False"
        ) from error
    return SummaryWriter(str(directory), purge_step=purge_step)

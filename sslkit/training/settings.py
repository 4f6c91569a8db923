"""Settings of a run: what the engine reads of them, and settings as text."""

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from sslkit.files import describe_value, parse_json

T = TypeVar("T")

DEFAULT_PRESET = "demo"  # of every recipe


class SettingsError(ValueError):
    """Settings that contradict one another, or what is on the disk."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What the engine reads. The settings of a recipe extend it, and add sections of their own."""

    preset: str
    """Where the defaults come from; every other setting overrides it."""
    data: str
    """A folder, tar shards, hf:NAME, hf-stream:NAME, a torchvision data set, .npz or `scenes`."""
    output: Path = Path("runs/run")
    """Folder of the run. Every stage reads and writes here."""
    stages: tuple[str, ...] = ()
    """Stages to run. Each needs the results of those before it."""
    resume: bool = False
    """Continue the run in --output from its last checkpoint, with its settings and stages."""
    accept_changes: bool = False
    """Continue with other settings or other data than the run was made with."""
    seed: int = 0
    """Seed of all random numbers: initial weights, order of the images, crops, masks."""
    steps: int
    """Optimizer steps of the pretraining."""
    batch_size: int
    """Images per optimizer step, over all processes and micro-batches."""
    accumulation: int = 1
    """Micro-batches per step. Targets are balanced over all of them; only KoLeo differs."""
    workers: int = 8
    """Processes that load images, for each training process; 0: itself, fast on a few CPU cores."""
    augment_on: Literal["workers", "device"] = "workers"
    """Where views are rendered; `device` for a GPU that waits for its workers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where networks compute; auto: a GPU where there is one."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast on GPUs and on CPUs with AMX or AVX512-BF16, else float32."""
    parallel: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """How processes share the work; auto: ddp, or fsdp where a GPU would be too small for it."""
    hsdp_replicas: int = 1
    """Copies of the sharded networks with fsdp, for example one per node."""
    compile_blocks: bool = False
    """Apply torch.compile to every block of the encoder."""
    scene_size: int = 256
    """Pixels a side of an image of `--data scenes`."""
    num_scenes: int = 100_000
    """Images of each split of `--data scenes`."""
    test_fraction: float = 0.1
    """Share of the images held out for evaluation where --data has no test split of its own."""
    max_unreadable: float = 0.05
    """Share of unreadable images above which the run stops."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int = 1250
    """Steps between two checkpoints, from which --resume continues."""
    keep_last: int = 2
    """Number of recent checkpoints to keep; 2 survive a damaged one."""
    keep_every: int = 62_500
    """Steps between two checkpoints that are kept for good; 0: none."""


def flag(name: str) -> str:
    """Return a setting's name on the command line.

    >>> flag("model.num_prototypes")
    '--model.num-prototypes'
    """
    return f"--{name.replace('_', '-')}"


def as_json(settings: Any) -> str:
    """A dataclass as an indented JSON object; what JSON has no type for, such as a path, as text.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Optim:
    ...     lr: float = 0.1
    ...     betas: tuple[float, float] = (0.9, 0.999)
    >>> print(as_json(Optim()))
    {
      "lr": 0.1,
      "betas": [
        0.9,
        0.999
      ]
    }
    """
    return json.dumps(dataclasses.asdict(settings), indent=2, default=str)


def from_json(text: str, default: T) -> T:
    """Read what :func:`as_json` wrote; fields that the text does not name are those of ``default``.

    Each value must be of its field's type: int, float, bool, str, a ``Literal``, a tuple of these,
    a path, or another such dataclass. Only integers are converted, where a float belongs.

    Raises:
        ValueError: the text is not a JSON object, a name is not a field, or a value has another
            type. The message gives the dotted name.
    """
    return cast(T, _restored(parse_json(text, "the text"), default, ""))


def differences(old: T, new: T, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """``(dotted name, old value, new value)`` of every field that differs, in the fields' order.

    >>> Inner = dataclasses.make_dataclass("Inner", [("lr", float)])
    >>> Outer = dataclasses.make_dataclass("Outer", [("steps", int), ("optim", Inner)])
    >>> list(differences(Outer(9, Inner(0.1)), Outer(9, Inner(0.2))))
    [('optim.lr', 0.1, 0.2)]
    """
    for field in dataclasses.fields(old):  # type: ignore[arg-type]
        a, b = getattr(old, field.name), getattr(new, field.name)
        if dataclasses.is_dataclass(a):
            yield from differences(a, b, f"{prefix}{field.name}.")
        elif a != b:
            yield f"{prefix}{field.name}", a, b


def _restored(values: Any, default: Any, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        where = prefix.rstrip(".") or "the text"
        raise ValueError(f"{where} is not a JSON object but {describe_value(values)}")
    own = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
    types = get_type_hints(type(default))
    changed = {}
    for name, value in values.items():
        if name not in own:
            raise ValueError(f"there is no setting {prefix}{name[:60]}")
        if dataclasses.is_dataclass(own[name]):
            changed[name] = _restored(value, own[name], f"{prefix}{name}.")
        else:
            try:
                changed[name] = _typed(value, types[name])
            except TypeError as error:
                raise ValueError(f"{prefix}{name}: {error}") from None
    return dataclasses.replace(default, **changed)


def _typed(value: Any, kind: Any) -> Any:
    """Return the value as this type, or raise a TypeError if it is of another one."""
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        if isinstance(value, str) and value in arguments:
            return value
    elif get_origin(kind) is tuple and isinstance(value, list):
        if arguments[1:] == (...,):
            return tuple(_typed(each, arguments[0]) for each in value)
        if len(value) == len(arguments):
            return tuple(_typed(each, one) for each, one in zip(value, arguments, strict=True))
    elif kind is Path and isinstance(value, str):
        return Path(value)
    elif kind is float and type(value) in (int, float) and abs(value) < sys.float_info.max:
        return float(value)
    elif kind in (bool, int, str) and type(value) is kind and not _is_huge(value):
        return value
    names = kind.__name__ if isinstance(kind, type) and not arguments else str(kind)
    raise TypeError(f"expected {names.replace('typing.', '')}, found {describe_value(value)}")


def _is_huge(value: Any) -> bool:
    """Whether this is an integer too large for any tensor and any loop."""
    return isinstance(value, int) and abs(value) > sys.maxsize

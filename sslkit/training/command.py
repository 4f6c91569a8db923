"""The command line of a recipe: presets, resuming, refusals, stages, and how errors end it."""

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import tyro

from sslkit.data import TooManyUnreadable, UnusableData
from sslkit.data.local import is_local
from sslkit.files import DamagedFile, file_digest
from sslkit.training.checkpoint import CheckpointError, Checkpoints, step_of
from sslkit.training.checks import check_run
from sslkit.training.failures import explain
from sslkit.training.finite import NonFiniteLoss
from sslkit.training.help_text import show_settings, without_help
from sslkit.training.loop import Stopped
from sslkit.training.parallel import Parallel, restarted, start, stop
from sslkit.training.run import Run, has_begun
from sslkit.training.run_files import read_settings, write_settings
from sslkit.training.run_folder import FolderError, own_folder
from sslkit.training.settings import DEFAULT_PRESET, RunSettings, SettingsError, differences

S = TypeVar("S", bound=RunSettings)

# What may differ between two calls on one --output without changing the training. What a stage
# after the training reads may differ as well (`Stage.section`).
FREE_SETTINGS = (
    *("output", "stages", "resume", "accept_changes", "workers", "device", "log_every"),
    *("checkpoint_every", "keep_last", "keep_every", "max_unreadable"),
    *("parallel", "hsdp_replicas", "compile_blocks", "augment_on"),
)


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe.

    Attributes:
        run: what it does.
        result: the file in the output folder that it leaves; ``<name>.safetensors`` by default.
        files: further files and folders that it leaves there.
        steps: for a training stage, its optimizer steps, from the settings. All processes take
            part in it. A stage without steps runs in the main process alone.
        section: the section of the settings that this stage alone reads. It may change until the
            stage has begun, and if the stage does not train, at any time.
    """

    run: Callable[[Run[Any]], None]
    result: str = ""
    files: tuple[str, ...] = ()
    steps: Callable[[Any], int] | None = None
    section: str = ""


@dataclass(frozen=True)
class FromWeights(Generic[S]):
    """How the weights of ``--init-from`` decide about the settings.

    The settings have the fields ``init_from`` and ``init.sha256``.

    Attributes:
        sections: sections of the settings that they decide.
        defaults: default settings, changed to those that follow from these weights.
        resolve: settings as typed, and those defaults, to the settings of the run. It raises
            SettingsError if they contradict the weights.
    """

    sections: Sequence[str]
    defaults: Callable[[S, str], S]
    resolve: Callable[[S, S], S]


@dataclass(frozen=True)
class Recipe(Generic[S]):
    """A method that :func:`main` can run.

    Attributes:
        presets: settings by name; ``demo`` is taken when none is named.
        stages: in the order in which they run, by name.
        check: problems of the settings with a number of processes, each in words.
        from_weights: for a recipe with ``--init-from``, what weights decide; None: no such setting.
        method: builds what the first training stage trains, a `sslkit.training.Method`, for
            ``sslkit plan``.
    """

    presets: Mapping[Any, S]
    stages: Mapping[str, Stage]
    check: Callable[[S, int], list[str]]
    from_weights: FromWeights[S] | None = None
    method: Callable[[Run[S]], Any] | None = None

    @property
    def training(self) -> list[str]:
        """Names of the training stages."""
        return [name for name, stage in self.stages.items() if stage.steps is not None]

    def result(self, name: str) -> str:
        """The file that a stage leaves."""
        return self.stages[name].result or f"{name}.safetensors"

    def has_begun(self, output: Path) -> bool:
        """Whether the first training stage has left anything in a folder."""
        return has_begun(output, self.training[0])


# -------------------------------------------------------------------------------------- main


def main(
    recipe: Recipe[Any], arguments: Sequence[str] | None = None, *, program: str | None = None
) -> None:
    """Run a recipe from the command line, and exit with one line if it cannot go on.

    Args:
        recipe: the recipe.
        arguments: words of the command line; by default those of this process.
        program: command that runs the recipe, as it is typed; by default the script itself.
    """
    try:
        words = sys.argv[1:] if arguments is None else arguments
        settings = parse(recipe, words, program=program)
        run(recipe, settings)
    except Stopped as stopped:
        output = shlex.quote(str(settings.output))
        if os.environ.get("RANK", "0") == "0":
            print(f"{stopped}: {_started(program)} --output {output} --resume")
    except (SettingsError, NonFiniteLoss, CheckpointError, DamagedFile, UnusableData) as error:
        sys.exit(f"error: {error}")
    except TooManyUnreadable as error:
        sys.exit(f"error: {error}: --max-unreadable")
    except (OSError, MemoryError, RuntimeError) as error:
        reason = explain(error)
        if reason is None:
            raise
        sys.exit(f"error: {reason}")


def _started(program: str | None) -> str:
    """How the recipe was started, without its settings."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if program is None:
        return f"{'python' if alone else 'torchrun ...'} {shlex.quote(sys.argv[0])}"
    return program if alone else f"torchrun ... -m {program}"


def run(recipe: Recipe[S], settings: S) -> None:
    """Run the stages of ``settings``, in order, in a folder that no other run uses."""
    try:
        parallel = start(settings.device)
    except ValueError as error:
        raise SettingsError(f"--device {settings.device}: {error}") from error
    again = parallel.any(restarted())
    files = ["settings.json", "data.json", "init.safetensors"]
    for name, stage in recipe.stages.items():
        files += [name, recipe.result(name), *stage.files]
    try:  # what is left of the job before a restart may still be ending
        with own_folder(settings.output, files, parallel, patience=120.0 if again else 0.0):
            parallel = run_stages(recipe, settings, parallel, again=again)
    except FolderError as error:
        stop(parallel)
        raise SettingsError(f"--output {error}") from error
    stop(parallel)


def run_stages(
    recipe: Recipe[S], settings: S, parallel: Parallel, *, again: bool = False
) -> Parallel:
    """Check the settings, then run the stages. ``again``: see :func:`check`."""
    check(recipe, settings, parallel.world_size, again=again)
    parallel.wait()  # nobody writes before all have looked
    names = tuple(recipe.stages)
    now = Run(settings, parallel, names)
    if settings.resume:
        now.say(what_is_left(recipe, settings))
    stored = read_settings(settings.output, settings)
    if parallel.is_main and not (settings.accept_changes and stored):
        write_settings(settings, names)  # changed ones once they have proved to fit
    left = unfinished(recipe, settings) if settings.resume else settings.stages
    for name, stage in recipe.stages.items():
        training = stage.steps is not None
        if not training:  # one process does the rest
            parallel = stop(parallel)
        if name in settings.stages and (parallel.is_main or parallel.group is not None):
            if name in left or training:  # these look for themselves
                stage.run(Run(settings, parallel, names))
            else:
                now.say(f"{name}: finished already")
    return parallel


# ---------------------------------------------------------------------------------- resuming


def is_finished(recipe: Recipe[S], name: str, output: Path) -> bool:
    """Whether a stage has its result, newer than those of the stages before it."""
    result = output / recipe.result(name)
    if name in recipe.training or not result.exists():
        return result.exists()
    names = list(recipe.stages)
    before = (output / recipe.result(each) for each in names[: names.index(name)])
    times = [path.stat().st_mtime_ns for path in before if path.exists()]
    return result.stat().st_mtime_ns >= max(times, default=0)


def unfinished(recipe: Recipe[S], settings: S) -> list[str]:
    """The first stage of ``--stages`` without its result, and those after it."""
    asked = [name for name in recipe.stages if name in settings.stages]
    while asked and is_finished(recipe, asked[0], settings.output):
        asked.pop(0)
    return asked


def what_is_left(recipe: Recipe[S], settings: S) -> str:
    """The stages that are left of a resumed run, its step in the first of them, and its data."""
    left = unfinished(recipe, settings)
    stages = ", ".join(left) or "all is finished"
    if left and (steps := recipe.stages[left[0]].steps):
        latest = Checkpoints(settings.output / left[0] / "checkpoints").latest()
        step = 0 if latest is None else step_of(latest)
        stages = stages.replace(left[0], f"{left[0]} (at step {step} of {steps(settings)})", 1)
    return (
        f"resuming {settings.output}: {stages}. Data: {settings.data}. Settings not given here "
        f"come from {settings.output}/settings.json"
    )


def check(recipe: Recipe[S], settings: S, world_size: int, *, again: bool = False) -> None:
    """Refuse settings that cannot work, and output folders that hold another run.

    ``again``: the same command has run before, and a cluster repeats it.

    Raises:
        SettingsError: the message says what to do.
    """
    problems = [*check_run(settings, world_size), *recipe.check(settings, world_size)]
    if not settings.stages:
        problems.append(f"--stages is empty; choose from {', '.join(recipe.stages)}")
    if problems:
        raise SettingsError("; ".join(problems))

    stored = read_settings(settings.output, settings)
    if stored is None and settings.resume:
        raise SettingsError(f"--resume: {settings.output} holds no run")
    begun = {name for name in recipe.training if has_begun(settings.output, name)}
    if stored is None or not begun:
        return  # nothing there, or settings that never came as far as a checkpoint
    if recipe.training[0] in settings.stages and not (settings.resume or again):
        raise SettingsError(
            f"{settings.output} holds a run already: continue it with --resume, run its later "
            "stages with --stages, or choose another --output"
        )
    free = {stage.section for name, stage in recipe.stages.items() if name not in begun}
    changed = [
        f"{name} was {old!r}, is {new!r}"
        for name, old, new in differences(stored, settings)
        if name.split(".")[0] not in free.union(FREE_SETTINGS)
    ]
    if changed and not settings.accept_changes:
        raise SettingsError(
            f"{settings.output} was made with other settings: {'; '.join(changed)}. Leave them as "
            "they were, choose another --output, or insist with --accept-changes"
        )
    asked = [name for name in recipe.training if name in settings.stages]
    finished = [settings.output / recipe.result(name) for name in asked]
    if changed and all(path.exists() for path in finished):
        raise SettingsError(
            f"--accept-changes: {'; '.join(changed)}, but there is nothing left to train. Remove "
            f"{', '.join(map(str, finished)) or 'the results'} to go on, or choose another --output"
        )


# ----------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class _First:
    """What decides where the defaults of all other settings come from."""

    output: Path | None = None
    preset: str | None = None
    init_from: str | None = None
    data: str | None = None
    resume: bool = False


def parse(recipe: Recipe[S], arguments: Sequence[str], *, program: str | None = None) -> S:
    """The command line over the settings of the run in --output, or of --preset.

    Two settings are not taken from the run: whether to resume, and the stages. By default these are
    all stages of the preset, or with --resume, the stages that the run was asked for.
    """
    words = without_help(arguments)
    first, _ = tyro.cli(_First, args=words, return_unknown_args=True)
    default = recipe.presets[DEFAULT_PRESET]
    if first.preset is not None and first.preset not in recipe.presets:
        # Says which presets there are, and exits.
        tyro.cli(type(default), default=default, args=words, prog=program)
    default = recipe.presets[first.preset or DEFAULT_PRESET]
    stored = read_settings(first.output or default.output, default)
    if stored and (first.preset is None or (first.resume and first.preset == stored.preset)):
        default = stored
        require_typed(recipe, stored, first)
    stages = stored.stages if stored and first.resume else recipe.presets[default.preset].stages
    default = replace(default, resume=False, accept_changes=False, stages=stages)
    if words != list(arguments):
        show_settings(default, arguments, program=program)
    weights = recipe.from_weights
    if not first.init_from or weights is None:
        return tyro.cli(type(default), default=default, args=arguments, prog=program)
    if stored is not None and has_begun_from(recipe, stored, first.init_from):
        decided = {name: getattr(stored, name) for name in weights.sections}
        default = replace(default, **decided)
        return tyro.cli(type(default), default=default, args=arguments, prog=program)
    default = weights.defaults(default, first.init_from)
    typed = tyro.cli(type(default), default=default, args=arguments, prog=program)
    return weights.resolve(typed, default)


def require_typed(recipe: Recipe[S], stored: S, first: _First) -> None:
    """Refuse to start a program or to use the network because a file says so.

    The folder of a run may come from somebody else.
    """
    named = []
    try:
        if first.data is None and not is_local(stored.data):
            named.append(f"--data '{stored.data}'")
    except (ImportError, ValueError) as error:
        raise SettingsError(f"--data: {error}") from error
    init_from = getattr(stored, "init_from", "")
    needed = init_from != "" and not recipe.has_begun(stored.output)  # else it is in the folder
    if first.init_from is None and needed and not os.path.exists(init_from):
        named.append(f"--init-from '{init_from}'")
    if named:
        raise SettingsError(
            f"{stored.output}/settings.json names what may start a program or ask another machine: "
            f"{' and '.join(named)}. If you trust it, give it again in this call"
        )


def has_begun_from(recipe: Recipe[S], stored: Any, init_from: str) -> bool:
    """Whether a run from these weights has begun, so that it no longer needs the file."""
    same = stored.init_from == init_from and digest_of(init_from) in ("", stored.init.sha256)
    return same and recipe.has_begun(stored.output)


def digest_of(init_from: str) -> str:
    """SHA-256 of a file of weights; "" for the name of other weights."""
    return file_digest(Path(init_from)) if Path(init_from).is_file() else ""

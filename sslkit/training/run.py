"""A run: its settings, its processes, its random numbers, and what is in its folder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from sslkit.data.seeds import sample_seed
from sslkit.files import DamagedFile
from sslkit.training.checkpoint import Checkpoints, checkpoint_group
from sslkit.training.parallel import Parallel
from sslkit.training.precision import has_fast_bfloat16
from sslkit.training.settings import RunSettings, SettingsError

S = TypeVar("S", bound=RunSettings, covariant=True)
T = TypeVar("T")


@dataclass(frozen=True)
class Run(Generic[S]):
    """One call of a recipe.

    A training stage called NAME keeps ``NAME/checkpoints`` and ``NAME/metrics.jsonl`` in the output
    folder, and leaves ``NAME.safetensors`` when it is finished.

    Attributes:
        settings: of the recipe.
        parallel: the processes that take part. After the training stages there is one.
        stage_names: all stages of the recipe, in order.
    """

    settings: S
    parallel: Parallel
    stage_names: tuple[str, ...] = ()

    # ------------------------------------------------------------------------- random numbers

    def seed(self, *words: str | int) -> int:
        """A seed for one purpose, such as ``seed("pretrain", "drop path", step)``.

        The words decide it, together with the seed of the settings; see
        :func:`sslkit.data.sample_seed`.
        """
        return sample_seed(self.settings.seed, *words)

    def generator(self, *words: str | int) -> torch.Generator:
        """A generator on the CPU with :meth:`seed`."""
        return torch.Generator().manual_seed(self.seed(*words))

    # ----------------------------------------------------------------------------- computing

    @property
    def in_bfloat16(self) -> bool:
        """Whether encoders compute in bfloat16."""
        automatic = has_fast_bfloat16(self.parallel.device)
        choices = {"auto": automatic, "bfloat16": True, "float32": False}
        return choices[self.settings.precision]

    def autocast(self) -> torch.autocast:
        """A context in which encoders have the precision of the settings."""
        return torch.autocast(self.parallel.device.type, torch.bfloat16, enabled=self.in_bfloat16)

    def say(self, text: str) -> None:
        """Print in the main process."""
        if self.parallel.is_main:
            print(text)

    # ---------------------------------------------------------------------------- the folder

    @property
    def output(self) -> Path:
        """Folder of the run."""
        return self.settings.output

    def export_path(self, stage: str) -> Path:
        """File that a stage leaves when it is finished."""
        return self.output / f"{stage}.safetensors"

    def is_exported(self, stage: str) -> bool:
        """Whether a stage has left its file."""
        return self.export_path(stage).exists()

    def has_begun(self, stage: str) -> bool:
        """Whether a stage has a checkpoint, or is finished. All processes have to ask."""
        return self.parallel.any(has_begun(self.output, stage))

    def checkpoints(self, stage: str) -> Checkpoints:
        """Checkpoints of a training stage. All processes have to call it."""
        return Checkpoints(
            self.output / stage / "checkpoints",
            keep_last=self.settings.keep_last,
            keep_every=self.settings.keep_every,
            group=checkpoint_group(self.parallel.group),
        )

    def last_checkpoint(self, stage: str, *, network: Callable[[], nn.Module]) -> Path:
        """The checkpoint at which a training stage ended.

        Args:
            stage: name of the stage.
            network: builds the student whose weights it has to hold, on the meta device.

        Raises:
            SettingsError: the stage is not finished, or its student is another network.
        """
        checkpoints = self.checkpoints(stage)
        latest = checkpoints.latest()
        if latest is None or not self.is_exported(stage):
            raise SettingsError(f"{self.output} has no finished {stage}: run --stages {stage}")
        require_fit(checkpoints, latest, network)
        return latest

    def load_(self, path: Path, state: Mapping[str, Any], *, partial: bool = True) -> None:
        """Fill ``state`` from a checkpoint; ``partial``: which may hold more than that.

        Raises:
            SettingsError: the checkpoint does not have these tensors.
        """
        checkpoints = Checkpoints(path.parent, group=checkpoint_group(self.parallel.group))
        try:
            checkpoints.load_(path, state, partial=partial, finite=True)
        except ValueError as error:
            raise SettingsError(f"these settings make another network: {error}") from error

    def read_export(self, stage: str, reader: Callable[[Path], T]) -> T:
        """Return what ``reader`` makes of the file of a stage.

        Raises:
            DamagedFile: it cannot be read; the message says how to make it again.
        """
        path = self.export_path(stage)
        try:
            return reader(path)
        except (OSError, ValueError, TypeError, RuntimeError, KeyError) as error:
            again = "--resume" if (self.output / stage).is_dir() else f"--stages {stage}"
            remedy = f"Delete it and make it again with {again}"
            if stage == "init":
                remedy = "Restore it, or start again in another --output"
            problem = str(error).rstrip(".?")
            raise DamagedFile(f"{path} is damaged: {problem}. {remedy}") from error


def has_begun(output: Path, stage: str) -> bool:
    """Whether there is anything of a stage to continue in the folder of a run."""
    checkpoints = Checkpoints(output / stage / "checkpoints")
    return bool(checkpoints.paths()) or (output / f"{stage}.safetensors").exists()


def require_fit(checkpoints: Checkpoints, path: Path, network: Callable[[], nn.Module]) -> None:
    """Raise SettingsError for a checkpoint of another student, before this one takes memory."""
    with torch.device("meta"):
        student = network()
    try:
        checkpoints.require_fit(path, {"student": student.state_dict()}, partial=True)
    except ValueError as error:
        raise SettingsError(f"these settings make another network: {error}") from error

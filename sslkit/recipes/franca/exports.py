"""The encoders that the stages of a run leave in its folder."""

import json
from collections.abc import Sequence
from pathlib import Path

from sslkit import RASAProjector, backbones
from sslkit.backbones import ViTEncoder
from sslkit.rasa import save_rasa
from sslkit.recipes.franca.settings import Model, Settings
from sslkit.training.finite import require_finite_tensors
from sslkit.training.run import Run
from sslkit.training.settings import SettingsError

EXPORTING = ("pretrain", "highres", "rasa")
"""Stages that leave an encoder, in order."""


def make_encoder(model: Model, img_size: int) -> ViTEncoder:
    """An untrained encoder."""
    return backbones.create(**model.backbone_arguments(img_size))


def load_encoder(run: Run[Settings], stage: str) -> ViTEncoder:
    """The encoder that a stage exported."""

    def finite(path: Path) -> ViTEncoder:
        encoder = backbones.load(path)
        require_finite_tensors(encoder.state_dict())
        return encoder

    return run.read_export(stage, finite).eval()


def export_metadata(run: Run[Settings], stage: str, name: str) -> str:
    """What the header of an export says under a name."""
    return run.read_export(stage, lambda path: backbones.read_metadata(path)[name])


def last_trained(run: Run[Settings]) -> str:
    """The last training stage that is finished.

    Raises:
        SettingsError: there is none.
    """
    for stage in ("highres", "pretrain"):
        if run.is_exported(stage):
            return stage
    raise SettingsError(f"{run.output} has no trained encoder; run --stages pretrain first")


def finished_stages(run: Run[Settings]) -> list[str]:
    """The stages that exported an encoder, in order; a RASA of an older encoder is refused."""
    finished = [stage for stage in EXPORTING if run.is_exported(stage)]
    if "rasa" in finished:
        fitted_on, last = export_metadata(run, "rasa", "of"), last_trained(run)
        if fitted_on != last:
            raise SettingsError(
                f"{run.export_path('rasa')} was fitted on {fitted_on}, and {last} has been trained "
                "since; run --stages rasa evaluate report"
            )
    return finished


def save_without_position(
    run: Run[Settings],
    encoder: ViTEncoder,
    projector: RASAProjector,
    *,
    of: str,
    errors: Sequence[float],
) -> None:
    """Fold a projector into an encoder, and write both.

    Args:
        run: the run, in whose folder ``rasa.safetensors`` and ``rasa_projector.safetensors`` are.
        encoder: is changed.
        projector: fitted on the encoder.
        of: the stage that the encoder comes from.
        errors: position error after each iteration of the fit.
    """
    for iteration, error in enumerate(errors, start=1):
        run.say(f"rasa: iteration {iteration}, position error {error:.5f}")
    encoder = encoder.cpu()
    encoder.vit = projector.fold_into_vit(encoder.vit)
    save_rasa(projector, run.output / "rasa_projector.safetensors")  # for the evaluation command
    described = {"stage": "rasa", "of": of, "position_errors": json.dumps(list(errors))}
    backbones.save(encoder, run.export_path("rasa"), described)

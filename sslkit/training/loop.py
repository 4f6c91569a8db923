"""The training loop of every method: data, checkpoints, resuming, metrics, warnings, signals."""

import json
import math
import signal
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from sslkit.backbones.weight_files import read_header
from sslkit.data import (
    Batch,
    MultiCrop,
    MultiCropDataset,
    Source,
    StreamSource,
    UnreadableLog,
    make_loader,
)
from sslkit.data.throughput import DataWatch
from sslkit.progress import TrainingProgress
from sslkit.training.checkpoint import step_of
from sslkit.training.data import Sources, describe_sources, open_training_images
from sslkit.training.metrics import MetricsWriter
from sslkit.training.monitor import CollapseMonitor, feature_std
from sslkit.training.precision import explain
from sslkit.training.run import Run, require_fit
from sslkit.training.run_files import write_file, write_settings
from sslkit.training.settings import SettingsError, as_json
from sslkit.training.signals import stop_request
from sslkit.training.step import StepReport


class Method(Protocol):
    """A method of self-supervised learning, as the training loop drives it."""

    @property
    def num_prototypes(self) -> Mapping[str, int]:
        """Prototypes by the names of the losses that compare with them; empty without any."""

    def step(self, step: int, batch: Batch, *, watch: bool) -> StepReport:
        """Take one optimizer step, counted from 0; ``watch``: report the usage of prototypes."""

    def state(self) -> dict[str, Any]:
        """Tensors by name, in nested dicts, that the next step depends on.

        Those of the network that is trained are under ``"student"``: a run that is resumed with
        another network is refused by their shapes.
        """

    def encoder(self) -> nn.Module:
        """The encoder in its present state, for evaluation, on the CPU.

        Called in all processes.
        """

    def export(self, path: Path, description: dict[str, str]) -> None:
        """Write the encoder to a file. Called in all processes, of which the main one writes."""


class Stopped(Exception):
    """A SIGTERM or SIGINT has arrived, and everything is saved."""

    def __str__(self) -> str:
        stage, step, number = self.args
        name = signal.Signals(number).name
        return f"{stage}: stopped by {name} and saved at step {step}; continue with --resume"


def train(
    make_method: Callable[[], Method],
    run: Run,
    *,
    stage: str,
    network: Callable[[], nn.Module],
    steps: int,
    batch_size: int,
    sources: Sources,
    crops: MultiCrop,
    grace_steps: int = 0,
    online: Callable[[nn.Module], Mapping[str, float]] | None = None,
    online_every: int = 0,
    export_before: str = "",
) -> None:
    """Train one stage, from its last checkpoint if it has any, to ``<stage>.safetensors``.

    Args:
        make_method: makes the method at its first step.
        run: the run. Its settings decide on workers, checkpoints and logging.
        stage: name of the stage.
        network: builds the student on the meta device, whose shapes a checkpoint has to have.
        steps: optimizer steps.
        batch_size: images per step, over all processes.
        sources: the data.
        crops: views of an image.
        grace_steps: steps before which the collapse monitor is silent.
        online: scores an encoder, as ``{metric: value}`` for the metrics, in the main process.
        online_every: steps between two of these scores; 0: none.
        export_before: name of a file that the method exports before its first step; "": none.

    Raises:
        Stopped: a signal has arrived.
        SettingsError: a checkpoint or the data does not fit the settings.
    """
    settings, parallel = run.settings, run.parallel
    if run.is_exported(stage):
        run.read_export(stage, read_header)  # raises an error if it is damaged
        run.say(f"{stage}: finished already, {run.export_path(stage)}")
        return
    checkpoints = run.checkpoints(stage)
    images = open_training_images(settings, sources)
    latest = checkpoints.latest()
    start = 0 if latest is None else step_of(latest)
    if latest is not None:
        require_fit(checkpoints, latest, network)
    if start > steps:
        raise SettingsError(f"{stage} has {steps} steps, but {latest} is further")
    run.say(f"{stage}: {explain(settings.precision, parallel.device)}")
    method = make_method()
    if latest is not None:
        run.load_(latest, method.state(), partial=False)
    elif export_before:
        method.export(run.export_path(export_before), _description(run, export_before, 0, method))
    if parallel.is_main:
        write_settings(run.settings, run.stage_names)
        write_file(run.output, "data.json", describe_sources(sources))
    num_images = _count_images(run, images)
    if num_images is not None and batch_size > num_images:
        run.say(
            f"warning: the batch of {batch_size} is larger than the data set: each step sees some "
            f"of its {num_images} images more than once. Give at most {num_images}, or more images"
        )
    loader = make_loader(
        MultiCropDataset(images, crops, seed=settings.seed),
        batch_size=batch_size,
        start_sample=start * batch_size,
        rank=parallel.rank,
        world_size=parallel.world_size,
        num_workers=settings.workers,
        augment_on=parallel.device if settings.augment_on == "device" else None,
    )
    on_cpu = parallel.device.type == "cpu"
    data = DataWatch(settings.workers, model_cores=torch.get_num_threads() if on_cpu else 1)
    unreadable = UnreadableLog(num_images, threshold=settings.max_unreadable)
    monitor = CollapseMonitor(
        method.num_prototypes, grace_steps=grace_steps, loss_grace_steps=max(grace_steps, 100)
    )
    with ExitStack() as stack:
        request = stack.enter_context(stop_request())
        # Also when the training fails, but not after a second Ctrl-C.
        stack.push(lambda kind, *_: None if kind is KeyboardInterrupt else checkpoints.wait())
        batches = stack.enter_context(iter(loader))
        saved = -1 if latest is None else start
        if parallel.is_main:
            metrics = stack.enter_context(MetricsWriter(run.output / stage, resume_step=start))
            progress = stack.enter_context(
                TrainingProgress(steps, start_step=start, description=stage)
            )
        for step in range(start, steps):
            if parallel.group is None:
                batch = request.unless_stopped(lambda: data.next(batches))
            else:  # the others are in the step already, and wait for this process there
                batch = data.next(batches)
            if batch is None:
                if saved < step:
                    checkpoints.save(step, method.state())
                raise Stopped(stage, step, request.number)
            unreadable.update(batch.indices, batch.unreadable)
            done = step + 1
            logged = parallel.is_main and _is_due(done, settings.log_every, steps)
            report = method.step(step, batch, watch=logged)
            record: dict[str, float] = {}
            if online is not None and _is_due(done, online_every, steps):
                encoder = method.encoder()
                if parallel.is_main:
                    record |= online(encoder.to(parallel.device))
                    for name, score in record.items():
                        progress.message(f"step {done}: {name} {score:.4g}")
            if parallel.is_main:
                progress.update(done, loss=report.loss, images=batch_size)
                if logged:
                    values, warnings = _watch(report, monitor, done)
                    record |= values
                    record["images_per_second"] = progress.images_per_second
                    record |= {k: v for k, v in data.metrics().items() if math.isfinite(v)}
                    for warning in filter(None, (*warnings, data.warning())):
                        progress.message(f"warning: {warning}")
                if record:
                    metrics.log(done, record)
            asked_to_stop = int(parallel.gather(torch.tensor(request.number)).max())
            if asked_to_stop or _is_due(done, settings.checkpoint_every, steps):
                checkpoints.save(done, method.state())
                saved = done
            if asked_to_stop:
                raise Stopped(stage, done, asked_to_stop)
        checkpoints.wait()
        if asked_to_stop := int(parallel.gather(torch.tensor(request.number)).max()):
            raise Stopped(stage, steps, asked_to_stop)
    method.export(run.export_path(stage), _description(run, stage, steps, method))
    parallel.wait()


def _count_images(run: Run, images: Source | StreamSource) -> int | None:
    """The number of images, which all processes have to see alike; None for a stream."""
    found = None if isinstance(images, StreamSource) else len(images)
    counts = run.parallel.gather(torch.tensor(found or 0)).tolist()
    if len(set(counts)) > 1:
        raise SettingsError(f"--data {run.settings.data} has {counts} images for ranks 0, 1, ...")
    return found


def _description(run: Run, stage: str, step: int, method: Method) -> dict[str, str]:
    """What the header of an exported file says."""
    return {
        "stage": stage,
        "step": str(step),
        "settings": as_json(run.settings),
        "num_prototypes": json.dumps(dict(method.num_prototypes)),
    }


def _is_due(step: int, interval: int, last: int) -> bool:
    """Every ``interval`` steps and at the last one; never if ``interval`` is 0."""
    return interval > 0 and (step % interval == 0 or step == last)


def _watch(
    report: StepReport, monitor: CollapseMonitor, step: int
) -> tuple[dict[str, float], list[str]]:
    """One line of metrics.jsonl, and warnings if the run collapses."""
    losses = {name: loss.item() for name, loss in report.losses.items()}
    usage = report.usage
    spread = feature_std(report.features).item()
    record = {
        "loss": report.loss.item(),
        **{f"loss/{name}": value for name, value in losses.items()},
        **report.hyperparameters,
        **{f"gradient_norm/{name}": norm.item() for name, norm in report.gradient_norms.items()},
        **{f"target_entropy/{name}": u.target_entropy.item() for name, u in usage.items()},
        **{f"prototypes_used/{name}": u.fraction_used.item() for name, u in usage.items()},
        "feature_std": spread,
    }
    shares = {name: report.row_shares.get(name.split("/")[0], 1.0) for name in usage}
    warnings = monitor.update(
        step,
        target_entropy={name: u.target_entropy.item() for name, u in usage.items()},
        mean_entropy={name: u.entropy.item() for name, u in usage.items()},
        # A uniform student has a cross-entropy of ln K in the rows that count.
        losses={name: losses[name] / (share or math.nan) for name, share in shares.items()},
        spread=spread,
    )
    return record, warnings

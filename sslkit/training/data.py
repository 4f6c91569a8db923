"""The data of a run: opened from its settings, and compared with what the run began with."""

import json
from typing import NamedTuple

from sslkit.data import Source, StreamSource, open_source, open_stream, train_test_split
from sslkit.data.fingerprint import changes, fingerprints
from sslkit.data.sources import Split, is_stream, source_arguments
from sslkit.files import read_json_object
from sslkit.training.run import Run, has_begun
from sslkit.training.settings import RunSettings, SettingsError


class Sources(NamedTuple):
    """The images to learn from, and held-out ones to evaluate on."""

    train: Source
    test: Source

    @property
    def labelled(self) -> bool:
        """Whether there are classes for k-NN to tell apart."""
        return self.train.num_classes > 1


def open_sources(run: Run[RunSettings]) -> Sources:
    """Open both splits of ``--data``; for a stream, two halves of what it holds out for tests.

    Raises:
        SettingsError: the data cannot be opened, or are not those that the run began with.
    """
    settings = run.settings

    def opened(split: Split) -> Source:
        arguments = source_arguments(settings, split)
        return open_source(**arguments, test_fraction=settings.test_fraction)

    try:
        if is_stream(settings.data):
            sources = Sources(*train_test_split(opened("test"), 0.5, settings.seed))
        else:
            sources = Sources(opened("train"), opened("test"))
    except (OSError, ImportError, RuntimeError, ValueError) as error:
        raise SettingsError(f"--data: {error}") from error
    _require_same(run, sources)
    return sources


def open_training_images(settings: RunSettings, sources: Sources) -> Source | StreamSource:
    """What the training loop learns from: the training split, or a stream beside it."""
    if not is_stream(settings.data):
        return sources.train
    fraction, seed = settings.test_fraction, settings.seed
    return open_stream(settings.data, test_fraction=fraction, seed=seed)


def describe_sources(sources: Sources) -> str:
    """What the data are, as the text of ``data.json``."""
    return json.dumps(fingerprints(sources._asdict()), indent=1)


def _require_same(run: Run[RunSettings], sources: Sources) -> None:
    """Refuse images or classes other than those that the run in --output began with."""
    settings, path = run.settings, run.output / "data.json"
    begun = any(has_begun(run.output, name) for name in run.stage_names)
    if settings.accept_changes or not (path.exists() and begun):
        return
    stored = read_json_object(path, "restore it, or remove it")
    if found := changes(stored, fingerprints(sources._asdict())):
        raise SettingsError(
            f"--data {settings.data} is not what the run in {settings.output} began with: "
            f"{'; '.join(found)}. Restore the data, choose another --output, or insist with "
            "--accept-changes"
        )

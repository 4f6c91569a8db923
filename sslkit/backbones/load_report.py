"""LoadReport: what became of every tensor of a file."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class LoadReport:
    """What :func:`sslkit.backbones.load_pretrained` did with a file; ``print`` it.

    Names of the file are those after wrappers and nested dicts were taken apart
    (``teacher.backbone.norm.weight``), names of the encoder those of its ``state_dict``.

    Attributes:
        source: the file, folder or name that was read.
        paths: the files that were opened; none for ``timm:NAME``.
        layout: whose names the file uses.
        network: the settings of :func:`sslkit.backbones.create` that rebuild the encoder.
        used: every name of the file whose values are in the encoder.
        renamed: encoder name -> names of the file, where they differ by more than a prefix.
        resampled: encoder name -> from which grid to which, and how.
        channels: encoder name -> how input channels were inflated or reduced.
        missing: encoder name -> what stands there in place of weights from the file.
        unused: name of the file -> why its values are not in the encoder.
        heads: name of a head -> what was made of it.
        notes: what could not be read off the file, and was assumed.
    """

    source: str
    paths: tuple[Path, ...]
    layout: str
    network: Mapping[str, object]
    used: tuple[str, ...]
    renamed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    resampled: Mapping[str, str] = field(default_factory=dict)
    channels: Mapping[str, str] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    unused: Mapping[str, str] = field(default_factory=dict)
    heads: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The report as a few lines of text; names that end alike are counted, not listed."""
        settings = dict(self.network)
        name = settings.pop("name")
        shown = ", ".join(f"{k}={v!r}" for k, v in settings.items() if v is not None)
        renamed = [f"{' + '.join(old)} -> {new}" for new, old in self.renamed.items()]
        lines = [
            f"{self.source}: {self.layout}",
            f"  network    {name} ({shown})",
            f"  used       {len(self.used)} tensors",
            *_several("renamed", renamed),
            *(f"  resampled  {key}: {how}" for key, how in self.resampled.items()),
            *(f"  channels   {key}: {how}" for key, how in self.channels.items()),
            *(f"  missing    {names}: {why}" for names, why in _by_reason(self.missing)),
            *(f"  unused     {names}: {why}" for names, why in _by_reason(self.unused)),
            *(f"  head       {key}: {what}" for key, what in self.heads.items()),
            *(f"  note       {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def _several(title: str, items: list[str], shown: int = 3) -> list[str]:
    if not items:
        return []
    more = f", and {len(items) - shown} more" if len(items) > shown else ""
    return [f"  {title:<10} {len(items)} tensors: {', '.join(items[:shown])}{more}"]


def _by_reason(reasons: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """``(names, reason)``: names of one reason together, as ``first.*`` where they share it."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, why in reasons.items():
        groups.setdefault((name.split(".")[0], why), []).append(name)
    for (first, why), names in groups.items():
        yield names[0] if len(names) == 1 else f"{first}.* ({len(names)})", why

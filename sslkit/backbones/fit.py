"""An encoder filled with the tensors of a file, each of them accounted for."""

import fnmatch
import functools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sslkit.backbones.encoder import ViTEncoder
from sslkit.backbones.encoder_file import build_folded_norm
from sslkit.backbones.factory import create
from sslkit.backbones.layouts.layout import Layout
from sslkit.backbones.load_report import LoadReport
from sslkit.backbones.networks import Network
from sslkit.backbones.settings import NETWORK, check_settings
from sslkit.backbones.weight_files import WeightsFile

# The weight that reads the channels of an image: the first convolution of a stem, or the only one.
_PATCH_WEIGHTS = ("vit.patch_embed.proj.stem.0.weight", "vit.patch_embed.proj.weight")
_WEIGHTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def build_encoder(
    file: WeightsFile,
    network: Network,
    layout: Layout,
    settings: Mapping[str, Any],
    *,
    folded_norm: Mapping[str, float] | None = None,
    in_chans: int | None = None,
    ignore: Sequence[str] = (),
) -> tuple[ViTEncoder, LoadReport]:
    """The encoder of ``settings`` with the values of ``network``, as ``layout`` names them.

    Args:
        file: for messages.
        network: its tensors and what stands beside.
        layout: which tensor goes where.
        settings: of ``create``, with the channels and the grid of the file.
        folded_norm: the final norm is the one of ``RASAProjector.fold_into_vit``.
        in_chans: channels of the encoder; the file's by default.
        ignore: patterns of names that need not match.

    Raises:
        ValueError: tensors are missing, unexpected, of another shape, or cannot be joined: all are
            listed. Nothing was built then.
    """
    settings = check_settings(f"{file.name}: the settings", settings, NETWORK)
    if settings.get("depth", 1) > len(network.tensors):
        raise ValueError(
            f"{file.name}: a network of {settings['depth']} blocks has more tensors than the "
            f"{len(network.tensors)} in the file"
        )
    encoder = _create(settings, folded_norm)
    expected = {name: t.shape for name, t in encoder.state_dict().items()}
    fit = _Fit(network, layout, ignore)
    state = {name: fit.take(name, shape) for name, shape in expected.items()}
    fit.check(file.name, settings)
    found = {name: tensor for name, tensor in state.items() if tensor is not None}
    if not found:
        raise ValueError(f"ignore={list(ignore)} leaves no tensor of {file.name} to load")
    channels = {}
    if in_chans is not None and in_chans != settings["in_chans"]:
        weight = next(name for name in _PATCH_WEIGHTS if name in found)
        found[weight] = adapt_channels(found[weight], in_chans)
        channels[weight] = f"{settings['in_chans']} to {in_chans}, repeated in turn"
        settings = {**settings, "in_chans": in_chans}
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in found.values()))
    if "mask_token" in fit.missing and "mask_token" in layout.absent:
        found["mask_token"] = torch.zeros(expected["mask_token"], dtype=dtype)
    if len(found) < len(expected):
        _require_share(file.name, expected, network)
    if channels or len(found) < len(expected):
        encoder = _create(settings, folded_norm, fresh=len(found) < len(expected))
    values = {name: tensor.to(dtype, copy=True) for name, tensor in found.items()}
    _warn_of_nan(file.name, values)
    encoder.load_state_dict(values, assign=True, strict=False)
    encoder.to(dtype)
    _replace_rope_(encoder, settings)
    notes = list(layout.notes)
    if any(tensor.dtype != dtype for tensor in found.values()):
        notes.append(f"the file mixes float types; all tensors are now {dtype}")
    report = LoadReport(
        source=file.name,
        paths=file.paths,
        layout=layout.title,
        network=encoder.settings or {},
        used=tuple(fit.full(name) for name in network.tensors if name in fit.used),
        renamed=fit.renamed,
        channels=channels,
        missing=fit.missing,
        unused={**fit.unused, **network.unused},
        notes=tuple(notes),
    )
    return encoder, report


def adapt_channels(weight: Tensor, in_chans: int) -> Tensor:
    """A patch embedding ``[D, C, ph, pw]`` for images of another number of channels, C'.

    An image of C channels and one of C' channels that both repeat the same min(C, C') channels in
    turn have the same embeddings: with C' > C, channel j has the weights of channel j mod C divided
    by the number of channels that have them; with C' < C, it has the sum of the weights of channels
    j, j + C', j + 2 C', ...

    >>> weight = torch.tensor([1.0, 2.0, 4.0]).reshape(1, 3, 1, 1)
    >>> [adapt_channels(weight, C).flatten().tolist() for C in (1, 2, 4)]
    [[7.0], [5.0, 2.0], [0.5, 2.0, 4.0, 0.5]]
    """
    if in_chans < 1:
        raise ValueError(f"in_chans must be at least 1, got {in_chans}")
    C = weight.shape[1]
    source = torch.arange(max(C, in_chans)) % min(C, in_chans)
    copies = source.bincount().to(weight.dtype)[source]
    if in_chans > C:
        return weight[:, source] / copies[:, None, None]
    reduced = weight.new_zeros(len(weight), in_chans, *weight.shape[2:])
    return reduced.index_add(1, source, weight)


class _Fit:
    """Which tensors of a network were taken for which of an encoder, and what did not fit."""

    def __init__(self, network: Network, layout: Layout, ignore: Sequence[str]) -> None:
        self.network = network
        self.layout = layout
        self.ignore = tuple(ignore)
        self.used: set[str] = set()
        self.renamed: dict[str, tuple[str, ...]] = {}
        self.missing: dict[str, str] = {}
        self.unused: dict[str, str] = {}
        self.problems: list[str] = []

    def full(self, name: str) -> str:
        """The name in the file of a name in the network."""
        return self.network.prefix + name

    def take(self, name: str, shape: torch.Size) -> Tensor | None:
        """The value of an encoder tensor; None where it is missing, whether that is well or not."""
        source = self.layout.source(name)
        tensors = self.network.tensors
        absent = [part for part in source.names if part not in tensors]
        ignored = self._ignored([name, *map(self.full, source.names)])
        self.used.update(part for part in source.names if part in tensors)
        if absent:
            if name in self.layout.absent:
                self.missing[name] = self.layout.absent[name]
            elif ignored:
                self.missing[name] = "fresh weights, by ignore"
            else:
                listed = " and ".join(map(self.full, absent))
                of = "" if listed == name else f" (of {name})"
                self.problems.append(f"missing: {listed}{of}")
            return None
        parts = [tensors[part] for part in source.names]
        try:
            value = source.join(*parts) if source.join is not None else parts[0]
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            self.problems.append(f"{' and '.join(map(self.full, source.names))}: {error}")
            return None
        if value.shape != shape or value.dtype not in _WEIGHTS:
            if ignored:
                self.missing[name] = f"fresh weights, by ignore (the file's is {list(value.shape)})"
                return None
            kind = "" if value.dtype in _WEIGHTS else f"{value.dtype} "
            self.problems.append(
                f"mismatched: {' and '.join(map(self.full, source.names))} is "
                f"{kind}{list(value.shape)}, the network has {list(shape)}"
            )
            return None
        if source.names != (name.removeprefix("vit."),) and source.names != (name,):
            self.renamed[name] = tuple(map(self.full, source.names))
        return value

    def check(self, name: str, settings: Mapping[str, Any]) -> None:
        """Account for what was not taken, and raise if anything does not fit."""
        missing = [p for p in self.problems if p.startswith("missing")]
        others = [p for p in self.problems if not p.startswith("missing")]
        left = [part for part in self.network.tensors if part not in self.used]
        unexpected = [*map(self.full, left), *self.network.unexpected]
        problems = []
        for full in unexpected:
            part = full.removeprefix(self.network.prefix)
            known = _matching(part, self.layout.companions)
            if known is not None:
                self.unused[full] = self.layout.companions[known]
            elif self._ignored([full, part]):
                self.unused[full] = "left out, by ignore"
            else:
                problems.append(f"unexpected: {full}")
        if problems or self.problems:
            shown = "\n  ".join([*missing, *problems, *others])
            raise ValueError(
                f"the tensors of {name}, read as {self.layout.title}, do not fit its settings "
                f"{dict(settings)}; nothing is loaded:\n  {shown}"
            )

    def _ignored(self, names: Iterable[str]) -> bool:
        return any(_matching(name, self.ignore) is not None for name in names)


def _matching(name: str, patterns: Iterable[str]) -> str | None:
    return next((pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)), None)


def _create(
    settings: Mapping[str, Any], folded_norm: Mapping[str, float] | None, *, fresh: bool = False
) -> ViTEncoder:
    """Build the network without memory (on the meta device), or with fresh weights.

    Raises:
        ValueError: timm cannot build the network; its own errors are of many types.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu" if fresh else "meta"):
            encoder = create(**settings)
            if folded_norm is not None:
                encoder.vit.norm = build_folded_norm(encoder.embed_dim, **folded_norm)
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"no encoder can be built with {dict(settings)}: {reason}") from error
    return encoder


def _require_share(name: str, expected: Mapping[str, torch.Size], network: Network) -> None:
    """Refuse an encoder that is much larger than the file, most of it fresh weights (``ignore``).

    Raises:
        ValueError: the encoder has more than four times the parameters in the file.
    """
    asked = sum(math.prod(shape) for shape in expected.values())
    there = sum(tensor.numel() for tensor in network.tensors.values())
    if asked > 4 * there + (1 << 20):
        raise ValueError(
            f"the encoder that {name} describes has {asked:,} parameters, but the file only "
            f"{there:,}: too few for ignore to leave the rest to fresh weights"
        )


def _warn_of_nan(name: str, values: Mapping[str, Tensor]) -> None:
    """Weights that are not finite may be what somebody looks for, and are loaded."""
    wrong = [n for n, x in values.items() if not x.is_meta and not bool(x.isfinite().all())]
    if wrong:
        warnings.warn(
            f"{name}: {len(wrong)} tensor(s) hold NaN or infinite values, such as {wrong[0]}: the "
            "tokens of this encoder may be NaN",
            RuntimeWarning,
            stacklevel=4,
        )


def _replace_rope_(encoder: ViTEncoder, settings: Mapping[str, Any]) -> None:
    """Give a network from the meta device the rotary positions of one with a single block."""
    rope = getattr(encoder.vit, "rope", None)
    if rope is not None and any(buffer.is_meta for buffer in rope.buffers()):
        encoder.vit.rope = _create({**settings, "depth": 1}, None, fresh=True).vit.rope

"""Cache of features: stores in a folder, of which any that has the tokens serves a request."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sslkit.data.sources import Source
from sslkit.evaluation.feature_store import FeatureStore
from sslkit.evaluation.features import Features, report_unreadable
from sslkit.evaluation.tokens import IMAGE_TOKENS, PATCH_TOKENS
from sslkit.files import damage_explained, parse_json

_ALL_LAYERS = {"cls": "layer_cls", "patches": "layer_patches"}  # whose last layer is the token
_OF_A_BLOCK = ("queries", "keys", "values", "attention")


def cached_features(
    folder: str | os.PathLike[str],
    encoder: nn.Module,
    source: Source,
    *,
    identity: Mapping[str, Any],
    transform: Callable[[Tensor], Tensor],
    want: Sequence[str] = ("cls", "patches"),
    indices: Sequence[int] | None = None,
    block: int = -1,
    num_layers: int = 4,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Features:
    """As `sslkit.evaluation.features.extract`, in float16 and on the disk.

    What a finished store in the folder has is not computed again; class tokens and patches are also
    the last layer of ``layer_cls`` and ``layer_patches``, and the last layers of more are those of
    fewer. Otherwise the request gets a store of its own; see
    `sslkit.evaluation.feature_store.FeatureStore`.

    Args:
        folder: made if missing; all its stores are of the same images.
        identity: what the features are of, as plain values (the weights, the data, the view): the
            stores' must be the same.
        encoder: this and all other arguments: see `extract`.
        progress: called with the number of images done, those that were there included.

    Raises:
        ValueError: the folder holds features of something else (the differences are named) or
            damaged files; there is no image; or a value is beyond float16.
    """
    indices = range(len(source)) if indices is None else indices
    name = "+".join(sorted(want))
    if any(token in _OF_A_BLOCK for token in want):
        name += f"-block{block}"
    if any(token in _ALL_LAYERS.values() for token in want):
        name += f"-{num_layers}_layers"
    own = FeatureStore(
        Path(folder) / name,
        identity=identity,
        want=want,
        indices=indices,
        block=block,
        num_layers=num_layers,
    )
    done = 0
    found = next(_finished(own), None)
    if found is None:
        for count in own.fill(
            encoder,
            source,
            transform=transform,
            batch_size=batch_size,
            device=device,
            num_workers=num_workers,
        ):
            done += count
            if progress is not None:
                progress(done)
        found = own.read()
    elif progress is not None:
        progress(len(indices))
    assert found is not None
    features, unreadable = found
    report_unreadable(unreadable, len(indices), all_of_them=not len(features))
    return replace(features, tokens={name: _taken(features, name, num_layers) for name in want})


def _finished(own: FeatureStore) -> Iterator[tuple[Features, list[str]]]:
    """What finished stores beside a request's own, itself included, have that serves it."""
    for path in sorted(own.folder.parent.glob("*/meta.json")):
        with damage_explained(str(path), f"remove {path.parent}"):
            of = parse_json(path.read_bytes(), "it")["of"]
            want, block, num_layers = of["want"], int(of["block"]), int(of["num_layers"])
            if not set(want) <= {*IMAGE_TOKENS, *PATCH_TOKENS}:
                raise ValueError(f"it is of {want}")
        if all(_serves(token, own, want, block, num_layers) for token in own.want):
            other = replace(own, folder=path.parent, want=want, block=block, num_layers=num_layers)
            found = other.read()
            if found is not None:
                yield found


def _serves(
    token: str, own: FeatureStore, want: Sequence[str], block: int, num_layers: int
) -> bool:
    """Whether a store of other tokens, block and layers has a token that ``own`` wants."""
    if token not in want:
        return _ALL_LAYERS.get(token) in want
    if token in _OF_A_BLOCK:
        return own.block == block
    return token not in _ALL_LAYERS.values() or own.num_layers <= num_layers


def _taken(features: Features, token: str, num_layers: int) -> Tensor:
    if token not in features.tokens:
        return features.tokens[_ALL_LAYERS[token]][:, -1]
    x = features.tokens[token]
    return x[:, -num_layers:] if token in _ALL_LAYERS.values() else x

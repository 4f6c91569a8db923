"""`torch.hub` entry points: ``torch.hub.load("ORG/sslkit", NAME)``, or of a local checkout.

``torch.hub.load(FOLDER, "encoder", "encoder.safetensors", source="local")`` reads weights;
``franca_vits14``, ... build the networks of Franca, with weights of a file or with fresh ones.
"""

from typing import Any as _Any  # torch.hub takes public callables for entry points

dependencies = ["torch", "timm", "einops", "numpy", "safetensors"]


def encoder(weights: str, **options: _Any) -> _Any:
    """The encoder of a file, a folder, ``hf:ORG/NAME`` or ``timm:NAME``, in evaluation mode.

    Args:
        weights: all that `sslkit.backbones.load` reads.
        **options: of `sslkit.backbones.load`: ``img_size``, ``in_chans``, ...

    Returns:
        `sslkit.backbones.ViTEncoder`: ``encoder(images)`` has ``cls``, ``registers``, ``patches``.
    """
    from sslkit import backbones

    return backbones.load(weights, **options).eval()


def rasa(weights: str) -> _Any:
    """The `sslkit.RASAProjector` of a file: ours, or the head of the released Franca."""
    from sslkit.rasa import load_rasa

    return load_rasa(weights).eval()


def franca_vits14(weights: str | None = None, **options: _Any) -> _Any:
    """ViT-S/14 of Franca's design; see `_franca`."""
    return _franca("franca_vits14", weights, options)


def franca_vitb14(weights: str | None = None, **options: _Any) -> _Any:
    """ViT-B/14 of Franca; see `_franca`."""
    return _franca("franca_vitb14", weights, options)


def franca_vitl14(weights: str | None = None, **options: _Any) -> _Any:
    """ViT-L/14 of Franca; see `_franca`."""
    return _franca("franca_vitl14", weights, options)


def franca_vitg14(weights: str | None = None, **options: _Any) -> _Any:
    """ViT-g/14 of Franca; see `_franca`."""
    return _franca("franca_vitg14", weights, options)


def _franca(name: str, weights: str | None, options: dict[str, _Any]) -> _Any:
    """A network by name, with the weights of a file, or fresh ones; in evaluation mode.

    ``options`` are those of `sslkit.backbones.load`, or without weights of ``create``.

    Raises:
        ValueError: the file holds another network.
    """
    from sslkit import backbones
    from sslkit.backbones.franca import VIT_SIZES

    if weights is None:
        return backbones.create(name, **options).eval()
    loaded = backbones.load(weights, **options)
    size = VIT_SIZES[name]
    found = (loaded.embed_dim, loaded.depth, loaded.num_heads)
    if found != (size.width, size.depth, size.heads):
        raise ValueError(
            f"{weights} is no {name}, which has (width, depth, heads) = "
            f"{(size.width, size.depth, size.heads)}: it has {found}; torch.hub.load(..., "
            "'encoder', weights) reads any network"
        )
    return loaded.eval()

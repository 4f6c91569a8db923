"""create: a token encoder by name."""

import difflib
from typing import Any, Literal

import timm

from sslkit.backbones.encoder import ViTEncoder
from sslkit.backbones.franca import VIT_SIZES, build_franca_vit
from sslkit.backbones.positions import PosInterpolation

Size = int | tuple[int, int] | list[int]


def create(
    name: str,
    *,
    img_size: Size | None = None,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    patch_size: Size | None = None,
    activation_checkpointing: bool = False,
    pos_interpolation: PosInterpolation | None = None,
    rope_periods: Literal["float32", "bfloat16"] = "float32",
    pretrained: bool = False,
    **timm_kwargs: Any,
) -> ViTEncoder:
    """Build a token encoder.

    Args:
        name: a network of :data:`sslkit.backbones.franca.VIT_SIZES` (``franca_vits14``,
            ``franca_vitb14``, ``franca_vitl14``, ``franca_vitg14``, ``sslkit_vit_tiny``,
            ``sslkit_vit_conv``, ``sslkit_vit_micro``), or any Vision Transformer of timm, with or
            without a weight tag (``vit_small_patch16_224``,
            ``vit_base_patch14_reg4_dinov2.lvd142m``, ``vit_small_patch16_dinov3``, ...).
        img_size: ``(height, width)`` or one number: the grid of the position embedding. Images of
            any other size can be encoded too. The network's own by default.
        in_chans: channels of an image.
        drop_path_rate: stochastic depth in training: of every block for the networks of this
            library, of the last block with a linear ramp for timm's.
        patch_size: ``(height, width)`` or one number; the network's own by default.
        activation_checkpointing: see :class:`ViTEncoder`.
        pos_interpolation: how positions are resampled, see :class:`ViTEncoder`. The default is the
            rule of the network's own code: ``"dinov2"`` for the networks of this library, as in the
            training of the released Franca, and ``"antialias"`` for timm's.
        rope_periods: see :class:`ViTEncoder`.
        pretrained: load timm's weights, by download or from its cache. Networks of this library
            have none to download.
        **timm_kwargs: of timm's ``VisionTransformer``: ``depth``, ``reg_tokens``, ``qk_norm``, ...
            and, for networks of this library, ``stem``: the channels of the convolutions of a
            :class:`~sslkit.backbones.stem.ConvStem`, empty for a plain patch embedding;
            of its ``Eva``, which the networks of DINOv3 are: ``depth``, ``num_reg_tokens``,
            ``rope_rescale_coords``, ...

    Returns:
        A :class:`ViTEncoder`; its ``settings`` are these arguments: ``create(**settings)`` builds
        the same network with fresh weights.

    Raises:
        ValueError: the name is unknown (close matches are listed), or has no pretrained weights.
        TypeError: the network is no Vision Transformer, or does not take an argument.
        RuntimeError: the pretrained weights could not be loaded.

    >>> import torch
    >>> encoder = create("sslkit_vit_micro", in_chans=1, img_size=(16, 24))
    >>> encoder(torch.zeros(1, 1, 16, 24)).patches.shape
    torch.Size([1, 4, 6, 32])
    """
    shape: dict[str, Any] = {
        "img_size": as_pair("img_size", img_size),
        "patch_size": as_pair("patch_size", patch_size),
    }
    common: dict[str, Any] = {"in_chans": in_chans, "drop_path_rate": drop_path_rate, **timm_kwargs}
    if name in VIT_SIZES:
        if pretrained:
            raise ValueError(
                f"{name} has no weights to download; give pretrained=False, or read a file of "
                "weights with sslkit.backbones.load"
            )
        vit = build_franca_vit(name, **shape, **common)
        pos_interpolation = pos_interpolation or "dinov2"
    elif timm.is_model(name):
        vit = _create_timm(name, pretrained, {**shape, **common})
    else:
        raise ValueError(f"unknown backbone {name!r}; {_close_matches(name)}")
    settings = {"name": name, **shape, **common}
    return ViTEncoder(
        vit,
        activation_checkpointing=activation_checkpointing,
        pos_interpolation=pos_interpolation or "antialias",
        rope_periods=rope_periods,
        settings=settings,
    )


def _create_timm(name: str, pretrained: bool, kwargs: dict[str, Any]) -> Any:
    """timm's network; its absent arguments (None) are left to timm."""
    given = {key: value for key, value in kwargs.items() if value is not None}
    try:
        return timm.create_model(
            name, pretrained=pretrained, num_classes=0, dynamic_img_size=True, **given
        )
    except TypeError as error:
        raise TypeError(
            f"timm cannot build {name!r} with {given}: {error}. sslkit.backbones wraps timm's "
            "Vision Transformers (timm.models.vision_transformer.VisionTransformer and "
            "timm.models.eva.Eva)"
        ) from error
    except Exception as error:
        if not pretrained:
            raise
        raise RuntimeError(
            f"the pretrained weights of {name!r} could not be loaded ({type(error).__name__}: "
            f"{error}). Without a network, fill timm's cache beforehand (HF_HOME), or give "
            "pretrained=False"
        ) from error


def as_pair(name: str, size: Size | None) -> tuple[int, int] | None:
    """``(height, width)``; a ValueError calls ``size`` by ``name`` if it is something else."""
    if size is None:
        return None
    if isinstance(size, int):
        return size, size
    if len(size) != 2:
        raise ValueError(f"{name} must be one number or (height, width), got {size}")
    return size[0], size[1]


def _close_matches(name: str) -> str:
    own = list(VIT_SIZES)
    known = [*own, *timm.list_models("vit_*"), *timm.list_models("deit*")]
    close = difflib.get_close_matches(name, known, n=4)
    hint = f"close matches: {', '.join(close)}" if close else f"sslkit has {', '.join(own)}"
    return f"{hint}; timm.list_models('vit_*') lists timm's"

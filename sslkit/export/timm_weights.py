"""Encoders as timm loads them: a folder of ``model.safetensors`` and ``config.json``.

timm's networks go back under their own names. Those of this library, a `VisionTransformer` with
`FusedSwiGLU`, become timm's ``vit_giant_patch14_dinov2`` with other sizes: of timm's registered
networks it is the one whose feed-forward layer is ``fc2(silu(x1) * x2)``, ``x1, x2 = fc1(x)``, the
same function under other names, and a class of layer cannot be named in a JSON file.
"""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from sslkit.backbones import ViTEncoder
from sslkit.backbones.encoder_file import require_json, require_settings
from sslkit.backbones.franca import VIT_SIZES
from sslkit.backbones.swiglu import FusedSwiGLU
from sslkit.data.normalisation import normalisation
from sslkit.export.card import Format
from sslkit.files import atomic_write

FORMAT = Format(
    library="timm",
    usage="""import timm

vit = timm.create_model("hf-hub:{name}", pretrained=True).eval()  # local-dir:FOLDER for a folder
tokens = vit.forward_features(images)  # [B, P + N, D], P = vit.num_prefix_tokens""",
    notes="The mask token, projection heads and drop path of the training are not in this folder; "
    "sslkit's own files keep them.",
    tags=("timm",),
)
_SWIGLU_ARCHITECTURE = "vit_giant_patch14_dinov2"
_SWIGLU_NAMES = {".mlp.w12.": ".mlp.fc1.", ".mlp.w3.": ".mlp.fc2."}
# Of create(), and neither the network's shape nor timm's to know.
_OURS_ALONE = (
    "name",
    "drop_path_rate",
    "activation_checkpointing",
    "pos_interpolation",
    "rope_periods",
)


def save_for_timm(
    encoder: ViTEncoder,
    folder: str | os.PathLike[str],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> None:
    """Write the folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads.

    The same two files in a repository of the Hugging Face Hub are
    ``timm.create_model("hf-hub:ORG/NAME", pretrained=True)``. timm's ``forward_features(images)``
    is then ``[B, P + N, D]``: the class token, the registers and the patches of the encoder, row
    after row. It is equal at the stored grid; other sizes are resampled by timm's rule, which is
    the encoder's where ``pos_interpolation`` is ``"antialias"``. Rotary periods that were rounded
    (``rope_periods="bfloat16"``) are not rounded in timm, which a warning says.

    Not kept: the mask token, for which timm has no place, and drop path, which is for training;
    both change no forward pass in evaluation. A network without a class token pools the average.

    Args:
        encoder: built by ``sslkit.backbones.create`` or ``load``.
        folder: made if missing; earlier files of these names are replaced.
        mean: what images in 0..1 were normalised with, one value a channel; None as in
            `sslkit.data.normalisation.normalisation`. For timm's ``resolve_data_config``.
        std: likewise.

    Raises:
        ValueError: RASA is folded into the final norm, the encoder has no settings, or
            ``mean`` and ``std`` do not fit the channels.
        TypeError: a setting cannot be written as JSON.

    >>> import tempfile
    >>> from sslkit.backbones import create
    >>> encoder, folder = create("sslkit_vit_micro").eval(), tempfile.mkdtemp()
    >>> save_for_timm(encoder, folder)
    >>> vit = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    >>> images = torch.randn(2, 3, 32, 32)
    >>> torch.allclose(vit.forward_features(images)[:, 0], encoder(images).cls, atol=1e-5)
    True
    """
    architecture, model_args = describe_for_timm(encoder)
    if encoder.rope_periods != "float32":
        warnings.warn(
            f"rope_periods is {encoder.rope_periods!r}, and timm's rotary positions are always in "
            "float32, as in its own port of DINOv3: its tokens will differ slightly",
            stacklevel=2,
        )
    tensors = tensors_for_timm(encoder)
    _require_same_tensors(architecture, model_args, tensors)
    averages = [x.flatten().tolist() for x in normalisation(encoder.in_chans, mean, std)]
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": encoder.embed_dim,
        "global_pool": model_args["global_pool"],
        "model_args": model_args,
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [encoder.in_chans, *encoder.img_size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 0.875,  # 256 to 224, as evaluations of sslkit resize and crop
            "crop_mode": "center",
            "mean": [round(x, 6) for x in averages[0]],
            "std": [round(x, 6) for x in averages[1]],
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    text = json.dumps(config, indent=2)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "model.safetensors") as file:
        file.write(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    with atomic_write(folder / "config.json") as file:
        file.write(text.encode())


def describe_for_timm(encoder: ViTEncoder) -> tuple[str, dict[str, Any]]:
    """The name of timm's network and the arguments of ``timm.create_model`` that make it this one.

    Raises:
        ValueError: RASA is folded into the final norm, or the encoder has no settings.
        TypeError: a setting cannot be written as JSON.

    >>> from sslkit.backbones import create
    >>> describe_for_timm(create("franca_vits14", depth=1))[0]
    'vit_giant_patch14_dinov2'
    """
    settings = require_settings(encoder)
    if isinstance(encoder.vit.norm, nn.Sequential):
        raise ValueError(
            "RASA is folded into the encoder's final norm, and timm's Vision Transformers have no "
            "linear layer there: export the encoder from before RASA, and apply the projector to "
            "timm's features (RASAProjector.forward), or fold it into the layer that reads them "
            "(RASAProjector.fold(linear, side='input'))"
        )
    given = {k: v for k, v in settings.items() if k not in _OURS_ALONE and v is not None}
    name = settings["name"].partition(".")[0]
    if name in VIT_SIZES:
        name = _SWIGLU_ARCHITECTURE
        given |= _swiglu_arguments(encoder, settings)
    arguments = {
        **given,
        "img_size": list(encoder.img_size),
        "dynamic_img_size": True,
        "num_classes": 0,
        # The encoder has its last norm before any pooling, and no attention pooling.
        "global_pool": "token" if encoder.vit.cls_token is not None else "avg",
        **_norm_before_pooling(encoder.vit),
    }
    require_json(arguments)
    return name, arguments


def tensors_for_timm(encoder: ViTEncoder) -> dict[str, Tensor]:
    """The network's tensors by timm's names; the mask token is not among them."""
    tensors = {}
    for name, tensor in encoder.vit.state_dict().items():
        for ours, theirs in _SWIGLU_NAMES.items():
            name = name.replace(ours, theirs)
        tensors[name] = tensor.detach().cpu().contiguous()
    return tensors


def _swiglu_arguments(encoder: ViTEncoder, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What tells one of `VIT_SIZES` from timm's ViT-g."""
    mlp: Any = encoder.vit.blocks[0].mlp
    if not isinstance(mlp, FusedSwiGLU):
        raise ValueError(
            f"the feed-forward layers are {type(mlp).__name__}, not the FusedSwiGLU of "
            f"{settings['name']}, and a class of layer cannot be named for timm"
        )
    layer_scale = settings.get("init_values", VIT_SIZES[settings["name"]].layer_scale)
    return {
        "patch_size": list(encoder.patch_size),
        "embed_dim": encoder.embed_dim,
        "depth": encoder.depth,
        "num_heads": encoder.num_heads,
        "init_values": layer_scale or 0.0,  # create_model leaves out a None
        # int(width * ratio) is the size of both halves; the half keeps rounding away from it
        "mlp_ratio": (mlp.w12.out_features + 0.5) / encoder.embed_dim,
    }


def _norm_before_pooling(vit: Any) -> dict[str, bool]:
    if isinstance(vit, VisionTransformer):
        return {"fc_norm": False}
    return {
        "use_fc_norm": False,
        "use_post_transformer_norm": not isinstance(vit.norm, nn.Identity),
    }


def _require_same_tensors(
    architecture: str, model_args: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    with torch.device("meta"):
        expected = timm.create_model(architecture, **model_args).state_dict()
    differing = sorted(
        name
        for name in expected.keys() | tensors.keys()
        if name not in expected
        or name not in tensors
        or expected[name].shape != tensors[name].shape
    )
    if differing:
        raise ValueError(
            f"timm's {architecture} with {dict(model_args)} does not have the encoder's tensors: "
            f"{len(differing)} differ, such as {', '.join(differing[:4])}"
        )

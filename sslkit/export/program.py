"""The encoder as one graph: `torch.export` programs and ONNX files of any batch, height and width.

An encoder packs crops by lengths that are Python numbers, one for each crop, and resamples
positions by an operation that graph formats lack or define otherwise; neither can depend on a size
that is only known later. `ExportableEncoder` runs the same submodules on ``[B, N, D]``, and
resamples by two matrix products whose weights are a formula of the size.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from sslkit.backbones import ViTEncoder
from sslkit.backbones.blocks import PackedAttention, PackedBlock, PackedEvaBlock
from sslkit.backbones.embedding import embed, split
from sslkit.backbones.rope import patch_rotations, with_prefix
from sslkit.export.resampling import resample_by_matrices
from sslkit.files import atomic_write

_MAX_BATCH, _MAX_GRID = 1 << 16, 4096  # a dimension needs some upper end
_MAX_PROTOBUF = 2**31 - 2**24  # bytes of one ONNX file, less some room for the graph
_INPUT = "images"


class ExportableEncoder(nn.Module):
    """The tokens of an encoder in evaluation mode, in a form that graphs can hold.

    ``forward(images [B, C, h, w])`` gives a dict of ``cls`` [B, D], ``registers`` [B, R, D] where
    the network has any, and ``patches`` [B, H, W, D]: the encoder's own tokens up to rounding.
    B, h and w may be symbols; h and w are multiples of the patch size. The submodules are the
    encoder's, not copies, and this sets them to evaluation.
    """

    def __init__(self, encoder: ViTEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.eval()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``[B, C, h, w]`` to tokens by name."""
        encoder = self.encoder
        vit: Any = encoder.vit
        (ph, pw), (_, _, h, w) = encoder.patch_size, images.shape
        H, W = h // ph, w // pw
        x = embed(vit, images, (H, W), self._resample, mask_token=encoder.mask_token)
        rope = getattr(vit, "rope", None)
        if rope is not None:  # [P + N, 2 * d]
            rope = with_prefix(patch_rotations(rope, H, W), encoder.num_prefix_tokens)
        for block in vit.blocks:
            x = _run(block, x, rope)
        tokens = split(vit, vit.norm(x), (H, W))._asdict()
        return {k: v for k, v in tokens.items() if k != "registers" or vit.reg_token is not None}

    def _resample(self, positions: Tensor, grid: tuple[int, int]) -> Tensor:
        return resample_by_matrices(positions, grid, self.encoder.pos_interpolation)


def _run(block: nn.Module, x: Tensor, rope: Tensor | None) -> Tensor:
    """One block in evaluation, ``[B, T, D] -> [B, T, D]``; ``rope`` is ``[T, 2 * d]``."""
    if not isinstance(block, PackedBlock | PackedEvaBlock):
        return block(x)
    attended = _attend(block.attn, block.norm1(x), rope)
    if isinstance(block, PackedEvaBlock):
        x = x + _scaled(attended, block.gamma_1)
        return x + _scaled(block.mlp(block.norm2(x)), block.gamma_2)
    x = x + block.ls1(attended)
    return x + block.ls2(block.mlp(block.norm2(x)))


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else gamma * x


def _attend(attn: PackedAttention, x: Tensor, rope: Tensor | None) -> Tensor:
    B, T, _ = x.shape
    per_token = None if rope is None else rope.repeat(B, 1)  # [B * T, 2 * d]
    qkv = attn.project(rearrange(x, "b t d -> (b t) d"), per_token)
    q, k, v = rearrange(qkv, "(b t) three h d -> three b h t d", t=T)
    attended = F.scaled_dot_product_attention(q, k, v)
    return attn.proj(attn.norm(rearrange(attended, "b h t d -> b t (h d)")))


def export_program(encoder: ViTEncoder) -> ExportedProgram:
    """The encoder as a `torch.export` program.

    ``program.module()(images)`` is what `ExportableEncoder` gives, a dict of tensors by name, for
    any number of images and any height and width that are multiples of the patch size, at least
    two patches each; pixels beyond the last whole patch are not seen, where the encoder would
    raise. RASA is in it if it was folded into the encoder's final norm. The encoder's type and
    device are the program's.

    Args:
        encoder: it is in evaluation mode afterwards.

    >>> from sslkit.backbones import create
    >>> program = export_program(create("sslkit_vit_micro", depth=1))
    >>> {k: list(v.shape) for k, v in program.module()(torch.zeros(3, 3, 8, 20)).items()}
    {'cls': [3, 32], 'patches': [3, 2, 5, 32]}
    """
    ph, pw = encoder.patch_size
    rows, columns = (Dim(name, min=2, max=_MAX_GRID) for name in ("rows", "columns"))
    sizes = {0: Dim("batch", min=1, max=_MAX_BATCH), 2: ph * rows, 3: pw * columns}
    like = encoder.vit.patch_embed.proj.weight
    # Unequal sizes, none of them 1 or the stored grid's: an equality would be taken for a rule.
    H0, W0 = encoder.grid_size
    images = like.new_zeros(2, encoder.in_chans, ph * (H0 + 1), pw * (W0 + 2))
    with torch.no_grad():
        return torch.export.export(
            ExportableEncoder(encoder), (images,), dynamic_shapes={_INPUT: sizes}
        )


def save_program(encoder: ViTEncoder, path: str | os.PathLike[str]) -> None:
    """Write `export_program` to a file for ``torch.export.load``, which needs no sslkit.

    Args:
        encoder: it is in evaluation mode afterwards.
        path: conventionally ``*.pt2``; its folder is made if missing.

    >>> import tempfile
    >>> from sslkit.backbones import create
    >>> path = f"{tempfile.mkdtemp()}/encoder.pt2"
    >>> save_program(create("sslkit_vit_micro", depth=1), path)
    >>> sorted(torch.export.load(path).module()(torch.zeros(1, 3, 16, 12)))
    ['cls', 'patches']
    """
    path = Path(path)
    program = export_program(encoder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        torch.export.save(program, file)


def save_onnx(encoder: ViTEncoder, path: str | os.PathLike[str]) -> None:
    """Write the encoder as ONNX: input ``images``, outputs ``cls``, ``registers``, ``patches``.

    Shapes are those of `export_program`; a network without registers has no output of that name.
    Weights beyond the 2 GiB of a protobuf file (ViT-g in float32) lie beside it, in ``*.data``.

    Args:
        encoder: it is in evaluation mode afterwards.
        path: conventionally ``*.onnx``; its folder is made if missing.

    Raises:
        ImportError: onnx or onnxscript is missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "writing ONNX needs onnx and onnxscript: pip install 'sslkit[export]'"
        ) from error
    path = Path(path)
    program = export_program(encoder)
    names = ["cls", *(["registers"] if encoder.vit.reg_token is not None else []), "patches"]
    converted = torch.onnx.export(
        program, input_names=[_INPUT], output_names=names, external_data=False, verbose=False
    )
    assert converted is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    if size > _MAX_PROTOBUF:
        converted.save(path, external_data=True)
        return
    model = converted.model_proto
    _name_sizes(model.graph)
    with atomic_write(path) as file:
        file.write(model.SerializeToString())


def _name_sizes(graph: Any) -> None:
    """Call the symbols of the input ``[s0, C, 14*s1, 14*s2]`` batch, rows and columns."""
    batch, _, height, width = graph.input[0].type.tensor_type.shape.dim
    names = {}
    for dim, name in ((batch, "batch"), (height, "rows"), (width, "columns")):
        names[re.findall(r"[a-z]\w*", dim.dim_param)[0]] = name
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                renamed = re.sub(
                    r"[a-z]\w*", lambda symbol: names.get(symbol[0], symbol[0]), dim.dim_param
                )
                dim.dim_param = renamed

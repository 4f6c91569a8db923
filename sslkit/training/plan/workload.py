"""The shapes of a training step, and how many parameters they make."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

NUM_GLOBAL = 2  # global crops of an image; the teacher sees these alone
FLOAT = 4  # bytes of a float32


class Level(NamedTuple):
    """A level of a nested head."""

    dim: int
    """Features that it sees."""
    prototypes: int


@dataclass(frozen=True)
class Workload:
    """The shapes of one training step: a ViT with LayerScale, two nested heads."""

    width: int
    depth: int
    heads: int
    mlp_hidden: int
    """Of one of the two halves, where the MLP is gated."""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    qkv_biases: Literal[0, 2, 3] = 3
    """Of queries, keys and values, how many have a bias; 0 and 2 in DINOv3's networks."""
    positions: Literal["learned", "rotary"] = "learned"
    patch_size: int = 14
    in_chans: int = 3
    registers: int = 0
    """With any, the class token has no learned position (as in timm's ``reg4`` networks)."""
    global_size: int = 224
    """Pixels a side, also of the grid of the learned positions."""
    local_size: int = 98
    num_local: int = 8
    batch_size: int = 2048
    """Images an optimizer step, over all GPUs and micro-batches."""
    accumulation: int = 1
    num_prototypes: int = 131072
    nesting_dims: tuple[int, ...] = ()
    """Empty: D/16, D/8, D/4, D/2, D."""
    nesting: Literal["slice", "slice_linear", "linear"] = "slice"
    head_hidden_dim: int = 2048
    head_layers: int = 3
    dino_bottleneck: int = 384
    ibot_bottleneck: int = 256
    normalize: bool = True
    mask_ratio: tuple[float, float] = (0.1, 0.65)
    mask_probability: float = 0.5
    sinkhorn_iterations: int = 3
    factored_scores: bool = False
    activation_checkpointing: bool = False
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the encoder, by autocast; heads, scores and losses are float32."""

    @property
    def element(self) -> int:
        """Bytes of an activation inside a branch of a block; the residual stream is float32."""
        return 2 if self.precision == "bfloat16" else FLOAT

    @property
    def levels(self) -> list[Level]:
        """Coarse to fine."""
        dims = self.nesting_dims or tuple(self.width // share for share in (16, 8, 4, 2, 1))
        return [Level(m, self.num_prototypes * m // dims[-1]) for m in dims]

    @property
    def all_prototypes(self) -> int:
        """Of all levels of one head."""
        return sum(level.prototypes for level in self.levels)

    @property
    def prefix(self) -> int:
        """Class token and registers."""
        return 1 + self.registers

    def patches(self, size: int) -> int:
        """Of a crop of so many pixels a side."""
        return (size // self.patch_size) ** 2

    @property
    def crops(self) -> list[tuple[int, int]]:
        """``(crops an image, tokens a crop)``, global ones first."""
        sizes = [(NUM_GLOBAL, self.global_size), (self.num_local, self.local_size)]
        return [(count, self.prefix + self.patches(size)) for count, size in sizes if count]

    @property
    def masked(self) -> float:
        """Masked patches an image, on average."""
        ratio = sum(self.mask_ratio) / 2
        return NUM_GLOBAL * self.mask_probability * ratio * self.patches(self.global_size)


class Parameters(NamedTuple):
    """Numbers of parameters of the student; the teacher has as many."""

    embedding: int
    """Patches, positions, tokens and the final norm."""
    block: int
    blocks: int
    dino_head: int
    ibot_head: int

    @property
    def backbone(self) -> int:
        """Embedding and all blocks."""
        return self.embedding + self.blocks

    @property
    def heads(self) -> int:
        """Both."""
        return self.dino_head + self.ibot_head

    @property
    def total(self) -> int:
        """Of the student."""
        return self.backbone + self.heads


def parameters(work: Workload) -> Parameters:
    """Count them; equal to the networks' own."""
    D, F = work.width, work.mlp_hidden
    positions = 0
    if work.positions == "learned":
        positions = work.patches(work.global_size) + (0 if work.registers else 1)
    embedding = (work.in_chans * work.patch_size**2 + 1) * D  # the convolution
    embedding += (positions + work.prefix + 1) * D + 2 * D  # one more token: the mask's
    mlp = (D + 1) * 2 * F + (F + 1) * D if work.mlp == "swiglu" else (D + 1) * F + (F + 1) * D
    attention = 3 * D * D + work.qkv_biases * D + (D + 1) * D
    block = attention + mlp + 6 * D  # two norms and two LayerScales
    return Parameters(
        embedding=embedding,
        block=block,
        blocks=work.depth * block,
        dino_head=_head_parameters(work, work.dino_bottleneck),
        ibot_head=_head_parameters(work, work.ibot_bottleneck),
    )


def _head_parameters(work: Workload, bottleneck: int) -> int:
    return sum(
        sum((a + 1) * b for a, b in head_layers(work, level, bottleneck))
        + level.prototypes * bottleneck
        for level in work.levels
    )


def head_layers(work: Workload, level: Level, bottleneck: int) -> list[tuple[int, int]]:
    """``(in, out)`` of each linear layer of a level, up to the bottleneck."""
    nest = {"slice": 0, "slice_linear": level.dim, "linear": work.width}[work.nesting]
    widths = [level.dim, *[work.head_hidden_dim] * (work.head_layers - 1), bottleneck]
    layers = list(pairwise(widths))
    return [(nest, level.dim), *layers] if nest else layers


# The recipe's presets on GPUs.
PRESETS = {
    "vitb14_in21k": Workload(width=768, depth=12, heads=12, mlp_hidden=2048),
    "vitl14_in21k": Workload(width=1024, depth=24, heads=16, mlp_hidden=2736, batch_size=3072),
    "vitg14_laion": Workload(
        width=1536,
        depth=40,
        heads=24,
        mlp_hidden=4096,
        batch_size=3072,
        activation_checkpointing=True,
    ),
}

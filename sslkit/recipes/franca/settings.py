"""Settings of Franca. Fields are named like the arguments of the parts that they become.

The defaults of the sections are those of ViT-B/14 on ImageNet-21K. `sslkit.recipes.franca.presets`
has the values of other runs, and where each value comes from.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sslkit.recipes.shared import settings as shared
from sslkit.recipes.shared.settings import Crops, Losses
from sslkit.training.settings import RunSettings

PresetName = Literal[
    "demo", "smoke", "cifar10", "photos", "adapt", "vitb14_in21k", "vitl14_in21k", "vitg14_laion"
]
StageName = Literal["pretrain", "highres", "rasa", "evaluate", "report"]


@dataclass(frozen=True)
class Model:
    """The encoder and its two nested heads."""

    backbone: str = "franca_vitb14"
    """A name of sslkit.backbones or any timm ViT; with --init-from that of the file."""
    backbone_settings: str = "{}"
    """More arguments of sslkit.backbones.create, as JSON, such as '{"reg_tokens": 4}'."""
    in_chans: int = 3
    """Channels of the images."""
    drop_path_rate: float = 0.1
    """Share of the student's residual branches left out; large networks need more (section 4)."""
    activation_checkpointing: bool = False
    """Compute each block again in the backward pass: less memory, a second forward pass."""
    num_prototypes: int = 131072
    """Prototypes K of the finest level; a level of m of D features has int(K * m / D)."""
    nesting_dims: tuple[int, ...] = ()
    """Features of each level, coarse to fine; empty: D/16, D/8, D/4, D/2, D (paper section 4)."""
    nesting: Literal["slice", "slice_linear", "linear"] = "slice"
    """The paper slices; the two released versions are `linear` and `slice_linear`."""
    hidden_dim: int = 2048
    """Width of the MLP of each level of both heads."""
    num_layers: int = 3
    """Linear layers of that MLP, up to the bottleneck."""
    dino_bottleneck_dim: int = 384
    """Features of a class token at each level, compared with the prototypes."""
    ibot_bottleneck_dim: int = 256
    """Features of a patch at each level, compared with the prototypes."""
    normalize: bool = True
    """Normalise in the heads, which bounds logits, as in DINO; False: as in the released head."""
    factored: bool = False
    """Compute logits in chunks, again whenever they are read: less memory, twice the products."""

    def backbone_arguments(self, img_size: int) -> dict[str, Any]:
        """Arguments of `sslkit.backbones.create`."""
        return {
            "name": self.backbone,
            "img_size": img_size,
            "in_chans": self.in_chans,
            "drop_path_rate": self.drop_path_rate,
            "activation_checkpointing": self.activation_checkpointing,
            **json.loads(self.backbone_settings),
        }

    def head_arguments(self) -> dict[str, Any]:
        """Arguments of `MatryoshkaProjector` that both heads share."""
        return {
            "num_prototypes": self.num_prototypes,
            "nesting_dims": self.nesting_dims or None,
            "nesting": self.nesting,
            "hidden_dim": self.hidden_dim,
            "num_layers": self.num_layers,
            "normalize": self.normalize,
        }


@dataclass(frozen=True)
class Masks:
    """CyclicMask (paper section 3.2)."""

    kind: Literal["inverse_block", "block", "random"] = "inverse_block"
    """inverse_block: one block stays visible; block: one is masked; random: single patches are."""
    shift: bool = True
    """Roll each mask on both axes, so that every patch is masked equally often."""
    mask_ratio: tuple[float, float] = (0.1, 0.65)
    """Share of its patches that a mask hides, from and to; the more, the harder to guess them."""
    mask_probability: float = 0.5
    """Share of the global crops that have a mask."""


@dataclass(frozen=True)
class Targets:
    """What the teacher hands to the losses."""

    kind: Literal["sinkhorn", "centering"] = "sinkhorn"
    """sinkhorn: the batch uses all prototypes equally; centering: a running mean is subtracted."""
    num_iterations: int = 3
    """Iterations of the balancing; more of them use the prototypes more equally."""
    queue: int = 0
    """Past rows, of all processes, that each level is balanced with; for small batches."""
    momentum: float = 0.9
    """Momentum of the running mean; nearer to 1 it follows the teacher more slowly."""
    start_temperature: float = 0.04
    """Teacher temperature at the first step; a lower one gives sharper targets."""
    temperature: float = 0.07
    """Teacher temperature after its warm-up."""
    temperature_warmup: float = 30 / 500
    """Share of the steps over which the teacher temperature rises linearly."""
    student_temp: float = 0.1
    """Student temperature, the same at every step."""

    def arguments(self) -> dict[str, Any]:
        """Arguments of `sslkit.Targets`."""
        return {
            name: getattr(self, name) for name in ("kind", "num_iterations", "queue", "momentum")
        }


@dataclass(frozen=True)
class Optim:
    """AdamW and the teacher's average. Shares are of the number of steps."""

    base_lr: float = 7.01e-4
    """Highest learning rate, at batch 1024; scaled by sqrt(batch / 1024)."""
    final_lr: float = 1e-6
    """Learning rate at the end of the cosine."""
    lr_warmup: float = 80 / 500
    """Share of the steps over which the learning rate first rises linearly from 0."""
    weight_decay: tuple[float, float] = (0.04, 0.2)
    """Weight decay at the first and last step, a cosine between; biases and norms have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Momentum of AdamW's averages of the gradient and of its square."""
    layer_decay: float = 1.0
    """Learning rate of a block over that of the next; below 1 early blocks keep what they know."""
    patch_embed_lr_scale: float = 0.2
    """Factor of the learning rate of the patch embedding; below 1 it changes more slowly."""
    max_norm: float = 3.0
    """Largest gradient norm of each of backbone, DINO head, iBOT head."""
    freeze_prototypes: float = 1 / 500
    """Share of the steps during which the last layers keep their initial value."""
    momentum: tuple[float, float] = (0.994, 1.0)
    """Teacher momentum at the first and last step, a cosine between; nearer to 1 it is slower."""
    momentum_batch: int = 0
    """Batch that `momentum` is stated at, momentum ** (batch / this) at others; 0: at any batch."""

    def group_arguments(self) -> dict[str, Any]:
        """Arguments of `sslkit.training.parameter_groups`."""
        return {
            "layer_decay": self.layer_decay,
            "patch_embed_lr_scale": self.patch_embed_lr_scale,
        }


@dataclass(frozen=True)
class Init:
    """How a run with --init-from begins. What the file decides is filled in and kept."""

    heads: Literal["auto", "file", "fresh"] = "auto"
    """auto: the file's if it has both and they are as --model says."""
    crops: Literal["settings", "file"] = "settings"
    """file: default crop sizes follow the resolution that the weights were trained at."""
    head_warmup: float = 0.1
    """Share of the steps in which fresh heads learn on a frozen backbone."""
    sha256: str = ""
    """Expected SHA-256 of the --init-from file; a mismatch is an error."""


@dataclass(frozen=True)
class HighRes:
    """High-resolution adaptation (paper section 4): the same training with schedules of its own."""

    # The values of the released configs/finetune/vitb14_finetune.yaml, 100 epochs of 200 steps,
    # except the batch: the file has 32 images a GPU and does not say on how many GPUs. The paper
    # says that the schedules of pretraining are compressed and that the teacher warms up for 10 K
    # steps; in the file, 10 K is the warm-up of the learning rate.
    steps: int = 20_000
    """Optimizer steps."""
    global_size: int = 518
    """Pixels a side of the views that student and teacher see."""
    local_size: int = 98
    """Pixels a side of the small views."""
    batch_size: int = 2048
    """Images an optimizer step, over all processes and micro-batches."""
    drop_path_rate: float = 0.1
    """Share of the student's residual branches left out in this stage."""
    lr_scale: float = 7.05e-5 / 7.01e-4
    """Highest learning rate as a multiple of the pretraining's."""
    lr_warmup: float = 10_000 / 20_000
    """Share of the steps over which the learning rate first rises linearly from 0."""
    temperature_warmup: float = 6_000 / 20_000
    """Share of the steps over which the teacher temperature rises linearly."""
    freeze_prototypes: float = 200 / 20_000
    """Share of the steps during which the last layers keep their initial value."""


@dataclass(frozen=True)
class Rasa:
    """Removal of absolute spatial attributes (paper section 3.3)."""

    num_iterations: int = 9
    """Planes that are removed, two directions of the features each."""
    num_images: int = 1000
    """Random crops that the planes are fitted on; the paper says a small set."""
    crop_scale: tuple[float, float] = (0.32, 1.0)
    """Share of an image's area that such a crop covers, from and to."""
    solver: Literal["auto", "adamw"] = "auto"
    """`adamw` is the paper's schedule; the default converges whatever the number of images."""


@dataclass(frozen=True)
class Evaluation(shared.Evaluation):
    """k-NN, in-context segmentation and the position probe, on frozen features."""

    num_dense: int = 200
    """Images of each split whose patches enter the dense scores."""


@dataclass(frozen=True, kw_only=True)
class Settings(RunSettings):
    """Franca: pretraining, high-resolution adaptation, RASA, evaluation, report."""

    preset: PresetName
    """Where the defaults come from; every other setting overrides it."""
    stages: tuple[StageName, ...] = ("pretrain", "highres", "rasa", "evaluate", "report")
    """Each needs the results of those before it, from this call or an earlier one."""
    output: Path = Path("runs/franca")
    """Folder of the run. Every stage reads and writes here."""
    init_from: str = ""
    """Weights to start from: any file or name that sslkit.backbones.load_pretrained takes."""
    model: Model = field(default_factory=Model)
    crops: Crops = field(default_factory=Crops)
    masks: Masks = field(default_factory=Masks)
    targets: Targets = field(default_factory=Targets)
    losses: Losses = field(default_factory=Losses)
    optim: Optim = field(default_factory=Optim)
    init: Init = field(default_factory=Init)
    highres: HighRes = field(default_factory=HighRes)
    rasa: Rasa = field(default_factory=Rasa)
    evaluation: Evaluation = field(default_factory=Evaluation)

    @property
    def frozen_steps(self) -> int:
        """Steps in which new heads learn on the frozen backbone of --init-from."""
        return round(self.init.head_warmup * self.steps) if self.init.heads == "fresh" else 0

    def global_size(self, stage: str) -> int:
        """Pixels a side of the global crops of a training stage."""
        return self.highres.global_size if stage == "highres" else self.crops.global_size

"""Franca from images to report: the whole method of arXiv 2507.14137 in one file.

    python examples/franca_recipe.py --preset demo --output runs/demo
    python examples/franca_recipe.py --preset vitb14_in21k --data /images --output runs/vitb
    torchrun --nproc-per-node 8 examples/franca_recipe.py --preset vitl14_in21k ...
    python examples/franca_recipe.py --preset adapt --init-from weights.safetensors --data folder

Top to bottom: settings and presets, networks, targets, losses, the training loop, then
high-resolution adaptation, RASA, evaluation and the report. Every stage writes what the next one
reads into `--output`, so that each can be run alone on a finished one's result (`--stages`), and
`--resume` continues an interrupted run, on as many processes or another number: on one CPU with as
many threads, with bit-identical weights.
"""

import argparse
import dataclasses
import json
import math
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast
from warnings import warn

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while the imports take seconds

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sslkit import (
    Assignments,
    CyclicMaskGenerator,
    DINOLoss,
    EMACentering,
    EMATeacher,
    KoLeoLoss,
    MatryoshkaProjector,
    RASAProjector,
    SinkhornQueue,
    backbones,
    iBOTLoss,
    sinkhorn_many,
)
from sslkit.backbones import Loaded, ViTEncoder
from sslkit.backbones.heads import misfit
from sslkit.backbones.settings import HEAD, NETWORK, check_settings
from sslkit.command_line import run_command
from sslkit.data import (
    Batch,
    MultiCrop,
    MultiCropDataset,
    Source,
    StreamSource,
    TooManyUnreadable,
    UnreadableImage,
    UnreadableLog,
    UnusableData,
    make_loader,
    open_source,
    open_stream,
    sample_seed,
    train_test_split,
)
from sslkit.data.annotated import Segmented
from sslkit.data.channels import with_channels
from sslkit.data.crops import random_crop
from sslkit.data.fingerprint import changes, fingerprints
from sslkit.data.local import is_local
from sslkit.data.throughput import DataWatch
from sslkit.evaluation import figures as draw
from sslkit.evaluation.attention import cls_attention
from sslkit.evaluation.cluster_entropy import position_entropy, shuffled
from sslkit.evaluation.features import Features, Unsuitable, evenly_spaced, extract
from sslkit.evaluation.floor import Pixels
from sslkit.evaluation.in_context import in_context_segmentation
from sslkit.evaluation.knn import knn_predict
from sslkit.evaluation.labels import with_labels
from sslkit.evaluation.matryoshka import matryoshka_curve
from sslkit.evaluation.pca import pca_maps
from sslkit.evaluation.position import position_probe
from sslkit.evaluation.report import format_table, write_report
from sslkit.evaluation.scores import Score, bootstrap
from sslkit.evaluation.subject import Subject
from sslkit.evaluation.views import EvalTransform
from sslkit.factored_logits import Logits, concatenated
from sslkit.files import DamagedFile, atomic_write, file_digest, parse_json, read_json_object
from sslkit.rasa import patch_positions, save_rasa
from sslkit.schedules import (
    cosine,
    ema_batch_scaling,
    joining,
    linear_warmup,
    sqrt_batch_scaling,
    unfreeze,
    warmup_cosine,
)
from sslkit.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    checkpoint_group,
    step_of,
)
from sslkit.training.failures import explain
from sslkit.training.finite import (
    NonFiniteLoss,
    by_rank,
    nan_unless_finite,
    require_finite,
    require_finite_tensors,
)
from sslkit.training.metrics import MetricsWriter, read_metrics
from sslkit.training.monitor import CollapseMonitor, feature_std
from sslkit.training.optim import (
    clip_gradients,
    moments,
    parameter_groups,
    set_hyperparameters,
)
from sslkit.training.parallel import (
    Parallel,
    choose,
    gradients_synchronised,
    joined,
    replicate,
    restarted,
    shard_,
    start,
    stop,
    whole,
)
from sslkit.progress import TrainingProgress
from sslkit.training.run_folder import FolderError, own_folder
from sslkit.training.settings import as_json, differences, from_json
from sslkit.training.signals import stop_request

T = TypeVar("T")
SUBMODULES = ("backbone", "dino_head", "ibot_head")  # gradients are clipped in each by itself
MASK_COUNTS, MASKS, DROP_PATH = range(3)  # what a stage draws random numbers for
NUM_GLOBAL = 2  # global crops of an image; the teacher sees these alone
PresetName = Literal[
    "demo", "smoke", "cifar10", "adapt", "vitb14_in21k", "vitl14_in21k", "vitg14_laion"
]
Stage = Literal["pretrain", "highres", "rasa", "evaluate", "report"]

# ------------------------------------------------------------------------------------ settings


@dataclass(frozen=True)
class Model:
    """The encoder and its two nested heads."""

    backbone: str = "franca_vitb14"
    """A name of sslkit.backbones or any timm ViT; with --init-from that of the file."""
    backbone_settings: str = "{}"
    """More arguments of sslkit.backbones.create, as JSON, such as '{"reg_tokens": 4}'."""
    in_chans: int = 3
    """Channels of the images."""
    drop_path: float = 0.1
    """Share of the student's residual branches left out; large networks need more (section 4)."""
    activation_checkpointing: bool = False
    """Compute each block again in the backward pass: less memory, a second forward pass."""
    num_prototypes: int = 131072
    """Prototypes K of the finest level; a level of m of D features has int(K * m / D)."""
    nesting_dims: tuple[int, ...] = ()
    """Features of each level, coarse to fine; empty: D/16, D/8, D/4, D/2, D (paper section 4)."""
    nesting: Literal["slice", "slice_linear", "linear"] = "slice"
    """The paper slices; the two released versions are `linear` and `slice_linear`."""
    head_hidden_dim: int = 2048
    """Width of the MLP of each level of both heads."""
    head_layers: int = 3
    """Linear layers of that MLP, up to the bottleneck."""
    dino_bottleneck: int = 384
    """Features of a class token at each level, compared with the prototypes."""
    ibot_bottleneck: int = 256
    """Features of a patch at each level, compared with the prototypes."""
    normalize: bool = True
    """Normalise in the heads, which bounds scores, as in DINO; False: as in the released head."""
    factored_scores: bool = False
    """Form scores in chunks, again whenever they are read: less memory, twice the products."""


@dataclass(frozen=True)
class Crops:
    """Multi-crop (DINOv2 and the released configuration; for the blur, docs/faithfulness.md)."""

    global_size: int = 224
    """Pixels a side of the two views that student and teacher see."""
    global_scale: tuple[float, float] = (0.32, 1.0)
    """Share of an image's area that such a view covers, from and to."""
    local_size: int = 98
    """Pixels a side of the small views, which the student alone sees."""
    local_scale: tuple[float, float] = (0.05, 0.32)
    """Share of an image's area that these cover; the smaller, the harder to tell what it is."""
    num_local: int = 8
    """Small views of an image; each adds a comparison with the teacher, and time."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur in pixels of the view, from and to; small views lose more."""


@dataclass(frozen=True)
class Masks:
    """CyclicMask (paper section 3.2)."""

    kind: Literal["inverse_block", "block", "random"] = "inverse_block"
    """inverse_block: one block stays visible; block: one is masked; random: single patches are."""
    shift: bool = True
    """Roll each mask on both axes, so that every patch is masked equally often."""
    ratio: tuple[float, float] = (0.1, 0.65)
    """Share of its patches that a mask hides, from and to; the more, the harder to guess them."""
    probability: float = 0.5
    """Share of the global crops that have a mask."""


@dataclass(frozen=True)
class Targets:
    """What the teacher hands to the losses."""

    kind: Literal["sinkhorn", "centering"] = "sinkhorn"
    """sinkhorn: the batch uses all prototypes equally; centering: a running mean is subtracted."""
    sinkhorn_iterations: int = 3
    """Iterations of the balancing; more of them use the prototypes more equally."""
    queue: int = 0
    """Past rows, of all processes, that each level is balanced with; for small batches."""
    centering_momentum: float = 0.9
    """Momentum of the running mean; nearer to 1 it follows the teacher more slowly."""
    start_temperature: float = 0.04
    """Teacher temperature at the first step; a lower one gives sharper targets."""
    temperature: float = 0.07
    """Teacher temperature after its warm-up."""
    temperature_warmup: float = 30 / 500
    """Share of the steps over which the teacher temperature rises linearly."""
    student_temperature: float = 0.1
    """Student temperature, the same at every step."""


@dataclass(frozen=True)
class Losses:
    """Weights of the three terms; DINO and iBOT are sums over the nesting levels."""

    dino: float = 1.0
    """Weight of the DINO loss: class tokens predict the teacher's targets of other views."""
    ibot: float = 1.0
    """Weight of the iBOT loss: masked patches predict the teacher's targets at their places."""
    koleo: float = 0.1
    """Weight of KoLeo, which pushes the class tokens of different images apart."""


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
    clip: float = 3.0
    """Largest gradient norm of each of backbone, DINO head, iBOT head."""
    freeze_prototypes: float = 1 / 500
    """Share of the steps during which the last layers keep their initial value."""
    momentum: tuple[float, float] = (0.994, 1.0)
    """Teacher momentum at the first and last step, a cosine between; nearer to 1 it is slower."""
    momentum_batch: int = 0
    """Batch that `momentum` is stated at, momentum ** (batch / this) at others; 0: at any batch."""


@dataclass(frozen=True)
class Init:
    """How a run with --init-from begins. What the file decides is filled in and kept."""

    heads: Literal["auto", "file", "fresh"] = "auto"
    """auto: the file's if it has both and they are as --model says."""
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
    drop_path: float = 0.1
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
class Evaluation:
    """k-NN, in-context segmentation and the position probe, on frozen features."""

    num_train: int = 100_000
    """Images of the training split that k-NN looks its neighbours up in."""
    num_test: int = 10_000
    """Held-out images that it classifies."""
    num_dense: int = 200
    """Images of each split whose patches enter the dense scores."""
    batch_size: int = 64
    """Images a forward pass."""
    knn: int = 20
    """Neighbours that vote."""
    resize_over_crop: float = 256 / 224
    """Evaluation views: shorter side resized to this multiple of the crop."""
    online_every: int = 12_500
    """Steps between two k-NN scores of the teacher during training; 0: none."""
    online_train: int = 20_000
    """Images that these look neighbours up in."""
    online_test: int = 2_000
    """Held-out images that these classify."""


@dataclass(frozen=True)
class Settings:
    """Franca: pretraining, high-resolution adaptation, RASA, evaluation, report."""

    preset: PresetName = "demo"
    """Where the defaults come from; every other setting overrides it."""
    data: str = "scenes"
    """A folder, tar shards, hf:NAME, hf-stream:NAME, a torchvision data set, .npz or `scenes`."""
    output: Path = Path("runs/franca")
    """Every stage reads and writes here."""
    stages: tuple[Stage, ...] = ("pretrain", "highres", "rasa", "evaluate", "report")
    """Each needs the results of those before it, from this call or an earlier one."""
    resume: bool = False
    """Continue the run in --output from its last checkpoint, with its settings and stages."""
    init_from: str = ""
    """Weights to continue training from: any file or name that sslkit.backbones.read takes."""
    accept_changes: bool = False
    """Continue with other settings or other data than the run was made with."""
    seed: int = 0
    """Seed of all random numbers: initial weights, order of the images, crops, masks."""
    steps: int = 625_000
    """Optimizer steps of the pretraining."""
    batch_size: int = 2048
    """Images an optimizer step, over all processes and micro-batches."""
    accumulation: int = 1
    """Micro-batches a step. The targets are balanced over all of them; only KoLeo differs."""
    workers: int = 8
    """Processes that load images, for each training process."""
    augment_on: Literal["workers", "device"] = "workers"
    """Where views are rendered; `device` for a GPU that waits for its workers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where networks compute; auto: a GPU where there is one."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Encoder precision; auto: bfloat16 autocast on a GPU, float32 on a CPU."""
    parallel: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """How processes share the work; auto: ddp, or fsdp where a GPU would be too small for it."""
    hsdp_replicas: int = 1
    """With fsdp, copies of the sharded networks, for example one a node."""
    compile_blocks: bool = False
    """torch.compile of every block of the encoder."""
    scene_size: int = 256
    """Pixels a side of an image of `--data scenes`."""
    num_scenes: int = 100_000
    """Images of each split of `--data scenes`."""
    test_fraction: float = 0.1
    """Share of the images held out for evaluation where --data has no test split of its own."""
    max_unreadable: float = 0.05
    """Share of unreadable images above which the run stops."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int = 1250
    """Steps between two checkpoints, from which --resume continues."""
    keep_last: int = 2
    """Number of recent checkpoints to keep; 2 survive a damaged one."""
    keep_every: int = 62_500
    """Steps between two checkpoints that are kept for good; 0: none."""
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


# The defaults above are ViT-B on ImageNet-21K. Each value of model, crops, masks, targets, losses
# and optim is in the released configuration (24f8c60: configs/train, and ssl_default_config.yaml
# where these are silent) and, if the paper gives it, also in its section 4, unless a comment says
# otherwise. The values of rasa and evaluation are ours: see docs/faithfulness.md.
#
#                          paper                  released configuration               taken
#   steps, ViT-B           625 K (500 epochs)     1 M (800 epochs of 1250)             paper
#   steps, ViT-L           625 K                  20 K (16 epochs); 625 K of LAION     paper
#   lr warm-up             80 epochs of 500       128 of 800 (B), 8 of 16 (L), 80 of   80 / 500
#                                                 500 (g, LAION)
#   temperature warm-up                           30 epochs: 37.5 K steps              37.5 K
#   frozen last layers                            1 epoch: 1,250 steps                 1,250
#   base lr, ViT-B         1e-3 at batch 2048     7.01e-4 at 1024: 9.9e-4 at 2048      7.01e-4
#   base lr, ViT-L, -g     3.5e-4 at batch 3072   2.0e-4 at 1024: 3.5e-4 at 3072       2.0e-4
#   batch, ViT-g of LAION  3072                   32 on each of 128 GPUs: 4096         paper
#   nesting                slice                  linear, later slice_linear           paper
#   head                   "DINO-style"           unbounded, GELU at the end           normalised
#   high resolution        20 K steps             configs/finetune                     see HighRes
PRESETS: dict[PresetName, Settings] = {
    "vitb14_in21k": Settings(preset="vitb14_in21k", data="/data/imagenet21k"),
    "vitl14_in21k": Settings(
        preset="vitl14_in21k",
        data="/data/imagenet21k",
        batch_size=3072,
        model=Model(backbone="franca_vitl14", drop_path=0.4),
        optim=Optim(base_lr=2.0e-4),
        # configs/finetune/vitl14_finetune.yaml, whose drop path is .1, after .4 in pretraining.
        highres=HighRes(batch_size=3072, lr_scale=1.51e-5 / 2.0e-4),
    ),
    "vitg14_laion": Settings(
        preset="vitg14_laion",
        data="/data/laion600m",
        batch_size=3072,
        model=Model(backbone="franca_vitg14", drop_path=0.4, activation_checkpointing=True),
        # configs/train/LAION/vitg14.yaml. ViT-L's there has .48-1, .05-.32 and a base lr of 1e-3.
        crops=Crops(global_scale=(0.45, 1.0), local_scale=(0.05, 0.45)),
        optim=Optim(base_lr=2.0e-4),
        # No released file adapts a ViT-g: the schedules are ViT-B's, the drop path pretraining's.
        highres=HighRes(batch_size=3072, drop_path=0.4),
    ),
    # Two CPU cores, minutes: 32 px views of 48 px scenes, and every part of the method. Changed for
    # short runs of small batches (docs/cifar10.md): as many prototypes as the batch has rows, a
    # sharper teacher, a faster average, a shorter warm-up, a full learning rate for the patch
    # embedding, less iBOT, larger local crops, and a blur as wide as 2 of 224 pixels.
    "demo": Settings(
        preset="demo",
        steps=210,
        batch_size=48,
        workers=1,
        scene_size=48,
        num_scenes=4000,
        log_every=10,
        checkpoint_every=100,
        keep_every=0,
        model=Model(
            backbone="sslkit_vit_tiny",
            drop_path=0.0,
            num_prototypes=128,
            head_hidden_dim=256,
            dino_bottleneck=64,
            ibot_bottleneck=64,
        ),
        crops=Crops(
            global_size=32,
            global_scale=(0.5, 1.0),
            local_size=16,
            local_scale=(0.2, 0.5),
            num_local=4,
            blur_sigma=(0.1, 0.3),
        ),
        targets=Targets(temperature=0.04),
        losses=Losses(ibot=0.2),
        optim=Optim(
            base_lr=6e-3,
            lr_warmup=0.05,
            patch_embed_lr_scale=1.0,
            freeze_prototypes=0.02,
            momentum=(0.98, 1.0),
        ),
        # The shares of the demo's pretraining. The released warm-up, half of the steps, would leave
        # too few of 20 at the full learning rate.
        highres=HighRes(
            steps=20,
            global_size=48,
            local_size=24,
            batch_size=48,
            drop_path=0.0,
            lr_scale=0.1,
            lr_warmup=0.05,
            temperature_warmup=0.5,
            freeze_prototypes=0.02,
        ),
        rasa=Rasa(num_images=500),
        evaluation=Evaluation(
            num_train=3000,
            num_test=1000,
            num_dense=300,
            online_train=1000,
            online_test=500,
            online_every=70,
            resize_over_crop=1.0,
        ),
    ),
}
# Two CPU cores, under 40 minutes on 20,000 images of CIFAR-10: 24 px views of 32 px images.
PRESETS["cifar10"] = replace(
    PRESETS["demo"],
    preset="cifar10",
    data="cifar10.npz",
    steps=2000,
    batch_size=64,
    log_every=20,
    checkpoint_every=200,
    crops=replace(PRESETS["demo"].crops, global_size=24, local_size=12, blur_sigma=(0.1, 2.0)),
    highres=replace(
        PRESETS["demo"].highres, steps=100, global_size=32, local_size=12, batch_size=64
    ),
    evaluation=Evaluation(
        num_train=20_000,
        num_test=4_000,
        num_dense=500,
        online_train=5_000,
        online_test=2_000,
        online_every=85,
        resize_over_crop=1.0,
    ),
)
PRESETS["smoke"] = replace(
    PRESETS["demo"],
    preset="smoke",
    steps=12,
    batch_size=16,
    num_scenes=200,
    log_every=2,
    checkpoint_every=6,
    model=replace(PRESETS["demo"].model, backbone="sslkit_vit_micro", num_prototypes=64),
    highres=replace(PRESETS["demo"].highres, steps=4, batch_size=16),
    rasa=replace(PRESETS["demo"].rasa, num_images=64),
    evaluation=Evaluation(
        num_train=150,
        num_test=50,
        num_dense=50,
        online_train=100,
        online_test=50,
        online_every=6,
        resize_over_crop=1.0,
    ),
)
# Weights of --init-from on hundreds or thousands of images, one GPU or CPU (docs/adapt.md has the
# reasons). The file decides the backbone and, for as long as nobody says otherwise, the crops.
PRESETS["adapt"] = Settings(
    preset="adapt",
    data="images",
    stages=("pretrain", "rasa", "evaluate", "report"),
    steps=2000,
    batch_size=32,
    workers=4,
    checkpoint_every=200,
    keep_every=0,
    # Two rows of batch and queue for each prototype, and heads that few images can teach.
    model=Model(num_prototypes=512, head_hidden_dim=512, dino_bottleneck=128, ibot_bottleneck=128),
    targets=Targets(temperature=0.04, queue=1024),
    losses=Losses(ibot=0.5),
    optim=Optim(
        layer_decay=0.8,
        lr_warmup=0.05,
        weight_decay=(0.04, 0.04),
        freeze_prototypes=0.01,
        momentum=(0.99, 1.0),
        momentum_batch=64,
    ),
    # A short warm-up, as in the demo: the steps are few and the weights trained.
    highres=HighRes(steps=200, batch_size=32, lr_scale=0.1, lr_warmup=0.05, freeze_prototypes=0.01),
    evaluation=Evaluation(
        num_train=5000,
        num_test=1000,
        online_train=2000,
        online_test=500,
        online_every=200,
    ),
)


# ------------------------------------------------------------------------------------ networks


class Scores(NamedTuple):
    """One pass of the network over V global and V_l local crops of B images."""

    cls: Tensor  # [V * B, D], of the global crops
    dino: tuple[Logits, ...]  # L x [(V + V_l) * B, K_l]
    ibot: tuple[Logits, ...]  # L x [M, K_l], in row-major order of the masks


def make_encoder(model: Model, global_size: int) -> ViTEncoder:
    """An untrained ViT."""
    return backbones.create(
        model.backbone,
        img_size=global_size,
        in_chans=model.in_chans,
        drop_path_rate=model.drop_path,
        activation_checkpointing=model.activation_checkpointing,
        **json.loads(model.backbone_settings),
    )


def check_network(model: Model) -> Literal[True]:
    """Raise ValueError if an exported encoder could not state these settings."""
    more = parse_json(model.backbone_settings, "backbone_settings")
    check_settings("backbone_settings", more, NETWORK)
    check_settings("settings", {"name": model.backbone, "in_chans": model.in_chans}, NETWORK)
    head = {
        "num_prototypes": model.num_prototypes,
        "hidden_dim": model.head_hidden_dim,
        "num_layers": model.head_layers,
        **({"nesting_dims": model.nesting_dims} if model.nesting_dims else {}),
    }
    for bottleneck in (model.dino_bottleneck, model.ibot_bottleneck):
        check_settings("heads", {**head, "bottleneck_dim": bottleneck}, HEAD)
    return True


class FrancaNetwork(nn.Module):
    """A ViT and two nested heads: one for class tokens, one for masked patches."""

    def __init__(self, model: Model, global_size: int) -> None:
        super().__init__()
        self.backbone = make_encoder(model, global_size)
        head = partial(
            MatryoshkaProjector,
            self.backbone.embed_dim,
            model.num_prototypes,
            nesting_dims=model.nesting_dims or None,
            nesting=model.nesting,
            hidden_dim=model.head_hidden_dim,
            num_layers=model.head_layers,
            normalize=model.normalize,
        )
        self.dino_head = head(bottleneck_dim=model.dino_bottleneck)
        self.ibot_head = head(bottleneck_dim=model.ibot_bottleneck)
        self.factored_scores = model.factored_scores

    @property
    def heads(self) -> dict[str, MatryoshkaProjector]:
        """Both heads, by name."""
        return {"dino_head": self.dino_head, "ibot_head": self.ibot_head}

    def forward(
        self, crops: list[Tensor], masks: Tensor, *, hide: bool, frozen: bool = False
    ) -> Scores:
        """Scores of crops ([V * B, C, g, g], then local ones) with masks bool [V * B, H, W].

        The student's masked patches are hidden from it (`hide`); the teacher sees them. A `frozen`
        backbone gets no gradients.
        """
        hidden = [masks if hide else None, *(None for _ in crops[1:])]
        with torch.no_grad() if frozen else nullcontext():
            tokens = self.backbone.forward_many(crops, hidden)
        # Copies: FSDP cannot follow a view of an output.
        cls = [t.cls.to(torch.float32, copy=True) for t in tokens]
        # Scores and losses are float32, also where the encoder runs in bfloat16.
        with torch.autocast(masks.device.type, enabled=False):
            dino = self.dino_head(torch.cat(cls), factored=self.factored_scores)
            patches = tokens[0].patches[masks].float()
            ibot = self.ibot_head(patches, factored=self.factored_scores)
        return Scores(cls[0], dino, ibot)


# ------------------------------------------------------------------------------------- targets


class TeacherTargets(nn.Module):
    """Teacher scores of every level of both heads -> Assignments, by Sinkhorn or centering."""

    def __init__(
        self,
        targets: Targets,
        num_prototypes: list[int],
        bound: float | None,
        parallel: Parallel,
        *,
        queue_columns: list[int],
    ) -> None:
        super().__init__()
        self.parallel = parallel
        self.iterations = targets.sinkhorn_iterations
        self.bound = bound
        self.centers = nn.ModuleList(
            EMACentering(k, momentum=targets.centering_momentum, group=parallel.group)
            for k in num_prototypes * (targets.kind == "centering")
        )
        self.queues = nn.ModuleList(
            SinkhornQueue(targets.queue // parallel.world_size, columns)
            for columns in queue_columns * (targets.queue > 0)
        )

    @torch.no_grad()
    def forward(self, logits: list[Logits], temperature: float) -> list[Assignments]:
        """One `Assignments` for each [rows, K_l]; the centers or queues, if any, then move."""
        if not self.centers:
            queues = cast(list[SinkhornQueue], list(self.queues))
            pasts = [queue(x) for queue, x in zip(queues, logits, strict=bool(queues))]
            balanced = sinkhorn_many(
                logits,
                temperature,
                num_iterations=self.iterations,
                pasts=pasts or None,
                group=self.parallel.group,
                bound=self.bound,
            )
            for queue, x in zip(queues, logits, strict=bool(queues)):
                queue.update(x)
            return balanced
        centers = cast(list[EMACentering], list(self.centers))
        pairs = list(zip(centers, logits, strict=True))
        assignments = [center(scores, temperature) for center, scores in pairs]
        for center, scores in pairs:
            center.update(scores)
        return assignments

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint: the centers, which all processes share, and the queues of all."""
        own = self.state_dict()
        queues = {name: x for name, x in own.items() if name.startswith("queues.")}
        return own | joined(queues, self.parallel)


# -------------------------------------------------------------------------------------- losses


class FrancaLoss(nn.Module):
    """Every term of the loss by name: DINO and iBOT at each nesting level, and KoLeo."""

    def __init__(self, student_temperature: float, group: ProcessGroup | None) -> None:
        super().__init__()
        # Nobody reads the student's scores after the losses: gradients take their memory.
        self.dino = DINOLoss(student_temp=student_temperature, overwrite_logits=True)
        self.ibot = iBOTLoss(student_temp=student_temperature, overwrite_logits=True)
        self.koleo = KoLeoLoss(group=group)

    def forward(
        self, scores: Scores, dino: list[Assignments], ibot: list[Assignments], masks: Tensor
    ) -> dict[str, Tensor]:
        """Unweighted terms, for masks bool [V * B, H, W]."""
        num_images = len(masks) // NUM_GLOBAL
        terms = {}
        for level, (logits, targets) in enumerate(zip(scores.dino, dino, strict=True)):
            views = logits.unflatten(0, (-1, num_images))  # [V + V_l, B, K]
            terms[f"dino/level_{level}"] = self.dino(views, targets)
        for level, (logits, targets) in enumerate(zip(scores.ibot, ibot, strict=True)):
            terms[f"ibot/level_{level}"] = self.ibot(logits, targets, masks)
        terms["koleo"] = torch.stack([self.koleo(x) for x in scores.cls.chunk(NUM_GLOBAL)]).sum()
        return terms


def weighted_sum(terms: dict[str, Tensor], weights: Losses) -> Tensor:
    """The loss: levels weigh the same, so each term has the weight of its kind."""
    kinds = dataclasses.asdict(weights)
    return torch.stack([kinds[name.split("/")[0]] * term for name, term in terms.items()]).sum()


# ------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class Plan:
    """What distinguishes pretraining from high-resolution adaptation."""

    name: Stage
    steps: int
    batch_size: int
    global_size: int
    local_size: int
    drop_path: float
    base_lr: float
    lr_warmup: float
    temperature_warmup: float
    freeze_prototypes: float
    head_warmup: float  # share of the steps in which the backbone rests

    @property
    def frozen_steps(self) -> int:
        """Steps in which the heads learn alone."""
        return round(self.head_warmup * self.steps)


def pretraining(settings: Settings) -> Plan:
    """The first stage."""
    return Plan(
        name="pretrain",
        steps=settings.steps,
        batch_size=settings.batch_size,
        global_size=settings.crops.global_size,
        local_size=settings.crops.local_size,
        drop_path=settings.model.drop_path,
        base_lr=settings.optim.base_lr,
        lr_warmup=settings.optim.lr_warmup,
        temperature_warmup=settings.targets.temperature_warmup,
        freeze_prototypes=settings.optim.freeze_prototypes,
        head_warmup=settings.init.head_warmup if settings.init.heads == "fresh" else 0.0,
    )


def high_resolution(settings: Settings) -> Plan:
    """The same training on larger crops, with warm-ups of its own."""
    highres = settings.highres
    return Plan(
        name="highres",
        steps=highres.steps,
        batch_size=highres.batch_size,
        global_size=highres.global_size,
        local_size=highres.local_size,
        drop_path=highres.drop_path,
        base_lr=settings.optim.base_lr * highres.lr_scale,
        lr_warmup=highres.lr_warmup,
        temperature_warmup=highres.temperature_warmup,
        freeze_prototypes=highres.freeze_prototypes,
        head_warmup=0.0,
    )


class Schedule(NamedTuple):
    """The hyper-parameters of one step."""

    lr: float
    last_layer_lr: float
    weight_decay: float
    momentum: float
    teacher_temperature: float


def schedule(step: int, plan: Plan, settings: Settings) -> Schedule:
    """Every schedule is a function of the step, so a resumed run needs no other state."""
    optim, targets, total = settings.optim, settings.targets, plan.steps
    lr = warmup_cosine(
        step,
        peak=sqrt_batch_scaling(plan.base_lr, plan.batch_size),
        final=optim.final_lr,
        total_steps=total,
        warmup_steps=round(plan.lr_warmup * total),
    )
    start, end = optim.weight_decay
    momentum = cosine(step, start=optim.momentum[0], end=optim.momentum[1], total_steps=total)
    if optim.momentum_batch:
        batch = optim.momentum_batch
        momentum = ema_batch_scaling(momentum, plan.batch_size, reference=batch)
    return Schedule(
        lr=lr,
        last_layer_lr=lr * unfreeze(step, freeze_steps=round(plan.freeze_prototypes * total)),
        weight_decay=cosine(step, start=start, end=end, total_steps=total),
        momentum=momentum,
        teacher_temperature=linear_warmup(
            step,
            start=targets.start_temperature,
            end=targets.temperature,
            warmup_steps=round(plan.temperature_warmup * total),
        ),
    )


def backbone_lr_scale(step: int, plan: Plan) -> float:
    """Factor of the backbone's learning rate: 0 while fresh heads learn alone, then a warm-up."""
    warmup_steps = round(plan.lr_warmup * plan.steps) if plan.frozen_steps else 0
    return joining(step, frozen_steps=plan.frozen_steps, warmup_steps=warmup_steps)


def make_optimizer(student: FrancaNetwork, optim: Optim) -> torch.optim.AdamW:
    """AdamW over the parameters of the student, in groups by learning rate and weight decay."""
    groups = parameter_groups(
        student,
        layer_decay=optim.layer_decay,
        patch_embed_lr_scale=optim.patch_embed_lr_scale,
        parts=("backbone",),
    )
    return torch.optim.AdamW(groups, lr=0.0, betas=optim.betas)


class Seen(NamedTuple):
    """What one step leaves to watch."""

    terms: dict[str, Tensor]  # unweighted, means over micro-batches and processes
    loss: Tensor
    schedule: Schedule
    gradient_norms: dict[str, Tensor]
    targets: dict[str, Assignments]  # by the names of their loss terms
    cls: Tensor  # [V * B, D] of the last micro-batch
    masked_images: float  # share of the global crops that have a mask


class Trainer:
    """Student, teacher, targets, losses and optimizer of one stage, and one step of them."""

    def __init__(
        self, plan: Plan, settings: Settings, parallel: Parallel, initial: Loaded | None = None
    ) -> None:
        self.plan, self.settings, self.parallel = plan, settings, parallel
        if plan.name == "highres":
            group = checkpoint_group(parallel.group)
            pretrained, path = last_checkpoint("pretrain", settings, group)
            require_fit(pretraining(settings), settings, pretrained, path)
        torch.manual_seed(settings.seed)
        model = replace(settings.model, drop_path=plan.drop_path)
        self.student = FrancaNetwork(model, settings.crops.global_size)
        if initial is not None:  # the teacher is a copy, whichever the heads are
            fill_(self.student, initial, settings)
        self.student.to(parallel.device)
        self.teacher = EMATeacher(self.student)
        self.num_prototypes = {
            f"{kind}/level_{level}": k
            for kind, head in (("dino", self.student.dino_head), ("ibot", self.student.ibot_head))
            for level, k in enumerate(head.num_prototypes_per_level)
        }
        self.targets = TeacherTargets(
            settings.targets,
            list(self.num_prototypes.values()),
            bound=1.0 if settings.model.normalize else None,  # cosines
            parallel=parallel,
            queue_columns=queue_columns(self.student),
        ).to(parallel.device)
        self.loss = FrancaLoss(settings.targets.student_temperature, parallel.group)
        networks = (self.student, self.teacher.module)
        if plan.name == "highres":
            load_checkpoint_(pretrained, path, self.weights(), partial=True)
            # As the release's scripts/modify_ckpt_highres.py; local crops keep the encoder's rule.
            for network in networks:
                network.backbone.set_img_size_(plan.global_size, pos_interpolation="antialias")
        self.distribute(networks)
        self.optimizer = make_optimizer(self.student, settings.optim)
        if plan.name == "highres":  # the position embedding, which changed shape, starts afresh
            fitting = {n: m for n, m in moments(self.optimizer).items() if "pos_embed" not in n}
            load_checkpoint_(pretrained, path, {"optimizer": fitting}, partial=True)
        self.draw_masks = mask_generator(self.student.backbone.grid_size, settings.masks)

    def distribute(self, networks: tuple[FrancaNetwork, FrancaNetwork]) -> None:
        """Student and teacher over the processes; `replica` is the student whose output counts."""
        settings, parallel = self.settings, self.parallel
        if settings.compile_blocks:
            for network in networks:
                for block in network.backbone.vit.blocks:
                    block.compile()
        self.kind = settings.parallel
        if self.kind == "auto":
            self.kind = choose(sum(p.numel() for p in self.student.parameters()), parallel)
        if settings.hsdp_replicas > 1 and self.kind != "fsdp":
            raise SettingsError(
                f"--hsdp-replicas {settings.hsdp_replicas} is for --parallel fsdp, not {self.kind}"
            )
        self.replica: nn.Module = self.student
        if self.kind == "fsdp":
            shard_(
                networks,
                parallel,
                blocks="backbone.vit.blocks",
                heads=("dino_head", "ibot_head"),
                replicas=settings.hsdp_replicas,
                dtype=torch.bfloat16 if self.in_bfloat16 else None,
            )
        elif self.kind == "ddp":
            self.replica = replicate(self.student, parallel)

    def let_backbone_rest(self, frozen: bool) -> None:
        """DDP awaits a gradient of every parameter that required one when it was made."""
        first = next(self.student.backbone.parameters())
        if self.kind == "ddp" and first.requires_grad == frozen:
            self.student.backbone.requires_grad_(not frozen)
            self.replica = replicate(self.student, self.parallel)

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Student, teacher, and centers or queues."""
        return {
            "student": self.student.state_dict(),
            "teacher": self.teacher.module.state_dict(),
            "targets": self.targets.state(),
        }

    def state(self) -> dict[str, Any]:
        """Everything the next step depends on, but for the step number.

        The number fixes the images, masks and random numbers of the step.
        """
        return {**self.weights(), "optimizer": moments(self.optimizer)}

    def step(self, step: int, batch: Batch) -> Seen:
        """One optimizer step, counted from 0."""
        # Stochastic depth alone draws from it; all else has generators of its own.
        torch.manual_seed(self.seed(DROP_PATH, step, self.parallel.rank))
        now = schedule(step, self.plan, self.settings)
        set_hyperparameters(
            self.optimizer,
            lr=now.lr,
            weight_decay=now.weight_decay,
            last_layer_lr=now.last_layer_lr,
            part_lr_scales={"backbone": backbone_lr_scale(step, self.plan)},
        )
        frozen = step < self.plan.frozen_steps
        self.let_backbone_rest(frozen)
        all_masks = self.masks(step, batch)
        micro = self.micro_batches(batch, all_masks)

        # The teacher sees every micro-batch first: targets are balanced over all of them.
        with self.autocast():
            teacher = [self.teacher([crops[0]], masks, hide=False) for crops, masks in micro]
        scores = [s.dino + s.ibot for s in teacher]
        rows = [[len(level) for level in levels] for levels in scores]
        watched = {
            "images": nan_unless_finite(images for crops, _ in micro for images in crops),
            "teacher's features": nan_unless_finite(s.cls for s in teacher),
            "masked images": all_masks.flatten(2).any(2).float().mean().to(self.parallel.device),
        }
        own_terms: dict[str, Tensor] = {}  # means over this process's micro-batches
        logits = [concatenated(parts) for parts in zip(*scores, strict=True)]
        del teacher, scores  # a copy of the logits, where there are several micro-batches
        targets = self.targets(logits, now.teacher_temperature)

        self.optimizer.zero_grad(set_to_none=True)
        first = [0] * len(targets)
        for i, (crops, masks) in enumerate(micro):
            ends = [start + count for start, count in zip(first, rows[i], strict=True)]
            own = [
                replace(level, logits=level.logits[start:end])
                for level, start, end in zip(targets, first, ends, strict=True)
            ]
            with gradients_synchronised(self.replica, last=i == len(micro) - 1):
                share = 1 / len(micro)
                terms, cls = self.backward(crops, masks, own, share=share, frozen=frozen)
            for name, term in terms.items():
                own_terms[name] = own_terms.get(name, 0) + term / len(micro)
            first = ends

        watched |= own_terms
        everywhere = self.parallel.gather(torch.stack(list(watched.values())))  # [processes, names]
        means = dict(zip(watched, everywhere.mean(0), strict=True))
        terms = {name: means[name] for name in own_terms}
        parts = {name: getattr(self.student, name) for name in SUBMODULES}
        norms = clip_gradients(parts, self.settings.optim.clip)
        gradients = {f"gradient of {name}": n for name, n in norms.items()}
        require_finite({**by_rank(watched, everywhere), **gradients}, step)
        self.optimizer.step()
        self.teacher.update(self.student, now.momentum)
        return Seen(
            terms=terms,
            loss=weighted_sum(terms, self.settings.losses),
            schedule=now,
            gradient_norms=norms,
            targets=dict(zip(self.num_prototypes, targets, strict=True)),
            cls=cls,
            masked_images=means["masked images"].item(),
        )

    def backward(
        self,
        crops: list[Tensor],
        masks: Tensor,
        targets: list[Assignments],
        *,
        share: float,
        frozen: bool,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Add the gradients of a micro-batch, this share of the batch: its terms, class tokens."""
        with self.autocast():
            student = self.replica(crops, masks, hide=True, frozen=frozen)
        levels = len(student.dino)
        terms = self.loss(student, targets[:levels], targets[levels:], masks)
        (share * weighted_sum(terms, self.settings.losses)).backward()
        return {name: term.detach() for name, term in terms.items()}, student.cls.detach()

    def seed(self, purpose: int, *words: int) -> int:
        """Seed of this stage's random numbers for one purpose."""
        return sample_seed(self.settings.seed, list(STAGES).index(self.plan.name), purpose, *words)

    def masks(self, step: int, batch: Batch) -> Tensor:
        """Bool [V, B, H, W] for this process's images.

        A function of (seed, stage, position of the image in the stream), however many processes
        share the batch: how many patches of each image are masked is drawn for the whole batch.
        """
        V, B = batch.global_crops.shape[:2]
        rank, world = self.parallel.rank, self.parallel.world_size
        whole_batch = torch.Generator().manual_seed(self.seed(MASK_COUNTS, step))
        counts = self.draw_masks.counts(V * B * world, generator=whole_batch)
        masks = torch.zeros(V, B, *self.draw_masks.grid_size, dtype=torch.bool)
        for view in range(V):
            for b, i in enumerate(range(rank, B * world, world)):
                if count := counts[view * B * world + i]:
                    seed = self.seed(MASKS, step * B * world + i, view)
                    own = torch.Generator().manual_seed(seed)
                    masks[view, b] = self.draw_masks.one(count, generator=own)
        return masks

    def micro_batches(self, batch: Batch, masks: Tensor) -> list[tuple[list[Tensor], Tensor]]:
        """Equal shares of the images, as (crops by resolution, masks), each view-major."""
        device, count = self.parallel.device, self.settings.accumulation
        views = [c for c in (batch.global_crops, batch.local_crops) if len(c)]
        crops = [c.to(device, non_blocking=True).chunk(count, dim=1) for c in views]
        shares = zip(zip(*crops, strict=True), masks.chunk(count, dim=1), strict=True)
        return [
            ([c.flatten(0, 1) for c in own], own_masks.flatten(0, 1).to(device))
            for own, own_masks in shares
        ]

    @property
    def in_bfloat16(self) -> bool:
        """Whether the encoder computes in bfloat16."""
        automatic = self.parallel.device.type == "cuda"
        return {"auto": automatic, "bfloat16": True, "float32": False}[self.settings.precision]

    def autocast(self) -> torch.autocast:
        """bfloat16 for the encoder, where `precision` asks for it."""
        return torch.autocast(self.parallel.device.type, torch.bfloat16, enabled=self.in_bfloat16)


def queue_columns(network: FrancaNetwork) -> list[int]:
    """Columns of each level of both heads: its scores, or the features of factored scores."""
    return [
        prototypes.in_features if network.factored_scores else prototypes.out_features
        for head in network.heads.values()
        for prototypes in cast(Iterable[nn.Linear], head.prototypes)
    ]


def mask_generator(grid_size: tuple[int, int], masks: Masks) -> CyclicMaskGenerator:
    """CyclicMask on the grid of the global crops."""
    return CyclicMaskGenerator(
        grid_size,
        mask_ratio=masks.ratio,
        mask_probability=masks.probability,
        kind=masks.kind,
        shift=masks.shift,
    )


def train(plan: Plan, settings: Settings, parallel: Parallel) -> None:
    """One stage of training, from its last checkpoint if it has any, to `<stage>.safetensors`."""
    export = settings.output / f"{plan.name}.safetensors"
    if export.exists():
        export_metadata(plan.name, settings)  # raises an error if it is damaged
        say(parallel, f"{plan.name}: finished already, {export}")
        return
    folder = settings.output / plan.name
    checkpoints = Checkpoints(
        folder / "checkpoints",
        keep_last=settings.keep_last,
        keep_every=settings.keep_every,
        group=checkpoint_group(parallel.group),
    )
    sources = open_data(settings)
    images = open_training_images(settings, sources)
    latest = checkpoints.latest()
    if latest is not None:
        require_fit(plan, settings, checkpoints, latest)
    begins = latest is None and plan.name == "pretrain" and settings.init_from != ""
    trainer = Trainer(plan, settings, parallel, read_weights(settings) if begins else None)
    if begins:
        save_teacher("init", 0, trainer)
    start = 0 if latest is None else step_of(latest)
    if start > plan.steps:
        raise SettingsError(f"{plan.name} has {plan.steps} steps, but {latest} is further")
    if latest is not None:
        load_checkpoint_(checkpoints, latest, trainer.state())
    if parallel.is_main:
        write_settings(settings)
        write_data(settings, sources)
    loader = make_loader(
        MultiCropDataset(images, multi_crop(plan, settings), seed=settings.seed),
        batch_size=plan.batch_size,
        start_sample=start * plan.batch_size,
        rank=parallel.rank,
        world_size=parallel.world_size,
        num_workers=settings.workers,
        augment_on=parallel.device if settings.augment_on == "device" else None,
    )
    data = DataWatch(settings.workers)
    num_images = None if isinstance(images, StreamSource) else len(images)
    counts = parallel.gather(torch.tensor(num_images or 0)).tolist()
    if len(set(counts)) > 1:
        raise SettingsError(f"--data {settings.data} has {counts} images for ranks 0, 1, ...")
    unreadable = UnreadableLog(num_images, threshold=settings.max_unreadable)
    # Somewhat past the warm-up: an untrained network shows the signs of a collapsed one.
    grace_steps = plan.frozen_steps + round(1.25 * plan.lr_warmup * plan.steps)
    monitor = CollapseMonitor(
        trainer.num_prototypes, grace_steps=grace_steps, loss_grace_steps=max(grace_steps, 100)
    )
    if num_images is not None and plan.batch_size > num_images:
        option = "--batch-size" if plan.name == "pretrain" else "--highres.batch-size"
        say(
            parallel,
            f"warning: {option} {plan.batch_size} is larger than the data set: each step sees some "
            f"of its {num_images} images more than once. Give at most {num_images}, or more images",
        )
    if settings.accumulation > 1 and settings.losses.koleo > 0:
        say(parallel, "accumulation: KoLeo sees the neighbours within each micro-batch alone")
    with ExitStack() as stack:
        request = stack.enter_context(stop_request())
        # Also when the training fails, but not after a second Ctrl-C.
        stack.push(lambda kind, *_: None if kind is KeyboardInterrupt else checkpoints.wait())
        batches = stack.enter_context(iter(loader))
        saved = -1 if latest is None else start
        if parallel.is_main:
            metrics = stack.enter_context(MetricsWriter(folder, resume_step=start))
            progress = stack.enter_context(
                TrainingProgress(plan.steps, start_step=start, description=plan.name)
            )
        for step in range(start, plan.steps):
            if parallel.group is None:
                batch = request.unless_stopped(lambda: data.next(batches))
            else:  # the others are in the step already, and wait for this process there
                batch = data.next(batches)
            if batch is None:
                if saved < step:
                    checkpoints.save(step, trainer.state())
                raise Stopped(plan.name, step, request.number)
            unreadable.update(batch.indices, batch.unreadable)
            seen = trainer.step(step, batch)
            done = step + 1
            accuracy = None
            if due(done, settings.evaluation.online_every, plan.steps) and sources.labelled:
                weights = whole(trainer.teacher.module.backbone)
                if parallel.is_main:
                    encoder = encoder_of(weights, plan, settings).to(parallel.device)
                    accuracy = online_knn(encoder, plan, settings, sources)
            if parallel.is_main:
                progress.update(done, loss=seen.loss, images=plan.batch_size)
                record: dict[str, float] = {}
                if due(done, settings.log_every, plan.steps):
                    record, warnings = watch(seen, monitor, done, settings)
                    record["images_per_second"] = progress.images_per_second
                    record |= {k: v for k, v in data.metrics().items() if math.isfinite(v)}
                    for warning in filter(None, (*warnings, data.warning())):
                        progress.message(f"warning: {warning}")
                if accuracy is not None:
                    record[f"knn/{settings.evaluation.knn}"] = accuracy
                    progress.message(f"step {done}: k-NN accuracy {100 * accuracy:.1f} %")
                if record:
                    metrics.log(done, record)
            asked_to_stop = int(parallel.gather(torch.tensor(request.number)).max())
            if asked_to_stop or due(done, settings.checkpoint_every, plan.steps):
                checkpoints.save(done, trainer.state())
                saved = done
            if asked_to_stop:
                raise Stopped(plan.name, done, asked_to_stop)
            del seen  # the teacher's scores, before there are new ones
        checkpoints.wait()
        if asked_to_stop := int(parallel.gather(torch.tensor(request.number)).max()):
            raise Stopped(plan.name, plan.steps, asked_to_stop)
    save_teacher(plan.name, plan.steps, trainer)


def load_checkpoint_(
    checkpoints: Checkpoints, path: Path, state: dict[str, Any], *, partial: bool = False
) -> None:
    """Fill `state` from a checkpoint; an error says if the settings do not fit."""
    try:
        checkpoints.load_(path, state, partial=partial, finite=True)
    except ValueError as error:
        raise SettingsError(f"these settings make another network: {error}") from error


def require_fit(plan: Plan, settings: Settings, checkpoints: Checkpoints, path: Path) -> None:
    """Refuse a checkpoint of another network before this one takes its memory."""
    with torch.device("meta"):
        network = FrancaNetwork(settings.model, plan.global_size)
    try:
        checkpoints.require_fit(path, {"student": network.state_dict()}, partial=True)
    except ValueError as error:
        raise SettingsError(f"these settings make another network: {error}") from error


def save_teacher(name: str, step: int, trainer: Trainer) -> None:
    """The teacher's encoder and heads in one file, which --init-from takes."""
    settings, parallel = trainer.settings, trainer.parallel
    weights = whole(trainer.teacher.module)
    if parallel.is_main:
        network = FrancaNetwork(settings.model, trainer.plan.global_size)
        network.load_state_dict(weights)
        path = settings.output / f"{name}.safetensors"
        described = {"stage": name, "step": str(step), "settings": as_json(settings)}
        backbones.save(network.backbone, path, described, heads=network.heads)
    parallel.wait()


class Stopped(Exception):
    """A SIGTERM or SIGINT has arrived, and everything is saved."""

    def __str__(self) -> str:
        stage, step, number = self.args
        name = signal.Signals(number).name
        return f"{stage}: stopped by {name} and saved at step {step}; continue with --resume"


def say(parallel: Parallel, text: str) -> None:
    """Print once, not once a process."""
    if parallel.is_main:
        print(text)


def encoder_of(weights: dict[str, Tensor], plan: Plan, settings: Settings) -> ViTEncoder:
    """The encoder of a stage with these weights, in this process alone."""
    encoder = make_encoder(settings.model, plan.global_size)
    encoder.load_state_dict(weights)
    return encoder.eval()


def due(step: int, interval: int, last: int) -> bool:
    """Every `interval` steps and at the last one; never if `interval` is 0."""
    return interval > 0 and (step % interval == 0 or step == last)


def watch(
    seen: Seen, monitor: CollapseMonitor, step: int, settings: Settings
) -> tuple[dict[str, float], list[str]]:
    """One line of metrics.jsonl, and warnings if the run collapses."""
    terms = {name: term.item() for name, term in seen.terms.items()}
    usage = {name: targets.usage() for name, targets in seen.targets.items()}
    spread = feature_std(seen.cls).item()
    record = {
        "loss": seen.loss.item(),
        **terms,
        **seen.schedule._asdict(),
        "student_temperature": settings.targets.student_temperature,
        **{f"gradient_norm/{name}": norm.item() for name, norm in seen.gradient_norms.items()},
        **{f"target_entropy/{name}": u.target_entropy.item() for name, u in usage.items()},
        **{f"prototypes_used/{name}": u.fraction_used.item() for name, u in usage.items()},
        "feature_std": spread,
    }
    # iBOT counts images without a mask as 0; a uniform student's cross-entropy is ln K elsewhere.
    cross_entropies = {
        name: terms[name] / (1 if name.startswith("dino") else seen.masked_images or math.nan)
        for name in usage
    }
    warnings = monitor.update(
        step,
        target_entropy={name: u.target_entropy.item() for name, u in usage.items()},
        mean_entropy={name: u.entropy.item() for name, u in usage.items()},
        losses=cross_entropies,
        spread=spread,
    )
    return record, warnings


# ------------------------------------------------------------------------ weights to begin with


def read_weights(settings: Settings) -> Loaded:
    """What --init-from names, for the channels and global crops of these settings.

    The first reading, which the command line is parsed over, knew neither; to keep it until here
    would be a third network in every process.
    """
    options = {"in_chans": settings.model.in_chans, "img_size": settings.crops.global_size}
    loaded = read_init(settings.init_from, **options)
    digest = digest_of(settings.init_from)
    if settings.init.sha256 not in ("", digest):
        raise SettingsError(
            f"--init-from {settings.init_from} has another content than when the run was made: "
            f"init.sha256 was {settings.init.sha256}, is {digest}. Bring that file back, or choose "
            "another --output"
        )
    return loaded


def read_init(init_from: str, **options: Any) -> Loaded:
    """Weights, or an error that names the flag."""
    try:
        loaded = backbones.read(init_from, **options)
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        raise SettingsError(f"--init-from {init_from}: {error}") from error
    if isinstance(loaded.encoder.vit.norm, nn.Sequential):
        raise SettingsError(
            f"--init-from {init_from}: RASA is folded into this encoder, whose last layer is no "
            "norm to train on; give the file that RASA was fitted on"
        )
    return loaded


def digest_of(init_from: str) -> str:
    """SHA-256 of a file; a name that is none has no digest."""
    return file_digest(Path(init_from)) if Path(init_from).is_file() else ""


def following(default: Settings, init_from: str, encoder: ViTEncoder) -> Settings:
    """`default` with the network of the file; the preset `adapt` also takes its sizes."""
    network = {k: v for k, v in (encoder.settings or {}).items() if v is not None}
    own = ("img_size", "drop_path_rate", "activation_checkpointing")
    model = replace(
        default.model,
        backbone=network.pop("name"),
        in_chans=network.pop("in_chans"),
        backbone_settings=json.dumps(
            {k: v for k, v in network.items() if k not in own}, sort_keys=True
        ),
    )
    crops, highres = default.crops, default.highres
    if default.preset == "adapt":
        patch = max(encoder.patch_size)
        side = min(*encoder.img_size, crops.global_size) // patch * patch
        local = max(1, round(side * 98 / 224 / patch)) * patch  # Franca's local and global crops
        crops = replace(crops, global_size=side, local_size=local)
        highres = replace(highres, global_size=2 * side, local_size=local)
    init = replace(default.init, heads="auto", sha256=digest_of(init_from))
    return replace(default, model=model, crops=crops, highres=highres, init=init)


def agreeing(settings: Settings, default: Settings, loaded: Loaded) -> Settings:
    """Settings that do not contradict the file, and whether its heads are taken."""
    for name in ("backbone", "backbone_settings"):
        asked, own = getattr(settings.model, name), getattr(default.model, name)
        if asked != own:
            raise SettingsError(
                f"{flag(f'model.{name}')} {asked}: the network of --init-from "
                f"{settings.init_from} has {own}, and cannot be another; leave it out"
            )
    if settings.init.sha256 != default.init.sha256:
        raise SettingsError(
            f"--init.sha256 {settings.init.sha256}: {settings.init_from} has "
            f"{default.init.sha256 or 'none, as it is not a file'}"
        )
    try:
        with torch.device("meta"):
            network = FrancaNetwork(settings.model, settings.crops.global_size)
    except ValueError as error:
        raise SettingsError(f"--model: {error}") from error
    problems = [misfit(name, loaded.heads.get(name), head) for name, head in network.heads.items()]
    problems = [problem for problem in problems if problem]
    if problems and settings.init.heads == "file":
        raise SettingsError(f"--init.heads file: {problems[0]}; leave it out for fresh heads")
    if settings.init.heads == "auto":
        heads: Literal["fresh", "file"] = "fresh" if problems else "file"
        settings = replace(settings, init=replace(settings.init, heads=heads))
    return settings


def fill_(network: FrancaNetwork, loaded: Loaded, settings: Settings) -> None:
    """The file's backbone, and its heads if `settings` take them."""
    network.backbone.load_state_dict(loaded.encoder.state_dict())
    if settings.init.heads == "file":
        for name, head in network.heads.items():
            head.load_state_dict(cast(nn.Module, loaded.heads[name]).state_dict())


# ---------------------------------------------------------------------------------------- data


class Sources(NamedTuple):
    """The images to learn from, and held-out ones to evaluate on."""

    train: Source
    test: Source

    @property
    def labelled(self) -> bool:
        """Whether there are classes for k-NN to tell apart."""
        return self.train.num_classes > 1


def open_data(settings: Settings) -> Sources:
    """Both splits of `--data`; of a stream, two halves of what it holds out for tests."""

    def opened(split: Literal["train", "test"]) -> Source:
        return open_source(
            settings.data,
            split=split,
            seed=settings.seed,
            scene_size=(settings.scene_size, settings.scene_size),
            num_scenes=settings.num_scenes,
            test_fraction=settings.test_fraction,
        )

    try:
        if is_stream(settings.data):
            sources = Sources(*train_test_split(opened("test"), 0.5, settings.seed))
        else:
            sources = Sources(opened("train"), opened("test"))
    except (OSError, ImportError, RuntimeError, ValueError) as error:
        raise SettingsError(f"--data: {error}") from error
    require_same_data(settings, sources)
    return sources


def require_same_data(settings: Settings, sources: Sources) -> None:
    """Refuse images or classes other than those that the run in --output began with."""
    path = settings.output / "data.json"
    begun = path.exists() and has_begun("pretrain", settings.output)
    if settings.accept_changes or not begun:
        return
    stored = read_json_object(path, "restore it, or remove it")
    if found := changes(stored, fingerprints(sources._asdict())):
        raise SettingsError(
            f"--data {settings.data} is not what the run in {settings.output} began with: "
            f"{'; '.join(found)}. Restore the data, choose another --output, or insist with "
            "--accept-changes"
        )


def open_training_images(settings: Settings, sources: Sources) -> Source | StreamSource:
    """What the training loop learns from: the training split, or a stream beside it."""
    if not is_stream(settings.data):
        return sources.train
    fraction, seed = settings.test_fraction, settings.seed
    return open_stream(settings.data, test_fraction=fraction, seed=seed)


def is_stream(data: str) -> bool:
    """Whether `--data` can be read in one order only."""
    return data.startswith("hf-stream:")


def multi_crop(plan: Plan, settings: Settings) -> MultiCrop:
    """Two global and several local views of an image."""
    return MultiCrop(
        global_size=plan.global_size,
        global_scale=settings.crops.global_scale,
        num_global=NUM_GLOBAL,
        local_size=plan.local_size,
        local_scale=settings.crops.local_scale,
        num_local=settings.crops.num_local,
        blur_sigma=settings.crops.blur_sigma,
        channels=settings.model.in_chans,
    )


def last_checkpoint(
    stage: str, settings: Settings, group: ProcessGroup | None = None
) -> tuple[Checkpoints, Path]:
    """The checkpoint at which a training stage ended, and who reads it."""
    checkpoints = Checkpoints(settings.output / stage / "checkpoints", group=group)
    latest = checkpoints.latest()
    if latest is None or not (settings.output / f"{stage}.safetensors").exists():
        raise SettingsError(f"{settings.output} has no finished {stage}: run --stages {stage}")
    return checkpoints, latest


# ---------------------------------------------------------------------------------------- RASA


def remove_position(settings: Settings, parallel: Parallel) -> None:
    """Fit the planes of position on random crops; write the encoder that carries them."""
    plan = final_plan(settings)
    encoder = load_encoder(plan.name, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    train = open_data(settings).train
    features = extract(
        encoder.to(parallel.device),
        train,
        transform=random_crop(plan.global_size, settings.rasa.crop_scale, generator=generator),
        indices=evenly_spaced(len(train), settings.rasa.num_images),
        batch_size=settings.evaluation.batch_size,
        want=("patches",),
        device=parallel.device,
        dtype=torch.float16,
    )
    rasa = RASAProjector(encoder.embed_dim, num_iterations=settings.rasa.num_iterations)
    batches = features.patches.split(128)  # images, as in the released code
    errors = rasa.fit(batches, solver=settings.rasa.solver)
    for iteration, error in enumerate(errors, start=1):
        print(f"rasa: iteration {iteration}, position error {error:.5f}")
    encoder = encoder.cpu()
    encoder.vit = rasa.fold_into_vit(encoder.vit)
    save_rasa(rasa, settings.output / "rasa_projector.safetensors")  # for sslkit.evaluation --rasa
    path = settings.output / "rasa.safetensors"
    described = {"stage": "rasa", "of": plan.name, "position_errors": json.dumps(errors)}
    backbones.save(encoder, path, described)


# ---------------------------------------------------------------------------------- evaluation


def final_plan(settings: Settings) -> Plan:
    """The last training stage that is finished."""
    for plan in (high_resolution(settings), pretraining(settings)):
        if (settings.output / f"{plan.name}.safetensors").exists():
            return plan
    raise SettingsError(f"{settings.output} has no trained encoder; run --stages pretrain first")


def finished_stages(settings: Settings) -> list[str]:
    """The stages that exported an encoder, in order; a RASA of an older encoder is refused."""
    exports: dict[str, Path] = {n: settings.output / f"{n}.safetensors" for n in STAGES}
    finished = [name for name, path in exports.items() if path.exists()]
    if "rasa" in finished:
        fitted_on, last = export_metadata("rasa", settings, "of"), final_plan(settings).name
        if fitted_on != last:
            raise SettingsError(
                f"{exports['rasa']} was fitted on {fitted_on}, and {last} has been trained since; "
                "run --stages rasa evaluate report"
            )
    return finished


def load_encoder(stage: str, settings: Settings) -> ViTEncoder:
    """The encoder that a stage exported."""

    def finite(path: Path) -> ViTEncoder:
        encoder = backbones.load(path)
        require_finite_tensors(encoder.state_dict())
        return encoder

    return read_export(stage, settings, finite).eval()


def export_metadata(stage: str, settings: Settings, name: str = "stage") -> str:
    """What the header of an export says under a name."""
    return read_export(stage, settings, lambda path: backbones.read_metadata(path)[name])


def read_export(stage: str, settings: Settings, reader: Callable[[Path], T]) -> T:
    """Return what `reader` makes of a stage's export; an error says how to make the file again."""
    path = settings.output / f"{stage}.safetensors"
    try:
        return reader(path)
    except (OSError, ValueError, TypeError, RuntimeError, KeyError) as error:
        again = "--resume" if stage in ("pretrain", "highres") else f"--stages {stage}"
        remedy = f"Delete it and make it again with {again}"
        if stage == "init":
            remedy = "Restore it, or start again in another --output"
        raise DamagedFile(f"{path} is damaged: {error}. {remedy}") from error


def require_export_of(settings: Settings) -> None:
    """Refuse settings that make another encoder than the exported one, before building it."""
    plan = final_plan(settings)
    with torch.device("meta"):
        asked = make_encoder(settings.model, plan.global_size).state_dict()
    found = load_encoder(plan.name, settings).state_dict()
    if {k: x.shape for k, x in asked.items()} != {k: x.shape for k, x in found.items()}:
        path = settings.output / f"{plan.name}.safetensors"
        raise SettingsError(f"--model: {path} has another encoder than these settings make")


def eval_view(size: int, settings: Settings) -> EvalTransform:
    """The deterministic view of an image that evaluations use."""
    return EvalTransform(size, resize=round(size * settings.evaluation.resize_over_crop))


def knn_score(
    train_labels: Tensor, test_labels: Tensor, train: Tensor, test: Tensor, *, k: int
) -> float:
    """Top-1 accuracy of weighted k-NN."""
    return knn_hits(train_labels, test_labels, train, test, k=k).value


def knn_hits(
    train_labels: Tensor, test_labels: Tensor, train: Tensor, test: Tensor, *, k: int
) -> Score:
    """`knn_score` with its value for each labelled test image, which can be resampled."""
    test_labels, test = with_labels(test_labels, test, name="test_labels")
    return Score.mean(knn_predict(train, train_labels, test, ks=(k,))[k] == test_labels)


def have_labels(*splits: Features) -> bool:
    """Whether each split has an image with a label."""
    return all(bool((features.labels >= 0).any()) for features in splits)


def online_knn(
    encoder: nn.Module, plan: Plan, settings: Settings, sources: Sources
) -> float | None:
    """k-NN accuracy of the teacher on a sample of the images; None if none of them has a label."""
    counts = (settings.evaluation.online_train, settings.evaluation.online_test)
    images = subject(encoder, plan, settings, sources, counts)
    train, test = (images.features(split, "cls") for split in Sources._fields)
    if not have_labels(train, test):
        warn("no online k-NN: none of the sampled images has a label", stacklevel=2)
        return None
    return knn_score(train.labels, test.labels, train.cls, test.cls, k=settings.evaluation.knn)


SCORES = ("knn", "online_knn", "matryoshka", "in_context", "position_r2")


def evaluate(settings: Settings, parallel: Parallel) -> None:
    """Scores of the untrained encoder and of every stage's, in `results.json`."""
    options, sources = settings.evaluation, open_data(settings)
    require_export_of(settings)
    torch.manual_seed(settings.seed)
    untrained = make_encoder(settings.model, settings.crops.global_size)  # as before training
    first, last = pretraining(settings), final_plan(settings)
    # Pixels are what features have to beat.
    contestants: dict[str, tuple[nn.Module, Plan]] = {
        "raw pixels": (Pixels(standardised=False), first),
        "standardised pixels": (Pixels(), first),
        "random init": (untrained, first),
    }
    if settings.init_from:
        contestants["init"] = (load_encoder("init", settings), first)
    floor = list(contestants)
    for stage in finished_stages(settings):
        contestants[stage] = (load_encoder(stage, settings), first if stage == "pretrain" else last)

    results: dict[str, Any] = {name: {} for name in (*SCORES, "chance")}
    measured: dict[str, dict[str, Score]] = {"knn": {}, "in_context": {}, "position_r2": {}}
    for name, (encoder, plan) in contestants.items():
        print(f"evaluate: {name}")
        encoder = encoder.to(parallel.device)
        images = subject(encoder, plan, settings, sources, (options.num_train, options.num_test))
        labelled = sources.labelled
        if labelled:
            train, test = (images.features(split, "cls") for split in Sources._fields)
            labelled = have_labels(train, test)
        if labelled:
            score = partial(knn_score, train.labels, test.labels, k=options.knn)
            measured["knn"][name] = knn_hits(
                train.labels, test.labels, train.cls, test.cls, k=options.knn
            )
            results["chance"]["knn"] = 1 / sources.train.num_classes
            online = online_knn(encoder, plan, settings, sources) if name in floor else None
            if online is not None:  # what the curve of the online score has to be compared with
                results["online_knn"][name] = online
        if isinstance(encoder, Pixels):
            continue
        if labelled:
            results["matryoshka"][name] = matryoshka_curve(
                train.cls, test.cls, score=score, sizes=settings.model.nesting_dims or None
            )
        images = subject(encoder, plan, settings, sources, 2 * (options.num_dense,))
        train, test = (images.features(split, "patches", view="dense") for split in Sources._fields)
        probe = position_probe(train.patches, test.patches)
        measured["position_r2"][name] = Score.mean(probe.r2_by_image(), percent=False)
        if isinstance(sources.train, Segmented):
            masks = (images.masks(*split) for split in (("train", train), ("test", test)))
            try:
                segmented = in_context_segmentation(
                    train.patches,
                    next(masks),
                    test.patches,
                    next(masks),
                    len(sources.train.mask_class_names),
                )
            except Unsuitable as error:
                print(f"evaluate: no in-context segmentation: {error}")
            else:
                measured["in_context"][name] = Score.of_confusion(segmented.confusions)
    results |= {kind: {m: s.value for m, s in by.items()} for kind, by in measured.items()}
    results["intervals"] = {
        kind: {m: interval(s, settings) for m, s in by.items()} for kind, by in measured.items()
    }
    results["test_images"] = {
        kind: score.num_items for kind, by in measured.items() for score in by.values()
    }
    with atomic_write(settings.output / "results.json") as file:
        file.write(json.dumps(results, indent=2).encode())


def interval(score: Score, settings: Settings) -> list[float]:
    """95 % interval, [low, high], of a score. All models share the resamples of test images."""
    found = bootstrap(score, generator=torch.Generator().manual_seed(settings.seed))
    assert found is not None
    return [found.low, found.high]


def subject(
    encoder: nn.Module, plan: Plan, settings: Settings, sources: Sources, counts: tuple[int, ...]
) -> Subject:
    """An encoder and `counts` images of each split, in the views that evaluations use."""
    parameters = list(encoder.parameters())
    return Subject(
        type(encoder).__name__,
        encoder,
        sources._asdict(),
        identity={},
        global_size=plan.global_size,
        dense_size=plan.global_size,
        resize_over_crop=settings.evaluation.resize_over_crop,
        limits=dict(zip(Sources._fields, counts, strict=True)),
        batch_size=settings.evaluation.batch_size,
        device=str(parameters[0].device) if parameters else "cpu",
        seed=settings.seed,
    )


# -------------------------------------------------------------------------------------- report


def summary(results: dict[str, Any], last: str, k: int) -> list[tuple[str, str]]:
    """The short table: every score, from the untrained network to the last stage."""

    def models(kind: str) -> list[tuple[str, str]]:
        return [
            (f"- {name}", f"{100 * score:.1f} % [{100 * low:.1f}, {100 * high:.1f}]")
            for name, score in results[kind].items()
            for low, high in [results["intervals"][kind][name]]
        ]

    def r2(name: str) -> str:
        low, high = results["intervals"]["position_r2"][name]
        return f"{results['position_r2'][name]:.3f} [{low:.3f}, {high:.3f}]"

    rows = []
    images = {kind: f"{count} test images" for kind, count in results["test_images"].items()}
    if results["knn"]:
        chance = f"{images['knn']}, chance {100 * results['chance']['knn']:.1f} %"
        rows += [(f"k-NN accuracy (k = {k})", chance), *models("knn")]
        curve = results["matryoshka"][last].items()
        sizes = ", ".join(f"{size}: {100 * score:.1f} %" for size, score in curve)
        rows.append((f"k-NN accuracy by embedding size ({last})", sizes))
    if results["in_context"]:
        rows += [("in-context segmentation, mIoU", images["in_context"]), *models("in_context")]
    if "rasa" in results["position_r2"]:
        value = f"{r2(last)} -> {r2('rasa')}, {images['position_r2']}, chance 0"
        rows.append(("position R2, before -> after RASA", value))
    return rows


def report(settings: Settings, parallel: Parallel) -> None:
    """`report.md`: the scores, and pictures of what was learned."""
    del parallel  # pictures are drawn on the CPU
    path = settings.output / "results.json"
    if not path.exists():
        raise SettingsError(f"{path} is missing; run --stages evaluate first")
    plan = final_plan(settings)
    results = read_results(path, finished_stages(settings))
    rows = summary(results, plan.name, settings.evaluation.knn)
    figures = {
        **training_pictures(settings, results, plan.name),
        **view_pictures(settings),
        **feature_pictures(settings, results, plan),
    }
    columns = ("Score", "Value [95 % interval over test images]")
    page = write_report(
        settings.output,
        title=f"Franca on {settings.data}",
        settings=dataclasses.asdict(settings),
        results=rows,
        columns=columns,
        figures=figures,
    )
    print(format_table([columns, *rows]))
    print(f"report: {page}")


def read_results(path: Path, stages: Sequence[str]) -> dict[str, Any]:
    """Read the scores of these stages, and of what they are compared with, from `results.json`."""
    remedy = "run --stages evaluate report"
    results = read_json_object(path, remedy)
    for name in SCORES:
        scores = results.get(name)
        has_kind = scores_by_size if name == "matryoshka" else is_number
        if not isinstance(scores, dict) or not all(map(has_kind, scores.values())):
            raise DamagedFile(f"{path} has no scores {name!r} by encoder: {remedy}")
    needed = dict.fromkeys(("knn", "matryoshka", "in_context", "position_r2"), stages)
    for name, encoders in (needed | {"online_knn": ("raw pixels",)}).items():
        missing = [each for each in ("random init", *encoders) if each not in results[name]]
        optional = name == "in_context" or not results["knn"]
        if missing and (results[name] or name == "position_r2" or not optional):
            raise SettingsError(f"{path} is older than {missing[0]}; {remedy}")
    for kind in ("intervals", "test_images", "chance"):
        if not isinstance(results.get(kind), dict):
            raise SettingsError(f"{path} is older than the {kind} of scores; {remedy}")
    for kind in ("knn", "in_context", "position_r2"):
        ends = results["intervals"].get(kind)
        fits = isinstance(ends, dict) and all(is_interval(ends.get(name)) for name in results[kind])
        if results[kind] and not (fits and is_number(results["test_images"].get(kind))):
            raise DamagedFile(f"{path} has no interval of each score {kind!r}: {remedy}")
    if results["knn"] and not is_number(results["chance"].get("knn")):
        raise DamagedFile(f"{path} has no chance of the score 'knn': {remedy}")
    return results


def is_interval(value: Any) -> bool:
    """Whether a JSON value is the two ends of an interval."""
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number."""
    return type(value) in (int, float)


def scores_by_size(value: Any) -> bool:
    """Whether a JSON value maps embedding sizes to numbers."""
    return isinstance(value, dict) and all(
        size.isdecimal() and is_number(score) for size, score in value.items()
    )


def some_images(source: Source, count: int) -> list[Tensor]:
    """At most `count` images, evenly spaced; for a broken one, the next that can be read."""
    images = []
    for first in evenly_spaced(len(source), count):
        for i in range(first, len(source)):
            try:
                images.append(source[i][0])
            except UnreadableImage:
                continue
            break
    return images


def training_pictures(settings: Settings, results: dict[str, Any], last: str) -> dict[str, Figure]:
    """Curves of the losses, of the online k-NN, and over embedding sizes."""
    path = settings.output / "pretrain" / "metrics.jsonl"
    records = read_metrics(path) if path.exists() else []
    with torch.device("meta"):
        head = FrancaNetwork(settings.model, settings.crops.global_size).dino_head
    figures = {}
    if any("loss" in record for record in records):
        prototypes = {"dino": head.num_prototypes_per_level}
        figures["losses"] = draw.loss_curves(records, num_prototypes=prototypes)
    else:
        print(f"report: {path} has no losses: their curves are left out")
    key = f"knn/{settings.evaluation.knn}"
    if online := [(record["step"], record[key]) for record in records if key in record]:
        steps, accuracy = zip(*online, strict=True)
        floor = "init" if settings.init_from else "raw pixels"
        figures["online_knn"] = draw.online_knn(
            steps,
            accuracy,
            k=settings.evaluation.knn,
            random_init=results["online_knn"]["random init"],
            floor=results["online_knn"][floor],
            floor_name=floor,
        )
    if curves := results["matryoshka"]:
        names = {last: "trained", "random init": "random initialisation"}
        figures["matryoshka"] = draw.matryoshka(
            {names[k]: {int(m): score for m, score in curves[k].items()} for k in names}
        )
    return figures


def view_pictures(settings: Settings) -> dict[str, Figure]:
    """What the student sees: crops, masks, and how often each position is masked."""
    train = open_data(settings).train
    generator = torch.Generator().manual_seed(settings.seed)
    crop = multi_crop(pretraining(settings), settings)
    views = [crop(image, generator=generator) for image in some_images(train, 4)]
    grid = load_encoder("pretrain", settings).grid_size
    masked = replace(settings.masks, probability=1.0)
    masks = mask_generator(grid, masked)(NUM_GLOBAL * len(views), generator=generator)
    exposure = [
        mask_generator(grid, replace(masked, shift=shift))(2000, generator=generator)
        for shift in (True, False)
    ]
    return {
        "crops_and_masks": draw.crops_and_masks(
            list(torch.stack([v.globals_ for v in views], dim=1)),
            list(torch.stack([v.locals_ for v in views], dim=1)),
            list(masks.unflatten(0, (NUM_GLOBAL, -1))),
        ),
        "mask_exposure": draw.mask_exposure(*(m.float().mean(0) for m in exposure)),
    }


def feature_pictures(settings: Settings, results: dict[str, Any], plan: Plan) -> dict[str, Figure]:
    """What the last encoder sees in held-out images, before and after RASA."""
    test = open_data(settings).test
    view = eval_view(plan.global_size, settings)
    encoder = load_encoder(plan.name, settings)
    shown = (with_channels(image, encoder.in_chans) for image in some_images(test, 6))
    images = torch.stack([view(image) for image in shown])
    with torch.no_grad():
        patches = encoder(images).patches
        q, k, _ = encoder.queries_keys_values(images)
    H, W = patches.shape[1:3]
    attention = cls_attention(q, k, num_prefix_tokens=encoder.num_prefix_tokens, grid=(H, W))
    figures = {"attention": draw.attention_maps(images, attention)}
    try:
        figures["pca"] = draw.pca_maps(images, pca_maps(patches, threshold=None).rgb)
    except ValueError as error:  # patches without a difference
        print(f"report: no map of principal components: {error}")
    if (settings.output / "rasa.safetensors").exists():
        errors = read_export("rasa", settings, position_errors)
        r2 = results["position_r2"]
        figures["rasa"] = draw.position_error(
            errors,
            r2={"linear": (r2[plan.name], r2["rasa"])},
            chance=patch_positions(H, W).flatten(0, 1).var(0, correction=0).mean().item(),
        )
        figures["cluster_entropy"] = cluster_entropy_picture(settings, plan)
    return figures


def position_errors(path: Path) -> list[float]:
    """Read the position error of each of RASA's iterations from the header of its export."""
    errors = json.loads(backbones.read_metadata(path)["position_errors"])
    return [float(error) for error in errors]


def cluster_entropy_picture(settings: Settings, plan: Plan) -> Figure:
    """Where in the image the teacher's patch clusters fire, before and after RASA.

    At the finest level that has, on average, a patch for each cluster and position.
    """
    test, view = open_data(settings).test, eval_view(plan.global_size, settings)
    heads = read_export(plan.name, settings, backbones.read).heads
    head = cast(MatryoshkaProjector, heads["ibot_head"])
    counts = head.num_prototypes_per_level
    images = evenly_spaced(len(test), settings.evaluation.num_dense)
    level = max((level for level, k in enumerate(counts) if k <= len(images)), default=0)
    ids = []
    for stage in (plan.name, "rasa"):
        patches = extract(
            load_encoder(stage, settings),
            test,
            transform=view,
            indices=images,
            batch_size=settings.evaluation.batch_size,
            want=("patches",),
        ).patches
        with torch.no_grad():
            nearest = [head(x)[level].argmax(-1) for x in patches.split(8)]
        ids.append(torch.cat(nearest))  # [B, H, W]
    generator = torch.Generator().manual_seed(settings.seed)
    entropies = [
        position_entropy(x, counts[level], minimum_count=x[0].numel())
        for x in (*ids, shuffled(ids[0], generator=generator))
    ]
    return draw.cluster_entropy(entropies[0], entropies[1], shuffled=entropies[2])


# ---------------------------------------------------------------------------------------- main


class SettingsError(ValueError):
    """Settings that contradict one another, or what is on the disk."""


TRAINING: tuple[Stage, ...] = ("pretrain", "highres")
STAGES: dict[Stage, Callable[[Settings, Parallel], None]] = {
    "pretrain": lambda settings, parallel: train(pretraining(settings), settings, parallel),
    "highres": lambda settings, parallel: train(high_resolution(settings), settings, parallel),
    "rasa": remove_position,
    "evaluate": evaluate,
    "report": report,
}

# What the stages read and write in --output.
RUN_FILES = (
    *STAGES,
    *(f"{name}.safetensors" for name in ("init", *STAGES, "rasa_projector")),
    *("settings.json", "data.json", "results.json", "report.md", "figures"),
)

# What may differ between two calls on one --output without changing the training.
FREE_SETTINGS = {
    *("output", "stages", "resume", "accept_changes", "workers", "device", "log_every"),
    *("checkpoint_every", "keep_last", "keep_every", "max_unreadable", "rasa", "evaluation"),
    *("parallel", "hsdp_replicas", "compile_blocks", "augment_on"),
}


def run(settings: Settings) -> None:
    """Every stage of `--stages`, in order."""
    try:
        parallel = start(settings.device)
    except ValueError as error:
        raise SettingsError(f"--device {settings.device}: {error}") from error
    again = parallel.any(restarted())
    try:  # what is left of the job before a restart may still be ending
        with own_folder(settings.output, RUN_FILES, parallel, patience=120.0 if again else 0.0):
            parallel = run_stages(settings, parallel, again=again)
    except FolderError as error:
        stop(parallel)
        raise SettingsError(f"--output {error}") from error
    except (Stopped, NonFiniteLoss, CheckpointError):
        stop(parallel)  # together; who fails alone ends without waiting for the others
        raise
    stop(parallel)


def run_stages(settings: Settings, parallel: Parallel, *, again: bool) -> Parallel:
    """Check the settings, then run the stages. `again`: see :func:`check`."""
    check(settings, parallel.world_size, again=again)
    parallel.wait()  # nobody writes before all have looked
    if settings.resume:
        say(parallel, what_is_left(settings))
    if parallel.is_main and not (settings.accept_changes and read_settings(settings.output)):
        write_settings(settings)  # changed ones once they have proved to fit
    left = unfinished(settings) if settings.resume else settings.stages
    for name, stage in STAGES.items():
        if name not in TRAINING:  # one process does the rest
            parallel = stop(parallel)
        if name in settings.stages and (parallel.is_main or parallel.group is not None):
            if name in left or name in TRAINING:  # these look for themselves
                stage(settings, parallel)
            else:
                say(parallel, f"{name}: finished already")
    return parallel


RESULTS: dict[Stage, str] = {
    **{name: f"{name}.safetensors" for name in ("pretrain", "highres", "rasa")},
    "evaluate": "results.json",
    "report": "report.md",
}


def is_finished(stage: Stage, output: Path) -> bool:
    """Whether a stage has its result, newer than those of the stages before it."""
    result = output / RESULTS[stage]
    if stage in TRAINING or not result.exists():
        return result.exists()
    before = (output / RESULTS[name] for name in list(STAGES)[: list(STAGES).index(stage)])
    times = [path.stat().st_mtime_ns for path in before if path.exists()]
    return result.stat().st_mtime_ns >= max(times, default=0)


def unfinished(settings: Settings) -> list[Stage]:
    """The first stage of `--stages` without its result, and those after it."""
    asked = [name for name in STAGES if name in settings.stages]
    while asked and is_finished(asked[0], settings.output):
        asked.pop(0)
    return asked


def what_is_left(settings: Settings) -> str:
    """The stages that are left of a resumed run, its step in the first of them, and its data."""
    left = unfinished(settings)
    stages = ", ".join(left) or "all is finished"
    for plan in (pretraining(settings), high_resolution(settings)):
        if left[:1] == [plan.name]:
            latest = Checkpoints(settings.output / plan.name / "checkpoints").latest()
            step = 0 if latest is None else step_of(latest)
            stages = stages.replace(plan.name, f"{plan.name} (at step {step} of {plan.steps})", 1)
    return (
        f"resuming {settings.output}: {stages}. Data: {settings.data}. Settings not given here "
        f"come from {settings.output}/settings.json"
    )


def check(settings: Settings, world_size: int, *, again: bool = False) -> None:
    """Refuse settings that cannot work, and output folders that hold another run.

    `again`: the same command has run before, and a cluster repeats it.
    """
    problems = [
        *refused_numbers(settings, world_size),
        *refused_beginnings(settings),
        *refused_parallelism(settings, world_size),
        *refused_by_parts(settings),
    ]
    if problems:
        raise SettingsError("; ".join(problems))

    stored = read_settings(settings.output)
    if stored is None and settings.resume:
        raise SettingsError(f"--resume: {settings.output} holds no run")
    begun = {name for name in TRAINING if has_begun(name, settings.output)}
    if stored is None or not begun:
        return  # nothing there, or settings that never came as far as a checkpoint
    if "pretrain" in settings.stages and not (settings.resume or again):
        raise SettingsError(
            f"{settings.output} holds a run already: continue it with --resume, run its later "
            "stages with --stages, or choose another --output"
        )
    free = FREE_SETTINGS | ({"highres"} - begun)
    changed = [
        f"{name} was {old!r}, is {new!r}"
        for name, old, new in differences(stored, settings)
        if name.split(".")[0] not in free
    ]
    if changed and not settings.accept_changes:
        raise SettingsError(
            f"{settings.output} was made with other settings: {'; '.join(changed)}. Leave them as "
            "they were, choose another --output, or insist with --accept-changes"
        )
    asked = [name for name in TRAINING if name in settings.stages]
    finished = [settings.output / f"{name}.safetensors" for name in asked]
    if changed and all(path.exists() for path in finished):
        raise SettingsError(
            f"--accept-changes: {'; '.join(changed)}, but there is nothing left to train. Remove "
            f"{', '.join(map(str, finished)) or 'the results'} to go on, or choose another --output"
        )


def flag(name: str) -> str:
    """A setting as it is called on the command line."""
    return f"--{name.replace('_', '-')}"


# Settings may come with a folder from somebody else, so that sizes are bounded.
LARGEST = {
    "workers": 1024,
    **dict.fromkeys(("scene_size", "crops.global_size", "crops.local_size"), 1 << 13),
    **dict.fromkeys(("highres.global_size", "highres.local_size"), 1 << 13),
    **dict.fromkeys(("batch_size", "highres.batch_size", "targets.queue"), 1 << 20),
    **dict.fromkeys(("evaluation.batch_size", "rasa.num_iterations"), 1 << 12),
    **{"crops.num_local": 256, "num_scenes": 1 << 27},
    **{"evaluation.knn": 200, "evaluation.resize_over_crop": 8},
    **dict.fromkeys(("optim.base_lr", "optim.final_lr"), 1e3),
    **dict.fromkeys(("optim.patch_embed_lr_scale", "highres.lr_scale"), 1e3),
}


def refused_numbers(settings: Settings, world_size: int) -> list[str]:
    """Settings that are out of range with `world_size` processes."""
    positive = ["steps", "batch_size", "accumulation", "log_every", "checkpoint_every", "keep_last"]
    batches = ["batch_size"]
    if settings.targets.kind == "sinkhorn":
        positive.append("targets.sinkhorn_iterations")
    if "highres" in settings.stages:
        positive.append("highres.steps")
        batches.append("highres.batch_size")
    positive += ["num_scenes", "scene_size", "rasa.num_iterations", "rasa.num_images"]
    samples = ("num_train", "num_test", "num_dense", "online_train", "online_test")
    positive += [f"evaluation.{name}" for name in (*samples, "batch_size", "knn")]
    positive += ["evaluation.resize_over_crop"]
    lowest = dict.fromkeys(positive, 1) | dict.fromkeys(("workers", "keep_every", "seed"), 0)
    lowest |= dict.fromkeys(("evaluation.online_every", "optim.base_lr", "optim.final_lr"), 0)
    values = {name: attrgetter(name)(settings) for name in (*lowest, *batches, *LARGEST)}
    problems = [
        f"{flag(name)} must be at least {least}, got {values[name]}"
        for name, least in lowest.items()
        if not values[name] >= least
    ]
    problems += [
        f"{flag(name)} must be at most {most}, got {values[name]}"
        for name, most in LARGEST.items()
        if values[name] > most
    ]
    problems += [
        f"{flag(name)} {values[name]} does not divide into {world_size} processes of "
        f"{settings.accumulation} micro-batches"
        for name in batches
        if values[name] % (world_size * max(settings.accumulation, 1))
    ]
    shares = ["max_unreadable", "init.head_warmup", "model.drop_path", "highres.drop_path"]
    shares += ["targets.temperature_warmup", "highres.temperature_warmup"]
    shares += ["test_fraction", "targets.centering_momentum", "masks.probability"]
    for name in shares:
        if not 0 <= (share := attrgetter(name)(settings)) <= 1:
            problems.append(f"{flag(name)} is a share, got {share}")
    temperatures = ("temperature", "start_temperature", "student_temperature")
    for name in ("optim.clip", *(f"targets.{name}" for name in temperatures)):
        if not 0 < (value := attrgetter(name)(settings)) <= 1e6:
            problems.append(f"{flag(name)} must be above 0 and at most 1000000, got {value}")
    if all(weight == 0 for weight in dataclasses.astuple(settings.losses)):
        problems.append("--losses.* are all 0: there is nothing to learn from")
    if not settings.stages:
        problems.append(f"--stages is empty; choose from {', '.join(STAGES)}")
    return problems


def refused_beginnings(settings: Settings) -> list[str]:
    """What is wrong with the weights to begin with."""
    problems = []
    if settings.preset == "adapt" and not settings.init_from:
        problems.append("--preset adapt continues from weights: name them with --init-from")
    if (settings.init.heads == "auto") != (settings.init_from == ""):
        problems.append("--init.heads says whether the heads of --init-from are taken: give both")
    if pretraining(settings).frozen_steps and settings.losses.dino == settings.losses.ibot == 0:
        problems.append("--init.head-warmup: --losses.koleo alone teaches a head nothing")
    return problems


def has_begun(stage: str, output: Path) -> bool:
    """Whether there is anything to continue."""
    checkpoints = Checkpoints(output / stage / "checkpoints")
    return bool(checkpoints.paths()) or (output / f"{stage}.safetensors").exists()


def refused_parallelism(settings: Settings, world_size: int) -> list[str]:
    """Problems of --parallel and related settings with `world_size` processes."""
    problems = []
    if (settings.parallel == "none") != (world_size == 1) and settings.parallel != "auto":
        problems.append(
            f"--parallel {settings.parallel}: there are {world_size} process(es); start several "
            "with torchrun, or leave --parallel out"
        )
    if settings.hsdp_replicas > 1 and settings.parallel in ("none", "ddp"):
        problems.append(f"--hsdp-replicas is for --parallel fsdp, not {settings.parallel}")
    if settings.hsdp_replicas < 1 or world_size % settings.hsdp_replicas:
        problems.append(
            f"--hsdp-replicas {settings.hsdp_replicas} does not divide the {world_size} process(es)"
        )
    if settings.targets.queue < 0 or settings.targets.queue % world_size:
        problems.append(
            f"--targets.queue {settings.targets.queue} does not divide into {world_size} processes"
        )
    if settings.targets.queue > 0 and settings.targets.kind != "sinkhorn":
        problems.append(f"--targets.queue is for sinkhorn, not {settings.targets.kind}")
    factored_parameters = settings.model.factored_scores and not settings.model.normalize
    if settings.parallel == "fsdp" and factored_parameters:
        # Unnormalised prototypes are the parameters, which FSDP frees before they are read.
        problems.append("--parallel fsdp: --model.factored-scores needs --model.normalize")
    return problems


def refused_by_parts(settings: Settings) -> list[str]:
    """What the parts themselves find wrong with the settings that they are made from."""
    plans = [pretraining(settings)] + [high_resolution(settings)] * ("highres" in settings.stages)
    problems = []

    def attempt(name: str, make: Callable[[], Any]) -> Any:
        try:
            with torch.device("meta"):
                return make()
        except (ValueError, TypeError) as error:
            problems.append(f"{name}: {error}")

    def sizes() -> None:
        patch_size = network.backbone.patch_size
        for plan in plans:
            for size in (plan.global_size, plan.local_size):
                if any(size % patch for patch in patch_size):
                    raise ValueError(
                        f"{plan.name}: crops of {size} pixels do not divide into patches of "
                        f"{patch_size}"
                    )

    attempt("--crops", lambda: multi_crop(plans[0], settings))
    attempt("--masks", lambda: mask_generator((2, 2), settings.masks))
    attempt("--optim or --targets", lambda: [schedule(0, plan, settings) for plan in plans])
    network: Any = None
    if attempt("--model", lambda: check_network(settings.model)):
        network = attempt("--model", lambda: FrancaNetwork(settings.model, plans[0].global_size))
    if network is not None:
        attempt("--optim", lambda: make_optimizer(network, settings.optim))
        attempt("--crops or --highres", sizes)
    return problems


def write_settings(settings: Settings) -> None:
    """Write `settings.json`, the first file in the output folder, with all stages asked for."""
    stored = read_settings(settings.output)
    begun = any(has_begun(name, settings.output) for name in TRAINING)
    if stored is not None and (begun or settings.resume):
        asked = tuple(name for name in STAGES if name in (*stored.stages, *settings.stages))
        settings = replace(settings, stages=asked)
    write(settings.output, "settings.json", as_json(settings))


def write_data(settings: Settings, sources: Sources) -> None:
    """Write `data.json`: what the data are, which later calls compare with theirs."""
    write(settings.output, "data.json", json.dumps(fingerprints(sources._asdict()), indent=1))


def write(output: Path, name: str, text: str) -> None:
    """Write a small file into the output folder."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with atomic_write(output / name) as file:
            file.write(text.encode())
    except OSError as error:
        raise SettingsError(f"--output {output} cannot be written: {error}") from error


def read_settings(output: Path) -> Settings | None:
    """The settings that a run in `output` was started with."""
    path = output / "settings.json"
    try:
        stored = from_json(path.read_text(), Settings()) if path.exists() else None
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{path} cannot be read ({error}): it is damaged, or another version of this recipe "
            "wrote it. Restore it, or choose another --output"
        ) from error
    return None if stored is None else replace(stored, output=output)  # it may have been moved


def parse(arguments: Sequence[str]) -> Settings:
    """The command line over the settings of the run in --output, or of --preset.

    Two settings are not taken from the run: whether to resume, and the stages. By default these are
    all stages of the preset, or with --resume, the stages that the run was asked for.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--output", type=Path, default=Settings().output)
    first.add_argument("--preset", choices=list(PRESETS), default=None)
    first.add_argument("--init-from", "--init_from", default=None)
    first.add_argument("--data", default=None)
    first.add_argument("--resume", action="store_true")
    known, _ = first.parse_known_args(arguments)
    default, stored = PRESETS[known.preset or "demo"], read_settings(known.output)
    if stored and (known.preset is None or (known.resume and known.preset == stored.preset)):
        default = stored
        require_typed(stored, known.data, known.init_from)
    stages = stored.stages if stored and known.resume else PRESETS[default.preset].stages
    default = replace(default, resume=False, accept_changes=False, stages=stages)
    loaded = None
    if known.init_from and stored is not None and goes_on(stored, known.init_from, known.output):
        decided = {name: getattr(stored, name) for name in ("model", "crops", "highres", "init")}
        default = replace(default, **decided)
    elif known.init_from:
        loaded = read_init(known.init_from)
        default = following(default, known.init_from, loaded.encoder)
    settings = tyro.cli(Settings, default=default, args=arguments)
    return settings if loaded is None else agreeing(settings, default, loaded)


def require_typed(stored: Settings, data: str | None, init_from: str | None) -> None:
    """Refuse to start a program or to use the network because a file says so.

    The folder of a run may come from somebody else. `data` and `init_from` are those of this call.
    """
    named = []
    try:
        if data is None and not is_local(stored.data):
            named.append(f"--data '{stored.data}'")
    except (ImportError, ValueError) as error:
        raise SettingsError(f"--data: {error}") from error
    begun = has_begun("pretrain", stored.output)  # then the weights are in the folder
    read = stored.init_from != "" and not begun
    if init_from is None and read and not os.path.exists(stored.init_from):
        named.append(f"--init-from '{stored.init_from}'")
    if named:
        raise SettingsError(
            f"{stored.output}/settings.json names what may start a program or ask another machine: "
            f"{' and '.join(named)}. If you trust it, give it again in this call"
        )


def goes_on(stored: Settings, init_from: str, output: Path) -> bool:
    """Whether a run from these weights has begun, so that it no longer needs the file."""
    same = stored.init_from == init_from and digest_of(init_from) in ("", stored.init.sha256)
    return same and has_begun("pretrain", output)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    try:
        settings = parse(sys.argv[1:] if arguments is None else arguments)
        run(settings)
    except Stopped as stopped:
        launcher = "python" if int(os.environ.get("WORLD_SIZE", "1")) == 1 else "torchrun ..."
        output = shlex.quote(str(settings.output))
        if os.environ.get("RANK", "0") == "0":
            print(f"{stopped}: {launcher} {shlex.quote(sys.argv[0])} --output {output} --resume")
    except (SettingsError, NonFiniteLoss, CheckpointError, DamagedFile, UnusableData) as error:
        sys.exit(f"error: {error}")
    except TooManyUnreadable as error:
        sys.exit(f"error: {error}: --max-unreadable")
    except (OSError, MemoryError, RuntimeError) as error:
        reason = explain(error)
        if reason is None:
            raise
        sys.exit(f"error: {reason}")


if __name__ == "__main__":
    run_command(main)

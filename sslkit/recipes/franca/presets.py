"""Franca's presets: values of its settings, each with its source. A preset is never behaviour."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sslkit.recipes.franca.settings import (
    Evaluation,
    HighRes,
    Init,
    Model,
    Optim,
    PresetName,
    Rasa,
    Settings,
    Targets,
)
from sslkit.recipes.shared import CIFAR10, DEMO, SMOKE, Crops, Losses


def _small(values: Mapping[str, Any], *, num_dense: int) -> dict[str, Any]:
    """The arguments of `Settings` that a small preset of every recipe has."""
    evaluation = Evaluation(**vars(values["evaluation"]), num_dense=num_dense)
    return {**values, "evaluation": evaluation}


# The defaults of the sections are ViT-B on ImageNet-21K. Each value of model, crops, masks,
# targets, losses and optim is in the released configuration (24f8c60: configs/train, and
# ssl_default_config.yaml where these are silent) and, if the paper gives it, also in its section 4,
# unless a comment says otherwise. The values of rasa and evaluation are ours: see
# docs/faithfulness.md.
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
    "vitb14_in21k": Settings(
        preset="vitb14_in21k", data="/data/imagenet21k", steps=625_000, batch_size=2048
    ),
    "vitl14_in21k": Settings(
        preset="vitl14_in21k",
        data="/data/imagenet21k",
        steps=625_000,
        batch_size=3072,
        model=Model(backbone="franca_vitl14", drop_path_rate=0.4),
        optim=Optim(base_lr=2.0e-4),
        # configs/finetune/vitl14_finetune.yaml, whose drop path is .1, after .4 in pretraining.
        highres=HighRes(batch_size=3072, lr_scale=1.51e-5 / 2.0e-4),
    ),
    "vitg14_laion": Settings(
        preset="vitg14_laion",
        data="/data/laion600m",
        steps=625_000,
        batch_size=3072,
        model=Model(backbone="franca_vitg14", drop_path_rate=0.4, activation_checkpointing=True),
        # configs/train/LAION/vitg14.yaml. ViT-L's there has .48-1, .05-.32 and a base lr of 1e-3.
        crops=Crops(global_scale=(0.45, 1.0), local_scale=(0.05, 0.45)),
        optim=Optim(base_lr=2.0e-4),
        # No released file adapts a ViT-g: the schedules are ViT-B's, the drop path pretraining's.
        highres=HighRes(batch_size=3072, drop_path_rate=0.4),
    ),
    # Two CPU cores, minutes: 32 px views of 48 px scenes, and every part of the method. Changed for
    # short runs of small batches (docs/cifar10.md): as many prototypes as the batch has rows, a
    # sharper teacher, a faster average, a shorter warm-up, a full learning rate for the patch
    # embedding, less iBOT.
    "demo": Settings(
        preset="demo",
        **_small(DEMO, num_dense=300),
        model=Model(
            backbone="sslkit_vit_tiny",
            drop_path_rate=0.0,
            num_prototypes=128,
            hidden_dim=256,
            dino_bottleneck_dim=64,
            ibot_bottleneck_dim=64,
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
            drop_path_rate=0.0,
            lr_scale=0.1,
            lr_warmup=0.05,
            temperature_warmup=0.5,
            freeze_prototypes=0.02,
        ),
        rasa=Rasa(num_images=500),
    ),
}
PRESETS["cifar10"] = replace(
    PRESETS["demo"],
    preset="cifar10",
    **_small(CIFAR10, num_dense=500),
    # A stem of convolutions knows that neighbouring pixels belong together, which plain patches
    # have to learn from the images (docs/log.md, 2026-12-01).
    model=replace(PRESETS["demo"].model, backbone="sslkit_vit_conv"),
    highres=replace(
        PRESETS["demo"].highres, steps=100, global_size=32, local_size=12, batch_size=64
    ),
)
PRESETS["smoke"] = replace(
    PRESETS["demo"],
    preset="smoke",
    **_small(SMOKE, num_dense=50),
    model=replace(PRESETS["demo"].model, backbone="sslkit_vit_micro", num_prototypes=64),
    highres=replace(PRESETS["demo"].highres, steps=4, batch_size=16),
    rasa=replace(PRESETS["demo"].rasa, num_images=64),
)
# Thousands of your own photographs, one GPU, from scratch: a ViT-S. The values are reasoned, from
# what was measured at small size here (docs/cifar10.md, docs/log.md) and from DINO's ViT-S (arXiv
# 2104.14294 and its code). A full run has not been scored.
PRESETS["photos"] = Settings(
    preset="photos",
    data="photos",
    # 5 million images: a hundred passes over 50,000 photographs, DINO's shortest schedule.
    steps=20_000,
    # Somebody with a ViT-S and data of their own found at most 256 images best (dinov2 issue 272).
    # In four micro-batches the step takes 13 GiB of a GPU, by the planner.
    batch_size=256,
    accumulation=4,
    checkpoint_every=1000,
    keep_every=0,
    model=Model(
        # Franca's LayerScale of 1e-5 keeps the blocks near the identity for thousands of steps.
        # CaiT (arXiv 2103.17239) begins with .1 up to a depth of 18.
        backbone="franca_vits14",
        backbone_settings='{"init_values": 0.1}',
        # Two rows of batch and queue (2 * 256 + 1536) for each prototype, and five images of
        # 5,000. With more prototypes than rows, the losses of short runs stay at ln K.
        num_prototypes=1024,
        # 16 M parameters beside 22 M of the encoder. Franca's sizes would be 53 M.
        hidden_dim=1024,
        dino_bottleneck_dim=256,
        ibot_bottleneck_dim=256,
    ),
    # Six local crops have most of what eight or ten give (DINO, table 8), for less time and memory.
    crops=Crops(num_local=6),
    # Sharp targets learn faster in short runs. The queue is three steps old, and the teacher moves
    # in hundreds.
    targets=Targets(temperature=0.04, queue=1536),
    # At small size iBOT first learns where a patch is: .2 in `cifar10`, .5 in `adapt`.
    losses=Losses(ibot=0.5),
    optim=Optim(
        base_lr=1e-3,  # 5e-4 at 256 images, DINO's rate for a ViT-S
        lr_warmup=0.1,  # DINO's ten of a hundred epochs
        patch_embed_lr_scale=1.0,
        freeze_prototypes=0.01,
        # A teacher of 500 steps, 2.5 % of the run as in `cifar10`. Smaller batches want a slower
        # one: .994 at 2048 images is .9993 at 256 (arXiv 2307.13813).
        momentum=(0.998, 1.0),
    ),
    # 5 % more steps at 336 pixels, which most photographs have. Half the batch, so that it takes no
    # more memory than the pretraining.
    highres=HighRes(
        steps=1000,
        global_size=336,
        batch_size=128,
        lr_scale=0.1,
        lr_warmup=0.1,
        freeze_prototypes=0.01,
    ),
    evaluation=Evaluation(
        num_train=20_000,
        num_test=5_000,
        online_train=5_000,
        online_test=1_000,
        online_every=1000,
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
    model=Model(
        num_prototypes=512, hidden_dim=512, dino_bottleneck_dim=128, ibot_bottleneck_dim=128
    ),
    targets=Targets(temperature=0.04, queue=1024),
    losses=Losses(ibot=0.5),
    init=Init(crops="file"),
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

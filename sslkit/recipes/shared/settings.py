"""Settings of a recipe of two stages, and sections that the settings of several recipes have."""

from dataclasses import dataclass, field
from typing import Literal

from sslkit.training.settings import RunSettings


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
    blur_probability: tuple[float, float, float] = (1.0, 0.1, 0.5)
    """Share of the first large views, of the second and of the small ones that are blurred."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur in pixels of the view, from and to; small views lose more."""
    solarise_probability: float = 0.2
    """Share of the second large views in which bright pixels are inverted."""


@dataclass(frozen=True)
class Losses:
    """Weights of the three terms; with nesting levels, DINO and iBOT are sums over them."""

    dino: float = 1.0
    """Weight of the DINO loss: class tokens predict the teacher's targets of other views."""
    ibot: float = 1.0
    """Weight of the iBOT loss: masked patches predict the teacher's targets at their places."""
    koleo: float = 0.1
    """Weight of KoLeo, which pushes the class tokens of different images apart."""


@dataclass(frozen=True)
class Evaluation:
    """k-NN and a linear classifier, on frozen features."""

    num_train: int = 100_000
    """Images of the training split that k-NN looks its neighbours up in."""
    num_test: int = 10_000
    """Held-out images that it classifies."""
    batch_size: int = 64
    """Images a forward pass."""
    knn: int = 20
    """Neighbours that vote."""
    resize_over_crop: float = 256 / 224
    """Evaluation views: shorter side resized to this multiple of the crop."""
    online_every: int = 12_500
    """Steps between two scores of the encoder during training (k-NN, RankMe, LiDAR); 0: none."""
    online_train: int = 20_000
    """Images that k-NN then looks neighbours up in, and whose features RankMe ranks."""
    online_test: int = 2_000
    """Held-out images that k-NN then classifies."""
    lidar_images: int = 1000
    """Training images whose augmented views LiDAR then ranks, more than features; 0: no LiDAR."""
    lidar_views: int = 10
    """Augmented views of each of them, at least 2."""


@dataclass(frozen=True, kw_only=True)
class Settings(RunSettings):
    """What both stages read, besides what the engine reads. A method adds its own settings."""

    stages: tuple[Literal["pretrain", "evaluate"], ...] = ("pretrain", "evaluate")
    """Each needs the results of those before it, from this call or an earlier one."""
    lr: float = 1.5e-3
    """Highest learning rate of AdamW. After the warm-up it falls to 1e-6 along a cosine."""
    lr_warmup: float = 0.05
    """Share of the steps over which the learning rate first rises linearly from 0."""
    weight_decay: tuple[float, float] = (0.04, 0.2)
    """Weight decay at the first and last step, a cosine between; biases and norms have none."""
    max_norm: float = 3.0
    """Largest gradient norm of each submodule of the network."""
    freeze_prototypes: float = 0.02
    """Share of the steps during which the last layers keep their initial value."""
    crops: Crops = field(default_factory=Crops)
    evaluation: Evaluation = field(default_factory=Evaluation)

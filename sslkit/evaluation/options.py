"""Options of the protocols of `sslkit evaluate`.

They are kept apart from the modules of `sslkit.evaluation.protocols` that read them, because a help
text does not need PyTorch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class KNN:
    """k-NN accuracy of the class token, or of the mean patch token."""

    token: Literal["cls", "mean_patch"] = "cls"
    """The published protocol compares class tokens; those of a network that has seen few images
    may follow the background, when the mean of its patch tokens does not."""
    ks: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbours that vote; of fewer training images, all of them."""
    temperature: float = 0.07
    """Divides the similarities."""


@dataclass(frozen=True)
class LinearProbe:
    """Linear classification: the best of a grid of heads on class and mean patch tokens."""

    num_steps: int = 12_500
    """Steps of SGD."""
    batch_size: int = 1024
    """Items a step; the learning rates are scaled by a 256th of it."""
    num_blocks: tuple[int, ...] = (1, 4)
    """Heads read the class tokens of the last so many blocks, or of as many as there are (1 where
    an encoder does not show its blocks, and after RASA or nesting)."""
    learning_rates: tuple[float, ...] = (
        *(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4),
        *(1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1),
    )
    """For a batch of 256."""


@dataclass(frozen=True)
class Logistic:
    """Logistic regression on the class token, its penalty chosen on held-out training images."""

    metric: Literal["accuracy", "mean_per_class"] = "accuracy"
    """The literature reports the mean per class on aircraft, pets, caltech101 and flowers, and
    accuracy on food101, cifar10, cifar100, sun397, cars, dtd and cub."""
    max_iter: int = 1000
    """L-BFGS iterations a fit."""
    held_out: float = 0.1
    """Share of the training images that chooses C."""


@dataclass(frozen=True)
class Robustness(LinearProbe):
    """Accuracy of ImageNet's (--data) linear head on its variants, each a folder of classes."""

    imagenet_a: str | None = None
    """ImageNet-A: folders by WordNet id."""
    imagenet_r: str | None = None
    """ImageNet-R: folders by WordNet id."""
    imagenet_v2: str | None = None
    """ImageNet-V2: folders 0 to 999."""
    imagenet_sketch: str | None = None
    """ImageNet-Sketch: folders by WordNet id."""
    real: bool = True
    """Also score the validation images by their ReaL labels, if their files have ImageNet's names
    (ILSVRC2012_val_00000001.JPEG)."""


@dataclass(frozen=True)
class OOD:
    """Out-of-distribution detection: AUROC of six scores, over near and far sets."""

    near: tuple[str, ...] = ()
    """Images of similar classes, each a folder or what --data takes (imglist:LIST for OpenOOD's
    lists): all of it, or its test split. OpenOOD's for ImageNet are SSB-hard and NINCO."""
    far: tuple[str, ...] = ()
    """Images of other kinds. OpenOOD's for ImageNet: iNaturalist, Textures and OpenImage-O."""
    k: int = 50
    """The k-NN score is the distance to the k-th nearest training image."""
    num_principal: int | None = None
    """Dimension of ViM's principal space; default: 1000, 512 or half, as the features are wide."""
    num_steps: int = 12_500
    """Steps of SGD of the linear classifier of the class token that gives the logits."""
    batch_size: int = 1024
    """Items a step."""


@dataclass(frozen=True)
class InContext:
    """In-context segmentation: masks read off a memory of labelled training patches."""

    patches_per_image: int | None = None
    """Patches that each training image puts into the memory, rare classes first; default: all."""
    num_neighbours: int = 30
    """Memory patches that vote for each test patch."""
    temperature: float = 0.02
    """Divides the similarities."""
    half: bool = True
    """Keep the memory in float16."""
    reference_quirks: bool = False
    """Score as the published code does: matched classes, absent ones as 0, ignored as class 0."""


@dataclass(frozen=True)
class LinearSegmentation:
    """Linear segmentation: one linear layer from patch tokens to classes."""

    learning_rates: tuple[float, ...] = (0.01,)
    """Learning rates; the one with the best test score is reported, as in the Franca paper."""
    size: tuple[int, int] | None = (100, 100)
    """Pixels at which the loss is taken; None: those of the dense view, as in the Franca paper."""
    epochs: int = 25
    """Passes over the training images."""
    drop_epoch: int = 20
    """Number of epochs after which the learning rate is divided by 10."""
    batch_size: int = 60
    """Images a step."""
    reference_quirks: bool = False
    """Score at --size, absent classes as 0, as the published code does."""


@dataclass(frozen=True)
class Overclustering:
    """Overclustering: k-means clusters of the test patches against their classes."""

    num_clusters: tuple[int, ...] = (500, 300, 0)
    """Numbers of clusters, 0 being the number of classes; those above the patches' are left out."""
    size: tuple[int, int] | None = (100, 100)
    """Pixels at which clusters and masks are compared; None: those of the dense view."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """The score is the mean over one run of k-means for each."""
    num_iterations: int = 100
    """Iterations of k-means."""
    num_restarts: int = 5
    """Random starts of k-means; the one with the least distortion counts."""
    reference_quirks: bool = False
    """Fit to 256 patches a cluster, resize by corners, absent classes as 0, as published."""


@dataclass(frozen=True)
class LOST:
    """Object discovery with LOST: CorLoc of one box an image, from the keys of a block."""

    num_candidates: int = 100
    """Patches of lowest degree that the seed may grow by; k of the paper."""
    block: int = -1
    """Which block's keys; -1: the last."""
    num_shown: int = 12
    """Images in the figure; 0: no figure."""


@dataclass(frozen=True)
class TokenCut:
    """Object discovery with TokenCut: CorLoc of one box an image, from the keys of a block."""

    threshold: float = 0.2
    """Patches of a higher cosine similarity are joined; tau of the paper."""
    eps: float = 1e-5
    """The weight of all other edges."""
    block: int = -1
    """Which block's keys; -1: the last."""
    num_shown: int = 12
    """Images in the figure; 0: no figure."""


@dataclass(frozen=True)
class Correspondence:
    """Key points found again on another object of the class (SPair-71k): PCK, mean over classes."""

    image_size: int = 512
    """Pixels a side of the square views; rounded to whole patches."""
    alpha: float = 0.1
    """A key point is found if it is this close, in terms of the larger side of the target's box."""
    reference_quirks: bool = False
    """Count as the published code of Probe3D does (see `match_keypoints`)."""
    num_shown: int = 6
    """Pairs in the figure; 0: no figure."""


@dataclass(frozen=True)
class Depth:
    """Depth: a linear probe on the patch and class tokens of the last blocks."""

    num_layers: int = 4
    """Blocks whose tokens the probe reads; 1 where the encoder has no blocks to look into, and with
    RASA or a nesting size, which are of the final tokens."""
    max_depth: float = 10.0
    """Metres; pixels beyond it are unknown."""
    learning_rate: float = 5e-4
    """The highest one of the schedule."""
    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 8
    """Images a step."""
    reference_quirks: bool = False
    """DINOv2's gradient loss, which compares the images of a batch."""


@dataclass(frozen=True)
class Feat2GS:
    """Feat2GS: write the features of the test images, the views of one scene, for its training."""

    features: Path
    """Folder to write to."""
    dim: int = 256
    """Principal components kept; all of them where a model has fewer features, or a scene fewer
    patches."""


@dataclass(frozen=True)
class PCA:
    """Principal components of patch features as colours: a picture, without a score."""

    num_images: int = 9
    """Test images in the figure, evenly spaced; their components are found together."""
    threshold: float | None = 0.0
    """Foreground threshold of the first component, in standard deviations; None: no split."""
    clip: float = 0.01
    """Share of patches at either end that the colours saturate on."""


@dataclass(frozen=True)
class Attention:
    """Where the class token looks: a picture of attention maps, without a score."""

    num_images: int = 6
    """Test images in the figure, evenly spaced."""
    max_heads: int = 6
    """Heads in the figure."""
    block: int = -1
    """Which block's attention; -1: the last."""


@dataclass(frozen=True)
class ClusterEntropy:
    """Do clusters of patch features stand for content (1) or for a place in the image (0)?"""

    num_clusters: int = 256
    """Clusters that k-means finds among the patches of the test images; at most half as many as
    there are images, so that most clusters have more patches than there are places."""
    minimum_count: int | None = None
    """Clusters of fewer patches are left out; default: as many as an image has patches."""


@dataclass(frozen=True)
class Position:
    """How well patch tokens tell where in the image they are."""

    hidden_dim: int = 256
    """Width of the two-layer probe's hidden layer; 0: the linear probe only."""


@dataclass(frozen=True)
class RankMe:
    """Effective rank of the features of training images, without labels."""

    token: Literal["cls", "mean_patch"] = "cls"
    """Token of an image."""
    num_images: int = 25_600
    """Largest number of training images; they are evenly spaced. 25,600 is the paper's."""
    eps: float = 1e-7
    """Added to each singular value's share of their sum."""


@dataclass(frozen=True)
class LiDAR:
    """Effective rank of the features that tell training images apart, without labels."""

    token: Literal["cls", "mean_patch"] = "cls"
    """Token of a view."""
    num_images: int = 1000
    """Largest number of training images, each a class; they are evenly spaced. The paper's number
    is 1,000; it should be above that of the features."""
    num_views: int = 50
    """Augmented views of each; the paper's number. Compare models with the same number."""
    scale: tuple[float, float] = (0.32, 1.0)
    """Share of an image's area that a view covers, from and to; views are of --global-size and
    drawn as DINOv2's global ones."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur in pixels of the view, from and to."""
    delta: float = 1e-4
    """Added to the variance within images."""
    eps: float = 1e-7
    """Added to each eigenvalue's share of their sum."""


@dataclass(frozen=True)
class Matryoshka:
    """Another protocol's first score by the number of features kept."""

    protocol: Literal[
        "knn", "logistic", "in-context", "linear-segmentation", "overclustering", "position"
    ] = "knn"
    """With its default options."""
    sizes: tuple[int, ...] = ()
    """Features kept; empty: D/16, D/8, D/4, D/2, D."""


# By the protocol's name on the command line, in the order of its help text.
OPTIONS: Mapping[str, type[Any]] = {
    "knn": KNN,
    "linear": LinearProbe,
    "logistic": Logistic,
    "robustness": Robustness,
    "ood": OOD,
    "in-context": InContext,
    "linear-segmentation": LinearSegmentation,
    "overclustering": Overclustering,
    "lost": LOST,
    "tokencut": TokenCut,
    "correspondence": Correspondence,
    "depth": Depth,
    "feat2gs": Feat2GS,
    "pca": PCA,
    "attention": Attention,
    "cluster-entropy": ClusterEntropy,
    "position": Position,
    "rankme": RankMe,
    "lidar": LiDAR,
    "matryoshka": Matryoshka,
}

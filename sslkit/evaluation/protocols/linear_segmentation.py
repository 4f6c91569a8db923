"""Linear segmentation with a model, by `sslkit.evaluation.linear_segmentation`."""

from dataclasses import dataclass

from sslkit.evaluation.linear_segmentation import linear_segmentation
from sslkit.evaluation.protocols.segmentation import masked_patches, segmentation_outcome
from sslkit.evaluation.scores import Outcome
from sslkit.evaluation.subject import Subject


@dataclass(frozen=True)
class Options:
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


def evaluate(subject: Subject, options: Options) -> Outcome:
    """Mean IoU over the test images, of the best learning rate."""
    train, train_masks, names = masked_patches(subject, "train")
    test, test_masks, _ = masked_patches(subject, "test")
    results = {
        lr: linear_segmentation(
            train.patches,
            train_masks,
            test.patches,
            test_masks,
            len(names),
            size=options.size,
            lr=lr,
            epochs=options.epochs,
            drop_epoch=options.drop_epoch,
            batch_size=options.batch_size,
            generator=subject.generator(),
            reference_quirks=options.reference_quirks,
            class_names=names,
        )
        for lr in options.learning_rates
    }
    best = max(results, key=lambda lr: results[lr].mean_iou)
    return segmentation_outcome(
        subject,
        test,
        test_masks,
        results[best],
        figure="linear_segmentation",
        title="Linear segmentation: one linear layer on patch features",
        class_names=names,
        details={
            "learning rate": best,
            "mIoU by learning rate": {f"{lr:g}": one.mean_iou for lr, one in results.items()},
        },
        absent_as_zero=options.reference_quirks,
    )

"""Linear segmentation with a model, by `sslkit.evaluation.linear_segmentation`."""

from sslkit.evaluation.linear_segmentation import linear_segmentation
from sslkit.evaluation.options import LinearSegmentation as Options
from sslkit.evaluation.protocols.segmentation import masked_patches, segmentation_outcome
from sslkit.evaluation.scores import Outcome
from sslkit.evaluation.subject import Subject


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

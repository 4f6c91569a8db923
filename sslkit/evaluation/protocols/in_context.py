"""In-context segmentation with a model, by `sslkit.evaluation.in_context`."""

import torch

from sslkit.evaluation.in_context import in_context_segmentation
from sslkit.evaluation.options import InContext as Options
from sslkit.evaluation.protocols.segmentation import masked_patches, segmentation_outcome
from sslkit.evaluation.scores import Outcome
from sslkit.evaluation.subject import Subject


def evaluate(subject: Subject, options: Options) -> Outcome:
    """Mean IoU over the test images."""
    train, train_masks, names = masked_patches(subject, "train")
    test, test_masks, _ = masked_patches(subject, "test")
    result = in_context_segmentation(
        train.patches,
        train_masks,
        test.patches,
        test_masks,
        len(names),
        patches_per_image=options.patches_per_image,
        num_neighbours=options.num_neighbours,
        temperature=options.temperature,
        dtype=torch.float16 if options.half else None,
        generator=subject.generator(),
        reference_quirks=options.reference_quirks,
        class_names=names,
    )
    return segmentation_outcome(
        subject,
        test,
        test_masks,
        result,
        figure="in_context",
        title="In-context segmentation: read off a memory of labelled patches, without training",
        class_names=names,
        details={"memory patches": result.memory_size},
        absent_as_zero=options.reference_quirks,
    )

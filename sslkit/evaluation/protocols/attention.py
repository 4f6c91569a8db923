"""Attention maps of a model: pictures of `sslkit.evaluation.attention.cls_attention`."""

import torch
from einops import rearrange

from sslkit.evaluation import figures as draw
from sslkit.evaluation.options import Attention as Options
from sslkit.evaluation.scores import Outcome
from sslkit.evaluation.subject import Subject


def evaluate(subject: Subject, options: Options) -> Outcome:
    """The figure; ``details`` say how much of its attention the class token pays to patches."""
    few = subject.limited("test", options.num_images)
    features = few.features("test", "attention", view="dense", block=options.block)
    maps = rearrange(features["attention"].float(), "i h w heads -> i heads h w")
    images = torch.stack(few.images("test", features.indices.tolist()))
    figure = draw.attention_maps(images, maps, block=options.block, max_heads=options.max_heads)
    share = maps.sum((2, 3)).mean(0)
    details = {"attention on patches, by head": [round(x, 4) for x in share.tolist()]}
    return Outcome({}, {"attention_maps": figure}, details)

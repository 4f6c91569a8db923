"""Semantic correspondence of a model, by `sslkit.evaluation.correspondence`."""

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sslkit.data.annotated.annotated_source import KeypointPair
from sslkit.evaluation import figures as draw
from sslkit.evaluation.correspondence import (
    SquareView,
    class_pck,
    correct_keypoints,
    match_keypoints,
)
from sslkit.evaluation.options import Correspondence as Options
from sslkit.evaluation.scores import Outcome, Score
from sslkit.evaluation.subject import Subject
from sslkit.progress import Mode, track

_IMAGES_KEPT = 256
"""Feature maps kept for the next pairs: pairs of a class share images, and stand together."""


@dataclass(frozen=True)
class _Matched:
    """A pair with what was found, in pixels of the views."""

    pair: KeypointPair
    keypoints: Tensor
    predicted: Tensor
    truth: Tensor
    correct: Tensor


def evaluate(subject: Subject, options: Options) -> Outcome:
    """PCK of all pairs, then of those of each viewpoint difference; details by class."""
    subject.annotated("test", "pair")
    view = _view(subject, options)
    correct, total, names, differences, shown = [], [], [], [], []
    count = len(subject.indices("test"))
    for i, matched in enumerate(_matched(subject, options, view)):
        correct.append(int(matched.correct.sum()))
        total.append(len(matched.correct))
        names.append(matched.pair.category)
        differences.append(matched.pair.viewpoint_difference)
        if i * options.num_shown // count != (i - 1) * options.num_shown // count:
            shown.append(matched)  # evenly spaced
    found, asked = torch.tensor(correct), torch.tensor(total)
    known = sorted(set(names))
    classes = torch.tensor([known.index(name) for name in names])
    difference = torch.tensor(differences)
    items = torch.tensor(list(subject.indices("test")))

    def score(chosen: Tensor) -> Score:
        parts = [x[chosen] for x in (found, asked, classes)]
        return Score.of(
            lambda n: class_pck(parts[0] * n, parts[1] * n, parts[2]).nanmean().item(),
            len(parts[0]),
            items=items[chosen],
        )

    scores = {"PCK": score(torch.ones_like(difference, dtype=torch.bool))}
    for level in sorted(set(differences)):
        scores[f"PCK, viewpoint difference {level}"] = score(difference == level)
    by_class = dict(zip(known, class_pck(found, asked, classes).tolist(), strict=True))
    details = {"pairs": count, "key points": int(asked.sum()), "PCK by class": by_class}
    figures = {}
    if shown:
        figures["correspondences"] = draw.correspondences(
            [view(one.pair.source_image) for one in shown],
            [view(one.pair.target_image) for one in shown],
            [one.keypoints for one in shown],
            [one.predicted for one in shown],
            [one.truth for one in shown],
            [one.correct for one in shown],
            titles=[one.pair.category for one in shown],
        )
    return Outcome(scores, figures, details)


def _view(subject: Subject, options: Options) -> SquareView:
    """The square view of about ``image_size`` that whole patches fill."""
    ph, pw = subject.patch_size
    step = math.lcm(ph, pw)
    return SquareView(max(round(options.image_size / step), 1) * step)


def _matched(subject: Subject, options: Options, view: SquareView) -> Iterator[_Matched]:
    """Pairs of the test data, evenly spaced, matched."""
    pairs, indices = subject.annotated("test", "pair"), subject.indices("test")
    maps: OrderedDict[str, Tensor] = OrderedDict()

    def features(image: Tensor, name: str) -> Tensor:
        found = maps.pop(name) if name in maps else None
        if found is None:
            found = subject.image_features(image, name, view, "patches").patches[0]
        if name:
            maps[name] = found  # the last one used stands last
            if len(maps) > _IMAGES_KEPT:
                maps.popitem(last=False)
        return found

    mode: Mode = "auto" if subject.progress else "none"
    for index in track(indices, f"{subject.name}: pairs", mode=mode):
        pair = pairs.pair(index)
        source_scale, target_scale = (
            view.scale((image.shape[1], image.shape[2]))
            for image in (pair.source_image, pair.target_image)
        )
        keypoints, truth = (
            pair.source_keypoints * source_scale,
            pair.target_keypoints * target_scale,
        )
        predicted = match_keypoints(
            features(pair.source_image, pair.source_name),
            features(pair.target_image, pair.target_name),
            keypoints,
            view_size=(view.size, view.size),
            reference_quirks=options.reference_quirks,
        )
        correct = correct_keypoints(
            predicted,
            truth,
            pair.target_box * target_scale,
            alpha=options.alpha,
            reference_quirks=options.reference_quirks,
        )
        yield _Matched(pair, keypoints, predicted, truth, correct)

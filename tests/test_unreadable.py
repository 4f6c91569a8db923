"""The log of broken images: each is named once, and many stop a run."""

import warnings

import numpy as np
import pytest
import torch

from sslkit.data.unreadable import Unreadable, UnreadableLog


def test_log_names_each_image_once():
    log = UnreadableLog(1000)
    broken = Unreadable(7, "photos/7.jpg", "truncated")
    with pytest.warns(RuntimeWarning, match="skipped unreadable image photos/7.jpg: truncated"):
        log.update([1, 2], [broken, broken])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log.update(torch.tensor([2, 3]), [broken])
    assert (log.num_seen, log.num_unreadable) == (4, 1)
    assert log.names == {7: "photos/7.jpg"}


def run_log(num_images, broken, threshold=0.05, batch=1):
    """Show the images in order, as a run would; the number seen when the log raised, or None."""
    log = UnreadableLog(num_images, threshold=threshold)
    message = None
    for start in range(0, num_images, batch):
        indices = range(start, min(start + batch, num_images))
        bad = [Unreadable(i, f"{i}.jpg", "cut") for i in indices if i in broken]
        try:
            log.update([i for i in indices if i not in broken], bad)
        except RuntimeError as error:
            message = str(error)
            break
    if message is None:
        return None
    assert message.startswith(f"{log.num_unreadable} of the {log.num_seen} images seen so far")
    assert f"the last one is {max(log.names)}.jpg" in message
    return log.num_seen


@pytest.mark.filterwarnings("ignore:skipped unreadable")
@pytest.mark.parametrize(
    ("num_images", "broken", "threshold", "expected"),
    [
        (10, {3}, 0.05, None),  # one broken file never stops a run
        (10, {3, 4}, 0.05, 10),  # a small set is judged when all of it has been seen
        (100, set(range(0, 100, 20)), 0.05, None),  # exactly the threshold
        (100, set(range(95, 100)) | {0}, 0.05, 100),
        (100, set(range(4)), 0.05, 20),  # 4 > 0.05 * 20 + 3 * sqrt(0.05 * 0.95 * 20) = 3.9
        (100, {0, 1, 2}, 0.05, None),
        (100, {0, 1}, 0.0, 20),
        (100, set(range(100)), 1.0, None),
    ],
)
def test_log_stops_the_run(num_images, broken, threshold, expected):
    assert run_log(num_images, broken, threshold) == expected


@pytest.mark.filterwarnings("ignore:skipped unreadable")
def test_log_is_rarely_wrong():
    rng = np.random.default_rng(0)
    stopped = {
        share: sum(
            run_log(2000, set(np.flatnonzero(rng.random(2000) < share).tolist()), batch=50)
            is not None
            for _ in range(20)
        )
        for share in (0.02, 0.1)
    }
    assert stopped == {0.02: 0, 0.1: 20}


def test_log_refuses_a_threshold_in_percent():
    with pytest.raises(ValueError, match=r"a share and must lie in 0\.\.1, got 5"):
        UnreadableLog(10, threshold=5)

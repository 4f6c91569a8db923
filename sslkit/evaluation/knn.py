"""Weighted k-nearest-neighbour classification on frozen features.

The protocol of DINO and DINOv2 (Wu et al. 2018, arXiv 1805.01978, section 3.4): cosine
similarity, votes weighted by softmax(similarity / 0.07) over the nearest 200.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sslkit.evaluation.labels import warn_of_one_class, with_labels
from sslkit.unit_rows import unit_rows

_KEYS_AT_ONCE = 16_384
_FIRST_KEYS = 2048


@torch.no_grad()
def cosine_neighbours(
    queries: Tensor, keys: Tensor, k: int, *, chunk_size: int = 1024
) -> tuple[Tensor, Tensor]:
    """Similarities and indices [Q, k] of each query's k most similar keys, most similar first.

    Exact search. Both sides are L2-normalised here and compared in float32, whatever they are
    stored in; a vector of zeros has similarity 0 to everything. Equal similarities come in no
    particular order. Keys are read once, in order, at most 16,384 at a time, so that float16 keys
    and keys in a memory-mapped file are never copied as a whole: beyond the result, the memory
    needed is that of ``chunk_size`` × 16,384 similarities and of these keys in float32.

    Args:
        queries: [Q, D].
        keys: [N, D], with N >= k.
        k: neighbours a query.
        chunk_size: queries compared at once.

    >>> keys = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    >>> cosine_neighbours(torch.tensor([[5.0, 0.0]]), keys, 2)
    (tensor([[1., 0.]]), tensor([[0, 1]]))
    """
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1]:
        raise ValueError(
            f"queries and keys must be [Q, D] and [N, D] with the same D, got "
            f"{list(queries.shape)} and {list(keys.shape)}"
        )
    if not 1 <= k <= len(keys):
        raise ValueError(
            f"k={k} neighbours were asked for, but there are {len(keys)} keys: "
            f"k must be between 1 and {len(keys)}"
        )
    Q, N = len(queries), len(keys)
    best = torch.full((Q, k), -torch.inf, device=queries.device)
    where = torch.zeros(Q, k, dtype=torch.int64, device=queries.device)
    buffer = best.new_empty(min(chunk_size, Q) * min(_KEYS_AT_ONCE, N))
    start = 0
    while start < N:
        # As many keys as were seen already: about k * log(2) of them are among the best so far.
        width = min(max(start, k, _FIRST_KEYS), _KEYS_AT_ONCE)
        key = _unit(keys[start : start + width], "keys")
        for first in range(0, Q, chunk_size):
            query = _unit(queries[first : first + chunk_size], "queries")
            out = buffer[: len(query) * len(key)].view(len(query), len(key))
            similarity = torch.mm(query, key.T, out=out)
            _keep_best_(
                best[first : first + chunk_size],
                where[first : first + chunk_size],
                similarity,
                start,
            )
        start += len(key)
    return best, where


def _unit(x: Tensor, name: str) -> Tensor:
    """Normalise rows to length 1, float32; rows of zeros stay zero."""
    rows = unit_rows(x).float()
    if not rows.isfinite().all():
        raise ValueError(f"{name} hold NaN or infinite values")
    return rows


def _keep_best_(best: Tensor, where: Tensor, similarity: Tensor, start: int) -> None:
    """Merge similarities [n, w] to keys start, start + 1, ... into the k best so far, in place.

    Few of them beat the k-th best so far, and comparing is many times cheaper than sorting: these
    few are sorted alone. A comparison's booleans are read in words of 8, as nearly all are 0.
    """
    (n, k), w = best.shape, similarity.shape[1]
    better = torch.empty(n, -(-w // 8) * 8, dtype=torch.bool, device=best.device)
    better[:, w:] = False
    torch.gt(similarity, best[:, -1:], out=better[:, :w])
    row, word = better.view(torch.int64).nonzero(as_tuple=True)
    hit, byte = better.view(n, -1, 8)[row, word].nonzero(as_tuple=True)
    row, column = row[hit], 8 * word[hit] + byte
    counts = torch.bincount(row, minlength=n)
    most = int(counts.max())
    if 4 * most > w:  # the first keys, or keys in an unlucky order
        candidates, index = similarity.topk(min(k, w))
    else:
        place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        candidates = best.new_full((n, most), -torch.inf)
        candidates[row, place] = similarity[row, column]
        index = where.new_zeros(n, most)
        index[row, place] = column
    merged, order = torch.cat([best, candidates], dim=1).topk(k)
    where.copy_(torch.cat([where, index + start], dim=1).gather(1, order))
    best.copy_(merged)


def knn_predict(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    ks: Sequence[int] = (10, 20, 100, 200),
    num_classes: int | None = None,
    temperature: float = 0.07,
    num_neighbours: int = 200,
    chunk_size: int = 1024,
) -> dict[int, Tensor]:
    """Predicted class of each test item, for several k at once.

    With ``s_1 >= s_2 >= ...`` the cosine similarities of a test item to the training items, and
    T = min(num_neighbours, N)::

        w_i = exp(s_i / temperature) / sum_{j <= T} exp(s_j / temperature)
        predicted = argmax_c  sum_{i <= k, label_i = c} w_i

    Of classes with equal votes, the one with the smallest index is predicted.

    Args:
        train_features: [N, D], normalised here.
        train_labels: int [N]; items of label -1 are left out, and N is the number of the others.
        test_features: [Q, D], normalised here.
        ks: numbers of neighbours that vote, at most ``num_neighbours``. If k exceeds N, all N
            training items vote.
        num_classes: C; training labels must be below it. It has no other use.
        temperature: divides the similarities.
        num_neighbours: how many neighbours the softmax is over; at most all N.
        chunk_size: test items compared at once.

    Returns:
        For each k, int64 [Q].

    Raises:
        ValueError: shapes do not agree, ``ks`` is out of range, no training item has a label, or
            labels are not integers or are below -1.

    >>> features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    >>> knn_predict(features, torch.tensor([0, 0, 1]), torch.tensor([[0.1, 1.0]]), ks=(1, 3))
    {1: tensor([1]), 3: tensor([1])}
    """
    _check_labels("train", train_features, train_labels)
    if not ks or min(ks) < 1 or max(ks) > num_neighbours:
        raise ValueError(
            f"ks={tuple(ks)} must be between 1 and num_neighbours={num_neighbours}, the neighbours "
            "that the softmax is over"
        )
    train_labels, train_features = with_labels(train_labels, train_features, name="train_labels")
    warn_of_one_class(train_labels, name="train_labels")
    if num_classes is not None and int(train_labels.max()) >= num_classes:
        raise ValueError(
            f"train_labels holds {int(train_labels.max())}, but num_classes={num_classes}"
        )
    num_neighbours = min(num_neighbours, len(train_features))
    present, which = train_labels.to(test_features.device).unique(return_inverse=True)  # ascending
    similarity, index = cosine_neighbours(
        test_features, train_features, num_neighbours, chunk_size=chunk_size
    )
    weights = (similarity / temperature).softmax(dim=1)  # [Q, T]
    classes = which[index]  # [Q, T]
    votes = weights.new_zeros(len(weights), len(present))
    predictions: dict[int, Tensor] = {}
    counted = 0
    for k in sorted(set(ks)):
        votes.scatter_add_(1, classes[:, counted:k], weights[:, counted:k])
        predictions[k] = present[votes.argmax(dim=1)]
        counted = k
    return predictions


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    num_neighbours: int = 200,
    chunk_size: int = 1024,
) -> dict[int, float]:
    """Top-1 accuracy, in 0..1, of `knn_predict` for each k.

    Items of label -1, on either side, are left out, and a warning says how many. A test item whose
    class is not in the training set counts as wrong.

    >>> features, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
    >>> knn_accuracy(features, labels, features, labels, ks=(1,))
    {1: 1.0}
    """
    _check_labels("test", test_features, test_labels)
    test_labels, test_features = with_labels(test_labels, test_features, name="test_labels")
    predictions = knn_predict(
        train_features,
        train_labels,
        test_features,
        ks=ks,
        temperature=temperature,
        num_neighbours=num_neighbours,
        chunk_size=chunk_size,
    )
    return {
        k: (predicted == test_labels.to(predicted.device)).double().mean().item()
        for k, predicted in predictions.items()
    }


def _check_labels(split: str, features: Tensor, labels: Tensor) -> None:
    if len(features) == 0:
        raise ValueError(f"{split}_features is empty: k-NN needs at least one item")
    if labels.shape != features.shape[:1]:
        raise ValueError(
            f"{split}_labels must be [{len(features)}], one for each of {split}_features, "
            f"got {list(labels.shape)}"
        )

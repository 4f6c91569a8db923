"""What is not finite is named, with the process where it began."""

import math
import pickle

import pytest
import torch

from sslkit.training.finite import NonFiniteLoss, by_rank, nan_unless_finite, require_finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_every_term_that_is_not_finite_is_named(bad, as_tensor):
    terms = {
        "dino/level0": torch.tensor(1.0, requires_grad=True),
        "ibot/level3": torch.tensor([[0.0, bad]], dtype=torch.bfloat16),
        "gradient/backbone": torch.tensor(3.0, dtype=torch.float64),
        "koleo": torch.tensor(bad) if as_tensor else bad,
        "lr": 1e-3,
    }
    with pytest.raises(NonFiniteLoss, match=r"step 120: not finite: ibot/level3, koleo\.") as error:
        require_finite(terms, 120)
    assert (error.value.step, error.value.names) == (120, ("ibot/level3", "koleo"))
    assert isinstance(error.value, FloatingPointError)


def test_finite_terms_pass():
    require_finite({"loss": torch.tensor(-3e38), "empty": torch.ones(0), "lr": 0.0}, 0)
    require_finite({}, 0)


def test_the_error_crosses_processes():
    error = pickle.loads(pickle.dumps(NonFiniteLoss(3, ("a", "b"))))
    assert (error.step, error.names) == (3, ("a", "b"))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_number_of_many_is_enough(bad):
    fine = [torch.ones(2, 3), torch.full((4,), -3e38), torch.ones(0)]
    assert nan_unless_finite(iter(fine)) == 0
    assert nan_unless_finite([*fine, torch.tensor([0.0, bad], dtype=torch.bfloat16)]).isnan()


def test_what_began_in_one_process_is_told_of_it():
    values = torch.tensor(
        [[0.0, 1.0, math.nan, 2.0], [math.nan, 1.0, math.nan, 3.0], [0.0, 1.0, math.nan, math.inf]]
    )
    found = by_rank(["images", "koleo", "loss", "norm"], values)
    assert list(found) == [
        *("images of rank 0", "images of rank 1", "images of rank 2", "koleo", "loss"),
        *("norm of rank 0", "norm of rank 1", "norm of rank 2"),
    ]
    with pytest.raises(NonFiniteLoss) as error:
        require_finite(found, 4)
    assert error.value.names == ("images of rank 1", "loss", "norm of rank 2")
    assert not any("rank" in name for name in by_rank("ab", torch.full((1, 2), math.nan)))

"""Projectors as files, and the released heads: every layout, and what is refused."""

import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sslkit.rasa import RASAProjector, load_rasa, read_planes, removals_in_turn, save_rasa
from sslkit.testing.references import rasa as oracle

D = 30


def planes(count: int = 3) -> list[Tensor]:
    """Rows of no special length or angle: a common direction makes the planes overlap."""
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(count, 2, D, generator=generator)
    return list(3 * rows + 4 * torch.randn(D, generator=generator))


def released(count: int = 3) -> dict[str, Tensor]:
    """The state dict of the released head, its layers in an order of no meaning."""
    *first, last = planes(count)
    layers = {f"pre_pos_layers.{i}.weight": plane for i, plane in enumerate(first)}
    return {"pos_pred.weight": last, **dict(reversed(layers.items()))}


# --- planes that are not orthogonal to one another ------------------------------------------------


def test_removals_in_turn_are_the_released_forward():
    given = planes()
    M = removals_in_turn(given)
    orthonormal = [oracle.gram_schmidt(plane.double().tolist()) for plane in given]
    expected = torch.tensor(oracle.removal_matrix(orthonormal, D), dtype=torch.float64)
    assert torch.allclose(M.T, expected, atol=1e-12)  # the oracle multiplies rows from the left
    x = torch.randn(D, dtype=torch.float64)
    removed = x.tolist()
    for plane in orthonormal:
        removed = oracle.remove(removed, plane)
    assert torch.allclose(x @ M.T, torch.tensor(removed, dtype=torch.float64), atol=1e-12)


def test_from_planes_is_the_projection_that_the_removals_in_turn_are_not():
    given = planes()
    rasa, M = RASAProjector.from_planes(given), removals_in_turn(given)
    P = rasa.matrix()
    rows = torch.cat(given).double()
    assert (P @ P - P).abs().max() < 1e-6
    assert (rows @ P).abs().max() < 1e-4  # nothing is left of any plane
    assert (M @ M - M).norm() > 0.05
    assert torch.allclose(P @ M, P, atol=1e-6)
    assert torch.allclose(M @ P, P, atol=1e-6)
    gram = rasa.basis @ rasa.basis.T
    assert torch.allclose(gram, torch.eye(6, dtype=torch.float64), atol=1e-14)
    first = torch.linalg.qr(given[0].double().T).Q
    assert torch.allclose(rasa.basis[:2].T @ rasa.basis[:2], first @ first.T, atol=1e-5)


def test_orthogonal_planes_agree_in_both_ways():
    axes = torch.linalg.qr(torch.randn(D, 6)).Q.T
    given = [5 * axes[:2], axes[2:4], axes[4:6] + 0.5 * axes[[5, 4]]]
    P = RASAProjector.from_planes(given).matrix()
    assert torch.allclose(removals_in_turn(given), P, atol=1e-6)


def test_rows_that_say_nothing_new_leave_zeros():
    axes = torch.eye(D)
    rasa = RASAProjector.from_planes([axes[:2], axes[:2] + 0, torch.stack([axes[1], axes[7]])])
    assert (rasa.basis.norm(dim=1) > 0).tolist() == [True, True, False, False, True, False]
    assert rasa(torch.ones(D)).sum() == D - 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], r"planes must be tensors \[2, D\] of one D, got \[\]"),
        ([torch.ones(3, D)], r"got \[\[3, 30\]\]"),
        ([torch.ones(2)], r"got \[\[2\]\]"),
        ([torch.tensor(1.0)], r"got \[\[\]\]"),
        ([torch.ones(2, D), torch.ones(2, 9)], "of one D"),
        ([torch.full((2, D), torch.nan)], "NaN or infinite"),
        ([torch.rand(2, 4)] * 2, r"dim must exceed 2 \* num_iterations = 4"),
    ],
)
def test_planes_of_other_shapes(given, message):
    with pytest.raises(ValueError, match=message):
        RASAProjector.from_planes(given)


# --- files ----------------------------------------------------------------------------------------


def test_our_file_keeps_the_basis_and_the_text(tmp_path):
    rasa = RASAProjector.from_planes(planes())
    save_rasa(rasa, tmp_path / "deep" / "a.safetensors", {"data": "x"})
    assert torch.equal(load_rasa(tmp_path / "deep" / "a.safetensors").basis, rasa.basis)
    assert set(load_file(tmp_path / "deep" / "a.safetensors")) == {"basis"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda head: head,
        lambda head: {f"module.rasa_head.{name}": w for name, w in head.items()},
        lambda head: {
            "teacher": {
                "backbone.cls_token": torch.zeros(1, 1, D),
                **{f"backbone.rasa_head.{name}": w for name, w in head.items()},
            },
            "iteration": 7,
        },
        lambda head: {"state_dict": {f"head.{name}": w for name, w in head.items()}},
        lambda head: planes(12),
    ],
    ids=["head", "prefixes", "teacher", "lightning", "list"],
)
def test_released_layouts(tmp_path, wrap):
    torch.save(wrap(released(12)), tmp_path / "rasa.pth")  # layer 10 comes after 9, not after 1
    found = read_planes(tmp_path / "rasa.pth")
    assert len(found) == 12
    assert all(torch.equal(a, b) for a, b in zip(found, planes(12), strict=True))
    expected = RASAProjector.from_planes(planes(12))
    assert torch.equal(load_rasa(tmp_path / "rasa.pth").basis, expected.basis)


def test_old_torch_files_are_read_too(tmp_path):
    torch.save(released(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(
        load_rasa(tmp_path / "old.pth").basis, RASAProjector.from_planes(planes()).basis
    )


class Malicious:
    ran = False

    def __reduce__(self):
        return setattr, (Malicious, "ran", True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Malicious(), "holds more than tensors"),
        ({**released(), "pre_pos_layers.5.weight": torch.ones(2, D)}, "without a gap"),
        ({"pre_pos_layers.0.weight": torch.ones(2, D)}, "and pos_pred.weight"),
        ({"blocks.0.attn.qkv.weight": torch.ones(2, D)}, r"got \['blocks.0.attn.qkv.weight'\]"),
        (
            {**released(), **{f"student.{name}": w for name, w in released().items()}},
            "several RASA heads",
        ),
        (
            [torch.ones(2, D), torch.ones(2, D + 1)],
            r"rasa\.pth is no RASA head: planes must be tensors \[2, D\] of one D",
        ),
        ([torch.ones(1, D)], r"got \[\[1, 30\]\]"),
        ([torch.full((2, D), torch.inf)], r"rasa\.pth is no RASA head: planes hold NaN or inf"),
        ([], r"got \[\]"),
        (torch.ones(2, D), "got Tensor"),
        ([1, 2], "got list"),
    ],
)
def test_what_is_no_head(tmp_path, content, message):
    torch.save(content, tmp_path / "rasa.pth")
    with pytest.raises(ValueError, match=message):
        load_rasa(tmp_path / "rasa.pth")
    assert not Malicious.ran


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_and_missing_files(tmp_path):
    torch.save(released(), tmp_path / "rasa.pth")
    whole = (tmp_path / "rasa.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half\.pth cannot be read as a file of torch\.save"):
        load_rasa(tmp_path / "half.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Malicious(), protocol=4))
    with pytest.raises(ValueError, match=r"bare\.pth"):
        load_rasa(tmp_path / "bare.pth")
    assert not Malicious.ran
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_rasa(tmp_path / "empty")
    save_file({"basis": torch.zeros(3, 8)}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"expected a float basis \[2 T, D\]"):
        load_rasa(tmp_path / "odd.safetensors")
    for read in (load_rasa, read_planes):
        with pytest.raises(FileNotFoundError, match="no RASA file"):
            read(tmp_path / "nowhere.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda basis: basis.index_fill(1, torch.tensor([3]), torch.nan), "NaN or infinite"),
        (lambda basis: basis.index_fill(0, torch.tensor([3]), torch.inf), "NaN or infinite"),
        (lambda basis: 2 * basis, "not orthonormal: an entry .* is 3 from the identity's"),
        (lambda basis: basis + 1e-4 * basis[[1, 0, 2, 3, 4, 5]], "not orthonormal"),
        (lambda basis: basis[[0, 0, 1, 2, 3, 4]], "not orthonormal"),
        (lambda basis: basis[:0], r"got torch.float64 \[0, 30\]"),
        (lambda basis: basis[0], r"got torch.float64 \[30\]"),
        (lambda basis: basis.long(), "got torch.int64"),
        (lambda basis: basis[:, :6], "would leave nothing"),
    ],
)
def test_a_basis_that_is_none(tmp_path, change, message):
    basis = change(RASAProjector.from_planes(planes()).basis).contiguous()
    save_file({"basis": basis}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=rf"a\.safetensors is not a RASA file: .*{message}"):
        load_rasa(tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_files_of_earlier_versions(tmp_path, dtype):
    rasa = RASAProjector.from_planes(planes())
    save_file({"basis": rasa.basis.to(dtype)}, tmp_path / "old.safetensors")
    found = load_rasa(tmp_path / "old.safetensors").basis
    torch.testing.assert_close(found, rasa.basis, rtol=0, atol=4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(found @ found.T, torch.eye(6).double(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("scale", [1e-30, 1e-200, 1e200])
def test_planes_of_any_length(scale):
    wide = [plane.double() for plane in planes()]
    expected = RASAProjector.from_planes(wide).matrix()
    found = RASAProjector.from_planes([scale * plane for plane in wide]).matrix()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)

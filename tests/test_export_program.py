"""The encoder as a graph: torch.export and ONNX against the encoder itself, by value."""

import onnxruntime
import pytest
import torch

from sslkit import RASAProjector
from sslkit.backbones.positions import resample_positions
from sslkit.export import ExportableEncoder, export_program, save_onnx, save_program
from sslkit.export.resampling import resampling_matrices
from tests.test_export_timm import NETWORKS, SMALL, network

GRIDS = [(1, 4, 6), (3, 16, 16), (2, 23, 9), (5, 8, 8), (1, 2, 3)]  # B, H, W; 8 x 8 is stored


def micro_with_rasa():
    encoder = network("sslkit_vit_micro", reg_tokens=2, pos_interpolation="dinov2")
    rasa = RASAProjector.from_planes([torch.eye(32)[:2]])
    encoder.vit = rasa.fold_into_vit(encoder.vit)
    return encoder


EXPORTED = {
    "ours, RASA folded in": micro_with_rasa,
    "DINOv3": lambda: network("vit_small_patch16_dinov3", **SMALL, img_size=128),
}


def assert_same(found, encoder, images, atol):
    with torch.no_grad():
        expected = encoder(images)._asdict()
    if encoder.vit.reg_token is None:
        del expected["registers"]
    assert list(found) == list(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=atol)


@pytest.mark.parametrize("method", ["antialias", "bicubic", "dinov2"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((16, 16), (37, 37)),
        ((37, 37), (16, 16)),
        ((16, 16), (7, 23)),
        ((8, 8), (1, 2)),
        ((1, 3), (5, 2)),
        ((16, 16), (17, 16)),
        ((37, 37), (37, 36)),
    ],
)
def test_matrices_resample_as_positions_are(method, old, new):
    torch.manual_seed(0)
    positions = torch.randn(1, *old, 5)
    rows, columns = resampling_matrices(old, new, method)
    found = torch.einsum("ih,jw,hwd->ijd", rows, columns, positions[0])
    # float32 rounds the places where the kernel is read, up to 37 * 2^-24, which both do
    expected = resample_positions(positions, new, method)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("method", ["antialias", "bicubic", "dinov2"])
def test_an_equal_grid_is_left_alone(method):
    for matrix, size in zip(resampling_matrices((5, 7), (5, 7), method), (5, 7), strict=True):
        assert torch.equal(matrix, torch.eye(size))


@pytest.mark.parametrize("case", [*NETWORKS, "parallel blocks"])
@torch.no_grad()
def test_the_module_is_the_encoder(case):
    parallel = ("vit_small_patch16_18x2_224", {**SMALL, "img_size": 64})
    name, kwargs = {**NETWORKS, "parallel blocks": parallel}[case]
    encoder = network(name, **kwargs)
    ph, pw = encoder.patch_size
    for B, H, W in [(2, *encoder.grid_size), (1, 3, 5)]:
        images = torch.randn(B, encoder.in_chans, H * ph, W * pw)
        assert_same(ExportableEncoder(encoder)(images), encoder, images, atol=1e-5)


@pytest.mark.parametrize("case", EXPORTED)
@torch.no_grad()
def test_a_saved_program_takes_any_size(case, tmp_path):
    encoder = EXPORTED[case]()
    save_program(encoder, tmp_path / "new" / "encoder.pt2")
    program = torch.export.load(tmp_path / "new" / "encoder.pt2").module()
    ph, pw = encoder.patch_size
    for B, H, W in GRIDS:
        images = torch.randn(B, 3, H * ph, W * pw)
        assert_same(program(images), encoder, images, atol=1e-5)
    images = torch.randn(1, 3, 4 * ph + 1, 4 * pw + 2)  # not whole patches: the rest is not seen
    assert_same(program(images), encoder, images[..., : 4 * ph, : 4 * pw], atol=1e-5)
    with pytest.raises(AssertionError):
        program(torch.randn(1, 3, ph, 4 * pw))  # one row: see the docstring


@pytest.mark.parametrize("case", EXPORTED)
def test_onnx_takes_any_size(case, tmp_path):
    encoder = EXPORTED[case]()
    ph, pw = encoder.patch_size
    save_onnx(encoder, tmp_path / "encoder.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx")
    (given,) = session.get_inputs()
    assert (given.name, given.shape) == ("images", ["batch", 3, f"{ph}*rows", f"{pw}*columns"])
    names = [output.name for output in session.get_outputs()]
    assert session.get_outputs()[-1].shape == ["batch", "rows", "columns", 32]
    for B, H, W in GRIDS:
        images = torch.randn(B, 3, H * ph, W * pw)
        outputs = map(torch.from_numpy, session.run(None, {"images": images.numpy()}))
        found = dict(zip(names, outputs, strict=True))
        assert_same(found, encoder, images, atol=2e-5)


def test_the_program_is_in_evaluation_and_in_the_encoders_type():
    encoder = network("sslkit_vit_micro", depth=1, drop_path_rate=0.5).train().bfloat16()
    program = export_program(encoder).module()
    images = torch.randn(2, 3, 16, 12).bfloat16()
    found = program(images)
    assert found["cls"].dtype == torch.bfloat16
    assert_same(found, encoder, images, atol=0.05)


def test_without_onnx_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install 'sslkit\[export\]'"):
        save_onnx(network("sslkit_vit_micro"), tmp_path / "encoder.onnx")


def test_weights_beyond_a_protobuf_lie_beside_the_file(monkeypatch, tmp_path):
    monkeypatch.setattr("sslkit.export.program._MAX_PROTOBUF", 1000)
    encoder = network("sslkit_vit_micro", depth=1)
    save_onnx(encoder, tmp_path / "encoder.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder.onnx", "encoder.onnx.data"]
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx")
    images = torch.randn(1, 3, 32, 32)
    cls = session.run(["cls"], {"images": images.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(cls), encoder(images).cls, rtol=0, atol=2e-5)

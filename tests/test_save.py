"""save and load of encoders: round trips, files that are refused, writes that fail."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sslkit.backbones import ViTEncoder, create, load, read_metadata, save
from sslkit.backbones.encoder_file import HEADER_KEY
from tests.networks import flat, micro, randomize


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["sslkit_vit_micro", "vit_little_patch16_reg4_gap_256"])
def test_save_and_load_round_trip(name, dtype, tmp_path):
    encoder = create(name, img_size=(32, 48), depth=1, in_chans=1, drop_path_rate=0.1)
    randomize(encoder).to(dtype)
    path = tmp_path / "new folder" / "encoder.safetensors"
    save(encoder, path, {"step": "12"})
    random_state = torch.get_rng_state()
    loaded = load(path)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert loaded.settings == encoder.settings
    assert read_metadata(path) == {"step": "12"}
    torch.testing.assert_close(
        dict(loaded.state_dict()), dict(encoder.state_dict()), rtol=0, atol=0
    )
    assert all(p.requires_grad for p in loaded.parameters())
    assert os.listdir(path.parent) == [path.name]


def test_load_resamples_positions_to_another_image_size(tmp_path):
    encoder = micro().eval()
    save(encoder, tmp_path / "e.safetensors")
    loaded = load(tmp_path / "e.safetensors", img_size=(16, 40)).eval()
    assert (loaded.img_size, loaded.grid_size) == ((16, 40), (4, 10))
    assert loaded.vit.pos_embed.shape == (1, 1 + 4 * 10, 32)
    images = torch.randn(1, 3, 16, 40)
    torch.testing.assert_close(flat(loaded(images)), flat(encoder(images)))
    save(loaded, tmp_path / "f.safetensors")
    assert load(tmp_path / "f.safetensors").grid_size == (4, 10)
    with pytest.raises(ValueError, match=r"img_size: .* got 30 x 30"):
        load(tmp_path / "e.safetensors", img_size=30)


def test_a_folded_final_norm_is_kept(tmp_path):
    """The form that RASAProjector.fold_into_vit gives a network."""
    encoder = micro().eval()
    encoder.vit.norm = nn.Sequential(
        nn.LayerNorm(32, eps=1e-3, elementwise_affine=False), nn.Linear(32, 32)
    )
    save(encoder, tmp_path / "e.safetensors")
    images = torch.randn(2, 3, 12, 8)
    loaded = load(tmp_path / "e.safetensors").eval()
    torch.testing.assert_close(flat(loaded(images)), flat(encoder(images)), rtol=0, atol=0)


def test_load_lists_every_tensor_that_does_not_fit(tmp_path):
    encoder = micro()
    encoder.vit.norm.register_parameter("extra", nn.Parameter(torch.zeros(1)))
    encoder.mask_token = nn.Parameter(torch.zeros(7))
    del encoder.vit.cls_token
    save(encoder, tmp_path / "e.safetensors")
    with pytest.raises(ValueError, match=r"do not fit its settings .* nothing is loaded") as caught:
        load(tmp_path / "e.safetensors")
    assert str(caught.value).splitlines()[1:] == [
        "  missing: vit.cls_token",
        "  unexpected: vit.norm.extra",
        "  mismatched: mask_token is [7], the network has [32]",
    ]


def test_headers_of_another_library_or_version(tmp_path):
    path = tmp_path / "e.safetensors"
    save_file({"x": torch.zeros(1)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"not written by sslkit.*has \['format'\]"):
        read_metadata(path)
    described = json.dumps({"version": 99})
    save_file({"x": torch.zeros(1)}, path, {HEADER_KEY: described})
    for read in (load, read_metadata):
        with pytest.raises(ValueError, match=r"has version 99 .* reads versions 1 and 2"):
            read(path)


def with_unknown_norm():
    encoder = micro()
    encoder.vit.norm = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32))
    return encoder


def test_a_saved_file_is_as_readable_as_any_other(tmp_path):
    (tmp_path / "other").touch()
    save(create("sslkit_vit_micro"), tmp_path / "encoder.safetensors")
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize(
    ("make", "metadata", "error", "message"),
    [
        (lambda: ViTEncoder(micro().vit), {}, ValueError, "no settings .* sslkit.backbones.create"),
        (lambda: micro(act_layer=nn.ReLU), {}, TypeError, "setting act_layer=.*'silu'"),
        (with_unknown_norm, {}, ValueError, "the final norm is a Sequential other than"),
        (micro, {"step": 3}, TypeError, "map str to str, got 'step': 3"),
        (micro, {HEADER_KEY: ""}, ValueError, "reserved"),
    ],
)
def test_save_refuses(make, metadata, error, message, tmp_path):
    with pytest.raises(error, match=message):
        save(make(), tmp_path / "e.safetensors", metadata)
    assert os.listdir(tmp_path) == []


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "e.safetensors"
    save(micro(), path, {"step": "1"})

    def fail(*_args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save(micro(), path, {"step": "2"})
    assert os.listdir(tmp_path) == [path.name]
    assert read_metadata(path) == {"step": "1"}

"""Convolutional encoders and their files."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from sslkit import backbones
from sslkit.backbones.cnn import CNN_KEY
from sslkit.evaluation.models import open_model
from sslkit.training.parallel import Parallel
from sslkit.training.replica import synchronise_batch_norms_
from sslkit.training.settings import SettingsError

SMALL: dict[str, Any] = {"layers": [1, 1, 1, 1], "channels": [32, 32, 32, 32], "output_stride": 8}


def small(**more: Any) -> backbones.CNNEncoder:
    return backbones.create_cnn("resnet18", **{**SMALL, **more})


def test_crops_of_several_sizes() -> None:
    encoder = small(in_chans=1).eval()
    crops = [torch.randn(2, 1, 32, 48), torch.randn(4, 1, 16, 16)]
    with torch.no_grad():
        many = encoder.forward_many(crops)
        for crop, tokens in zip(crops, many, strict=True):
            assert torch.equal(tokens.cls, encoder(crop).cls)
            torch.testing.assert_close(tokens.cls, tokens.patches.mean((1, 2)))
    assert [tokens.patches.shape for tokens in many] == [(2, 4, 6, 32), (4, 2, 2, 32)]
    assert many[0].registers.shape == (2, 0, 32)
    assert (encoder.embed_dim, encoder.in_chans, encoder.patch_size) == (32, 1, (8, 8))
    with pytest.raises(ValueError, match="no mask token"):
        encoder(crops[0], torch.zeros(2, 4, 6, dtype=torch.bool))


def test_a_vision_transformer_is_refused() -> None:
    vit = backbones.create_cnn("vit_tiny_patch16_224", depth=1)
    with pytest.raises(TypeError, match=r"not a map \[B, D=192, H, W\]; for Vision Transformers"):
        vit(torch.randn(1, 3, 224, 224))
    with pytest.raises(TypeError, match="Linear has no feature_info"):
        backbones.CNNEncoder(nn.Linear(1, 1))


def test_a_file_gives_the_encoder_back(tmp_path: Path) -> None:
    encoder, path = small(norm_layer="groupnorm").eval(), tmp_path / "cnn.safetensors"
    backbones.save_cnn(encoder, path, {"step": "3"})
    before = torch.get_rng_state()
    found = backbones.load_cnn(path)
    assert torch.equal(before, torch.get_rng_state())
    assert found.settings == encoder.settings
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(found.eval()(images).cls, encoder(images).cls)
        assert torch.equal(open_model(str(path)).encoder.eval()(images).cls, encoder(images).cls)
    with pytest.raises(ValueError, match=r"holds a convolutional network.*load_cnn reads it"):
        backbones.load(path)


def rewritten(path: Path, *, tensors: Any = None, **described: Any) -> Path:
    """A file of these settings with other tensors or another header."""
    backbones.save_cnn(small(), path)
    content = safetensors.torch.load_file(path) | (tensors or {})
    header = {"version": 1, "settings": {"name": "resnet18", **SMALL}, **described}
    safetensors.torch.save_file(content, path, {CNN_KEY: json.dumps(header)})
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 7}, "has version 7; this sslkit reads 1"),
        (
            {"settings": {"name": "resnet18", "checkpoint_path": "/etc"}},
            "not a setting that a file",
        ),
        ({"settings": {"name": "/etc/passwd"}}, "must be the name of a network"),
        ({"settings": {"layers": [1]}}, "settings have no name of a network"),
        (
            {"settings": {"name": "resnet18"}},
            r"not have the tensors .*: \d+ differ, such as layer1",
        ),
        ({"tensors": {"more": torch.zeros(1)}}, "1 differ, such as more"),
    ],
)
def test_other_files_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        backbones.load_cnn(rewritten(tmp_path / "cnn.safetensors", **change))


def test_other_kinds_of_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vit.safetensors"
    backbones.save(backbones.create("sslkit_vit_micro"), path)
    with pytest.raises(ValueError, match=re.escape(f"its header has no '{CNN_KEY}'")):
        backbones.load_cnn(path)
    with pytest.raises(FileNotFoundError, match=r"no encoder file at .*nowhere"):
        backbones.load_cnn(tmp_path / "nowhere.safetensors")
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        backbones.load_cnn(path)
    with pytest.raises(ValueError, match=r"use create_cnn"):
        backbones.save_cnn(backbones.CNNEncoder(small().network), path)


def test_batch_normalisation_spans_processes_on_gpus_alone() -> None:
    group: Any = object()
    cpus, gpus = (Parallel(0, 2, torch.device(kind), group) for kind in ("cpu", "cuda"))
    with pytest.raises(SettingsError, match=r"\(network.bn1\) cannot take the images of 2 proc"):
        synchronise_batch_norms_(small(), cpus)
    synchronise_batch_norms_(small(norm_layer="groupnorm"), cpus)
    encoder = small()
    synchronise_batch_norms_(encoder, Parallel(0, 1, torch.device("cpu"), None))
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in encoder.modules())
    synchronise_batch_norms_(encoder, gpus)
    kinds = {type(m) for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert kinds == {nn.SyncBatchNorm}
    assert encoder.network.bn1.process_group is group

"""Files that are not read: damaged, of another kind, with code, mixed up, incomplete."""

import argparse
import gzip
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from sslkit.backbones import __main__ as command
from sslkit.backbones import create, load, read, save
from tests import released
from tests.released import with_prefix

SHAPES = released.dinov2_shapes(64, 2, 256, grid=3)
STATE = released.values(SHAPES)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def problems(path, **options) -> list[str]:
    with pytest.raises(ValueError, match="nothing is loaded:") as caught:
        load(path, num_heads=2, **options)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def written(path: Path, state, **others) -> Path:
    torch.save({**state, **others}, path)
    return path


# --- damaged and foreign files -------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["torch.save", "legacy", "pickle"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_pickled_code_is_not_run(tmp_path, monkeypatch, protocol, suffix):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"w{suffix}"
    bomb = {"teacher": STATE, "extra": Bomb()}
    if protocol == "pickle":
        path.write_bytes(pickle.dumps(bomb))
    else:
        torch.save(bomb, path, _use_new_zipfile_serialization=protocol == "torch.save")
    with pytest.raises(ValueError, match=rf"w{suffix} holds more than tensors \(.*code .*not run"):
        load(path)
    assert not (tmp_path / "exploded").exists()


def test_the_class_that_a_file_needs_is_named(tmp_path):
    path = written(tmp_path / "w.pth", STATE, config=nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"it needs torch\.nn\.modules\.linear\.Linear"):
        load(path)


def test_the_command_line_that_dino_and_ibot_keep_is_no_code(tmp_path):
    path = written(tmp_path / "w.pth", STATE, args=argparse.Namespace(lr=0.1, names=["a"]))
    assert load(path, num_heads=2).depth == 2


@given(st.floats(0, 0.999))
@settings(max_examples=12, deadline=None)
@pytest.mark.parametrize("kind", ["torch", "safetensors", "own"])
def test_a_truncated_file_is_named(tmp_path_factory, kind, share):
    path = tmp_path_factory.mktemp("w") / "w.safetensors"
    if kind == "torch":
        torch.save(STATE, path)
    elif kind == "safetensors":
        save_file(STATE, path)
    else:
        save(create("sslkit_vit_micro", depth=1), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"w\.safetensors (is|cannot be|holds)"):
        load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(80), r"neither a safetensors file nor one of torch\.save"),
        (gzip.compress(b"weights", mtime=0), "gzip archive: unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs pointer"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"PK\x03\x04" + bytes(90), r"cannot be read as a file of torch\.save"),
    ],
)
def test_other_kinds_of_files(tmp_path, content, message):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(ValueError, match=rf"w\.pth .*{message}"):
        load(tmp_path / "w.pth")


def test_other_kinds_of_contents(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pt")
    with pytest.raises(ValueError, match=r"script\.pt is a TorchScript archive, which holds code"):
        load(tmp_path / "script.pt")
    np.savez(tmp_path / "w.npz", a=np.zeros(2))
    with pytest.raises(ValueError, match=r"w\.npz cannot be read"):
        load(tmp_path / "w.npz")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds no tensors"):
        load(tmp_path / "list.pt")
    resnet = {"conv1.weight": torch.zeros(3), "layer1.0.bn1.weight": torch.zeros(3)}
    torch.save(resnet, tmp_path / "resnet.pt")
    with pytest.raises(ValueError, match=r"no Vision Transformer.*2 tensors: conv1\.weight, layer"):
        load(tmp_path / "resnet.pt")
    torch.save({"model": {"_flat_param": torch.zeros(9)}}, tmp_path / "rank0.pt")
    with pytest.raises(ValueError, match="one rank's part of a sharded"):
        load(tmp_path / "rank0.pt")
    other = {"embeddings.patch_embeddings.projection.weight": torch.zeros(64, 3, 16, 16)}
    torch.save(other, tmp_path / "vit.pt")
    with pytest.raises(ValueError, match="Vision Transformer of transformers, but not DINOv2"):
        load(tmp_path / "vit.pt")


def test_nothing_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"no encoder file at facebook/dinov2.*hf:facebook/"
    ):
        load("facebook/dinov2-base")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match=r"folder .* found: none"):
        load("folder")
    for name in ("a.pth", "b.pth"):
        torch.save(STATE, tmp_path / "folder" / name)
    with pytest.raises(FileNotFoundError, match=r"found: a\.pth, b\.pth"):
        load("folder")
    (tmp_path / "folder" / "b.pth").unlink()
    assert load("folder", num_heads=2).depth == 2
    (tmp_path / "folder" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load("folder")


def test_shards(tmp_path):
    names = sorted(STATE)
    halves = {"model-1.safetensors": names[:20], "model-2.safetensors": names[20:]}
    weight_map = {name: shard for shard, part in halves.items() for name in part}
    for shard, part in halves.items():
        save_file({name: STATE[name] for name in part}, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert load(tmp_path, num_heads=2).depth == 2
    index.write_text(json.dumps({"weight_map": weight_map | {"head.bias": "model-2.safetensors"}}))
    with pytest.raises(ValueError, match=r"promises tensors that its shards lack: head\.bias"):
        load(tmp_path, num_heads=2)
    index.write_text(json.dumps({"weight_map": weight_map | {"x": "../model-2.safetensors"}}))
    with pytest.raises(ValueError, match=r"not beside it: \.\./model-2"):
        load(tmp_path, num_heads=2)
    index.write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"not beside it: model-1\.safetensors"):
        load(tmp_path, num_heads=2)


# --- networks in a file --------------------------------------------------------------------------


def test_which_network(tmp_path):
    other = {name: tensor + 1 for name, tensor in STATE.items()}
    both = {"student": with_prefix(other, "backbone."), "teacher": with_prefix(STATE, "backbone.")}
    path = written(tmp_path / "w.pth", both)
    for which, state in ((None, STATE), ("teacher", STATE), ("student", other)):
        loaded = read(path, num_heads=2, which=which)
        assert torch.equal(loaded.encoder.vit.norm.bias, state["norm.bias"])
        assert len(loaded.report.unused) == len(STATE)
        assert loaded.report.unused == {
            name: f"another network, {rest}.backbone"
            for name in loaded.report.unused
            for rest in ["teacher" if which == "student" else "student"]
        }
    with pytest.raises(ValueError, match=r"which='ema' is not one network of .*'student.backbone'"):
        load(path, num_heads=2, which="ema")
    path = written(tmp_path / "two.pth", {"a": STATE, "b": other})
    with pytest.raises(ValueError, match=r"several networks, 'a', 'b': choose one with which="):
        load(path, num_heads=2)
    assert torch.equal(load(path, num_heads=2, which="b").vit.norm.bias, other["norm.bias"])


def test_a_wrapper_that_hides_a_second_tensor(tmp_path):
    path = written(tmp_path / "w.pth", STATE, **{"module.norm.bias": torch.zeros(64)})
    with pytest.raises(ValueError, match=r"holds norm\.bias twice"):
        load(path, num_heads=2)


def test_what_stands_beside_a_network_must_be_known(tmp_path):
    wrapped = with_prefix(STATE, "backbone.") | {"decoder.weight": torch.zeros(3)}
    path = written(tmp_path / "w.pth", {"teacher": wrapped, "mystery": torch.zeros(2)})
    assert problems(path) == ["unexpected: teacher.decoder.weight", "unexpected: mystery"]
    loaded = read(path, num_heads=2, ignore=["*decoder*", "mystery"])
    assert loaded.report.unused == {
        "teacher.decoder.weight": "left out, by ignore",
        "mystery": "left out, by ignore",
    }


# --- tensors that do not fit ---------------------------------------------------------------------


def test_everything_that_does_not_fit_is_listed_at_once(tmp_path):
    state = dict(STATE)
    del state["blocks.1.mlp.fc1.bias"]
    state["blocks.0.attn.qkv.weight"] = torch.zeros(5, 64)
    state["blocks.0.norm3.weight"] = torch.zeros(64)
    state["norm.weight"] = torch.zeros(64, dtype=torch.int8)
    assert problems(written(tmp_path / "w.pth", state)) == [
        "missing: blocks.1.mlp.fc1.bias (of vit.blocks.1.mlp.fc1.bias)",
        "unexpected: blocks.0.norm3.weight",
        "mismatched: blocks.0.attn.qkv.weight is [5, 64], the network has [192, 64]",
        "mismatched: norm.weight is torch.int8 [64], the network has [64]",
    ]


def test_ignore_opts_out_by_name(tmp_path):
    state = dict(STATE, **{"blocks.0.norm3.weight": torch.zeros(64)})
    del state["blocks.1.mlp.fc1.bias"]
    state["norm.weight"] = torch.zeros(3)
    path = written(tmp_path / "w.pth", state)
    assert problems(path, ignore=["*.norm3.*"]) == [
        "missing: blocks.1.mlp.fc1.bias (of vit.blocks.1.mlp.fc1.bias)",
        "mismatched: norm.weight is [3], the network has [64]",
    ]
    loaded = read(path, num_heads=2, ignore=["*.norm3.*", "blocks.1.mlp.fc1.bias", "vit.norm.*"])
    assert loaded.report.missing == {
        "vit.blocks.1.mlp.fc1.bias": "fresh weights, by ignore",
        "vit.norm.weight": "fresh weights, by ignore (the file's is [3])",
    }
    assert torch.equal(loaded.encoder.vit.norm.weight, torch.ones(64))
    assert torch.equal(loaded.encoder.vit.norm.bias, STATE["norm.bias"])
    assert not any(p.is_meta for p in loaded.encoder.parameters())


def test_a_classifier_is_reported_and_left_out(tmp_path):
    path = written(tmp_path / "w.pth", STATE, **{"head.weight": torch.zeros(10, 64)})
    assert read(path, num_heads=2).report.unused == {"head.weight": "a classifier"}


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_any_lost_or_misspelt_name_is_found(tmp_path_factory, data):
    """The names from which the network is derived may be missed in other words."""
    name = data.draw(st.sampled_from(sorted(STATE)))
    state = dict(STATE)
    tensor = state.pop(name)
    misspelt = name
    if data.draw(st.booleans()):
        i = data.draw(st.integers(0, len(name) - 1))
        misspelt = name[:i] + "~" + name[i + 1 :]
        state[misspelt] = tensor
    path = written(tmp_path_factory.mktemp("w") / "w.pth", state)
    if name == "mask_token" == misspelt:  # timm's file of the same network
        report = read(path, num_heads=2).report
        assert report.missing == {"mask_token": "zeros: such files have none"}
        assert "DINOv2 without its mask token" in report.notes[0]
        return
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is checked below
        load(path, num_heads=2)
    message = str(caught.value)
    assert name in message or f"unexpected: {misspelt}" in message, message
    if misspelt != name and "missing" in message:
        assert f"unexpected: {misspelt}" in message


def test_heads_that_no_tensor_tells(tmp_path):
    path = written(tmp_path / "w.pth", STATE)
    with pytest.raises(ValueError, match=r"no released network has the width 64: give num_heads="):
        load(path)
    with pytest.raises(ValueError, match="num_heads=7 does not divide the width 64"):
        load(path, num_heads=7)


def test_what_is_stated_must_not_contradict_the_file(tmp_path):
    save(create("sslkit_vit_micro", depth=1), tmp_path / "own")
    with pytest.raises(ValueError, match=r"num_heads=4, but .* has 2 heads"):
        load(tmp_path / "own", num_heads=4)
    with pytest.raises(ValueError, match=r"architecture='vit_x' is for files with timm's names"):
        load(tmp_path / "own", architecture="vit_x")
    shapes = released.dinov3_shapes(64, 1, 256, heads=2)
    path = written(tmp_path / "w.pth", released.values(shapes))
    with pytest.raises(ValueError, match="num_heads=4: the file's 8 rotary periods are for 2"):
        load(path, num_heads=4)


def test_a_gated_size_that_cannot_be_built(tmp_path):
    state = released.values(released.dinov2_shapes(64, 2, 171, gated=True, grid=3))
    with pytest.raises(ValueError, match="hidden size 171 is not a multiple of 8"):
        load(written(tmp_path / "w.pth", state), num_heads=2)


# --- the command ---------------------------------------------------------------------------------


def test_the_command_prints_the_report(tmp_path, capsys):
    path = str(written(tmp_path / "w.pth", STATE))
    assert (
        command.main([path, "--num-heads", "2", "--img-size", "56", "28", "--in-chans", "1"]) == 0
    )
    text = capsys.readouterr().out
    assert "DINOv2's names" in text
    assert "3 x 3 to 4 x 2 patches (dinov2)" in text
    assert "3 to 1, repeated in turn" in text
    assert command.main([str(tmp_path / "no.pth")]) == 1
    assert "error: no encoder file at" in capsys.readouterr().err
    assert command.main([path, "--num-heads", "2", "--img-size", "56", "42", "28"]) == 1
    assert "img_size must be one number or (height, width)" in capsys.readouterr().err

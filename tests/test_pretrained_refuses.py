"""Files that are not read: damaged, of another kind, with code, mixed up, incomplete."""

import argparse
import gzip
import json
import os
import pickle
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sslkit import MatryoshkaProjector
from sslkit.backbones import create, load, load_pretrained, save
from sslkit.commands.main import run as sslkit_command
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
        FileNotFoundError, match=r"no weights 'facebook/dinov2.*did you mean hf:facebook/"
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


# --- files from somebody else ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_file(tmp_path_factory):
    """Tensors and header of a small file of `save`."""
    path = tmp_path_factory.mktemp("own") / "w.safetensors"
    head = MatryoshkaProjector(32, 8, nesting_dims=(16, 32), hidden_dim=8, bottleneck_dim=8)
    save(create("sslkit_vit_micro", depth=1), path, heads={"dino_head": head})
    with safe_open(path, framework="pt") as file:
        return load_file(path), json.loads(file.metadata()["sslkit.encoder"])


@pytest.fixture(scope="module")
def opened():
    """Names of the files that are opened from here on."""
    names: list[object] = []
    sys.addaudithook(lambda event, values: names.append(values[0]) if event == "open" else None)
    return names


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("settings", {"pretrained_cfg": {"file": "stolen"}}, "'pretrained_cfg' is not a setting"),
        ("settings", {"checkpoint_path": "stolen"}, "'checkpoint_path' is not a setting"),
        ("settings", {"pretrained": True}, "'pretrained' is not a setting"),
        ("settings", {"cache_dir": "made"}, "'cache_dir' is not a setting"),
        ("settings", {"block_fn": "os.system"}, "'block_fn' is not a setting"),
        ("settings", {"name": "local-dir:made"}, "name must be the name of a network"),
        ("settings", {"name": "resnet18"}, "no encoder can be built with"),
        ("settings", {"depth": 10**6}, "depth must be an integer from 1 to 256, got 1000000"),
        ("settings", {"depth": 200}, "a network of 200 blocks has more tensors than the "),
        ("settings", {"depth": True}, "depth must be an integer from 1 to 256, got True"),
        ("settings", {"embed_dim": 10**9}, "embed_dim must be an integer"),
        ("settings", {"img_size": [10**9, 4]}, "img_size must be a side or"),
        ("settings", {"reg_tokens": 10**9}, "reg_tokens must be"),
        ("settings", {"mlp_ratio": float("nan")}, "mlp_ratio must be a number from 0 to 1024"),
        ("settings", {"num_heads": 7}, "no encoder can be built with"),
        ("settings", {"x" * 10**5: 1}, r"settings: 'x{59}\.\.\. is not a setting"),
        ("settings", None, "settings must be values by name, got None"),
        ("heads", {"dino_head": {"num_layers": 10**7}}, "num_layers must be"),
        ("heads", {"dino_head": {"nesting_dims": [1] * 10**5}}, "nesting_dims must be 1 to 64"),
        (
            "heads",
            {"dino_head": {"in_dim": 32, "num_prototypes": 64}},
            "head's tensors do not fit its arguments",
        ),
        ("heads", {str(i): {} for i in range(65)}, "at most 64 heads"),
        ("folded_norm", {"eps": 1e-5, "dim": 10**9}, "'dim' is not a setting"),
        ("version", [2], r"has version \[2\] of the encoder format"),
    ],
)
def test_a_header_states_plain_settings_alone(own_file, opened, tmp_path, part, changes, message):
    tensors, described = own_file
    old = described[part]
    merged = {**old, **changes} if isinstance(old, dict) and changes is not None else changes
    header = {"sslkit.encoder": json.dumps({**described, part: merged})}
    save_file(tensors, tmp_path / "w.safetensors", header)
    opened.clear()
    with pytest.raises(ValueError, match=message) as caught:
        load_pretrained(tmp_path / "w.safetensors")
    assert len(str(caught.value)) < 3000
    assert not {"stolen", "made"} & {os.path.basename(str(name)) for name in opened}
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize("text", ["[" * 10**5, "null", "[]", "{}", "1" * 5000])
def test_a_header_that_is_none(own_file, tmp_path, text):
    save_file(own_file[0], tmp_path / "w.safetensors", {"sslkit.encoder": text})
    with pytest.raises(ValueError, match=r"w\.safetensors.*(is not JSON|has version None)"):
        load_pretrained(tmp_path / "w.safetensors")


def test_save_refuses_settings_that_no_file_may_state(tmp_path):
    encoder = create("sslkit_vit_micro", depth=1)
    encoder._settings["pretrained_cfg"] = {}
    with pytest.raises(ValueError, match="'pretrained_cfg' is not a setting"):
        save(encoder, tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_args": {"checkpoint_path": "x"}}, "'checkpoint_path' is not a setting"),
        ({"model_args": {"pretrained_cfg": {"file": "x"}}}, "'pretrained_cfg' is not a setting"),
        ({"model_args": {"depth": 10**6}}, "depth must be an integer"),
        ({"model_args": [1]}, "model_args must be values by name"),
        ({"architecture": "hf-hub:a/b"}, "is not a network of timm"),
    ],
)
def test_a_config_states_plain_settings_alone(tmp_path, config, message):
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0)
    save_file(vit.state_dict(), tmp_path / "model.safetensors")
    named = {"architecture": "vit_tiny_patch16_224", **config}
    (tmp_path / "config.json").write_text(json.dumps(named))
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


def test_numbers_of_a_transformers_config(tmp_path):
    state = {
        "embeddings.patch_embeddings.weight": torch.zeros(64, 3, 16, 16),
        "layer.0.mlp.down_proj.weight": torch.zeros(64, 256),
    }
    save_file(state, tmp_path / "model.safetensors")
    for config, message in (
        ({"num_hidden_layers": 10**9}, "depth must be an integer"),
        ({"num_hidden_layers": "12"}, "num_hidden_layers must be a positive number, got '12'"),
        ({"num_attention_heads": 0}, "num_heads must be a positive number, got 0"),
        ({"rope_theta": 1e300}, "rope_temperature must be a number"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 2, **config}))
        with pytest.raises(ValueError, match=message):
            load_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name", ["blocks.99999999.", "blocks.0.99999999.", f"blocks.{'9' * 5000}."]
)
def test_the_number_of_a_block_is_bounded(tmp_path, name):
    path = written(tmp_path / "w.pth", STATE, **{f"{name}norm1.weight": torch.zeros(64)})
    with pytest.raises(ValueError, match=r"w\.pth: a tensor's name has block 9+; networks of more"):
        load(path, num_heads=2)


def nested(depth: int, leaf: dict) -> dict:
    """Dicts that hold one dict twice each: 2 ** depth names in a file of some bytes."""
    for _ in range(depth):
        leaf = {"a": leaf, "b": leaf}
    return leaf


def scripted(path: Path, module: str, name: str, argument: int) -> Path:
    """A file of torch.save whose pickle calls a function with a number."""
    number = b"\x8a\x08" + argument.to_bytes(8, "little")
    call = b"\x80\x02}X\x01\x00\x00\x00ac" + f"{module}\n{name}\n".encode() + number + b"\x85Rs."
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in (("data.pkl", call), ("version", b"3\n"), ("byteorder", b"little")):
            archive.writestr(f"w/{member}", content)
    return path


def test_memory_follows_the_size_of_a_file(tmp_path):
    """In a process of its own, whose address space ends 1 GiB above what it has imported."""
    one = torch.zeros(1)
    loop: dict = {}
    loop["a"] = loop
    many = torch.zeros(10**5, 1, 1)  # sums and products of these broadcast
    v3, bias = (
        released.values(released.dinov3_shapes(64, 1, 256, heads=2)),
        "blocks.0.attn.qkv.bias",
    )
    spread_head = {
        "dino_head.last_layer.weight_g": many,
        "dino_head.last_layer.weight_v": torch.zeros(10**4, 10),
        "dino_head.mlp.weight": torch.zeros(10, 64),
    }
    files = {
        "stride": STATE | {"patch_embed.proj.weight": one.expand(10**6, 3, 14, 14)},
        "names": STATE | {f"blocks.0.{i}": torch.zeros(10**4).expand(99, -1) for i in range(99)},
        "sparse": STATE | {"norm.bias": torch.sparse_coo_tensor([[0]], [1.0], (10**12,))},
        "meta": STATE | {"norm.bias": torch.empty(10**13, device="meta")},
        "empty": STATE | {"pos_embed": torch.zeros(1, 10**12, 0)},
        "laughs": STATE | {"z": nested(30, {"c": one})},
        "nothing": STATE | {"z": nested(30, {})},
        "deep": STATE | {"z": nested(60, {"c": one})},
        "loop": STATE | {"z": loop},
        "wide head": STATE | spread_head,
        "wide token": STATE | {"register_tokens": torch.zeros(1, 1, 64), "cls_token": many},
        "wide mask": {**v3, bias: many[:, 0], f"{bias}_mask": many[:, 0, 0]},
        "kind": STATE | {"norm.bias": torch.zeros(64, dtype=torch.complex64)},
    }
    for name, state in files.items():
        torch.save(state, tmp_path / f"{name}.pth")
    scripted(tmp_path / "bytes.pth", "__builtin__", "bytearray", 8 * 10**9)
    scripted(tmp_path / "tensor.pth", "torch", "Tensor", 10**8)
    torch.save([torch.zeros(1, 1).expand(2, 10**10)], tmp_path / "planes.pth")
    plain = tmp_path / "plain.pth"
    torch.save(STATE, plain)
    zipped = zipfile.ZipFile(tmp_path / "zipped.pth", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(plain) as source, zipped:
        for member in source.namelist():
            padding = bytes(10**7) if member.endswith("data.pkl") else b""
            zipped.writestr(member, source.read(member) + padding)
    plain.unlink()
    script = f"""
import json, resource, warnings
from pathlib import Path
from sslkit.backbones import load_pretrained
from sslkit.rasa import load_rasa
warnings.simplefilter("ignore")
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
said = {{}}
for path in sorted(Path({str(tmp_path)!r}).glob("*.pth")):
    try:
        (load_rasa(path) if path.stem == "planes" else load_pretrained(path, num_heads=2))
        said[path.stem] = "read"
    except ValueError as error:
        said[path.stem] = str(error)
print(json.dumps(said))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    said = json.loads(done.stdout)
    expected = {
        "stride": "they repeat the same memory",
        "names": "they repeat the same memory",
        "sparse": "holds a tensor that is sparse",
        "meta": "or without values",
        "empty": r"pos_embed is \[1, 1000000000000, 0\]",
        "laughs": "holds more than 200,000 values",
        "nothing": "holds more than 200,000 values",
        "deep": "nested more than 32 deep",
        "loop": "nested more than 32 deep",
        "wide head": "^read$",
        "wide token": r"shapes \[100000, 1, 1\] and \[1, 1, 64\] cannot be added",
        "wide mask": r"a mask of shape \[100000\] for a bias of \[100000, 1\]",
        "kind": r"norm\.bias is torch\.complex64",
        "bytes": "it needs builtins.bytearray",
        "tensor": r"calls torch\.Tensor, which torch\.save does not write",
        "planes": "they repeat the same memory",
        "zipped": r"is compressed: its [\d,]+ bytes unpack to 10,",
    }
    assert said.keys() == expected.keys()
    for name, message in expected.items():
        assert re.search(message, said[name]), (name, said[name])


FLOATS = b"ctorch\nFloatStorage\n"
KEY = b"X\x17\x00\x00\x00patch_embed.proj.weight"


def integer(number: int) -> bytes:
    return b"\x8a\x08" + number.to_bytes(8, "little", signed=True)


def tensor_code(length: int, size: int, stride: int = 1, offset: int = 0) -> bytes:
    """Instructions for a vector of ``size`` numbers in a storage of ``length``."""
    text = b"X\x07\x00\x00\x00storage" + FLOATS + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    view = b"".join((integer(offset), integer(size), b"\x85", integer(stride), b"\x85"))
    rebuild, hooks = b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n)R"
    return rebuild + b"((" + text + integer(length) + b"NtQ" + view + b"\x89" + hooks + b"tR"


def doubled(times: int) -> bytes:
    """Instructions for a tuple that holds one tuple twice that holds one tuple twice that ..."""
    return b"K\x01q\x00" + b"".join(b"h%c\x86q%c" % (number, number + 1) for number in range(times))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"}" + doubled(60) + b"K\x01s", "holds a tuple of more than 4,096 values"),
        (b"c__builtin__\nset\n]" + doubled(60) + b"a\x85R", "holds a tuple of more than 4,096"),
        (b"})" + b"\x85" * 10**6 + b"K\x01s", "tuples nested more than 32 deep"),
        (FLOATS + integer(10**10) + b"\x85R", r"calls torch\.FloatStorage"),
        (b"ctorch\nTensor\nq\x01h\x01" + integer(10**10) + b"\x85Rs", r"calls torch\.Tensor"),
        (b"ctorch\nTensor\n" + integer(10**10) + b"\x85R", r"calls torch\.Tensor"),
        (
            b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch\nTensor\nq\x01h\x01"
            + integer(10**10)
            + b"\x85}tR",
            r"calls torch\.Tensor",
        ),
        (tensor_code(10**10, 4), "asks for 40,000,000,000 bytes of tensors, but has only"),
        (tensor_code(-4, 4), "asks for 0 bytes of tensors"),
        (tensor_code(4, 10**10), "a tensor of 10,000,000,000 numbers in a storage of 4"),
        (tensor_code(4, 4, offset=1), "a tensor of 5 numbers in a storage of 4"),
        (tensor_code(4, 4, stride=-1), "whole numbers from 0"),
        (tensor_code(4, 4, offset=-1), "whole numbers from 0"),
        (tensor_code(4, -4), "whole numbers from 0"),
    ],
)
def test_a_pickle_asks_for_no_more_than_its_file(tmp_path, code, message, legacy):
    """The old code hung in the first two cases, died of the third, and took memory for others."""
    path = tmp_path / "w.pth"
    pickled = b"\x80\x02}" + KEY + code + b"s."
    if legacy:
        start = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
        content = b"".join(pickle.dumps(each, 2) for each in start)
        path.write_bytes(content + pickled + pickle.dumps(["0"], 2) + bytes(24))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in (("data.pkl", pickled), ("version", b"3"), ("data/0", bytes(16))):
                archive.writestr(f"w/{name}", content)
    with pytest.raises(ValueError, match=rf"w\.pth .*({message})"):
        load(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_what_checkpoints_hold_beside_tensors(tmp_path, zipped):
    """Views, shared storages, empty tensors, the states of random numbers and of optimizers."""
    row = torch.arange(12.0)
    others = {
        "optimizer": {
            "state": {0: {"step": torch.tensor(1.0), "m": row[2:9:3], "v": row.view(3, 4).T}},
            "param_groups": [{"betas": (0.9, 0.99), "params": [0]}],
            "loss": {"random": random.getstate(), ("a", ("b", 3)): torch.zeros(0, 7)},
        }
    }
    tensors = {name: nn.Parameter(tensor) for name, tensor in STATE.items()}
    path = tmp_path / "w.pth"
    torch.save({"teacher": tensors, **others}, path, _use_new_zipfile_serialization=zipped)
    assert torch.equal(load(path, num_heads=2).vit.norm.bias, STATE["norm.bias"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_told(tmp_path, value):
    state = {**STATE, "norm.bias": torch.full((64,), value)}
    with pytest.warns(RuntimeWarning, match=r"1 tensor\(s\) hold NaN .* such as vit\.norm\.bias"):
        load(written(tmp_path / "w.pth", state), num_heads=2)


def test_the_number_of_networks_is_bounded(tmp_path):
    state = {f"n{i}.patch_embed.proj.weight": torch.zeros(0) for i in range(65)}
    with pytest.raises(ValueError, match="holds 65 networks, more than 64"):
        load(written(tmp_path / "w.pth", state))


def test_only_regular_files_beside_their_index(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    (tmp_path / "zero.pth").symlink_to("/dev/zero")
    with pytest.raises(FileNotFoundError, match="found: none"):
        load(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for shard in ("../../etc/passwd", "/etc/passwd", "http://a/b", "", ".", ".."):
        index.write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(ValueError, match="names shards that are not beside it"):
            load(tmp_path)
    for text in ("[]", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        with pytest.raises(ValueError, match="is not an index of shards"):
            load(tmp_path)
    index.write_text("[" * 10**5)
    with pytest.raises(ValueError, match="is not JSON"):
        load(tmp_path)


def test_fresh_weights_are_no_way_round(own_file, tmp_path):
    tensors, described = own_file
    wide = {**described, "settings": {**described["settings"], "embed_dim": 2048}}
    save_file(tensors, tmp_path / "w.safetensors", {"sslkit.encoder": json.dumps(wide)})
    kept = "vit.patch_embed.proj.bias"
    with pytest.raises(ValueError, match=r"too few for ignore|leaves no tensor"):
        load(tmp_path / "w.safetensors", ignore=["*"])
    several = {**tensors, kept: torch.zeros(2048)}
    save_file(several, tmp_path / "w.safetensors", {"sslkit.encoder": json.dumps(wide)})
    with pytest.raises(ValueError, match="parameters, but the file only"):
        load(tmp_path / "w.safetensors", ignore=["*"])


@pytest.mark.parametrize("given", ["steps/12", "steps/12/__0_0.distcp", "steps/12/.metadata", "."])
def test_a_distributed_checkpoint_is_named(tmp_path, given):
    folder = tmp_path / "my run" / "steps" / "12"
    folder.mkdir(parents=True)
    (folder / "__0_0.distcp").write_bytes(b"PK\x03\x04")
    (folder / ".metadata").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match="is a distributed checkpoint") as caught:
        load(tmp_path / "my run" / given)
    command = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
    assert f"{command}'{folder}' weights.pth" in str(caught.value)


# --- networks in a file --------------------------------------------------------------------------


def test_which_network(tmp_path):
    other = {name: tensor + 1 for name, tensor in STATE.items()}
    both = {"student": with_prefix(other, "backbone."), "teacher": with_prefix(STATE, "backbone.")}
    path = written(tmp_path / "w.pth", both)
    for which, state in ((None, STATE), ("teacher", STATE), ("student", other)):
        loaded = load_pretrained(path, num_heads=2, which=which)
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
    loaded = load_pretrained(path, num_heads=2, ignore=["*decoder*", "mystery"])
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
    loaded = load_pretrained(
        path, num_heads=2, ignore=["*.norm3.*", "blocks.1.mlp.fc1.bias", "vit.norm.*"]
    )
    assert loaded.report.missing == {
        "vit.blocks.1.mlp.fc1.bias": "fresh weights, by ignore",
        "vit.norm.weight": "fresh weights, by ignore (the file's is [3])",
    }
    assert torch.equal(loaded.encoder.vit.norm.weight, torch.ones(64))
    assert torch.equal(loaded.encoder.vit.norm.bias, STATE["norm.bias"])
    assert not any(p.is_meta for p in loaded.encoder.parameters())


def test_a_classifier_is_reported_and_left_out(tmp_path):
    path = written(tmp_path / "w.pth", STATE, **{"head.weight": torch.zeros(10, 64)})
    assert load_pretrained(path, num_heads=2).report.unused == {"head.weight": "a classifier"}


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
        report = load_pretrained(path, num_heads=2).report
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


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("run/pretrain.safetensor", "run/pretrain.safetensors"),
        ("runs/pretrain.safetensors", "run/pretrain.safetensors"),
        ("random:run/pretrian.safetensors", "run/pretrain.safetensors"),
        ("tim:vit_tiny_patch16_224", "timm:vit_tiny_patch16_224"),
        ("radnom:sslkit_vit_micro", "random:sslkit_vit_micro"),
        ("sslkit_vit_micro", "random:sslkit_vit_micro"),
        ("vit_tiny_patch16_224", "timm:vit_tiny_patch16_224"),
        ("facebook/dinov2-base", "hf:facebook/dinov2-base"),
        ("nothing like it", None),
    ],
)
def test_what_a_wrong_name_was_meant_for(given, meant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(create("sslkit_vit_micro"), tmp_path / "run" / "pretrain.safetensors")
    with pytest.raises(FileNotFoundError) as caught:
        load(given)
    said = f"did you mean {meant}?" if meant else "give a file, a folder, hf:ORG/NAME, timm:NAME"
    assert f"no weights {given.removeprefix('random:')!r}: {said}" in str(caught.value)


def test_what_is_for_files_is_not_for_names():
    with pytest.raises(ValueError, match="which, num_heads is for files: leave it out"):
        load("random:sslkit_vit_micro", which="student", num_heads=3)


# --- the command ---------------------------------------------------------------------------------


def test_the_command_prints_the_report(tmp_path, capsys):
    path = str(written(tmp_path / "w.pth", STATE))
    words = ["backbones", path, "--num-heads", "2", "--in-chans", "1", "--img-size", "56", "28"]
    assert sslkit_command(words) == 0
    text = capsys.readouterr().out
    assert "DINOv2's names" in text
    assert "3 x 3 to 4 x 2 patches (dinov2)" in text
    assert "3 to 1, repeated in turn" in text
    with pytest.raises(SystemExit, match=r"^error: no weights .*did you mean \S+/w\.pth\?"):
        sslkit_command(["backbones", str(tmp_path / "ww.pth")])
    with pytest.raises(SystemExit, match="img_size must be one number or"):
        sslkit_command([*words, "42"])

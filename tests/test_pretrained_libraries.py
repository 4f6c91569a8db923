"""Weights of timm and transformers, by file and by name: our tokens against theirs."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

from sslkit.backbones import load
from tests.networks import flat, randomize

GRIDS = [(5, 5), (2, 4), (7, 3)]
ALMOST = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- timm ----------------------------------------------------------------------------------------

TIMM = {
    "dinov2": ("vit_small_patch14_dinov2", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "packed SwiGLU": ("vit_giant_patch14_dinov2", {}),
    "plain": ("vit_tiny_patch16_224", {}),
    "classifier": ("vit_tiny_patch16_224", {"num_classes": 5}),
    "pooled": ("vit_small_patch16_224", {"global_pool": "avg", "num_classes": 5}),
    "DINOv3": ("vit_small_patch16_dinov3_qkvb", {}),
    "DINOv3, SwiGLU": ("vit_small_plus_patch16_dinov3", {}),
}


def small_timm(name, **changes):
    size = {"num_classes": 0, "embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 80}
    if "patch14" in name:
        size["img_size"] = 70
    if "giant" in name:
        size["mlp_ratio"] = 2 * 88 / 64
    network = timm.create_model(name, dynamic_img_size=True, **{**size, **changes})
    return randomize(network.eval())


@pytest.mark.parametrize("case", TIMM)
@torch.no_grad()
def test_timm(tmp_path, case):
    name, changes = TIMM[case]
    network = small_timm(name, **changes)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    encoder = load(tmp_path, num_heads=2).eval()
    p = encoder.patch_size[0]
    for H, W in GRIDS:
        images = torch.randn(2, 3, p * H, p * W)
        features = network.forward_features(images)
        norm = getattr(network, "fc_norm", None) or torch.nn.Identity()
        torch.testing.assert_close(flat(encoder(images)), norm(features), **ALMOST)
        if case != "pooled":
            expected = network.forward_intermediates(
                images, 2, return_prefix_tokens=True, norm=True, intermediates_only=True
            )
            for tokens, (patches, prefix) in zip(
                encoder.intermediate(images, 2), expected, strict=True
            ):
                torch.testing.assert_close(tokens.patches, patches.movedim(1, -1), **ALMOST)
                torch.testing.assert_close(tokens.cls, prefix[:, 0], **ALMOST)


@torch.no_grad()
def test_timms_config_tells_what_tensors_do_not(tmp_path):
    """Another activation and heads; the grid is not square."""
    name = "vit_base_patch16_clip_quickgelu_224"
    changes = {"embed_dim": 64, "depth": 2, "num_heads": 8, "img_size": [48, 80]}
    network = small_timm(name, **changes)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": name, "num_classes": 0, "model_args": changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        encoder = load(path).eval()
        images = torch.randn(1, 3, 48, 80)
        torch.testing.assert_close(
            flat(encoder(images)), network.forward_features(images), **ALMOST
        )
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"missing: patch_embed\.proj\.bias"):
        load(tmp_path, num_heads=8)
    with pytest.raises(ValueError, match=r"unexpected: norm_pre\.weight"):
        load(tmp_path, num_heads=8, file_img_size=(48, 80))


@torch.no_grad()
def test_an_architecture_can_be_stated(tmp_path):
    network = timm.create_model("vit_wee_patch16_reg1_gap_256", depth=1).eval()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"timm cannot build .resnet18.|cannot wrap a ResNet"):
        load(tmp_path / "w.pth", architecture="resnet18")
    network = timm.create_model("vit_little_patch16_reg1_gap_256", num_classes=0).eval()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    encoder = load(tmp_path / "w.pth", architecture="vit_little_patch16_reg1_gap_256").eval()
    images = torch.randn(1, 3, 64, 64)
    expected = timm.create_model(
        "vit_little_patch16_reg1_gap_256", num_classes=0, dynamic_img_size=True
    ).eval()
    expected.load_state_dict(network.state_dict())
    expected = expected.fc_norm(expected.forward_features(images))
    torch.testing.assert_close(flat(encoder(images))[:, 1:], expected, **ALMOST)


@torch.no_grad()
def test_timms_own_weights_by_name(monkeypatch):
    """With a stand-in for the download."""
    create_model, asked = timm.create_model, []

    def downloaded(name, pretrained=False, **kwargs):
        asked.append((name, pretrained))
        torch.manual_seed(len(asked) if pretrained else 99)
        return create_model(name, depth=1, **{k: v for k, v in kwargs.items() if k != "depth"})

    monkeypatch.setattr(timm, "create_model", downloaded)
    grey = load("timm:vit_tiny_patch16_224", in_chans=1, img_size=64).eval()
    assert asked[0] == ("vit_tiny_patch16_224", True)
    assert not any(pretrained for _, pretrained in asked[1:])
    torch.manual_seed(1)
    network = create_model("vit_tiny_patch16_224", depth=1, num_classes=0, dynamic_img_size=True)
    images = torch.randn(1, 1, 64, 64)
    expected = network.eval().forward_features(images.expand(-1, 3, -1, -1))
    torch.testing.assert_close(flat(grey(images)), expected, **ALMOST)


def test_a_grid_that_is_not_square_is_stated(tmp_path):
    network = small_timm("vit_tiny_patch16_224", img_size=(48, 96))
    torch.save(network.state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="18 positions, which is not a square grid: give file"):
        load(tmp_path / "w.pth", num_heads=2)
    with pytest.raises(ValueError, match=r"makes a grid of 3 x 4 patches, but the file has 18"):
        load(tmp_path / "w.pth", num_heads=2, file_img_size=(48, 64))
    encoder = load(tmp_path / "w.pth", num_heads=2, file_img_size=(48, 96)).eval()
    images = torch.randn(1, 3, 48, 96)
    with torch.no_grad():
        expected = network.forward_features(images)
        torch.testing.assert_close(flat(encoder(images)), expected, **ALMOST)


# --- transformers --------------------------------------------------------------------------------

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "layerscale_value": 0.8,
}


TRANSFORMERS = {
    "dinov2": lambda: Dinov2Model(Dinov2Config(**TINY, image_size=70, patch_size=14)),
    "dinov2, SwiGLU": lambda: Dinov2Model(
        Dinov2Config(**TINY, image_size=70, patch_size=14, use_swiglu_ffn=True)
    ),
    "dinov2, classifier": lambda: Dinov2ForImageClassification(
        Dinov2Config(**TINY, image_size=70, patch_size=14, num_labels=3)
    ),
    "registers": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**TINY, image_size=70, patch_size=14)
    ),
    "dinov3": lambda: DINOv3ViTModel(
        DINOv3ViTConfig(**TINY, num_register_tokens=4, intermediate_size=100)
    ),
    "dinov3, gated": lambda: DINOv3ViTModel(
        DINOv3ViTConfig(
            **TINY,
            num_register_tokens=4,
            intermediate_size=100,
            use_gated_mlp=True,
            hidden_act="silu",
        )
    ),
}


def random_transformer(case):
    return randomize(TRANSFORMERS[case]().eval())


@pytest.mark.parametrize("case", TRANSFORMERS)
@torch.no_grad()
def test_transformers(tmp_path, case):
    model = random_transformer(case)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    torch.save(model.state_dict(), tmp_path / "memory.pth")
    encoder = load(tmp_path / "whole").eval()
    for other in (load(tmp_path / "shards"), load(tmp_path / "memory.pth", num_heads=2)):
        torch.testing.assert_close(dict(other.state_dict()), dict(encoder.state_dict()))
    model = getattr(model, "dinov2", model)
    norm = model.layernorm if "dinov2" in case or case == "registers" else model.norm
    p = encoder.patch_size[0]
    for H, W in GRIDS:
        images, masks = torch.randn(2, 3, p * H, p * W), torch.rand(2, H, W) < 0.5
        plain = model(images, output_hidden_states=True)
        masked = model(images, bool_masked_pos=masks.flatten(1))
        torch.testing.assert_close(flat(encoder(images)), plain.last_hidden_state, **ALMOST)
        torch.testing.assert_close(flat(encoder(images, masks)), masked.last_hidden_state, **ALMOST)
        before = encoder.intermediate(images, 2)[0]
        torch.testing.assert_close(flat(before), norm(plain.hidden_states[-2]), **ALMOST)


def test_transformers_config_is_heeded(tmp_path):
    model = random_transformer("dinov2")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in {"hidden_act": "relu", "layer_norm_eps": 1e-3}.items():
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=f"config.json says {key}="):
            load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(ValueError, match=r"missing: encoder\.layer\.3\.norm1\.weight"):
        load(tmp_path)


# --- the hub, with a stand-in for the download ---------------------------------------------------


def test_names_of_the_hugging_face_hub(tmp_path, monkeypatch):
    import huggingface_hub

    random_transformer("dinov2").save_pretrained(tmp_path / "repo")
    asked = []

    def snapshot(repo_id, revision, allow_patterns):
        asked.append((repo_id, revision, "*.safetensors" in allow_patterns))
        return str(tmp_path / "repo")

    def one_file(repo_id, revision, filename):
        asked.append((repo_id, revision, filename))
        return str(tmp_path / "repo" / filename)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", one_file)
    assert load("hf:facebook/dinov2-tiny").num_heads == 2
    assert load("hf:facebook/dinov2-tiny@v1").num_heads == 2
    assert load("hf:facebook/dinov2-tiny/model.safetensors").num_heads == 2
    assert asked == [
        ("facebook/dinov2-tiny", None, True),
        ("facebook/dinov2-tiny", "v1", True),
        ("facebook/dinov2-tiny", None, "model.safetensors"),
    ]

    def offline(**_):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(RuntimeError, match=r"hf:a/b could not be .*no route to host.*HF_HOME"):
        load("hf:a/b")
    with pytest.raises(ValueError, match="hf:ORG/NAME"):
        load("hf:a")

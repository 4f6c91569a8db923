"""HubEncoder: folders, model cards, and pushes to a stand-in of the Hub."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard, hub_mixin
from timm.models.vision_transformer import VisionTransformer

from sslkit import MatryoshkaProjector, RASAProjector
from sslkit.backbones import ViTEncoder, load, read_metadata
from sslkit.export import HubEncoder
from sslkit.export import hub as hub_module
from sslkit.export.card import Card, Score, read_scores
from tests.test_export_timm import network

SETTINGS = {"data": "/home/someone/images", "sources": ["voc:/data/VOC", "scenes"], "steps": 10}
METADATA = {"stage": "pretrain", "step": "10", "settings": json.dumps(SETTINGS)}


def plain_encoder():
    return network("sslkit_vit_micro", reg_tokens=2, pos_interpolation="dinov2")


def hub_encoder(**kwargs):
    return HubEncoder(plain_encoder(), metadata=METADATA, **kwargs)


def assert_same_tokens(one, other):
    torch.manual_seed(1)
    images, masks = torch.randn(2, 3, 24, 32), torch.rand(2, 6, 8) < 0.5
    with torch.no_grad():
        for a, b in zip(one(images, masks), other(images, masks), strict=True):
            assert torch.equal(a, b)


def test_save_and_load(tmp_path):
    heads = {"dino_head": MatryoshkaProjector(32, 16, hidden_dim=8, bottleneck_dim=4)}
    encoder = hub_encoder(heads=heads)
    encoder.save_pretrained(tmp_path)
    again = HubEncoder.from_pretrained(tmp_path)
    assert not again.training
    assert again.metadata == METADATA == read_metadata(tmp_path / "model.safetensors")
    assert_same_tokens(plain_encoder(), again)
    assert_same_tokens(plain_encoder(), load(tmp_path).eval())
    x = torch.randn(3, 32)
    for a, b in zip(heads["dino_head"](x), again.heads["dino_head"](x), strict=True):
        assert torch.equal(a, b)
    assert "dino_head" not in "".join(again.state_dict())
    assert HubEncoder.from_pretrained(tmp_path, img_size=(16, 24)).grid_size == (4, 6)
    again.save_pretrained(tmp_path / "twice")
    assert_same_tokens(encoder, HubEncoder.from_pretrained(tmp_path / "twice"))


def test_rasa_stays_folded_in(tmp_path):
    encoder = network("sslkit_vit_micro")
    encoder.vit = RASAProjector.from_planes([torch.eye(32)[:2]]).fold_into_vit(encoder.vit)
    HubEncoder(encoder).save_pretrained(tmp_path)
    assert_same_tokens(encoder, HubEncoder.from_pretrained(tmp_path))
    assert "RASA is folded into" in (tmp_path / "README.md").read_text()


def test_it_shares_the_encoders_weights():
    encoder = network("sslkit_vit_micro")
    made = HubEncoder(encoder)
    assert isinstance(made, ViTEncoder)
    assert {id(p) for p in made.parameters()} == {id(p) for p in encoder.parameters()}
    assert made.settings == encoder.settings


def test_a_tensor_that_is_missing_is_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    hub_encoder().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    del tensors["mask_token"]
    save_file(tensors, path, metadata=header)
    with pytest.raises(ValueError, match="mask_token"):
        HubEncoder.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no settings"):
        HubEncoder(ViTEncoder(VisionTransformer(img_size=32, depth=1, embed_dim=32, num_heads=2)))


def test_the_card(tmp_path):
    card = Card(
        title="me/micro",
        license="cc-by-4.0",
        datasets=("me/images",),
        scores=(Score("k-NN accuracy", 0.25), Score("position R2", 0.5, (0.4, 0.625))),
        scored_on="/home/someone/cifar10.npz",
        source=("pretrain.safetensors", "ab" * 32),
    )
    hub_encoder(card=card).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    header = ModelCard(text).data.to_dict()
    assert header["license"] == "cc-by-4.0"
    assert header["library_name"] == "sslkit"
    assert header["datasets"] == ["me/images"]
    assert header["metrics"] == ["k-NN accuracy", "position R2"]
    assert {"self-supervised-learning", "pytorch_model_hub_mixin"} <= set(header["tags"])
    measured = header["model-index"][0]["results"][0]
    assert measured["dataset"]["name"] == "cifar10.npz"
    assert [m["value"] for m in measured["metrics"]] == [0.25, 0.5]
    assert "| k-NN accuracy | 0.2500 |  |" in text
    assert "| position R2 | 0.5000 | 0.4000 to 0.6250 |" in text
    assert 'HubEncoder.from_pretrained("me/micro")' in text
    assert "width 32, 2 blocks of 2 heads, patches of 4 x 4 pixels" in text
    assert "- stage: `pretrain`" in text
    assert "- its SHA-256: `" + "ab" * 32 + "`" in text
    digest = hub_module.file_digest(tmp_path / "model.safetensors")
    assert f"- SHA-256 of model.safetensors: `{digest}`" in text
    shown = json.loads(text.split("```json\n")[1].split("```")[0])
    assert shown == {"data": "images", "sources": ["voc:VOC", "scenes"], "steps": 10}
    assert "someone" not in text


def test_a_card_without_a_run_claims_nothing(tmp_path):
    HubEncoder(network("sslkit_vit_micro")).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "license" not in ModelCard(text).data.to_dict()
    assert "Licence of the weights: none was stated." in text
    assert "## Scores" not in text
    assert "## Training" not in text


class StandIn:
    """The Hub's HTTP API on a folder: repositories, and what is uploaded to them."""

    def __init__(self, folder, token=None):
        self.folder, self.token, self.created = folder, token, []

    def create_repo(self, *, repo_id, private, exist_ok):
        assert exist_ok
        self.created.append((repo_id, private))
        (self.folder / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, repo_type, folder_path, **options):
        assert repo_type == "model"
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)
        return f"https://hub/{repo_id}/commit/1"

    def download(self, repo_id, filename, **options):
        return str(self.folder / repo_id / filename)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    api = StandIn(tmp_path / "hub")
    monkeypatch.setattr(hub_mixin, "HfApi", lambda token=None: api)
    monkeypatch.setattr(hub_mixin, "hf_hub_download", api.download)
    monkeypatch.setattr(hub_module, "hf_hub_download", api.download)
    return api


def test_push_and_load_by_name(stand_in, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    encoder = hub_encoder()
    assert encoder.push_to_hub("me/micro", private=True) == "https://hub/me/micro/commit/1"
    assert stand_in.created == [("me/micro", True)]
    files = {path.name for path in (stand_in.folder / "me" / "micro").iterdir()}
    assert files == {"README.md", "config.json", "model.safetensors"}
    assert_same_tokens(encoder, HubEncoder.from_pretrained("me/micro"))


RECIPE = {
    "knn": {"raw pixels": 0.1, "pretrain": 0.4},
    "matryoshka": {"pretrain": {"8": 0.2, "16": 0.3}},
    "in_context": {},
    "position_r2": {"pretrain": 0.6, "rasa": 0.1},
}
EVALUATION = {
    "models": ["trained"],
    "protocols": {
        "knn": {"trained": {"scores": {"top-1": {"value": 0.5, "interval": [0.4, 0.6]}}}},
        "pca": {"trained": {"scores": {}}},
    },
    "settings": {"data": "scenes"},
}


def test_scores_of_the_recipe_and_of_evaluation(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(RECIPE))
    scores, data = read_scores(path, "pretrain")
    assert [(score.name, score.value) for score in scores] == [
        ("k-NN accuracy", 0.4),
        ("k-NN accuracy, first 8 features", 0.2),
        ("k-NN accuracy, first 16 features", 0.3),
        ("position R2", 0.6),
    ]
    assert data is None
    with pytest.raises(ValueError, match="no scores of 'highres'; it has raw pixels, pretrain, ra"):
        read_scores(path, "highres")
    path.write_text(json.dumps(EVALUATION))
    assert read_scores(path, "trained") == ((Score("knn top-1", 0.5, (0.4, 0.6)),), "scenes")
    for text, message in [("[]", "but a list"), ("{", "is not JSON"), ("{}", "it has none")]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_scores(path, "trained")
    with pytest.raises(FileNotFoundError, match="no results at"):
        read_scores(Path("absent.json"), "trained")

"""``sslkit export`` and the entry points of ``torch.hub``."""

import json
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch

import sslkit
from sslkit import RASAProjector
from sslkit.backbones import load, save
from sslkit.commands.main import run as sslkit_command
from sslkit.export import HubEncoder
from sslkit.rasa import save_rasa
from tests.test_export_hub import METADATA, RECIPE
from tests.test_export_timm import network


def main(words: list[str]) -> int:
    return sslkit_command(["export", *words])


ROOT = Path(sslkit.__file__).parent.parent


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "run" / "pretrain.safetensors"
    save(network("sslkit_vit_micro", depth=1), path, METADATA)
    return path


@pytest.fixture
def rasa(tmp_path):
    save_rasa(RASAProjector.from_planes([torch.eye(32)[:2]]), tmp_path / "rasa.safetensors")
    return tmp_path / "rasa.safetensors"


def refusal(*words):
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    return stopped.value.code


@pytest.mark.usefixtures("pytorchs_bodies")
def test_timm(weights, tmp_path, capsys):
    (weights.parent / "results.json").write_text(json.dumps(RECIPE))
    main(["timm", "--weights", str(weights), "--output", str(tmp_path / "out")])
    call = capsys.readouterr().out.strip()
    vit = eval(call, {"timm": timm}).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(vit(images), load(weights).eval()(images).cls)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: timm" in card
    assert "| k-NN accuracy | 0.4000 |" in card
    assert "Data: images. Shares" in card
    assert "- from: `pretrain.safetensors`" in card


def test_hf_with_rasa(weights, rasa, tmp_path, capsys):
    words = ["--weights", str(weights), "--rasa", str(rasa), "--output", str(tmp_path / "out")]
    main(["hf", *words, "--license", "mit", "--name", "me/micro"])
    main(["hf", *words, "--license", "mit", "--name", "me/other"])  # the card is written anew
    again = HubEncoder.from_pretrained(tmp_path / "out")
    images = torch.randn(2, 3, 32, 32)
    tokens = again(images)
    assert tokens.cls[:, :2].abs().max() < 1e-5
    expected = load(weights).eval()(images).patches[..., 2:]
    torch.testing.assert_close(tokens.patches[..., 2:], expected, rtol=0, atol=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card
    assert "# me/other" in card
    assert "- rasa: `rasa.safetensors`" in card
    assert '"steps": 10' in card


def test_settings_beside_an_encoder_with_rasa(tmp_path, capsys):
    path = tmp_path / "rasa.safetensors"
    save(network("sslkit_vit_micro", depth=1), path, {"stage": "rasa", "of": "pretrain"})
    (tmp_path / "settings.json").write_text('{"seed": 7}')
    (tmp_path / "results.json").write_text(json.dumps({"knn": {"pretrain": 0.5}}))
    main(["hf", "--weights", str(path), "--output", str(tmp_path / "out")])
    assert '"seed": 7' in (tmp_path / "out" / "README.md").read_text()
    assert "no scores in the card: " in capsys.readouterr().err


def test_settings_that_are_a_link_or_not_json_are_not_published(tmp_path):
    path = tmp_path / "rasa.safetensors"
    save(network("sslkit_vit_micro", depth=1), path, {"stage": "rasa"})
    (tmp_path / "private.json").write_text('{"password": 1}')
    (tmp_path / "settings.json").symlink_to(tmp_path / "private.json")
    words = ["hf", "--weights", str(path), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"settings\.json is a link"):
        main(words)
    (tmp_path / "settings.json").unlink()
    (tmp_path / "settings.json").write_text("not JSON")
    with pytest.raises(SystemExit, match=r"settings\.json is not JSON"):
        main(words)
    assert not (tmp_path / "out" / "README.md").exists()


def test_onnx_and_torch(weights, tmp_path):
    images = torch.randn(2, 3, 24, 16)
    expected = load(weights).eval()(images).cls
    main(["torch", "--weights", str(weights), "--output", str(tmp_path)])
    program = torch.export.load(tmp_path / "encoder.pt2").module()
    torch.testing.assert_close(program(images)["cls"], expected, rtol=0, atol=1e-5)
    main(["onnx", "--weights", str(weights), "--output", str(tmp_path)])
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx")
    cls = torch.from_numpy(session.run(["cls"], {"images": images.numpy()})[0])
    torch.testing.assert_close(cls, expected, rtol=0, atol=2e-5)


def test_refusals_are_one_line(weights, rasa, tmp_path):
    out = ["--output", tmp_path / "out"]
    absent = refusal("timm", "--weights", tmp_path / "absent.safetensors", *out)
    assert absent.startswith("error: ")
    folded = refusal("timm", "--weights", weights, "--rasa", rasa, *out)
    assert folded.startswith("error: RASA is folded into the encoder's final norm")
    push = refusal("hf", "--weights", weights, *out, "--push")
    assert push == "error: --push needs --name ORG/NAME, the repository to upload to"
    results = refusal("hf", "--weights", weights, *out, "--results", tmp_path / "absent.json")
    assert results.startswith("error: no results at")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing of the kind")
    damaged = refusal("onnx", "--weights", broken, *out)
    for text in (absent, folded, push, results, damaged):
        assert "\n" not in text
    assert not (tmp_path / "out").exists()


HUB = """
import sys, torch
encoder = torch.hub.load(sys.argv[1], "encoder", sys.argv[2], source="local", img_size=(16, 24))
rasa = torch.hub.load(sys.argv[1], "rasa", sys.argv[3], source="local")
print(encoder.training, encoder.grid_size, tuple(rasa.basis.shape))
fresh = torch.hub.load(sys.argv[1], "franca_vits14", source="local", depth=1, img_size=28)
sys.path.insert(0, sys.argv[1])
import hubconf
public = {name: value for name, value in vars(hubconf).items() if not name.startswith("_")}
print(fresh.embed_dim, fresh.training, sorted(n for n, value in public.items() if callable(value)))
try:
    torch.hub.load(sys.argv[1], "franca_vitb14", sys.argv[2], source="local")
except ValueError as error:
    print(error)
"""


def test_torch_hub(weights, rasa, tmp_path):
    """From another folder, as a user: `torch.hub` puts the repository on the path itself."""
    done = subprocess.run(
        [sys.executable, "-c", HUB, str(ROOT), str(weights), str(rasa)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "False (4, 6) (2, 32)"
    names = ["encoder", "franca_vitb14", "franca_vitg14", "franca_vitl14", "franca_vits14", "rasa"]
    assert lines[1] == f"384 False {names}"
    assert "is no franca_vitb14, which has (width, depth, heads) = (768, 12, 12)" in lines[2]

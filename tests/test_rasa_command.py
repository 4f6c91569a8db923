"""``sslkit rasa``: fits, measures, writes and folds, on any encoder."""

import json

import pytest
import torch
from safetensors import safe_open

from sslkit import backbones
from sslkit.commands.main import run as sslkit_command
from sslkit.data.sources import open_source
from sslkit.evaluation.views import EvalTransform
from sslkit.rasa import RASAProjector, load_rasa, save_rasa


def main(words: list[str]) -> int:
    return sslkit_command(["rasa", *words])


SCENES = ["--data", "scenes", "--num-images", "40", "--num-test", "20"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A network whose position embedding is loud."""
    torch.manual_seed(3)
    encoder = backbones.create("sslkit_vit_micro", img_size=32)
    with torch.no_grad():
        encoder.vit.pos_embed.mul_(20)
    path = tmp_path_factory.mktemp("weights") / "loud.safetensors"
    backbones.save(encoder, path)
    return str(path)


def test_fit_removes_position_and_folds(tmp_path, weights, capsys):
    output, folded = tmp_path / "rasa.safetensors", tmp_path / "folded.safetensors"
    words = ["--output", str(output), "--fold", str(folded), "--figures", str(tmp_path / "page")]
    main(["fit", "--weights", weights, *SCENES, *words])
    printed = capsys.readouterr()
    with safe_open(output, framework="pt") as file:
        before, after = json.loads(file.metadata()["position_r2"])
        errors = json.loads(file.metadata()["position_errors"])
    assert before > 0.4
    assert after < 0.1
    assert f"{before:.3f} -> {after:.3f}" in printed.out
    for number, error in enumerate(errors, start=1):
        assert f"iteration {number}: position error {error:.5f}" in printed.out + printed.err
    image = EvalTransform(32)(open_source("scenes")[0][0])[None]
    encoder, plain = backbones.load(folded).eval(), backbones.load(weights).eval()
    with torch.no_grad():
        expected = load_rasa(output)(plain(image).patches)
        assert torch.allclose(encoder(image).patches, expected, atol=1e-4)
    assert {p.name for p in (tmp_path / "page" / "figures").iterdir()} == {
        "position.png",
        "pca.png",
    }

    again = tmp_path / "again.safetensors"
    main(["fold", "--weights", weights, "--rasa", str(output), "--output", str(again)])
    state, other = backbones.load(again).state_dict(), encoder.state_dict()
    assert all(torch.equal(state[name], other[name]) for name in other)


def test_fit_depends_on_its_seed_alone(tmp_path, weights):
    bases = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        words = ["--num-images", "6", "--num-test", "4", "--num-iterations", "1"]
        path = tmp_path / name
        words += ["--output", str(path), "--seed", str(seed), "--image-size", "16", "24"]
        main(["fit", "--weights", weights, "--data", "scenes", *words])
        bases.append(load_rasa(path).basis)
    assert torch.equal(bases[0], bases[1])
    assert not torch.equal(bases[0], bases[2])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weights", "floor", "--fold", "x"], "cannot be folded into floor, a ColourAndPosition"),
        (["--weights", "floor"], r"dim must exceed 2 \* num_iterations"),
        (["--image-size", "30"], "--image-size 30 30 must be positive multiples of 4"),
        (["--num-images", "0"], "--num-images must be at least 1"),
        (["--weights", "nowhere"], "no weights 'nowhere'"),
        (["--data", "nowhere"], "no data 'nowhere'"),
    ],
)
def test_mistakes_take_one_line(tmp_path, weights, words, message):
    given = ["--weights", weights, *SCENES, "--num-images", "2", "--output", str(tmp_path / "r")]
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        main(["fit", *given, *words])
    assert not (tmp_path / "r").exists()


def test_a_gpu_that_is_not_there(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    words = ["--output", str(tmp_path / "r"), "--device", "cuda"]
    with pytest.raises(SystemExit, match="error: device 'cuda' needs GPU 0"):
        main(["fit", "--weights", weights, *SCENES, *words])


def test_fold_says_what_does_not_fit(tmp_path, weights):
    save_rasa(RASAProjector(50, num_iterations=2), tmp_path / "rasa")
    words = ["--rasa", str(tmp_path / "rasa"), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="needs a ViT with a final LayerNorm over D=50"):
        main(["fold", "--weights", weights, *words])
    with pytest.raises(SystemExit, match="cannot be folded into floor"):
        main(["fold", "--weights", "floor", *words])

"""``sslkit evaluate``: models and data by name, one table, errors in one line."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sslkit import RASAProjector, backbones
from sslkit.commands.evaluate import SUMMARIES
from sslkit.commands.main import run as sslkit_command
from sslkit.evaluation.linear_probe import LEARNING_RATES
from sslkit.evaluation.models import open_model
from sslkit.evaluation.options import OPTIONS
from sslkit.evaluation.protocols import PROTOCOLS
from sslkit.rasa import load_rasa
from tests import released


def main(words: list[str]) -> int:
    return sslkit_command(["evaluate", *words])


SCENES = ["--data", "scenes", "--num-scenes", "24", "--scene-size", "32"]
QUICK = ["--num-resamples", "50", "--global-size", "16", "--dense-size", "24"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "trained.safetensors"
    torch.manual_seed(7)
    backbones.save(backbones.create("sslkit_vit_micro", img_size=16), path)
    return path


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


# --- models by name ------------------------------------------------------------------------------


def test_models_by_name(weights):
    trained = open_model(str(weights))
    assert trained.name == "trained"
    state = trained.encoder.state_dict()
    fresh = open_model(f"random:{weights}")
    other = open_model(f"random:{weights}", seed=1)
    again = open_model(f"random:{weights}")
    assert (fresh.name, fresh.encoder.img_size) == ("random", (16, 16))
    key = "vit.blocks.0.attn.qkv.weight"
    assert not torch.equal(fresh.encoder.state_dict()[key], state[key])
    assert not torch.equal(fresh.encoder.state_dict()[key], other.encoder.state_dict()[key])
    assert torch.equal(fresh.encoder.state_dict()[key], again.encoder.state_dict()[key])
    assert len({m.identity for m in (trained, fresh, other)}) == 3
    assert fresh.identity == again.identity
    named = open_model("mine=random:sslkit_vit_micro")
    assert (named.name, named.encoder.embed_dim) == ("mine", 32)
    assert open_model("floor", floor_patch_size=4).encoder.patch_size == (4, 4)
    assert open_model(f"a={weights}").name == "a"


def test_models_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights 'x.pt': give a file, a folder, hf:"):
        open_model("x.pt")
    with pytest.raises(ValueError, match="unknown backbone 'vitt'"):
        open_model("random:vitt")
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"neither a safetensors file nor one of torch\.save"):
        open_model(str(tmp_path / "a.safetensors"))


def test_released_weights_are_models(tmp_path):
    state = released.values(released.ibot_shapes(192, 1, grid=2))
    torch.save({"teacher": state}, tmp_path / "dino.pth")
    model = open_model(str(tmp_path / "dino.pth"))
    assert (model.name, model.encoder.num_heads) == ("dino", 3)
    (tmp_path / "folder").mkdir()
    save_file(state, tmp_path / "folder" / "model.safetensors")
    folder = open_model(str(tmp_path / "folder"))
    assert folder.name == "folder"
    assert folder.identity != model.identity
    fresh = open_model(f"random:{tmp_path / 'folder'}")
    assert fresh.encoder.settings == folder.encoder.settings


def test_rasa_files(tmp_path, weights):
    rasa = RASAProjector(8, num_iterations=2)
    rasa.basis.copy_(torch.linalg.qr(torch.randn(8, 4))[0].T)
    save_file(rasa.state_dict(), tmp_path / "rasa.safetensors")
    x = torch.randn(3, 8)
    assert torch.equal(load_rasa(tmp_path / "rasa.safetensors")(x), rasa(x))
    with pytest.raises(ValueError, match=r"expected one tensor, basis .* give it as the weights"):
        load_rasa(weights)
    with pytest.raises(FileNotFoundError, match="no RASA file"):
        load_rasa(tmp_path / "missing")
    (tmp_path / "bad").write_bytes(b"no")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_rasa(tmp_path / "bad")


# --- the command line ----------------------------------------------------------------------------


def test_models_side_by_side(tmp_path, weights, capsys):
    words = ["knn", "--weights", str(weights), f"fresh=random:{weights}", "--nesting", "8"]
    main([*words, *SCENES, *QUICK, "--ks", "1", "20", "--output", str(tmp_path)])
    names = ["trained", "trained[:8]", "fresh", "fresh[:8]"]
    found = results(tmp_path)
    assert found["models"] == names
    assert set(found["protocols"]["knn"]) == set(names)
    for name in names:
        score = found["protocols"]["knn"][name]["scores"]["k=20"]
        low, high = score["interval"]
        assert low <= score["value"] <= high
        assert (score["difference_to_first"] is None) == (name == "trained")
    page = (tmp_path / "report.md").read_text()
    assert "| Score | trained | trained[:8] | fresh | fresh[:8] |" in page
    assert "knn k=20" in capsys.readouterr().out
    files = [path for path in tmp_path.glob("features/*/*/*") if path.name != "lock"]
    before = [path.stat().st_mtime_ns for path in files]
    assert before
    main([*words, *SCENES, *QUICK, "--ks", "1", "20", "--output", str(tmp_path)])
    assert [path.stat().st_mtime_ns for path in files] == before  # nothing is extracted again
    assert results(tmp_path)["protocols"] == found["protocols"]


def test_rasa_is_applied(tmp_path, weights):
    encoder = backbones.load(weights)
    rasa = RASAProjector(encoder.embed_dim, num_iterations=14)  # nearly everything
    rasa.basis.copy_(torch.linalg.qr(torch.randn(32, 28))[0].T)
    save_file(rasa.state_dict(), tmp_path / "rasa.safetensors")
    encoder.vit = rasa.fold_into_vit(encoder.vit)
    backbones.save(encoder, tmp_path / "folded.safetensors")
    words = ["in-context", *SCENES, *QUICK]
    plain, removed, folded = tmp_path / "plain", tmp_path / "removed", tmp_path / "folded"
    main([*words, "--weights", str(weights), "--output", str(plain)])
    rasa_file = str(tmp_path / "rasa.safetensors")
    main([*words, "--weights", str(weights), "--rasa", rasa_file, "--output", str(removed)])
    folded_file = str(tmp_path / "folded.safetensors")
    main([*words, "--weights", folded_file, "--output", str(folded)])

    def value(folder: Path, model: str) -> float:
        scores = results(folder)["protocols"]["in-context"][model]["scores"]
        return next(iter(scores.values()))["value"]

    expected = value(folded, "folded")
    assert value(removed, "trained + RASA") == pytest.approx(expected, abs=5e-3)
    assert value(plain, "trained") != pytest.approx(expected, abs=1e-2)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_all_runs_what_it_can_and_says_what_it_cannot(tmp_path, weights):
    words = ["all", "--weights", str(weights), "floor", *SCENES, *QUICK, "--output", str(tmp_path)]
    short = "--linear.num-steps 20 --logistic.max-iter 5 --overclustering.seeds 0 --depth.epochs 1"
    main([*words, *short.split(), "--overclustering.num-clusters", "20", "--lidar.num-views", "3"])
    found = results(tmp_path)
    expected = {
        *("knn", "linear", "logistic", "in-context", "linear-segmentation", "overclustering"),
        *("lost", "tokencut", "pca", "attention", "cluster-entropy", "position", "depth"),
        *("rankme", "lidar"),
    }
    assert set(found["protocols"]) == expected
    assert "keys" in found["not_run"]["lost"]["floor"]
    assert "spair:PATH" in found["not_run"]["correspondence"]["trained"]
    page = (tmp_path / "report.md").read_text()
    assert "| correspondence | not run | not run |" in page
    for picture in ("pca-trained", "attention-trained", "lost-trained", "in-context-floor"):
        assert list((tmp_path / "figures").glob(f"{picture}*.png")), picture


def test_every_protocol_has_options():
    assert list(OPTIONS) == list(PROTOCOLS)
    assert OPTIONS["linear"]().learning_rates == LEARNING_RATES  # written twice


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_protocol_has_words_and_help(protocol, capsys):
    assert re.fullmatch(r"[^\n]+[.?]", SUMMARIES[protocol])
    with pytest.raises(SystemExit) as stopped:
        main([protocol, "--help"])
    assert stopped.value.code == 0
    assert "--weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["knn", "--weights", "nowhere", *SCENES], "no weights 'nowhere'"),
        (["knn", "--weights", "floor", "--data", "voc:/nowhere"], "/nowhere"),
        (["lost", "--weights", "floor", *SCENES, *QUICK], "queries_keys_values"),
        (["knn", "--weights", "floor", "floor", *SCENES], "two models have the same name"),
        (["knn", "--weights", "floor", *SCENES, "--rasa", "a", "b"], "--rasa names 2 files for 1"),
        (
            ["knn", "--weights", "floor", *SCENES, "--num-test", "0"],
            "--num-test must be at least 1",
        ),
        (
            ["knn", "--weights", "random:sslkit_vit_micro", *SCENES, "--nesting", "16", "33"],
            "--nesting 33 must be between 1 and the 32 features of random",
        ),
        (["correspondence", "--weights", "floor", *SCENES, *QUICK], "has no pair.*spair:PATH"),
        (
            ["knn", "--weights", "random:sslkit_vit_micro", *SCENES, "--global-size", "30"],
            "--global-size 30 must be a positive multiple of 4, the patch size of random",
        ),
    ],
)
def test_errors_end_in_one_line(tmp_path, words, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        main([*words, "--output", str(tmp_path)])


def test_a_gpu_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    words = ["knn", "--weights", "floor", *SCENES, "--output", str(tmp_path), "--device", "cuda"]
    with pytest.raises(SystemExit, match="error: device 'cuda' needs GPU 0"):
        main(words)

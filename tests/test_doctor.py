"""The command `sslkit doctor`: what it prints of images made here, and how it fails."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sslkit.commands.doctor import main
from sslkit.recipes.franca import proposal
from sslkit.recipes.franca.proposal import Machine


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes of 20 photographs, a copy and a broken file; a machine without a GPU."""
    monkeypatch.setattr(proposal, "this_machine", lambda: Machine(cores=1))
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(20):
            pixels = random.integers(0, 256, (96, 128, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    copied = (tmp_path / "images" / "cat" / "3.png").read_bytes()
    (tmp_path / "images" / "dog" / "copy.png").write_bytes(copied)
    (tmp_path / "images" / "dog" / "broken.png").write_bytes(copied[:400])
    return tmp_path / "images"


def test_what_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(folder), "--workers", "0", "--test-fraction", "0.2"])
    text = capsys.readouterr().out
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    train, test = (int(word) for word in lines["images"].split()[1:])
    assert train + test == 42
    assert lines["width in pixels"].split()[-2:] == ["128", "128"]
    assert lines["classes"].split() == ["classes", "2", "2"]
    assert "(--test-fraction 0.2)" in text
    assert "Training images by class: cat (" in text
    assert "1 unreadable" in text
    assert "dog/broken.png: " in text
    assert "1 copies, with exactly the same pixels:" in text
    assert "dog/copy.png = " in text
    assert "Proposed for this machine (1 CPU core, no GPU):" in text
    command = text[text.index("sslkit run franca") :]
    assert f"--data {folder}" in command
    assert "--test-fraction 0.2" in command


def test_a_sample_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(folder), "--workers", "0", "--num-images", "5"])
    text = capsys.readouterr().out
    assert "images read" in text
    assert "Not all images were read" in text
    main([str(folder), "--workers", "0", "--num-images", "5", "--all"])
    assert "Not all images were read" not in capsys.readouterr().out


def test_warnings_are_told_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = (folder / "cat" / "1.png").read_bytes()
    (folder / "cat" / "1_mask.png").write_bytes(content)
    main([str(folder), "--workers", "0"])
    text = capsys.readouterr().out
    assert text.startswith("Note: 1 files in ")
    assert text.count("1_mask.png") == 1


def test_many_classes_are_told_by_the_smallest_and_the_largest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(proposal, "this_machine", lambda: Machine(cores=1))
    labels = np.repeat(np.arange(20), np.arange(1, 21))
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 16, 18), np.uint8)
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=labels, test_images=images[:2])
    main([str(tmp_path / "a.npz"), "--workers", "0"])
    text = " ".join(capsys.readouterr().out.split())
    assert "the fewest 0 (1), 1 (2), 2 (3), 3 (4), 4 (5), 5 (6); the most 14 (15)" in text
    assert "images of a class 1 .. 20" in text
    assert "images without a label 0 2" in text
    assert "copies of a training image 2" in text


def test_images_that_cannot_be_trained_on_are_described_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(20):
        (tmp_path / f"{i}.png").touch()
    with pytest.raises(ValueError, match=r"none of the .* training images read is readable"):
        main([str(tmp_path), "--workers", "0"])
    text = capsys.readouterr().out
    assert re.search(r"\n1\d unreadable training images:\n", text)
    assert re.search(r"\n  and 1\d more \(--shown\)\n", text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no data 'nowhere'"),
        (["scenes", "--num-images", "0"], "--num-images must be at least 1, got 0"),
        (["scenes", "--shown", "-1"], "--shown must be at least 0, got -1"),
    ],
)
def test_what_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        main(arguments)


def test_help_does_not_wait_for_torch() -> None:
    script = (
        "import sys; from sslkit.commands.doctor import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit:\n    sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == 0
    assert b"DATA" in done.stdout

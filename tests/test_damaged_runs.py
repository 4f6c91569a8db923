"""A damaged run folder ends in one line that names the file and says what to do."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sslkit import backbones
from sslkit.files import file_digest
from sslkit.recipes.franca.evaluation import SCORES
from tests.recipe import main, smoke

SMALL = "--steps 4 --checkpoint-every 2 --highres.steps 2 --optim.lr-warmup 0 --rasa.num-images 8"
SMALL += " --rasa.num-iterations 1 --evaluation.num-train 16 --evaluation.num-test 8"
SMALL += " --evaluation.num-dense 4 --evaluation.knn 3"
STEP_2, STEP_4 = (f"pretrain/checkpoints/step_{step:08d}" for step in (2, 4))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every stage but the high-resolution one."""
    output = tmp_path_factory.mktemp("finished") / "run"
    stages = ["--stages", "pretrain", "rasa", "evaluate", "report"]
    main(smoke(output, *SMALL.split(), *stages))
    return output


def write(content: str | bytes) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda path: path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_file(path: Path) -> None:
    shutil.rmtree(path)
    path.touch()


def without(name: str) -> Callable[[Path], object]:
    """Remove an entry of a JSON object, or of the header of a safetensors file."""

    def damage(path: Path) -> None:
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            del content[name]
            path.write_text(json.dumps(content))
        else:
            data = path.read_bytes()
            (length,) = struct.unpack("<Q", data[:8])
            header = json.loads(data[8 : 8 + length])
            del header["__metadata__"][name]
            text = json.dumps(header).encode()
            path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return damage


def emptied(name: str) -> Callable[[Path], object]:
    """An entry of a JSON object as an empty one."""
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), name: {}}))


def with_a_nan(folder: Path) -> None:
    """A checkpoint whose checksums are right and whose weights are not."""
    path = folder / "rank_0.safetensors"
    tensors = load_file(path)
    next(x for name, x in tensors.items() if "teacher" in name and x.ndim > 1)[0, 0] = torch.nan
    save_file(tensors, path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[path.name] = file_digest(path)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def renamed_step(path: Path) -> None:
    path.write_text(path.read_text().replace('"step": 2', '"step": "2"'))


def text_for_loss(path: Path) -> None:
    path.write_text(path.read_text().replace('"loss": ', '"loss": "high", "other": ', 1))


# What lies there instead, of any file of JSON.
JUNK = {
    "empty": write(b""),
    "not UTF-8": write(b"\xff\xfe\x00{"),
    "cut": cut,
    "a list": write("[1, 2]\n"),
    "a number": write("3\n"),
    "deep": write("[" * 100_000 + "\n"),
    "a folder": to_folder,
}
WEIGHTS = {kind: JUNK[kind] for kind in ("empty", "not UTF-8", "cut", "a folder")}
RESUMED = "--resume --stages pretrain"
UNFINISHED = "--resume --stages pretrain rasa"  # the last steps of pretraining are undone first
HIGHRES = "--resume --stages pretrain highres"


def cases() -> list:
    found = []

    def add(file: str, damages: dict[str, Callable], arguments: str, message: str) -> None:
        for kind, damage in damages.items():
            name = f"{file}: {kind}: {arguments.replace('--', '')}"
            found.append(pytest.param(file, damage, arguments, message, id=name))

    wrong = {
        "unknown preset": write('{"preset": "mine"}'),
        "infinite": write('{"steps": 1e999}'),
        "a text for a flag": write('{"resume": "no"}'),
        "a text for stages": write('{"stages": "report"}'),
        "a fraction": write('{"steps": 1.5}'),
    }
    add("settings.json", JUNK | wrong, RESUMED, r"settings\.json cannot be read \(.*\)")
    lines = {k: v for k, v in JUNK.items() if k not in ("empty", "cut")}  # as a killed run's
    lines |= {"not UTF-8": write(b"\xff\xfe\x00{\n")}
    lines |= {"a step of text": renamed_step, "a loss of text": text_for_loss}
    folder = {"a folder": lines.pop("a folder")}
    add("pretrain/metrics.jsonl", lines, "--stages report", r"line \d of .*metrics\.jsonl.*delete")
    add("pretrain/metrics.jsonl", folder, "--stages report", r"metrics\.jsonl: Is a directory\. Mo")
    wrong = {name: without(name) for name in SCORES}
    # Without labels there are no scores of k-NN at all; here those that belong to them are lost.
    wrong |= {
        f"{name} empty": emptied(name) for name in ("online_knn", "matryoshka", "position_r2")
    }
    results = JUNK | wrong | {"text": write('{"knn": {"pretrain": "good"}}')}
    folder = {"a folder": results.pop("a folder")}
    add("results.json", results, "--stages report", r"results\.json .*run --stages evaluate report")
    add("results.json", folder, "--stages report", r"results\.json: Is a directory")
    again = r"pretrain\.safetensors is damaged: .*Delete it and make it again with --resume"
    for arguments in (RESUMED, "--stages rasa", "--stages evaluate", "--stages report"):
        add("pretrain.safetensors", WEIGHTS, arguments, again)
    again = r"rasa\.safetensors is damaged: .*make it again with --stages rasa"
    of, errors = {"no 'of'": without("of")}, {"no errors": without("position_errors")}
    add("rasa.safetensors", WEIGHTS | of, "--stages evaluate", again)
    add("rasa.safetensors", WEIGHTS | of | errors, "--stages report", again)
    manifest = JUNK | {"no names": write("{}"), "numbers": write('{"tensors.json": 1}')}
    add(f"{STEP_4}/manifest.json", manifest, HIGHRES, "step_00000004 is damaged.*step_00000002$")
    files = {"empty": JUNK["empty"], "cut": cut, "missing": Path.unlink, "a folder": to_folder}
    for name in ("tensors.json", "rank_0.safetensors"):
        add(f"{STEP_4}/{name}", files, HIGHRES, "step_00000004 is damaged: .*step_00000002$")
    message = "step_00000004 is damaged: teacher.* has numbers that are not.*step_00000002$"
    add(STEP_4, {"a NaN": with_a_nan}, HIGHRES, message)
    add("pretrain/metrics.jsonl", lines, UNFINISHED, r"line \d of .*metrics\.jsonl.*delete")
    add("pretrain/tensorboard", {"a file": to_file}, UNFINISHED, r"tensorboard: File exists\. Mov")
    add("pretrain/checkpoints", {"a file": to_file}, UNFINISHED, "pretrain/checkpoints")
    add("pretrain", {"a file": to_file}, UNFINISHED, "run/pretrain")
    add("report.md", {"a folder": to_folder}, "--stages report", r"report\.md: Is a directory\. M")
    add("figures", {"a file": to_file}, "--stages report", r"figures: File exists\. Move")
    return found


@pytest.mark.parametrize(("file", "damage", "arguments", "message"), cases())
def test_damaged(
    file: str,
    damage: Callable[[Path], object],
    arguments: str,
    message: str,
    finished: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    damage(output / file)
    if arguments == UNFINISHED:
        (output / "pretrain.safetensors").unlink()
        if (output / STEP_4).exists():
            shutil.rmtree(output / STEP_4)
    with pytest.raises(SystemExit, match=rf"^error: (?s:.)*{message}") as ended:
        main(["--output", str(output), *arguments.split()])
    assert "\n" not in str(ended.value).rstrip("\n")


@pytest.mark.parametrize("name", ["step_00000005", "step_99999999", "step_junk", "notes.txt"])
def test_a_stray_file_beside_the_checkpoints(name: str, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    (output / "pretrain.safetensors").unlink()
    (output / "pretrain" / "checkpoints" / name).write_text("stray")
    main(["--output", str(output), "--resume", "--stages", "pretrain"])
    assert backbones.load(output / "pretrain.safetensors").embed_dim == 32


def test_a_report_without_metrics_leaves_their_curves_out(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    (output / "pretrain" / "metrics.jsonl").write_bytes(b"")
    main(["--output", str(output), "--stages", "report"])
    assert "metrics.jsonl has no losses" in capsys.readouterr().out
    assert "losses.png" not in (output / "report.md").read_text()

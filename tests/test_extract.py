"""``sslkit extract``: by hand, in any number of processes, killed and continued."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import save_file

from sslkit import backbones
from sslkit.commands.main import run as sslkit_command
from sslkit.data.decode import read_image
from sslkit.evaluation.encoders import as_encoder
from sslkit.evaluation.models import Model, open_model
from sslkit.evaluation.views import EvalTransform, PaddedView
from sslkit.extract import (
    Extraction,
    extract_to_file,
    parts,
    processes,
    read_description,
    read_features,
    read_names,
)
from sslkit.rasa import RASAProjector, load_rasa
from sslkit.training.parallel import Parallel


def main(words: list[str]) -> int:
    return sslkit_command(["extract", *words])


ALONE = Parallel(0, 1, torch.device("cpu"), None)
BROKEN = 4  # of 14 images, by name


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "micro.safetensors"
    backbones.save(backbones.create("sslkit_vit_micro", img_size=16), path)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """14 images of two classes and two shapes, one of them broken, and a text."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(14):
        path = folder / "ab"[i // 7] / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        shape = (20, 28, 3) if i % 3 else (32, 20, 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)
        if i == BROKEN:
            path.write_bytes(path.read_bytes()[:60])
    (folder / "readme.txt").write_text("not an image")
    return str(folder)


@pytest.fixture
def given(weights, folder) -> Extraction:
    return Extraction(weights, folder, batch_size=3, part_size=4)


def by_hand(given: Extraction, take, view=None) -> np.ndarray:
    """Image after image, no batches."""
    encoder = backbones.load(given.weights).eval()
    view = view or EvalTransform(16, round(16 * 256 / 224))
    rows = []
    for i in range(14):
        if i != BROKEN:
            image = read_image(f"{given.data}/{'ab'[i // 7]}/{i:02d}.png")
            with torch.no_grad():
                rows.append(take(encoder, view(image)[None])[0])
    return torch.stack(rows).numpy()


# --- what is extracted ---------------------------------------------------------------------------


def test_class_tokens_equal_the_encoder_by_hand(tmp_path, given):
    output = tmp_path / "f.npy"
    description = extract_to_file(given, output, parallel=ALONE)
    found = np.load(output)
    expected = by_hand(given, lambda encoder, x: encoder(x).cls)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.dtype == np.float32
    places = [i for i in range(14) if i != BROKEN]
    assert [index for index, _ in read_names(output)] == places
    assert [Path(name).stem for _, name in read_names(output)] == [f"{i:02d}" for i in places]
    lines = output.with_suffix(".csv").read_text().splitlines()
    assert lines[0] == "row,index,label,name"
    assert lines[8] == f"7,8,1,{given.data}/b/08.png"
    assert read_description(output) == description
    assert description["shape"] == {"f.npy": [13, 32]}
    assert len(description["unreadable"]) == 1
    assert "04.png" in description["unreadable"][0]
    assert description["settings"]["weights_identity"] != given.weights  # a digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.csv", "f.json", "f.npy"]
    assert isinstance(read_features(output), np.memmap)


def test_other_tokens_views_and_types(tmp_path, given):
    cases = {
        "mean_patch": lambda encoder, x: encoder(x).patches.mean((1, 2)),
        "cls_and_mean_patch": lambda encoder, x: torch.cat(
            [encoder(x).cls, encoder(x).patches.mean((1, 2))], dim=1
        ),
        "layer_cls": lambda encoder, x: torch.cat(
            [layer.cls for layer in encoder.intermediate(x, 2)], dim=1
        ),
    }
    for token, take in cases.items():
        output = tmp_path / f"{token}.npy"
        case = replace(given, token=token, num_layers=2)
        extract_to_file(case, output, parallel=ALONE)
        np.testing.assert_allclose(np.load(output), by_hand(given, take), atol=1e-5)
    padded = replace(given, view="padded", dtype="float16")
    extract_to_file(padded, tmp_path / "padded.npy", parallel=ALONE)
    found = np.load(tmp_path / "padded.npy")
    expected = by_hand(given, lambda encoder, x: encoder(x).cls, PaddedView((4, 4)))
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, expected, atol=4e-3)
    wide = replace(given, image_size=(8, 24), resize_over_crop=1.0)
    extract_to_file(wide, tmp_path / "wide.npy", parallel=ALONE)
    expected = by_hand(given, lambda encoder, x: encoder(x).cls, EvalTransform((8, 24), 8))
    np.testing.assert_allclose(np.load(tmp_path / "wide.npy"), expected, atol=1e-5)


def test_rasa_comes_before_the_nesting_and_both_are_of_each_token(tmp_path, given):
    basis = torch.linalg.qr(torch.randn(32, 4)).Q.T
    save_file({"basis": basis.contiguous()}, tmp_path / "rasa")
    case = replace(
        given, token="cls_and_mean_patch", rasa=tmp_path / "rasa", nesting=(8, 20), dtype="float32"
    )
    rasa = load_rasa(tmp_path / "rasa")
    for ending in ("npy", "parquet"):
        output = tmp_path / f"f.{ending}"
        extract_to_file(case, output, parallel=ALONE)
        for size in (8, 20):
            expected = by_hand(
                given,
                lambda encoder, x, size=size: torch.cat(
                    [
                        rasa(encoder(x).cls)[:, :size],
                        rasa(encoder(x).patches.mean((1, 2)))[:, :size],
                    ],
                    dim=1,
                ),
            )
            np.testing.assert_allclose(read_features(output, size=size), expected, atol=1e-5)
    assert not (tmp_path / "f.npy").exists()  # but f_8.npy and f_20.npy
    one = replace(given, nesting=(8,))
    extract_to_file(one, tmp_path / "one.npy", parallel=ALONE)
    assert np.load(tmp_path / "one.npy").shape == (13, 8)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parquet_holds_the_same_a_row_group_a_part(tmp_path, given, dtype):
    given = replace(given, dtype=dtype)
    extract_to_file(given, tmp_path / "f.npy", parallel=ALONE)
    description = extract_to_file(given, tmp_path / "f.parquet", parallel=ALONE)
    found = read_features(tmp_path / "f.parquet")
    assert np.array_equal(found, np.load(tmp_path / "f.npy"))
    assert found.dtype == dtype
    assert read_names(tmp_path / "f.parquet") == read_names(tmp_path / "f.npy")
    assert read_description(tmp_path / "f.parquet") == description
    file = pq.ParquetFile(tmp_path / "f.parquet")
    assert file.metadata.num_row_groups == 4
    assert file.schema_arrow.field("feature").type.list_size == 32
    assert file.read(["label"])["label"].to_pylist() == [0] * 6 + [1] * 7


# --- in parts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_any_number_of_processes_gives_the_same_file(tmp_path, given, world_size):
    extract_to_file(given, tmp_path / "one.npy", parallel=ALONE)
    # One after the other: the first begins, and joins what the others make.
    with pytest.raises(RuntimeError, match="do all processes see that folder"):
        extract_to_file(
            given, tmp_path / "many.npy", parallel=Parallel(0, world_size, ALONE.device, None)
        )
    for rank in reversed(range(world_size)):
        process = Parallel(rank, world_size, ALONE.device, None)
        done = extract_to_file(given, tmp_path / "many.npy", parallel=process)
        assert (done is None) == (rank > 0)
    for ending in ("npy", "csv"):
        one, many = tmp_path / f"one.{ending}", tmp_path / f"many.{ending}"
        assert one.read_bytes() == many.read_bytes()


def test_processes_of_the_command(tmp_path, given, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # one thread each, as below
    extract_to_file(given, tmp_path / "one.npy", parallel=ALONE)
    processes.extract_with_processes(given, tmp_path / "two.npy", processes=2, device="cpu")
    np.testing.assert_allclose(np.load(tmp_path / "two.npy"), np.load(tmp_path / "one.npy"), 1e-5)


def test_processes_of_torchrun(tmp_path, given):
    words = ["--weights", given.weights, "--data", given.data, "--part-size", "4"]
    words += ["--batch-size", "3", "--device", "cpu", "--output", str(tmp_path / "two.npy")]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "sslkit", "extract", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("two.npy: float32 [13, 32]") == 1
    extract_to_file(given, tmp_path / "one.npy", parallel=ALONE)
    for ending in ("npy", "csv"):
        one, two = (tmp_path / f"{name}.{ending}" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_a_process_hands_its_mistake_on(tmp_path, given, monkeypatch):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:  # what _work sets is put back afterwards
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    mistakes: SimpleQueue[str] = SimpleQueue()
    wrong = replace(given, nesting=(99,))
    with pytest.raises(SystemExit):
        processes._work(0, 0, 1, 1, wrong, tmp_path / "no.npy", "cpu", 0, [0, 0], mistakes)
    assert mistakes.get() == "nesting 99 is more than the 32 features of a token"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="given by torchrun already"):
        processes.extract_with_processes(given, tmp_path / "no.npy", processes=2)


def test_a_killed_run_continues(tmp_path, weights):
    rng = np.random.default_rng(1)
    np.save(tmp_path / "images.npy", rng.integers(0, 256, (300, 16, 16, 3), dtype=np.uint8))
    output = tmp_path / "f.npy"
    words = ["--weights", weights, "--data", str(tmp_path / "images.npy"), "--part-size", "1"]
    command = [sys.executable, "-m", "sslkit", "extract", *words, "--output", str(output)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    folder = tmp_path / ".f.npy.parts"
    while len(list(folder.glob("*/journal.jsonl"))) < 5:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = {
        path: path.stat().st_mtime_ns
        for path in folder.glob("*/journal.jsonl")
        if path.read_bytes().endswith(b"\n")
    }
    assert 4 <= len(made) < 300
    assert not output.exists()
    given = Extraction(weights, str(tmp_path / "images.npy"), part_size=1, batch_size=2)
    seen = []
    later = Parallel(1, 2, torch.device("cpu"), None)  # two processes continue what one began
    extract_to_file(given, output, parallel=later, progress=lambda *count: seen.append(count))
    assert seen[-1] == (150, 150)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    extract_to_file(given, output, parallel=replace(later, rank=0))
    extract_to_file(given, tmp_path / "whole.npy", parallel=ALONE)
    assert output.read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert not folder.exists()


def test_a_stopped_part_continues(tmp_path, given):
    output = tmp_path / "f.npy"

    def stop(done: int, total: int) -> None:
        assert total == 14
        if done >= 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract_to_file(given, output, parallel=ALONE, progress=stop)
    folder = tmp_path / ".f.npy.parts"
    assert sorted(path.name for path in folder.iterdir()) == ["00000000", "00000004", "lock"]
    with (folder / "00000004" / "cls.f32").open("ab") as file:
        file.write(b"half a row")
    smaller = replace(given, batch_size=2)  # as after a lack of memory
    counts = []
    extract_to_file(smaller, output, parallel=ALONE, progress=lambda done, _: counts.append(done))
    assert counts[:4] == [4, 7, 8, 8]  # 4 and 3 were there
    expected = by_hand(given, lambda encoder, x: encoder(x).cls)
    np.testing.assert_allclose(np.load(output), expected, atol=1e-5)


def test_what_is_complete_is_not_made_again_and_nothing_is_mixed(tmp_path, given):
    for output in (tmp_path / "f.npy", tmp_path / "f.parquet"):
        first = extract_to_file(given, output, parallel=ALONE)
        before = output.stat().st_mtime_ns
        assert extract_to_file(given, output, parallel=ALONE) == first
        assert output.stat().st_mtime_ns == before
        with pytest.raises(ValueError, match="token: 'cls' there, 'mean_patch' asked for"):
            extract_to_file(replace(given, token="mean_patch"), output, parallel=ALONE)
    unfinished = tmp_path / "g.npy"
    later = Parallel(1, 2, torch.device("cpu"), None)
    with pytest.raises(RuntimeError, match=r"2 of 4 parts are not in .*\.g\.npy\.parts"):
        extract_to_file(given, unfinished, parallel=replace(later, rank=0))
    with pytest.raises(
        ValueError, match=r"unfinished .*want: \['cls'\] there, \['mean_patch'\] asked for"
    ):
        extract_to_file(replace(given, token="mean_patch"), unfinished, parallel=ALONE)
    extract_to_file(replace(given, nesting=(8,)), unfinished, parallel=ALONE)  # cut when it is read
    assert np.array_equal(np.load(unfinished), np.load(tmp_path / "f.npy")[:, :8])
    with pytest.raises(ValueError, match="nesting 99"):  # no part of it was made: it leaves nothing
        extract_to_file(replace(given, nesting=(99,)), tmp_path / "i.npy", parallel=ALONE)
    extract_to_file(given, tmp_path / "i.npy", parallel=ALONE)
    (tmp_path / "h.npy").write_bytes(b"other")
    with pytest.raises(ValueError, match="nothing says what it is of"):
        extract_to_file(given, tmp_path / "h.npy", parallel=ALONE)


@pytest.mark.parametrize(
    "damage", [lambda x: b"", lambda x: x[:-40], lambda x: x[:-40] + bytes(40), lambda x: x + b"0"]
)
def test_a_damaged_part_is_refused_and_can_be_made_anew(tmp_path, given, damage):
    output, folder = tmp_path / "f.npy", tmp_path / ".f.npy.parts"

    def stop(done: int, total: int) -> None:
        if done >= 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract_to_file(given, output, parallel=ALONE, progress=stop)
    part = folder / "00000000" / "cls.f32"
    part.write_bytes(damage(part.read_bytes()))
    with pytest.raises(ValueError, match=r"00000000/cls.f32 .*: remove .*00000000$"):
        extract_to_file(given, output, parallel=ALONE)
    assert not output.exists()
    shutil.rmtree(part.parent)
    extract_to_file(given, output, parallel=ALONE)
    expected = by_hand(given, lambda encoder, x: encoder(x).cls)
    np.testing.assert_allclose(np.load(output), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("ending", "damaged", "change"),
    [
        (".npy", "f.npy", lambda x: x[:-64]),
        (".npy", "f.npy", lambda x: x + bytes(64)),
        (".npy", "f.npy", lambda x: b""),
        (".npy", "f.csv", lambda x: x[: len(x) // 2]),
        (".npy", "f.json", lambda x: x[: len(x) // 2]),
        (".npy", "f.json", lambda x: b"[]"),
        (".parquet", "f.parquet", lambda x: x[:-64]),
        (".parquet", "f.parquet", lambda x: b""),
    ],
)
def test_a_damaged_output_is_not_taken_for_complete(tmp_path, given, ending, damaged, change):
    output, path = tmp_path / f"f{ending}", tmp_path / damaged
    extract_to_file(given, output, parallel=ALONE)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{damaged}.*remove"):
        extract_to_file(given, output, parallel=ALONE)


def test_two_runs_do_not_write_one_file(tmp_path, given):
    (tmp_path / ".f.npy.parts").mkdir()
    with (
        FileLock(tmp_path / ".f.npy.parts" / "lock"),
        pytest.raises(RuntimeError, match="another process is writing"),
    ):
        extract_to_file(given, tmp_path / "f.npy", parallel=ALONE)


def test_values_beyond_float16_are_refused(tmp_path, given, monkeypatch):
    loud = as_encoder(lambda x: (1e6 * x.mean((2, 3)), x.movedim(1, -1)), patch_size=1)
    monkeypatch.setattr(parts, "open_model", lambda *_, **__: Model("loud", loud, "loud"))
    with pytest.raises(ValueError, match=r"beyond float16: take float32"):
        extract_to_file(replace(given, dtype="float16"), tmp_path / "f.npy", parallel=ALONE)


# --- features of the model are computed once ------------------------------------------------------


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """Images of each forward pass of the encoders that extractions open."""
    seen: list[int] = []

    def opened(*args, **settings):
        model = open_model(*args, **settings)
        model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
        return model

    monkeypatch.setattr(parts, "open_model", opened)
    return seen


def test_other_outputs_of_the_same_features_compute_nothing(tmp_path, given, passes):
    """RASA, nesting, types and formats are applied to what the cache holds.

    Features with RASA equal those of the model that it is folded into, to float32's rounding of
    two orders of the same products: 1e-5.
    """
    rasa = RASAProjector(32, num_iterations=2)
    rasa.basis.copy_(torch.linalg.qr(torch.randn(32, 4))[0].T)
    save_file(rasa.state_dict(), tmp_path / "rasa")
    encoder = backbones.load(given.weights)
    encoder.vit = rasa.fold_into_vit(encoder.vit)
    backbones.save(encoder, tmp_path / "folded.safetensors")
    cached = replace(given, cache=tmp_path / "cache", token="cls_and_mean_patch")
    extract_to_file(cached, tmp_path / "plain.npy", parallel=ALONE)
    assert sum(passes) == 13
    passes.clear()
    for ending, dtype in (("npy", "float32"), ("parquet", "float32"), ("npy", "float16")):
        output = tmp_path / f"{dtype}.{ending}"
        removed = replace(cached, rasa=tmp_path / "rasa", nesting=(8, 20), dtype=dtype)
        extract_to_file(removed, output, parallel=ALONE)
        assert passes == []
        assert read_features(output, size=8).dtype == dtype
    folded = replace(given, weights=str(tmp_path / "folded.safetensors"), token=cached.token)
    extract_to_file(folded, tmp_path / "folded.npy", parallel=ALONE)
    assert sum(passes) == 13
    expected = np.load(tmp_path / "folded.npy").reshape(13, 2, 32)
    for size in (8, 20):
        cut = expected[:, :, :size].reshape(13, -1)
        for ending in ("npy", "parquet"):
            found = read_features(tmp_path / f"float32.{ending}", size=size)
            np.testing.assert_allclose(found, cut, atol=1e-5)
        found = read_features(tmp_path / "float16.npy", size=size)
        np.testing.assert_allclose(found, cut, atol=2e-3)
    assert np.abs(expected.reshape(13, -1) - np.load(tmp_path / "plain.npy")).max() > 0.1


def test_a_cache_keeps_models_tokens_and_images_apart(tmp_path, given, passes):
    cached = replace(given, cache=tmp_path / "cache")
    for case in (
        cached,
        replace(cached, token="mean_patch"),
        replace(cached, view="padded"),
        replace(cached, weights="random:sslkit_vit_micro", image_size=(16,)),
        replace(cached, part_size=5),
    ):
        passes.clear()
        for name in ("a.npy", "b.npy"):
            extract_to_file(case, tmp_path / name, parallel=ALONE)
            for path in tmp_path.glob("[ab].*"):
                path.unlink()
        assert sum(passes) == 13  # once
    assert len(list((tmp_path / "cache").iterdir())) == 5


# --- the command line ----------------------------------------------------------------------------


def test_the_command(tmp_path, weights, folder, capsys):
    output = tmp_path / "new" / "f.parquet"
    main(["--weights", weights, "--data", folder, "--output", str(output)])
    printed = capsys.readouterr().out
    assert f"{output}: feature float32 [13, 32]" in printed
    assert "1 images could not be read and have no row" in printed
    assert json.loads(json.dumps(read_description(output)))["settings"]["data"] == folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "EMPTY"], "no image in the folder"),
        (["--data", "BROKEN"], r"none of the 2 images can be read; cannot read image .*0\.png"),
        (["--data", "nowhere"], "no data 'nowhere'"),
        (["--weights", "nowhere"], "no weights 'nowhere'"),
        (["--output", "f.csv"], r"features are \.npy or \.parquet files, got 'f\.csv'"),
        (["--nesting", "40"], "nesting 40 is more than the 32 features of a token"),
        (["--nesting", "8", "8"], "nesting must be different sizes"),
        (["--image-size", "15"], r"image_size \(15, 15\) must be multiples of \(4, 4\)"),
        (["--token", "layer_cls", "--rasa", "x"], "cannot be applied to layer_cls"),
        (["--rasa", "x"], "no RASA file 'x'"),
        (["--processes", "0"], "processes must be at least 1"),
        (["--part-size", "0"], "part_size must be at least 1"),
    ],
)
def test_mistakes_take_one_line_and_leave_nothing(
    tmp_path, monkeypatch, weights, folder, words, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "EMPTY" / "notes.txt").write_text("no image")
    (tmp_path / "BROKEN").mkdir()
    for i in range(2):
        (tmp_path / "BROKEN" / f"{i}.png").write_bytes(b"no image")
    words = [str(tmp_path / word) if word in ("EMPTY", "BROKEN") else word for word in words]
    given = ["--weights", weights, "--data", folder, "--output", str(tmp_path / "f.npy")]
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        main([*given, *words])
    left = {path.name for path in tmp_path.iterdir()} - {"EMPTY", "BROKEN"}
    assert left == ({".f.npy.parts"} if message.startswith("none of") else set())  # all parts done


def test_rasa_of_another_size(tmp_path, given):
    save_file(RASAProjector(50).state_dict(), tmp_path / "rasa")
    with pytest.raises(ValueError, match=r"x must be float features \[..., D=50\]"):
        extract_to_file(replace(given, rasa=tmp_path / "rasa"), tmp_path / "f.npy", parallel=ALONE)


def test_parts_of_other_images_are_refused(tmp_path, given):
    output, folder = tmp_path / "f.npy", tmp_path / ".f.npy.parts"
    first = Parallel(0, 2, torch.device("cpu"), None)
    with pytest.raises(RuntimeError, match="2 of 4 parts are not in"):
        extract_to_file(given, output, parallel=first)
    (folder / "00000000").rename(folder / "00000004")
    with pytest.raises(ValueError, match=r"images: 'the first 4' there, '4 from 4 to 7, sums"):
        extract_to_file(given, output, parallel=ALONE)


def test_images_of_other_names_are_other_data(tmp_path, given):
    data = tmp_path / "images"
    data.mkdir()
    for name in "ab":
        Image.new("RGB", (20, 20), "red" if name == "a" else "blue").save(data / f"{name}.png")
    mine = replace(given, data=str(data))
    extract_to_file(mine, tmp_path / "f.npy", parallel=ALONE)
    (data / "a.png").rename(data / "c.png")  # as many images, in another order
    with pytest.raises(ValueError, match=r"is of something else: names: .* there, .* asked for"):
        extract_to_file(mine, tmp_path / "f.npy", parallel=ALONE)

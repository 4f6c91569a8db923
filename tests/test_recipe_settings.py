"""The command line of the recipe: what it refuses, and with which words."""

import dataclasses
import json
from pathlib import Path

import pytest

from sslkit.recipes.franca.presets import PRESETS
from sslkit.recipes.franca.settings import Settings
from sslkit.training.metrics import MetricsWriter
from sslkit.training.settings import SettingsError, as_json
from tests.recipe import check, main, parse, smoke, stored_settings


@pytest.fixture
def started(tmp_path: Path) -> Path:
    """An output folder with the settings and the name of a checkpoint of a run that was killed."""
    output = tmp_path / "run"
    (output / "pretrain" / "checkpoints" / "step_00000001").mkdir(parents=True)
    settings = parse(smoke(output))
    (output / "settings.json").write_text(as_json(settings))
    return output


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help-all"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out.replace("-", "_")
    for field in dataclasses.fields(Settings):
        assert f"__{field.name}" in text, field.name
        if dataclasses.is_dataclass(section := getattr(PRESETS["demo"], field.name)):
            for inner in dataclasses.fields(section):
                assert f"__{field.name}.{inner.name}" in text, inner.name


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--optim.learning-rate 1", "--optim.learning-rate"),
        ("--preset huge", "huge"),
        ("--steps many", "--steps"),
        ("--stages pretrain fly", "fly"),
        ("--masks.kind spiral", "spiral"),
        ("--targets.kind kmeans", "kmeans"),
    ],
)
def test_what_does_not_parse(
    arguments: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*smoke(tmp_path), *arguments.split()])
    assert exit_.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--accumulation 3", "--batch-size 8 does not divide into 1 processes of 3 micro-batches"),
        ("--highres.batch-size 6 --accumulation 4", "--highres.batch-size 6 does not divide"),
        ("--losses.dino 0 --losses.ibot 0 --losses.koleo 0", r"--losses\.\* are all 0"),
        ("--highres.steps 0", "--highres.steps must be at least 1, got 0"),
        ("--targets.num-iterations 0", "--targets.num-iterations must be at least 1"),
        ("--steps 0", "--steps must be at least 1"),
        ("--batch-size 0", "--batch-size must be at least 1, got 0"),
        ("--checkpoint-every 0", "--checkpoint-every must be at least 1, got 0"),
        ("--stages", "--stages is empty"),
        ("--resume", "--resume: .* holds no run"),
        ("--stages evaluate", "no trained encoder; run --stages pretrain first"),
        ("--stages rasa", "no trained encoder; run --stages pretrain first"),
        ("--stages report", r"results\.json is missing; run --stages evaluate first"),
        ("--stages highres", "no finished pretrain: run --stages pretrain"),
        ("--data /nowhere", "no data '/nowhere'"),
        ("--num-scenes 0", "--num-scenes must be at least 1, got 0"),
        ("--crops.global-size 30", r"pretrain: crops of 30 pixels do not divide into patches"),
        ("--highres.global-size 50", r"highres: crops of 50 pixels do not divide into patches"),
        ("--workers -1", "--workers must be at least 0, got -1"),
        ("--keep-every -1", "--keep-every must be at least 0, got -1"),
        ("--max-unreadable 2", "--max-unreadable is a share, got 2"),
        ("--test-fraction -1", "--test-fraction is a share, got -1"),
        ("--targets.momentum 3", "--targets.momentum is a share, got 3"),
        ("--targets.start-temperature 0", "--targets.start-temperature must be above 0 and"),
        ("--targets.student-temp -1", "--targets.student-temp must be above 0"),
        ("--targets.temperature 1e300", "--targets.temperature must be above 0 and at most"),
        ("--optim.base-lr 1e300", "--optim.base-lr must be at most 1000"),
        ("--optim.base-lr nan", "--optim.base-lr must be at least 0, got nan"),
        ("--optim.final-lr -1", "--optim.final-lr must be at least 0"),
        ("--optim.betas 2 2", "--optim: Invalid beta parameter at index 0: 2.0"),
        ("--evaluation.knn -1", "--evaluation.knn must be at least 1, got -1"),
        ("--evaluation.knn 201", "--evaluation.knn must be at most 200"),
        ("--evaluation.lidar-views 1", "--evaluation.lidar-views must be at least 2, got 1"),
        ("--evaluation.lidar-images -1", "--evaluation.lidar-images must be at least 0, got -1"),
        ("--evaluation.num-dense 0", "--evaluation.num-dense must be at least 1, got 0"),
        ("--evaluation.resize-over-crop 1e9", "--evaluation.resize-over-crop must be at most 8"),
        ("--rasa.num-images 0", "--rasa.num-images must be at least 1, got 0"),
        ("--highres.drop-path-rate 1.5", "--highres.drop-path-rate is a share, got 1.5"),
        ("--highres.temperature-warmup 2", "--highres.temperature-warmup is a share, got 2"),
        ("--optim.max-norm 0", "--optim.max-norm must be above 0 and at most 1000000, got 0"),
        ("--optim.layer-decay 1.5", "layer_decay must be above 0 and at most 1, got 1.5"),
        ("--optim.lr-warmup 1.5", "--optim.lr-warmup is a share, got 1.5"),
        ("--optim.momentum 0.9 1.1", r"--optim.momentum is a share, got \(0.9, 1.1\)"),
        ("--hsdp-replicas 2 --parallel ddp", "--hsdp-replicas is for --parallel fsdp, not ddp"),
        ("--device cuda", "--device cuda: device 'cuda' needs GPU 0"),
        ("--crops.global-scale 0.5 2", "--crops: global_scale must satisfy"),
        ("--masks.mask-ratio 0.9 0.1", "--masks: mask_ratio"),
        ("--model.nesting-dims 4 4", "--model: nesting_dims must rise strictly"),
        ("--model.backbone vit_huger", "--model: unknown backbone 'vit_huger'"),
        ("--test-fraction 2 --data FOLDER", "--test-fraction is a share, got 2"),
    ],
)
def test_what_cannot_work(arguments: str, message: str, tmp_path: Path) -> None:
    from PIL import Image

    for i in range(4):
        Image.new("RGB", (40, 30)).save(tmp_path / f"{i}.png")
    output = tmp_path / "run"
    words = arguments.replace("FOLDER", str(tmp_path)).split()
    with pytest.raises(SystemExit, match=message):
        main(smoke(output, *words))
    # Once repaired, the same command may use the same folder.
    check(parse(smoke(output)))


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit, match=r"error: --output .*file/run cannot be written: .*Errno"):
        main(smoke(tmp_path / "file" / "run"))


def test_a_full_disk_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(MetricsWriter, "log", full)
    with pytest.raises(SystemExit, match=r"error: .*No space left.* continue with --resume"):
        main(smoke(tmp_path / "run"))


def test_a_run_without_a_checkpoint_may_be_begun_again(tmp_path: Path) -> None:
    settings = parse(smoke(tmp_path))
    (tmp_path / "settings.json").write_text(as_json(settings))
    (tmp_path / "pretrain").mkdir()
    check(parse(smoke(tmp_path, "--optim.max-norm", "1.5")))


@pytest.mark.parametrize("content", ["{", '{"no_such_setting": 1}', '{"steps": [1]}'])
def test_settings_that_cannot_be_read(content: str, started: Path) -> None:
    (started / "settings.json").write_text(content)
    with pytest.raises(SystemExit, match=r"settings.json cannot be read .*: it is damaged, or"):
        main(["--output", str(started), "--resume"])


def test_a_finished_run_does_not_take_other_settings(started: Path) -> None:
    (started / "pretrain.safetensors").touch()
    words = "--resume --accept-changes --steps 99 --stages pretrain"
    with pytest.raises(SettingsError, match="steps was 12, is 99, but there is nothing lef"):
        check(parse(smoke(started, *words.split())))


def test_changes_that_do_not_fit_leave_the_settings_as_they_were(tmp_path: Path) -> None:
    words = ["--stages", "pretrain", "--steps", "2"]
    main(smoke(tmp_path, *words))
    (tmp_path / "pretrain.safetensors").unlink()
    before = (tmp_path / "settings.json").read_text()
    changed = [*words, "--resume", "--accept-changes", "--model.num-prototypes", "32"]
    with pytest.raises(SystemExit, match="error: these settings make another network: "):
        main(smoke(tmp_path, *changed))
    assert (tmp_path / "settings.json").read_text() == before
    with pytest.raises(SystemExit, match=r"pretrain has 1 steps, but .*step_00000002 is further"):
        main(smoke(tmp_path, *words, "--resume", "--accept-changes", "--steps", "1"))
    main(smoke(tmp_path, *words, "--resume"))


def test_a_run_is_not_overwritten(started: Path) -> None:
    with pytest.raises(SystemExit, match="holds a run already: continue it with --resume"):
        main(smoke(started))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("--optim.max-norm 1.5", r"optim\.max_norm was 3\.0, is 1\.5"),
        ("--seed 4", "seed was 0, is 4"),
        ("--steps 13", "steps was 12, is 13"),
        ("--data elsewhere", "data was 'scenes', is 'elsewhere'"),
        ("--masks.mask-ratio 0.2 0.5", r"masks\.mask_ratio was \(0\.1, 0\.65\), is \(0\.2, 0\.5\)"),
    ],
)
def test_settings_that_change_the_training_are_refused_on_resume(
    changed: str, message: str, started: Path
) -> None:
    before = (started / "settings.json").read_text()
    with pytest.raises(SystemExit, match=message):
        main(smoke(started, "--resume", *changed.split()))
    assert (started / "settings.json").read_text() == before


def test_changed_settings_can_be_insisted_on(started: Path) -> None:
    changed = ["--resume", "--optim.max-norm", "1.5"]
    with pytest.raises(SettingsError, match="or insist with --accept-changes"):
        check(parse(smoke(started, *changed)))
    check(parse(smoke(started, *changed, "--accept-changes")))
    # It is asked anew in each call.
    (started / "settings.json").write_text(as_json(parse(smoke(started, "--accept-changes"))))
    assert not parse(["--output", str(started)]).accept_changes


def test_settings_that_do_not_change_the_training_may_differ_on_resume(started: Path) -> None:
    free = "--workers 3 --log-every 7 --rasa.num-iterations 2 --evaluation.knn 5"
    free += " --highres.steps 9"  # free until the stage has begun
    check(parse(smoke(started, "--resume", *free.split())))
    (started / "highres" / "checkpoints" / "step_00000001").mkdir(parents=True)
    with pytest.raises(SettingsError, match=r"highres\.steps was 4, is 9"):
        check(parse(smoke(started, "--resume", *free.split())))


def test_settings_come_back_from_the_output(started: Path) -> None:
    assert parse(["--output", str(started)]) == parse(smoke(started))
    for preset, settings in PRESETS.items():
        (started / "settings.json").write_text(as_json(settings))
        expected = dataclasses.replace(settings, output=started)
        assert stored_settings(started) == expected, preset


def test_settings_are_json(started: Path) -> None:
    stored = json.loads((started / "settings.json").read_text())
    assert stored["model"]["backbone"] == "sslkit_vit_micro"


# ------------------------------------------------------------------- folders from somebody else


def store(folder: Path, /, **changed: object) -> None:
    """Write other values into the settings of a run."""
    settings = json.loads((folder / "settings.json").read_text())
    for name, value in changed.items():
        section, _, inner = name.rpartition("__")
        (settings[section] if section else settings)[inner] = value
    (folder / "settings.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    "data",
    [
        *("pipe:touch HIT; cat none.tar", "a.tar::pipe:touch HIT", "{pipe:touch HIT,a}.tar"),
        *("http://127.0.0.1:9/a.tar", "s3://bucket/a.tar", "hf:somebody/data", "hf-stream:x"),
    ],
)
@pytest.mark.parametrize("words", [["--stages", "evaluate"], ["--resume"]])
def test_what_a_folder_says_starts_no_program_and_asks_no_machine(
    data: str, words: list[str], started: Path, tmp_path: Path
) -> None:
    data = data.replace("HIT", str(tmp_path / "hit"))
    store(started, data=data)
    call = ["--output", str(started), *words]
    with pytest.raises(SystemExit) as exit_:
        main(call)
    assert f"--data '{data}'. If you trust it, give it again" in str(exit_.value)
    assert not (tmp_path / "hit").exists()
    assert parse([*call, "--data", data]).data == data


def test_weights_of_a_name_that_stands_in_a_folder_are_not_fetched(started: Path) -> None:
    store(started, init_from="hf-hub:somebody/weights")
    call = ["--output", str(started), "--resume"]
    parse(call)  # the run has begun: its weights are in the folder
    (started / "pretrain" / "checkpoints" / "step_00000001").rmdir()
    with pytest.raises(SystemExit, match=r"--init-from .hf-hub:somebody/weights.\. If you trust"):
        main(call)


def test_a_folder_writes_to_itself(
    started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    started.rename("runs/franca")  # the default of --output
    store(Path("runs/franca"), output=str(tmp_path / "elsewhere"))
    assert parse(["--resume"]).output == Path("runs/franca")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"preset": "huge"}, "preset: expected Literal"),
        ({"stages": ["pretrain", "fly"]}, "stages: expected Literal"),
        ({"stages": "pretrain"}, "stages: expected tuple"),
        ({"workers": 10**6}, "--workers must be at most 1024"),
        ({"scene_size": 10**6}, "--scene-size must be at most"),
        ({"crops__global_size": 10**6}, r"--crops\.global-size must be at most"),
        ({"model__num_prototypes": 10**12}, "--model: .*num_prototypes must be an integer from"),
        ({"model__num_layers": 10**7}, "--model: .*num_layers must be an integer from 1 to 64"),
        ({"model__backbone": "hf-hub:somebody/code"}, "--model: .*must be the name of a network"),
        ({"model__backbone": "local-dir:/tmp/x"}, "--model: .*must be the name of a network"),
        ({"model__backbone_settings": '{"depth": 1000000}'}, "--model: .*depth must be an integer"),
        (
            {"model__backbone_settings": '{"checkpoint_path": "/x"}'},
            "is not a setting that a file may state",
        ),
        (
            {"model__backbone_settings": '{"pretrained_cfg": {}}'},
            "is not a setting that a file may state",
        ),
        ({"model__backbone_settings": "[" * 100_000}, "--model: backbone_settings is not JSON"),
    ],
)
def test_settings_of_a_folder_are_within_bounds(changed: dict, message: str, started: Path) -> None:
    store(started, **changed)
    with pytest.raises(SystemExit, match=message):
        main(["--output", str(started), "--resume"])


def test_another_network_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    main(smoke(tmp_path, "--stages", "pretrain", "--steps", "1"))
    store(tmp_path, model__num_prototypes=1 << 24)
    store(tmp_path, model__backbone_settings='{"embed_dim": 65536, "depth": 200}')
    with pytest.raises(SystemExit, match=r"--model: .*has another encoder than these settings"):
        main(["--output", str(tmp_path), "--stages", "evaluate"])
    (tmp_path / "pretrain.safetensors").unlink()
    with pytest.raises(SystemExit, match="these settings make another network"):
        main(["--output", str(tmp_path), "--resume"])

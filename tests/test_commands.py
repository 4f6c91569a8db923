"""The `sslkit` command: what it lists, what --help costs, recipes by name, and how mistakes end."""

import json
import re
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import tyro

from sslkit.commands import extract, throughput
from sslkit.commands.evaluate import SUMMARIES
from sslkit.commands.main import COMMANDS, run, summary
from sslkit.commands.run import module_of, recipes
from sslkit.data import MultiCrop
from sslkit.extract import Extraction
from sslkit.recipes.franca.presets import PRESETS
from sslkit.training import command as recipe_command
from sslkit.training.help_text import COMMON
from sslkit.training.loop import Stopped
from sslkit.training.script import presets_of

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "sslkit" / "commands"

# Without these no model runs and no picture is drawn; a help text needs none of them.
HEAVY = ("torch", "timm", "torchvision", "numpy", "matplotlib", "sklearn", "PIL")

HELP = """
import json, runpy, sys
name, *sys.argv = sys.argv[1:]
try:
    (runpy.run_path if name.endswith(".py") else runpy.run_module)(name, run_name="__main__")
finally:
    print(json.dumps(sorted(set(sys.modules) & {heavy})), file=sys.stderr)
"""


def loaded_by(*words: str, program: Path | str = "sslkit") -> tuple[str, list[str]]:
    """What a module or a script prints, and the heavy packages that it has then loaded."""
    script = HELP.format(heavy=set(HEAVY))
    command = [sys.executable, "-c", script, str(program), str(program), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(done.stderr)


def test_every_file_is_a_command_and_is_listed():
    files = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "main"}
    assert set(COMMANDS) == files
    printed, loaded = loaded_by("--help")
    assert loaded == []
    for name in COMMANDS:
        text = summary(FOLDER / f"{name}.py")
        assert text.endswith(".")
        assert f"  {name:<10}  {text}\n" in printed


@pytest.mark.parametrize(
    "words",
    [(name,) for name in COMMANDS]
    + [("rasa", "fit"), ("rasa", "fold"), ("export", "timm")]
    + [("run", name) for name in recipes()]
    + [("evaluate", name) for name in SUMMARIES],
    ids=" ".join,
)
def test_help_loads_nothing_heavy(words):
    printed, loaded = loaded_by(*words, "--help")
    assert loaded == []
    assert f"usage: sslkit {' '.join(words)}" in printed


@pytest.mark.parametrize("name", recipes())
def test_help_of_a_script_loads_nothing_heavy(name):
    printed, loaded = loaded_by("--help", "--preset", "smoke", program=recipes()[name].resolve())
    assert loaded == []
    assert f"usage: {ROOT}/examples/{name}_recipe.py" in printed
    by_name, _ = loaded_by("run", name, "--help", "--preset", "smoke")
    assert printed.splitlines()[1:] == by_name.splitlines()[1:]


FIELD = """
@dataclass(frozen=True, kw_only=True)
class Mine(Settings):
    whitening: float = 0.5

{name} = {{"demo": Mine(**vars(PRESETS["demo"]))}}

"""


@pytest.mark.parametrize(
    ("place", "own", "heavy"), [("if __name__", "PRESETS", False), ("STAGES =", "OWN", True)]
)
def test_help_of_a_copy_has_its_own_settings(place, own, heavy, tmp_path):
    """Those above `begin` are shown at once, others after the script's imports."""
    text = recipes()["franca"].read_text()
    for start, instead in {
        "from dataclasses import ": "from dataclasses import dataclass, ",
        place: FIELD.format(name=own) + place,
        "RECIPE = Recipe(PRESETS,": f"RECIPE = Recipe({own},",
    }.items():
        text = text.replace(f"\n{start}", f"\n{instead}", 1)
    (copy := tmp_path / "mine.py").write_text(text)
    printed, loaded = loaded_by("--help-all", program=copy)
    assert "--whitening" in printed
    assert ("torch" in loaded) == heavy


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("RECIPE = Recipe(PRESETS, ", "RECIPE = Recipe({**PRESETS, 'mine': MINE}, "),
        ("RECIPE = Recipe(PRESETS, ", "RECIPE = Recipe(dict(PRESETS, mine=MINE), "),
        ("STAGES = ", "PRESETS['mine'] = MINE\nSTAGES = "),
        ("STAGES = ", "from mine import PRESETS\nSTAGES = "),
        ("RECIPE = ", "RECIPE = MINE\nRECIPE = "),
        ("    run_recipe(RECIPE)", "    run_recipe(replace(RECIPE, presets=MINE))"),
        ("    run_recipe(RECIPE)", "    run_recipe(MINE)"),
        ("    begin(PRESETS, __file__)", "    pass"),
    ],
)
def test_settings_are_unknown_where_a_script_may_change_them(line, instead, tmp_path):
    script = tmp_path / "script.py"
    text = recipes()["franca"].read_text()
    script.write_text(text)
    assert presets_of(script) == PRESETS
    assert text.count(f"\n{line}") == 1
    script.write_text(text.replace(f"\n{line}", f"\n{instead}"))
    assert presets_of(script) is None


def test_defaults_of_commands_are_those_of_the_parts():
    """They are written twice, so that --help need not load the parts."""
    given = {field.name: field.default for field in fields(extract.Settings)}
    for field in fields(Extraction):
        assert given[field.name] == field.default
    crops = MultiCrop()
    for name in ("global_size", "local_size", "num_local"):
        assert getattr(throughput.Settings, name) == getattr(crops, name)


def refusal(capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        run(words)
    printed = capsys.readouterr()
    return stopped.value.code, printed.err


def test_mistakes_have_status_two_and_one_line(capsys):
    assert refusal(capsys, "evalute") == (
        2,
        "error: no command 'evalute': did you mean evaluate? sslkit --help says what there is\n",
    )
    status, said = refusal(capsys, "evaluate", "knm")
    assert (status, said.count("\n")) == (2, 1)
    assert "error: no protocol 'knm': did you mean knn?" in said
    status, said = refusal(capsys, "shards", "images")
    assert status == 2
    assert "OUTPUT" in said


def test_a_failure_has_status_one_and_one_line(capsys, tmp_path):
    status, said = refusal(capsys, "backbones", str(tmp_path / "a.pth"))
    assert (
        status
        == f"error: no weights '{tmp_path}/a.pth': give a file, a folder, hf:ORG/NAME, "
        + ("timm:NAME, sslkit:NAME, or random:NAME for fresh ones")
    )
    assert said == ""


def test_version(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sslkit ")


# --- recipes --------------------------------------------------------------------------------------


def test_recipes_are_found_by_their_files(capsys):
    found = recipes()
    assert found["franca"].resolve() == ROOT / "examples" / "franca_recipe.py"
    assert module_of(found["franca"]) == "sslkit.recipes.franca.recipe"
    assert run(["run"]) == 0
    printed = capsys.readouterr().out
    for name, path in found.items():
        assert re.search(rf"^  {name} +{re.escape(summary(path))}$", printed, re.M), name
    status, said = refusal(capsys, "run", "frnca")
    assert (status, "no recipe 'frnca': did you mean franca?" in said) == (2, True)


def test_a_recipe_runs_by_its_name(tmp_path):
    """As `python examples/franca_recipe.py` does; and it says how it is continued."""
    output = tmp_path / "run"
    words = ["run", "franca", "--preset", "smoke", "--output", str(output), "--steps", "0"]
    command = [sys.executable, "-m", "sslkit", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: --steps")
    assert not output.exists()


def test_help_of_a_recipe_comes_in_two_layers(capsys):
    printed = {}
    for flag in ("-h", "--help", "--help-all"):
        with pytest.raises(SystemExit) as stopped:
            run(["run", "franca", flag])
        assert stopped.value.code == 0
        printed[flag] = capsys.readouterr().out
        assert "usage: sslkit run franca" in printed[flag]
    settings = {
        flag: set(re.findall(r"^(?:│ |  )(--[a-z][a-z0-9.-]*)", printed[flag], re.M))
        for flag in printed
    }
    common = {example.split()[0] for example in COMMON.values()}
    assert settings["-h"] == settings["--help"] == common
    assert common < settings["--help-all"]
    assert f"--help-all shows all {len(settings['--help-all'])} settings" in printed["--help"]
    assert "Pixels a side of the two views" in printed["--help"]


@pytest.mark.parametrize("name", recipes())
def test_examples_of_common_settings_are_taken_by_every_recipe_that_has_them(name, tmp_path):
    presets = presets_of(recipes()[name])
    for path, example in COMMON.items():
        owner, _, field = path.rpartition(".")
        section = getattr(presets["demo"], owner, None) if owner else presets["demo"]
        if hasattr(section, field):
            tyro.cli(type(presets["demo"]), default=presets["demo"], args=example.split())


def test_a_copy_of_a_recipe_is_a_program(tmp_path, capsys):
    copy = tmp_path / "my recipe.py"
    assert run(["cp", "franca", str(copy)]) == 0
    assert f"python '{copy}' --preset demo" in capsys.readouterr().out
    assert copy.read_text() == (ROOT / "examples" / "franca_recipe.py").read_text()
    copy.write_text("# mine")
    with pytest.raises(SystemExit, match="is there already: choose another name, or give --force"):
        run(["cp", "franca", str(copy)])
    assert copy.read_text() == "# mine"
    assert run(["cp", "franca", str(copy), "--force"]) == 0
    assert run(["cp", "franca", str(tmp_path)]) == 0
    command = [sys.executable, str(tmp_path / "franca_recipe.py"), "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "franca_recipe.py [-h]" in done.stdout
    status, said = refusal(capsys, "cp", "franka", str(copy))
    assert (status, "did you mean franca?" in said) == (2, True)


@pytest.mark.parametrize(("processes", "launcher"), [("1", ""), ("2", "torchrun ... -m ")])
def test_a_stopped_recipe_says_how_it_is_continued(
    processes, launcher, tmp_path, monkeypatch, capsys
):
    def stopped(*_):
        raise Stopped("pretrain", 3, signal.SIGTERM)

    monkeypatch.setattr(recipe_command, "run", stopped)
    monkeypatch.setenv("WORLD_SIZE", processes)
    output = tmp_path / "my run"
    assert run(["run", "franca", "--preset", "smoke", "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert "saved at step 3" in said
    assert said.endswith(f": {launcher}sslkit run franca --output '{output}' --resume\n")


def test_help_of_a_recipe_has_the_values_of_the_preset(capsys):
    for words in (["--preset", "vitb14_in21k"], ["--preset=vitb14_in21k"]):
        with pytest.raises(SystemExit) as stopped:
            run(["run", "franca", *words, "--help-all"])
        assert stopped.value.code == 0
        printed = capsys.readouterr().out
        assert re.search(r"all processes and micro-batches\.\W+\(default: 2048\)", printed), words
    status, said = refusal(capsys, "run", "franca", "--preset", "demmo", "--help")
    assert (status, "no preset 'demmo': did you mean demo?" in said) == (2, True)

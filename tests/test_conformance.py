"""sslkit's own parts hold what `sslkit.testing` asks of anybody's, and its faults are caught."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sslkit.testing
from sslkit.commands.main import run as sslkit_command
from sslkit.testing import (
    DINO,
    Finding,
    Loss,
    NotHeld,
    Schedule,
    Sinkhorn,
    cases,
    check,
    check_schedule,
    own,
    processes,
    strategies,
    textbook,
)
from sslkit.testing.conformance import Case, cases_of
from sslkit.testing.faults import GRADIENT_OVER_RANKS, Fault
from sslkit.testing.masks import chi_square_pvalue
from sslkit.testing.processes import end_ranks, run_on_ranks
from sslkit.testing.properties import Property, Stop, Violation, agree, shown
from sslkit.testing.report import conform, markdown, tables
from tests import faulty

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def ranks_for_this_file_alone():
    """Other tests look for processes that somebody has left."""
    yield
    end_ranks()


@pytest.mark.parametrize("case", cases(own), ids=str)
def test_own_parts_conform(case):
    case.check()


def case_of(adapter, promise) -> Case:
    return next(case for case in cases_of(adapter) if case.promise.holds is promise)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "adapter", "promise"),
    faulty.FAULTS,
    ids=[f"{type(adapter).__name__}: {what}" for what, adapter, _ in faulty.FAULTS],
)
def test_a_fault_is_caught_by_name(what, adapter, promise, monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", 3.0)
    finding = case_of(adapter, promise).run()
    assert not finding.holds
    assert finding.found
    print(finding)


def test_every_property_has_a_fault():
    known = {promise for _, _, promise in faulty.FAULTS}
    every = {promise.holds for _, adapter, _ in faulty.FAULTS for promise in adapter.properties}
    assert every == known
    assert {type(adapter) for _, adapter, _ in faulty.FAULTS} == {
        type(adapter) for adapter in [*sslkit.testing.adapters(own).values(), Loss(len)]
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", faulty.SOUND)
def test_what_faulty_parts_are_made_from_is_sound(name):
    check(faulty.SOUND[name])


def test_properties_are_told_in_one_sentence():
    for _, adapter, _ in faulty.FAULTS:
        for promise in adapter.properties:
            assert promise.sentence.endswith("."), promise
            assert promise.sentence.count(". ") == 0, promise


# --- what is reported -----------------------------------------------------------------------------


def fewer_views(student, probs):
    return textbook.dino(student[:2], probs)


def test_a_report_has_the_smallest_input_and_the_known_fault():
    case = case_of(DINO(fewer_views), sslkit.testing.dino.equals_the_double_loop)
    assert str(case) == "DINO: equals the double loop"
    with pytest.raises(NotHeld) as raised:
        case.check()
    lines = str(raised.value).splitlines()
    assert lines[0].startswith("DINO: The loss is the cross-entropy of every pair of views")
    assert lines[1:4] == [
        "  smallest input found:",
        "    student_logits = [[[0, 0]], [[0, 0]], [[0, 1]]]",
        "    probs = [[[0.5, 0.5]]]",
    ]
    assert lines[4].startswith("  expected 2.8466 (")  # the mean of ln 2 and ln(1 + exp(10)) - 5
    assert lines[5] == "  found    0.693147"
    assert lines[6].endswith("(lightly-ai/lightly#2023)")


def test_check_runs_all_properties_and_reports_those_that_fail():
    check_schedule(own.warmup_then_cosine)
    with pytest.raises(NotHeld, match=r"^1 of 5 properties do not hold\n\nSchedule: At the last"):
        check_schedule(faulty.periodic)


def test_two_runs_report_the_same():
    case = case_of(Sinkhorn(textbook.sinkhorn), sslkit.testing.sinkhorn.is_finite_over_its_range)
    state = torch.get_rng_state()
    first = case.run()
    assert torch.equal(torch.get_rng_state(), state)
    assert case.run() == first


def test_more_effort_tries_more_inputs():
    drawn = []

    def holds(adapter, draw):
        """Nothing is asked."""
        drawn.append(draw(strategies.seeds, "seed"))

    for effort, number in ((1, 8), (0.5, 4), (2, 16)):
        drawn.clear()
        assert Case("x", None, Property(holds, max_examples=8)).run(effort=effort).holds
        assert len(drawn) == number


def test_an_exception_is_a_violation():
    def raises(logits, temperature):
        raise ZeroDivisionError("division\nby zero")

    (finding, *_) = (case.run() for case in cases_of(Sinkhorn(raises)))
    assert finding.expected == "a result"
    assert finding.found.startswith("ZeroDivisionError: division by zero (")
    assert "test_conformance.py:" in finding.found


def test_what_is_not_promised_is_no_case():
    promised = {case.promise.name for case in cases_of(Sinkhorn(textbook.sinkhorn))}
    assert "any split over processes gives the same" not in promised
    everything = {case.promise.name for case in cases_of(own.sinkhorn)}
    assert promised < everything


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.tensor([[0.5, 1 / 3]]), "[[0.5, 0.333333]]"),
        (torch.tensor([1.5], dtype=torch.bfloat16), "bfloat16 [1] [1.5]"),
        (torch.zeros(0, 3), "float32 [0, 3] []"),
        (torch.arange(100.0), "float32 [100] of 0 .. 99"),
        ((2, 0, True), "[2, 0, True]"),
    ],
)
def test_values_are_shown_short(value, text):
    assert shown(value) == text


def test_agreement():
    x = torch.tensor([1.0, torch.inf])
    agree(x, x.double())
    agree(x + 1e-3, x, 2e-3)
    for other in (x + 1e-2, -x, x * torch.nan, x[:1]):
        with pytest.raises(Violation, match=r"^expected what: .* found"):
            agree(other, x, 1e-3, "what")


def test_chi_square_pvalues_are_scipys():
    from scipy.stats import chisquare

    counts = torch.tensor([8.0, 12.0, 21.0, 9.0])
    assert chi_square_pvalue(counts) == pytest.approx(chisquare(counts.numpy()).pvalue)


def test_a_fault_has_an_address():
    fault = Fault("what", "owner/name#12")
    assert (str(fault), fault.url) == (
        "what (owner/name#12)",
        "https://github.com/owner/name/issues/12",
    )
    assert len(GRADIENT_OVER_RANKS) == 2


# --- strategies -----------------------------------------------------------------------------------


def test_layouts_hold_the_same_numbers():
    x = torch.randn(4, 3)
    for name, view in strategies.layouts(x):
        assert torch.equal(view, x), name
        assert not view.is_contiguous() or view.storage_offset() > 0


def test_strategies_cover_what_they_say():
    from hypothesis import find

    assert find(strategies.splits(), lambda split: len(split) == 3 and 0 in split)
    assert find(strategies.splits(uneven=False), lambda split: len(split) == 3) == (1, 1, 1)
    assert find(strategies.masks(3, 2), lambda masks: masks.any() and not masks.all(1).any()).any()
    assert float(find(strategies.extreme_logits(1e4), lambda x: x.max() >= 1e4).max()) == 1e4
    smallest = find(strategies.probs(2, 3), lambda probs: True)
    torch.testing.assert_close(smallest, torch.full((2, 3), 1 / 3))


# --- several processes ----------------------------------------------------------------------------


def rank_and_sum(value):
    total = torch.tensor(value)
    torch.distributed.all_reduce(total)
    return torch.distributed.get_rank(), int(total)


def raise_on_rank(value):
    if torch.distributed.get_rank() == value:
        raise ValueError("refused")


def leave_rank_waiting(value):
    if torch.distributed.get_rank() != value:
        torch.distributed.barrier()


def test_functions_run_on_any_number_of_ranks(monkeypatch):
    for values in ((5,), (1, 2, 3), (1, 2), (3, 4)):
        found = run_on_ranks(rank_and_sum, [(value,) for value in values])
        assert found == [(rank, sum(values)) for rank in range(len(values))]
    monkeypatch.setattr(processes, "PATIENCE", 1.0)
    for function, message in (
        (raise_on_rank, "rank 1 of 2: ValueError: refused"),
        (leave_rank_waiting, "rank 1 is back, and rank 0 waits for it in a collective"),
    ):
        with pytest.raises(Stop, match=message):
            run_on_ranks(function, [(1,), (1,)])
        assert run_on_ranks(rank_and_sum, [(1,), (1,)]) == [(0, 2), (1, 2)]


def test_an_adapter_that_no_other_process_can_import_is_an_error():
    here = Sinkhorn(textbook.sinkhorn, on_ranks=lambda *x: textbook.sinkhorn(*x))
    promise = sslkit.testing.sinkhorn.any_split_over_processes_gives_the_same
    with pytest.raises(TypeError, match="a def and not as a lambda"):
        case_of(here, promise).run()


# --- the command ----------------------------------------------------------------------------------

ADAPTERS = """
import timm
from sslkit.testing import DINO, textbook

textbook_dino = DINO(textbook.dino, detaches=False)

def fewer(student, probs):
    return textbook.dino(student[:2], probs)

fewer_views = DINO(fewer, detaches=False, compiles=False)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_adapters.py").write_text(ADAPTERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path)
    yield "own_adapters"
    sys.modules.pop("own_adapters", None)


def test_the_command_prints_tables_and_writes_a_page(module, capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        sslkit_command(["conform", module, "--output", "page.md"])
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert "| equals the double loop               | holds         | FAILS (1)   |" in printed.out
    assert "| processes average to the same        | -             | -           |" in printed.out
    assert "(1) fewer views: The loss is the cross-entropy of every pair" in printed.out
    assert printed.out.endswith("19 of 22 properties hold\n")
    assert set(printed.err) <= {".", "F", "\n"}
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("# Conformance of own_adapters\n\nVersions: Python ")
    assert "timm " in page.splitlines()[2]
    assert "\n## Failure 1: fewer views, equals the double loop\n" in page
    assert "[lightly-ai/lightly#2023](https://github.com/lightly-ai/lightly/issues/2023)" in page

    assert sslkit_command(["conform", module, "--only", "textbook"]) == 0
    assert capsys.readouterr().out.endswith("11 of 11 properties hold\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a module with adapters"),
        (["no_such_module_here"], "no_such_module_here: No module named 'no_such_module_here'"),
        (["own_adapters", "--only", "knn"], "no adapter to examine; own_adapters has textbook"),
        (["own_adapters", "--effort", "0"], "--effort must be positive, got 0.0"),
    ],
)
def test_mistakes_take_one_line(words, message, module, capsys):
    with pytest.raises(SystemExit) as ended:
        sslkit_command(["conform", *words])
    assert message in str(ended.value.code) + capsys.readouterr().err


def test_adapters_of_one_name_are_refused():
    other = type(own)("other")
    other.dino_loss = DINO(textbook.dino)
    with pytest.raises(ValueError, match="two modules have an adapter that is called dino_loss"):
        cases(own, other)
    assert len(cases(own, own)) == len(cases(own))


WITHOUT_HYPOTHESIS = """
import sys
sys.modules["hypothesis"] = None
import sslkit.testing
from sslkit.testing.references.losses import koleo
print(len(sslkit.testing.__all__) > 20)
try:
    sslkit.testing.Sinkhorn
except ModuleNotFoundError as error:
    print(error)
from sslkit.commands.main import run
run(["conform", "sslkit.testing.own"])
"""


def test_without_hypothesis_the_extra_is_named():
    command = [sys.executable, "-c", WITHOUT_HYPOTHESIS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    needs = "needs hypothesis, which is not installed: pip install 'sslkit[testing]'"
    assert done.stdout.splitlines() == ["True", f"sslkit.testing {needs}"]
    assert done.stderr == f"error: sslkit conform {needs}\n"


def test_findings_can_be_tabulated():
    adapters = {"right": own.warmup_then_cosine, "wrong": Schedule(faulty.periodic)}
    told = []
    findings = conform(adapters, progress=told.append)
    assert told == findings
    assert all(isinstance(finding, Finding) for finding in findings)
    ((kind, lines),) = tables(adapters, findings)
    assert kind == "Schedule"
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 2 + len(adapters["right"].properties)
    assert markdown("A", adapters, findings).count("\n## Failure") == 1

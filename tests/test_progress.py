import contextlib
import io

import pytest
import torch

from sslkit.progress import TrainingProgress, WorkProgress, track


class Clock:
    """Time that passes when told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_come_at_first_every_five_seconds_and_at_the_end():
    clock, file = Clock(), io.StringIO()
    with TrainingProgress(1012, start_step=1000, file=file, clock=clock) as progress:
        for step in range(1001, 1013):
            clock.now += 2.0
            progress.update(step, torch.tensor(step / 1000), images=64)
    assert file.getvalue().splitlines() == [
        "training 1001/1012  loss 1.001  32 images/s",
        "training 1004/1012  loss 1.004  32 images/s  0:00:16 left",
        "training 1007/1012  loss 1.007  32 images/s  0:00:10 left",
        "training 1010/1012  loss 1.010  32 images/s  0:00:04 left",
        "training 1012/1012  loss 1.012  32 images/s  0:00:00 left",
    ]


def test_no_time_left_before_steps_have_been_timed():
    """Nor does the first step count, which starts workers and compiles: 100 times as slow here."""
    clock, file = Clock(), io.StringIO()
    with TrainingProgress(1000, file=file, clock=clock) as progress:
        for step, seconds in enumerate([600.0] + [6.0] * 5, start=1):
            clock.now += seconds
            progress.update(step, 1.0, images=6)
    lefts = [line.partition("images/s")[2].strip() for line in file.getvalue().splitlines()]
    assert lefts == ["", "", "", "1:39:36 left", "1:39:30 left", "1:39:24 left"]


def test_slow_steps_get_a_time_left_too():
    clock, file = Clock(), io.StringIO()
    with TrainingProgress(10, file=file, clock=clock) as progress:
        for step in range(1, 6):
            clock.now += 60.0
            progress.update(step, 1.0, images=6)
    assert file.getvalue().splitlines()[-1].endswith("0:05:00 left")


def test_speed_is_that_of_the_last_half_minute():
    clock, file = Clock(), io.StringIO()
    with TrainingProgress(10_000, file=file, clock=clock) as progress:
        for step, seconds in enumerate([600.0] + [1.0] * 40, start=1):  # a slow start: compilation
            clock.now += seconds
            progress.update(step, 1.0, images=10)
    assert progress.images_per_second == pytest.approx(10)
    assert (
        file.getvalue().splitlines()[-1].endswith("10 images/s  2:45:59 left")
    )  # 9959 s at step 41


def test_a_loss_is_read_only_when_it_is_shown():
    class Loss:
        reads = 0

        def __float__(self) -> float:
            Loss.reads += 1
            return 0.5

    clock = Clock()
    with TrainingProgress(1000, file=io.StringIO(), clock=clock) as progress:
        for step in range(1, 101):
            clock.now += 0.1  # 10 s in all: at the start, after 5 s
            progress.update(step, Loss(), images=1)
    assert Loss.reads == 2


@pytest.mark.parametrize("mode", ["auto", "bar"])
def test_a_terminal_gets_a_bar_with_everything_in_it(mode, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    clock, file = Clock(), Terminal()
    with TrainingProgress(
        200, description="pretrain", mode=mode, file=file, clock=clock
    ) as progress:
        for step in range(1, 101):
            clock.now += 1.0
            progress.update(step, 2.5, images=64)
        progress.message("k-NN [bold] 31.0 %")
        assert list(progress.track("abc", "k-NN features")) == ["a", "b", "c"]
    shown = file.getvalue()
    for text in (
        "pretrain",
        "100/200",
        "loss 2.500  64 images/s  0:01:40 left",
        "k-NN [bold] 31.0 %",
        "\x1b[",
    ):
        assert text in shown


@pytest.mark.parametrize(("terminal", "term"), [(False, "xterm"), (True, "dumb")])
def test_no_bar_where_none_can_be_drawn(terminal, term, monkeypatch):
    monkeypatch.setenv("TERM", term)
    file = Terminal() if terminal else io.StringIO()
    with TrainingProgress(1, file=file) as progress:
        progress.message("hello")
        progress.update(1, 2.5, images=64)
    first, second = file.getvalue().splitlines()
    assert first == "hello"
    assert second.startswith("training 1/1  loss 2.500  ")


def test_track_passes_everything_on_and_tells_how_far_it_is():
    clock, file = Clock(), io.StringIO()
    seen = []
    for item in track(range(12), "features", file=file, clock=clock):
        clock.now += 1.5
        seen.append(item)
    assert seen == list(range(12))
    assert file.getvalue().splitlines() == [
        "features 4/12  0:00:12 left",
        "features 8/12  0:00:06 left",
        "features 12/12  in 0:00:18",
    ]


def test_track_of_unknown_length_and_of_nothing():
    file = io.StringIO()
    assert list(track((i for i in range(3)), "stream", file=file)) == [0, 1, 2]
    assert list(track([], "nothing", file=file)) == []
    assert list(track(iter("ab"), "told", total=2, file=file)) == ["a", "b"]
    assert file.getvalue().splitlines() == [
        "stream 3  in 0:00:00",
        "nothing 0/0  in 0:00:00",
        "told 2/2  in 0:00:00",
    ]


def test_an_error_inside_ends_the_bar_and_gives_the_terminal_back(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    with pytest.raises(RuntimeError, match="stop"), TrainingProgress(5, file=file):
        raise RuntimeError("stop")
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert file.getvalue().rindex(show) > file.getvalue().rindex(hide)
    for _ in track("abc", "left early", file=file):
        break
    assert file.getvalue().rindex(show) > file.getvalue().rindex(hide)


def test_work_says_how_much_of_it_is_done():
    clock, file = Clock(), io.StringIO()
    with WorkProgress("images", file=file, clock=clock) as work:
        for done in (3, 6, 9):
            clock.now += 4.0
            work.reach(done, 9)
        work.message("all there")
    assert file.getvalue().splitlines() == [
        "images 6/9  0:00:04 left",
        "all there",
        "images 9/9  in 0:00:12",
    ]


def test_work_that_is_continued_says_where_it_begins():
    clock, file = Clock(), io.StringIO()
    with WorkProgress("images", 9, start=4, file=file, clock=clock) as work:
        work.reach(9)
    assert file.getvalue().splitlines() == ["images 4/9", "images 9/9  in 0:00:00"]


def test_work_that_fails_is_not_said_to_be_done():
    file = io.StringIO()
    with contextlib.suppress(OSError), WorkProgress("images", 9, file=file):
        raise OSError("the disk is full")
    assert file.getvalue() == ""
    with pytest.raises(RuntimeError, match="inside its with block"):
        WorkProgress("images", 9).reach(1)


def test_work_on_a_terminal_gets_a_bar_whose_total_may_come_late(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    clock, file = Clock(), Terminal()
    with WorkProgress("images", file=file, clock=clock) as work:
        clock.now += 1
        work.reach(3, 7)
    assert "3/7" in file.getvalue()


def test_nothing_is_shown_where_nothing_is_wanted(capsys):
    with WorkProgress("images", 2, mode="none") as work:
        work.message("hello")
        work.reach(2)
    assert list(track("ab", "letters", mode="none")) == ["a", "b"]
    with TrainingProgress(1, mode="none") as training:
        training.update(1, 2.5, images=1)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_steps": 5, "start_step": 6}, "between 0 and total_steps=5, got 6"),
        (
            {"total_steps": 5, "mode": "text"},
            r"mode must be one of \('auto', 'bar'",
        ),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingProgress(**settings)

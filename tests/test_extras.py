"""Progress of long calls."""

from __future__ import annotations

import io
import sys

import pytest

from fastvq import extras
from fastvq.extras import Progress, tracked, without_progress


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(extras.time, "monotonic", lambda: self.now)


def test_a_file_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock(monkeypatch)
    with Progress(100, "step", initial=10) as progress:
        for _ in range(90):
            clock.now += 1
            progress.update()
            progress.say(f"loss {clock.now:.0f}")
    lines = capsys.readouterr().err
    assert lines == (
        "step 40 of 100 after 0:30, 1:00 left: loss 129\n"
        "step 70 of 100 after 1:00, 0:30 left: loss 159\n"
        "step 100 of 100 after 1:30: loss 190\n"
    )


def test_items_pass_through_and_are_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    seen = []
    for item in tracked(["ab", "c"], 3, "letter", count=len):
        clock.now += 31
        seen.append(item)
    assert seen == ["ab", "c"]
    assert capsys.readouterr().err == "letter 2 of 3 after 0:31, 0:16 left\nletter 3 of 3 after 1:02\n"
    assert list(tracked("abc", 3, "letter", shown=False)) == ["a", "b", "c"]


def test_what_is_short_and_has_nothing_to_say_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(3, "image") as progress:
        progress.update(3)
    assert capsys.readouterr().err == ""


def test_what_fails_leaves_the_last_line_to_its_error(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(3, "image")
    progress.say("almost")
    progress.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("delay", [0, 1000])
def test_a_terminal_gets_a_bar_after_a_moment(delay: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(extras, "_DELAY_S", delay)
    with Progress(4, "image") as progress:
        progress.say("so far")
        progress.update(4)
    assert ("4/4" in terminal.getvalue() and "so far" in terminal.getvalue()) == (delay == 0)


@pytest.mark.parametrize("stderr", [io.StringIO, Terminal])
def test_there_is_none_where_none_is_wanted(stderr: type[io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    written = stderr()
    monkeypatch.setattr(sys, "stderr", written)
    monkeypatch.setattr(extras, "_DELAY_S", 0)
    with without_progress(), without_progress(False), Progress(1, "image") as progress:
        progress.say("x")
        progress.update()
    with Progress(1, "image", shown=False) as progress:
        progress.say("x")
        progress.update()
    assert written.getvalue() == ""
    with without_progress(False), Progress(1, "image") as progress:
        progress.say("x")
        progress.update()
    assert written.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (61, "1:01"), (3599.6, "1:00:00"), (7384, "2:03:04")])
def test_times_are_read_at_a_glance(seconds: float, text: str) -> None:
    assert extras.clock(seconds) == text

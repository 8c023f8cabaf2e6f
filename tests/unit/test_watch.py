"""The watch process: there is one, it outlives whatever a verb does, and it goes when it is told to."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from host import watch
from host.__main__ import main

ROOT = Path(__file__).parents[2]


class Watch:
    """The watch process with files of its own; it runs a verb that does not exist, so it touches nothing."""

    def __init__(self, folder: Path) -> None:
        self.pid_file = folder / "pid"
        self.words = ["watch", f"--pid-file={self.pid_file}", f"--log={folder / 'log'}", "--period=600"]

    def start(self) -> int:
        """Starts it; its pid."""
        assert main([*self.words, "--start", "nothing"]) == 0
        return int(self.pid_file.read_text())

    def stop(self) -> None:
        assert main([*self.words, "--stop"]) == 0
        assert not self.pid_file.exists()


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(watch, "program", lambda: [sys.executable, "-m", "host"])
    made = Watch(tmp_path)
    yield made
    made.stop()


def runs(pid: int) -> bool:
    """Whether a process is there and does not only wait to be reaped, when it holds no file any more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_it_is_one_however_often_it_is_started_and_gone_when_stopped(own: Watch) -> None:
    pid = own.start()
    assert own.start() == pid
    own.stop()
    assert not runs(pid)
    own.stop()  # is no error


def test_one_that_was_killed_leaves_nothing_that_keeps_the_next_from_starting(own: Watch) -> None:
    killed = own.start()
    os.kill(killed, signal.SIGKILL)
    while runs(killed):
        time.sleep(0.01)
    assert own.pid_file.exists()
    pid = own.start()
    assert pid != killed
    assert runs(pid)


def test_a_pid_file_that_names_another_process_ends_none(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        file = tmp_path / "pid"
        file.write_text(str(other.pid))
        assert watch.stop(file) == 0
        assert other.poll() is None
        other.kill()


class Enough(Exception):
    """Ends a loop that has no end."""


def rounds(
    count: int, programs: Sequence[str], log: Path, monkeypatch: pytest.MonkeyPatch, every: float = 50.0
) -> list[float]:
    """Runs the loop's verbs, each a shell text, so many times; the seconds that it waited after each round."""
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == count:
            raise Enough

    # Its own clock only: subprocess sleeps too.
    monkeypatch.setattr("host.watch.time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    monkeypatch.setattr(watch, "program", lambda: ["sh", "-c"])
    monkeypatch.setattr(watch, "VERBS", {text: (text,) for text in programs})
    with pytest.raises(Enough):
        watch.loop(programs, every, log)
    return waited


def test_a_verb_that_fails_or_is_killed_ends_neither_the_next_nor_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "state/log"
    waited = rounds(2, ["exit 3", "kill -9 $$", "echo well; echo oops >&2"], log, monkeypatch)
    assert log.read_text() == "well\noops\n" * 2
    assert all(40 < seconds <= 50 for seconds in waited)


def test_a_verb_that_hangs_is_killed_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "PERIOD", 0.2)
    log = tmp_path / "log"
    waited = rounds(1, ["exec sleep 60", "echo next"], log, monkeypatch, every=0.05)
    assert log.read_text() == "exec sleep 60 did not end within 1 s and was killed\nnext\n"
    assert waited == [0.0]


def test_the_log_has_a_size_that_it_does_not_pass_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOG_BYTES", 10)
    log = tmp_path / "log"
    rounds(4, ["echo 0123456789"], log, monkeypatch)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "log.1"]
    assert log.read_text() == (tmp_path / "log.1").read_text() == "0123456789\n"

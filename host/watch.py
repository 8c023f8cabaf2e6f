"""watch: runs verify, keep and backup at their periods on a host without systemd; there timers do.

One process, started by the host stack. Each run is a process of its own with a time limit, so that one that fails or
hangs ends nothing else. What they print (only news) goes to `/var/lib/bulkhead/watch.log`.
"""

import argparse
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from host.machine import Places

VERBS = {"verify": ("verify", "--news"), "keep": ("keep", "--news"), "backup": ("backup", "--due", "--background")}
PERIOD = 60.0
MARGIN = 10.0
"""Runs start so many seconds before the period is over (half of a short one): what happens just after a look, and is
then looked at twice, is still reported within the period."""
LOG_BYTES = 2**20
START_STOP_SECONDS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("verbs", nargs="*", default=[], metavar="VERB", help=f"of {', '.join(VERBS)}; all")
    parser.add_argument("--period", type=float, default=PERIOD, help=f"seconds within which news is told ({PERIOD:g})")
    parser.add_argument("--pid-file", type=Path, default=Places().run / "watch.pid")
    parser.add_argument("--log", type=Path, default=Places().state / "watch.log")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--start", action="store_true", help="in the background, unless it runs already")
    action.add_argument("--stop", action="store_true", help="stop the one that runs")


def run(args: argparse.Namespace) -> int:
    """In the foreground until it is told to stop. 0 also when another one runs already."""
    if args.stop:
        return stop(args.pid_file)
    if args.start:
        return start(args)
    # Ends the verb that is running too: subprocess.run kills its child when it is left by an exception.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    args.pid_file.parent.mkdir(parents=True, exist_ok=True)
    with args.pid_file.open("a+") as file:
        if not locked(file.fileno()):
            return 0
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        loop(args.verbs or list(VERBS), max(args.period - MARGIN, args.period / 2), args.log)
    return 0


def locked(descriptor: int) -> bool:
    """Whether the lock of the pid file could be had. It is gone with its process, however that ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def loop(verbs: Sequence[str], every: float, log: Path) -> None:
    """Runs each verb, then waits for the rest of `every` seconds, for ever."""
    log.parent.mkdir(parents=True, exist_ok=True)
    while True:
        started = time.monotonic()
        if log.exists() and log.stat().st_size > LOG_BYTES:
            log.replace(log.with_name(f"{log.name}.1"))
        with log.open("a") as output:
            for verb in verbs:
                command = [*program(), *VERBS.get(verb, (verb,))]
                try:
                    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=5 * PERIOD)
                except subprocess.TimeoutExpired:
                    print(f"{verb} did not end within {5 * PERIOD:g} s and was killed", file=output, flush=True)
        time.sleep(max(0.0, every - (time.monotonic() - started)))


def program() -> list[str]:
    """How this program is started again: a zipapp by its file, else as a module."""
    return [sys.executable, sys.argv[0]] if sys.argv[0].endswith(".pyz") else [sys.executable, "-m", "host"]


def start(args: argparse.Namespace) -> int:
    """Starts the loop as a process of its own session, holding nothing of whoever started it, unless one runs."""
    args.pid_file.parent.mkdir(parents=True, exist_ok=True)
    with args.pid_file.open("a+") as file:
        if not locked(file.fileno()):
            return 0
        file.truncate(0)
    command = [*program(), "watch", *args.verbs, f"--period={args.period:g}", f"--pid-file={args.pid_file}"]
    null = subprocess.DEVNULL
    child = subprocess.Popen(
        [*command, f"--log={args.log}"], stdin=null, stdout=null, stderr=null, start_new_session=True
    )
    deadline = time.monotonic() + START_STOP_SECONDS
    while child.poll() is None and args.pid_file.read_text() != str(child.pid):
        if time.monotonic() > deadline:
            print(f"{args.pid_file}: the watch process did not start", file=sys.stderr)
            return 2
        time.sleep(0.05)
    return child.returncode or 0


def stop(file: Path) -> int:
    """Ends the process that holds the pid file, and waits until it has."""
    if not file.exists():
        return 0
    with file.open() as held:
        deadline = time.monotonic() + START_STOP_SECONDS
        asked = ""
        while not locked(held.fileno()):
            held.seek(0)
            if (runs := held.read().strip()) and runs != asked:
                os.kill(int(runs), signal.SIGTERM)
                asked = runs
            if time.monotonic() > deadline:
                print(f"{file}: process {asked} does not end", file=sys.stderr)
                return 2
            time.sleep(0.1)
        file.unlink(missing_ok=True)
    return 0

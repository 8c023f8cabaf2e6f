"""Measures how fast the disk under the engine's data is, once: the speed that best-effort ceilings are a share of.
Standard library only and a file of its own, since the host stack runs it before anything is installed there."""

import argparse
import json
import mmap
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

CACHE = Path("/var/lib/bulkhead/device.json")
FILE = 192 * 2**20
RANDOM = 64 * 2**20
"""Bytes of the trial file, and the most that is written again at random: 256 MiB in all."""
SECONDS = 1.2
"""The longest of each of the four measurements, so that all end within 5 s also on a slow disk."""
ROOM = 2 * FILE
BLOCK, PAGE = 2**20, 4096
THREADS = 16
"""Requests under way at once: one at a time measures the latency instead of the speed."""


class Unmeasurable(Exception):
    """Why this file system has no speed that a ceiling could be a share of, today or ever."""


def measure(folder: Path, notice: Callable[[str], None] = lambda _: None) -> dict[str, int]:
    """Bytes and operations a second, of reads and writes past the page cache, in `folder`'s file system.

    Other work goes on meanwhile, so it is a lower bound: a ceiling that is a share of it errs for the protected.
    The trial file has no name and is gone with the process. Raises Unmeasurable, or OSError where the disk is full.
    """
    free = os.statvfs(folder)
    if free.f_bavail * free.f_frsize < ROOM:
        raise OSError(f"less than {ROOM >> 20} MiB are free in {folder}")
    notice(f"Measuring the disk below {folder}, at most {4 * SECONDS:.0f} s …")
    try:
        trial = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT, 0o600)
    except OSError as error:
        raise Unmeasurable(f"{folder}: its file system does not take direct writes ({error.strerror})") from None
    try:
        wrote, write_bps = _run(trial, os.pwritev, BLOCK, FILE, [index * BLOCK for index in range(FILE // BLOCK)])
        blocks = [index * BLOCK for index in range(wrote)]
        _, read_bps = _run(trial, os.preadv, BLOCK, sys.maxsize, blocks)
        pages = [block + page for block in blocks for page in range(0, BLOCK, PAGE)]
        random.shuffle(pages)
        _, write_iops = _run(trial, os.pwritev, PAGE, RANDOM, pages)
        _, read_iops = _run(trial, os.preadv, PAGE, sys.maxsize, pages)
    finally:
        os.close(trial)
    return {
        "read_bps": int(read_bps * BLOCK),
        "write_bps": int(write_bps * BLOCK),
        "read_iops": int(read_iops),
        "write_iops": int(write_iops),
    }


def _run(trial: int, call: Callable[..., int], size: int, most: int, offsets: list[int]) -> tuple[int, float]:
    """How many requests of `size` bytes ended, and how many a second, over `offsets` round and round; `most` bytes."""
    lock = threading.Lock()
    taken = done = 0
    end = (start := time.monotonic()) + SECONDS

    def work() -> None:
        nonlocal taken, done
        with mmap.mmap(-1, size) as buffer:  # whole pages, as O_DIRECT requires
            buffer.write(os.urandom(size))  # a device that compresses would be fast with zeroes
            while time.monotonic() < end:
                with lock:
                    mine, taken = taken, taken + 1
                if (mine + 1) * size > most:
                    return
                call(trial, [buffer], offsets[mine % len(offsets)])
                with lock:
                    done += 1

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not done:
        raise Unmeasurable("the disk did not end a single request")
    return done, done / (time.monotonic() - start)


def cached(cache: Path, device: dict[str, Any]) -> dict[str, Any] | None:
    """What was measured of the same device before, else None."""
    try:
        found = json.loads(cache.read_text())
    except (OSError, ValueError):
        return None
    same = isinstance(found, dict) and device.items() <= found.items() and "read_bps" in found
    return found if same else None


def main(arguments: list[str] | None = None) -> int:
    """Prints one line of JSON: the device, when it was measured and its speed; or `why` it can have none.

    1 when it should be tried again: the deploy fails, since it would leave IO without ceilings.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_root", type=Path)
    parser.add_argument("number", help="MAJ:MIN of the device")
    parser.add_argument("size", type=int, help="its size in bytes")
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args(arguments)
    device = {"device": args.number, "size": args.size, "data_root": str(args.data_root)}
    found = cached(args.cache, device)
    if found is None:
        try:
            speed = measure(args.data_root, lambda line: print(line, file=sys.stderr, flush=True))
        except Unmeasurable as error:
            print(json.dumps(device | {"why": str(error)}))
            return 0
        except OSError as error:
            print(f"The disk cannot be measured: {error}. Next step: free some space, then make up", file=sys.stderr)
            return 1
        found = device | {"at": datetime.now(UTC).isoformat(timespec="seconds")} | speed
        args.cache.parent.mkdir(parents=True, exist_ok=True)
        fresh = args.cache.with_suffix(".new")
        fresh.write_text(json.dumps(found, indent=2) + "\n")
        fresh.replace(args.cache)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

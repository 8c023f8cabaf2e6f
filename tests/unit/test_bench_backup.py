"""What the backup benchmark makes of its numbers: ratios of what ran in one run, and the page that tells them."""

import json
from pathlib import Path
from typing import Any

from bench import backup


def seen(p50: float) -> dict[str, float]:
    return {"throughput": 100.0, "p50": p50, "p99": 4 * p50, "errors": 0, "backups": 1}


def found(pairs: int = 3) -> dict[str, Any]:
    ours = {"backup": 20.0, "again": 10.0, "restore": 25.0, "added": 2_000_000, "size": 2_000_000_000}
    saved = {"rows": 0.5, "save": 18.0, "WAL": 1.5}
    phases = {"backup": saved, "again": saved | {"save": 8.0}, "restore": {"unpack": 19.0, "rows": 0.25}}
    plain = {"backup": 18.0, "pg_basebackup": 5.0, "unpack": 19.0, "restore": 20.0}
    return {
        "at": "2026-01-02T03:04:05+00:00",
        "machine": {"cpus": 2, "memory": 8 * 2**30, "docker": "20.10", "cgroup_version": "2"},
        "capacity": 250.0,
        "rate": 100,
        "pairs": [{"no backup": seen(5), "scheduled backup": seen(5.5), "backup by hand": seen(10)}] * pairs,
        "rounds": [{"ours": ours | {"phases": phases}, "plain": plain}] * 3,
    }


def test_each_ratio_is_of_what_was_measured_in_one_round() -> None:
    values = {what: ratio.partition(" ")[0] for what, ratio, _ in backup.ratios(found())}
    assert values == {
        "prod's throughput during a scheduled backup, to without": "1",
        "prod's p50 during a scheduled backup, to without": "1.1",
        "prod's p99 during a scheduled backup, to without": "1.1",
        "prod's throughput during a backup by hand, to without": "1",
        "prod's p50 during a backup by hand, to without": "2",
        "prod's p99 during a backup by hand, to without": "2",
        "backup's throughput, to pg_basebackup into restic": "0.9",
        "the same while it saves": "1",
        "backup's throughput, to pg_basebackup into nothing": "0.25",
        "restore's throughput, checks and recovery included, to restic into tar": "0.8",
        "the same while it unpacks, nothing synced": "1",
        "time of a second backup of the same data, to the first": "0.5",
        "bytes that a second backup of the same data adds, to all": "0.001",
    }


def test_each_phase_is_told_beside_the_runs_that_have_it() -> None:
    one = found()
    late = one["rounds"][0]["ours"]["phases"]["restore"]
    one["rounds"][1] = {"ours": {"phases": one["rounds"][0]["ours"]["phases"] | {"restore": late | {"rows": 9.0}}}}
    told = backup.phases(one)
    assert told == [
        ("rows", "0.5", "0.5", "0.2"),
        ("save", "18.0", "8.0", ""),
        ("WAL", "1.5", "1.5", ""),
        ("unpack", "", "", "19.0"),
    ]
    assert "| save | 18.0 | 8.0 |  |" in backup.page(found())


def test_the_page_tells_the_machine_the_load_and_every_ratio() -> None:
    told = backup.page(found())
    for part in (
        "2026-01-02",
        "2 CPUs, 8 GiB",
        "2.0 GB in its database",
        "100 times a second",
        "20 s for a backup (100 MB/s)",
        "reads 32 MiB a second at most",
    ):
        assert part in " ".join(told.split()), part
    for what, ratio, _ in backup.ratios(found()):
        assert f"| {what} | {ratio} |" in told


def test_the_published_page_is_what_the_published_numbers_say() -> None:
    folder = Path(__file__).parents[2] / backup.DOCS
    assert backup.page(json.loads((folder / "backup.json").read_text())) == (folder / "backup.md").read_text()

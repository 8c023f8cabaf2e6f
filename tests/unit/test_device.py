"""The disk's speed: measured within its bounds of time and bytes, and only once for a device."""

import json
import time
from pathlib import Path

import pytest

from host import device

SPEED = {"read_bps": 4, "write_bps": 3, "read_iops": 2, "write_iops": 1}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were measured, at a speed that is made up."""
    folders: list[Path] = []

    def measure(folder: Path, _: object) -> dict[str, int]:
        folders.append(folder)
        return SPEED

    monkeypatch.setattr(device, "measure", measure)
    return folders


def asked(tmp_path: Path, *words: str) -> int:
    return device.main([*words, "--cache", str(tmp_path / "state" / "device.json")])


def test_a_device_is_measured_once(tmp_path: Path, measured: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert asked(tmp_path, "/data", "8:0", "1000") == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == second
    assert SPEED.items() <= first.items()
    assert measured == [Path("/data")]
    assert json.loads((tmp_path / "state" / "device.json").read_text()) == first


@pytest.mark.parametrize("other", [("/data", "8:16", "1000"), ("/data", "8:0", "2000"), ("/elsewhere", "8:0", "1000")])
def test_another_device_is_measured_again(tmp_path: Path, measured: list[Path], other: tuple[str, ...]) -> None:
    asked(tmp_path, "/data", "8:0", "1000")
    asked(tmp_path, *other)
    assert len(measured) == 2


def test_a_file_system_that_cannot_be_measured_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(*_: object) -> dict[str, int]:
        raise device.Unmeasurable("no direct writes")

    monkeypatch.setattr(device, "measure", measure)
    assert asked(tmp_path, "/data", "8:0", "1000") == 0
    assert json.loads(capsys.readouterr().out)["why"] == "no direct writes"
    assert not (tmp_path / "state").exists()


def test_a_full_disk_fails_so_that_it_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device, "ROOM", 2**70)
    assert asked(tmp_path, str(tmp_path), "8:0", "1000") == 1
    assert "free some space, then make up" in capsys.readouterr().err


def test_a_measurement_keeps_to_its_bytes_and_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "FILE", 4 * 2**20)
    monkeypatch.setattr(device, "RANDOM", 2**20)
    monkeypatch.setattr(device, "SECONDS", 0.1)
    said: list[str] = []
    start = time.monotonic()
    try:
        speed = device.measure(tmp_path, said.append)
    except device.Unmeasurable as reason:
        pytest.skip(str(reason))  # a temporary folder in memory, on an older kernel
    assert time.monotonic() - start < 5
    assert set(speed) == set(SPEED)
    assert min(speed.values()) > 0
    assert len(said) == 1
    assert list(tmp_path.iterdir()) == []

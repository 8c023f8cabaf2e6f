"""The base image: which package sources of the machine it takes over."""

from pathlib import Path

import pytest

from engine import base_image

DEB822 = """Types: deb
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""
SOURCES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "one-line entries": (
        "sources.list",
        "deb http://mirror.example/debian bookworm main contrib\n# deb http://old.example/debian bookworm main\n",
        ("deb http://mirror.example/debian bookworm main",),
    ),
    "deb822 stanzas": (
        "sources.list.d/debian.sources",
        DEB822,
        (
            "deb http://mirror.example/debian bookworm main",
            "deb http://mirror.example/debian bookworm-updates main",
        ),
    ),
    "another release's are not used": ("sources.list", "deb http://mirror.example/debian trixie main\n", ()),
    "another signer's are not used": (
        "sources.list",
        "deb [signed-by=/etc/apt/keyrings/other.gpg] http://mirror.example/debian bookworm main\n",
        (),
    ),
    "a file is out of a container's reach": ("sources.list", "deb file:/srv/debian bookworm main\n", ()),
}


@pytest.mark.parametrize("case", SOURCES)
def test_the_machines_debian_sources_are_taken_over(case: str, tmp_path: Path) -> None:
    name, text, expected = SOURCES[case]
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / name).write_text(text)
    assert base_image._debian_sources(tmp_path) == expected

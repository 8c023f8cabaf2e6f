"""Root on the Docker host, for commands: a script runs there with `sh -eu`, on this machine or through `ssh://`.
Deploys use components/host_command.py; both go through the same door (settings/ssh.py)."""

import base64
import os
import subprocess
from pathlib import Path

from settings import ssh
from settings.host import address

SECONDS = 120.0


def run(
    host: str | None, script: str, *, stdin: bytes | None = None, timeout: float = SECONDS
) -> subprocess.CompletedProcess[bytes]:
    """Runs a POSIX script as root on the machine of the engine at `address(host)`; its output is captured.

    `stdin`: what the script finds on its standard input, which is empty otherwise. `timeout` in seconds.
    Raises nothing for a script that fails: see the return code (255 is ssh's own). TimeoutExpired, OSError.
    """
    return subprocess.run(
        _root(host), input=with_stdin(script, stdin).encode(), capture_output=True, timeout=timeout, check=False
    )


def shown(host: str | None, script: str) -> int:
    """Runs a script as `run` does, with its output on ours, for as long as it takes. Its exit code."""
    return subprocess.run(_root(host), input=script.encode(), check=False).returncode


def _root(host: str | None) -> list[str]:
    """What runs a script from its standard input as root on the machine of the engine."""
    url = address(host)
    return ssh.command(url, ssh.enter()) if ssh.is_remote(url) else shell(os.geteuid(), Path(ssh.DOOR).exists())


def shell(uid: int, door: bool) -> list[str]:
    """What runs a script from its standard input as root on this machine. `door`: bulkhead-root is installed."""
    if uid == 0:
        return ["/bin/sh", "-euc", ssh.HERE]
    return ["sudo", "-n", *([ssh.DOOR] if door else shell(0, door))]


def with_stdin(script: str, stdin: bytes | None) -> str:
    """The script with what it reads in it: the door has one way in, and logs the hash of all that comes through."""
    if stdin is None:
        return script
    data = base64.encodebytes(stdin).decode()  # has no line that could end the document early
    return f"base64 -d <<'STDIN' | {{\n{data}STDIN\n{script}\n}}\n"

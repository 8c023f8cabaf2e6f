"""How an `ssh://` host is reached: the system's `ssh` with the user's own configuration and known hosts, and root there
through one door. It never asks for a password, and never accepts a machine that the user does not know."""

import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from settings.errors import SettingsError

DOOR = "/usr/local/sbin/bulkhead-root"
"""The program on the host that runs a script as root for whoever may become root by it: see `make bootstrap`."""

HERE = 'script=$(mktemp -p /dev/shm); cat >"$script"; exec 3<"$script"; rm "$script"; exec sh -eu /dev/fd/3 </dev/null'
"""Shell text: root runs the script on its standard input. From a file, for an argument has at most 128 KiB."""

ENGINE_SOCKET = "/var/run/docker.sock"
CONNECT_SECONDS = 15  # a handshake with a busy server takes several
LOOK_UP_SECONDS = 10
# The provider asks a server for one type of key, and a server has them all: the order in which OpenSSH prefers them.
KEY_TYPES = ("ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521", "ssh-rsa")


def is_remote(address: str | None) -> bool:
    """Whether an engine's address names another machine."""
    return address is not None and address.startswith("ssh://")


def command(url: str, remote: str, *options: str) -> list[str]:
    """`ssh` that runs one command line on the host of `url`, and fails where it would ask for anything.

    BatchMode: a question in the middle of a deploy would hang it.
    """
    return ["ssh", "-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}", *options, url, "--", remote]


# --- root on the host


def as_root(script: str, environment: Mapping[str, str] = {}) -> str:
    """A POSIX script as one command line that runs it with `sh -eu`, as root, on the host that it is given to."""
    return f"printf %s {shlex.quote(with_variables(script, environment))} | {{ {enter()}; }}"


def with_variables(script: str, environment: Mapping[str, str]) -> str:
    """The script with its variables in front: no environment goes through the door."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in sorted(environment.items())) + script


def enter() -> str:
    """Shell text that runs the script on its standard input as root.

    Through the door, also for root itself, so that it is in the journal; root may do without where there is none.
    """
    missing = (
        f"bulkhead: $(id -un) is not root on this machine, and {DOOR} is not there or not allowed. "
        "Next step: make bootstrap HOST=ssh://root@..., or log in as root (bulkhead:host)"
    )
    return (
        f'if [ "$(id -u)" != 0 ]; then sudo -n {DOOR} || {{ code=$?; '
        f'sudo -n -l {DOOR} >/dev/null 2>&1 || echo "{missing}" >&2; exit $code; }}; '
        f"elif [ -x {DOOR} ]; then {DOOR}; else {HERE}; fi"
    )


# --- what `ssh` knows about a host


@dataclass(frozen=True)
class Target:
    """A host as `ssh` would reach it. `host_key`: type and key, as in a known_hosts file. `keys`: files that exist."""

    host: str
    port: int
    user: str
    host_key: str
    keys: tuple[Path, ...]


def target(url: str) -> Target:
    """What the user's ssh configuration makes of an address (aliases, ports, key files), and the host's known key.

    SettingsError when the host is not known yet, or is behind a jump host, which `command.remote` does not take over.
    """
    chosen = configuration(url)
    for key in ("proxyjump", "proxycommand"):
        if chosen.get(key, ["none"])[0] != "none":
            raise _error(
                url,
                f"your ssh configuration reaches it through {key} {chosen[key][0]}, which host commands cannot",
                "Name an address that is reached directly, such as one in a VPN.",
            )
    host, port = chosen["hostname"][0], int(chosen["port"][0])
    name = chosen.get("hostkeyalias", [host if port == 22 else f"[{host}]:{port}"])[0]
    files = " ".join([*chosen.get("userknownhostsfile", []), *chosen.get("globalknownhostsfile", [])]).split()
    known = known_keys(name, [Path(file).expanduser() for file in files])
    if not known:
        raise _error(
            url,
            f"its host key is not in {' or '.join(files[:1])} (as {name}), so that another machine could pose as it",
            f"Log in once and compare the fingerprint that it shows with the server's own: ssh {url}",
        )
    keys = [Path(file).expanduser() for file in chosen.get("identityfile", [])]
    return Target(
        host=host,
        port=port,
        user=chosen["user"][0],
        host_key=known[0],
        keys=tuple(file for file in keys if file.is_file()),
    )


def configuration(url: str) -> dict[str, list[str]]:
    """`ssh -G`: all settings that `ssh` would use for an address, by name in lower case."""
    found: dict[str, list[str]] = {}
    for line in _asked(url, ["ssh", "-G", url]).splitlines():
        name, _, value = line.partition(" ")
        found.setdefault(name, []).append(value)
    return found


def known_keys(name: str, files: Sequence[Path]) -> list[str]:
    """The keys (`type key`) that a host is known by, the preferred type first."""
    found = []
    for file in files:
        if file.is_file():
            listed = subprocess.run(  # it also finds hashed names; it ends with 1 when there are none
                ["ssh-keygen", "-F", name, "-f", str(file)], capture_output=True, text=True, check=False
            ).stdout
            # A marker (@revoked, @cert-authority) in front makes it something else than the host's key.
            lines = [line.split() for line in listed.splitlines() if line and line[0] not in "#@"]
            found += [f"{words[1]} {words[2]}" for words in lines if len(words) > 2 and words[1] in KEY_TYPES]
    return sorted(dict.fromkeys(found), key=lambda key: KEY_TYPES.index(key.split()[0]))


def _asked(url: str, words: Sequence[str]) -> str:
    try:
        asked = subprocess.run(words, capture_output=True, text=True, timeout=LOOK_UP_SECONDS, check=False)
    except FileNotFoundError:
        raise _error(url, f"{words[0]} is not installed", "sudo apt-get install openssh-client") from None
    except subprocess.TimeoutExpired as expired:
        raise _error(url, str(expired), f"See that this works: {shlex.join(words)}") from None
    if asked.returncode:
        raise _error(url, asked.stderr.strip(), f"See that this works: {shlex.join(words)}")
    return asked.stdout


# --- the engine's socket


@contextmanager
def engine_socket(url: str) -> Iterator[str]:
    """The engine of an `ssh://` host as a `unix://` address on this machine, through one connection, while it lasts.

    OSError, with what ssh said, when the host cannot be reached.
    """
    with tempfile.TemporaryDirectory(prefix="bulkhead-") as folder:
        socket = Path(folder) / "docker.sock"
        # The host writes a line when the forwarding stands, and goes when our side of `cat` closes, however we end.
        # A connection of its own: one that is shared would keep the forwarding after it.
        options = ("-o", "ControlPath=none", "-o", "ExitOnForwardFailure=yes", "-L", f"{socket}:{ENGINE_SOCKET}")
        with subprocess.Popen(
            command(url, "echo ready; exec cat >/dev/null", *options),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as tunnel:
            try:
                if tunnel.stdout is None or tunnel.stdout.readline().strip() != "ready":
                    tunnel.wait()
                    raise OSError(tunnel.stderr.read().strip() if tunnel.stderr else "")
                yield f"unix://{socket}"
            finally:
                tunnel.terminate()


def agent_runs() -> bool:
    """Whether an SSH agent holds the deployer's key."""
    return bool(os.environ.get("SSH_AUTH_SOCK"))


def _error(url: str, problem: str, remedy: str) -> SettingsError:
    return SettingsError(file="Docker host", key="bulkhead:host", value=url, problem=problem, remedy=remedy)

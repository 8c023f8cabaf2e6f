"""HostCommand: a shell script that runs on the Docker host, as root, at create, update and delete.

The one place that decides between `command.local` (the engine is on this machine) and `command.remote` (`ssh://`).
It does not copy files and keeps no state on the host: a script must be safe to run twice.
"""

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pulumi
from pulumi_command import local, remote

# OpenSSH's own preference among the key files that it looks for.
KEY_FILES = ("id_ed25519", "id_ecdsa", "id_rsa")


@dataclass(frozen=True)
class HostCommandArgs:
    """What runs on the host.

    `host`: the engine's address (`unix://…` or None is this machine, `ssh://user@host[:port]` another one).
    `create`: POSIX shell text, run with `sh -eu` at creation and again whenever it or `environment` changes.
    `delete`: POSIX shell text, run when the resource goes. `environment`: variables of the script.
    """

    host: str | None
    create: str
    delete: str
    environment: Mapping[str, str] = field(default_factory=dict)


class HostCommand(pulumi.ComponentResource):
    """Runs a script on the Docker host; `stdout` is what its last run printed."""

    stdout: pulumi.Output[str]

    def __init__(self, name: str, args: HostCommandArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("bulkhead:index:HostCommand", name, None, opts)
        child = pulumi.ResourceOptions(parent=self)
        command: local.Command | remote.Command
        if is_remote(args.host):
            command = remote.Command(
                f"{name}-remote",
                connection=connection(args.host or ""),
                create=as_root(args.create, args.environment),
                update=as_root(args.create, args.environment),
                delete=as_root(args.delete, args.environment),
                opts=child,
            )
        else:
            command = local.Command(
                f"{name}-local",
                interpreter=interpreter(os.geteuid()),
                create=args.create,
                update=args.create,
                delete=args.delete,
                environment=dict(args.environment),
                opts=child,
            )
        self.stdout = command.stdout
        self.register_outputs({"stdout": self.stdout})


def is_remote(host: str | None) -> bool:
    """Whether an engine's address names another machine."""
    return host is not None and host.startswith("ssh://")


def interpreter(uid: int) -> list[str]:
    """The local shell, through sudo (never asking for a password) when the deployer is not root."""
    shell = ["/bin/sh", "-euc"]
    return shell if uid == 0 else ["sudo", "-n", "--preserve-env", *shell]


def as_root(script: str, environment: Mapping[str, str]) -> str:
    """A script as one remote command line that runs as root and stops at the first error."""
    variables = "".join(f"{name}={shlex.quote(value)}\n" for name, value in sorted(environment.items()))
    quoted = shlex.quote(variables + script)
    return f'if [ "$(id -u)" = 0 ]; then sh -euc {quoted}; else sudo -n sh -euc {quoted}; fi'


def connection(host: str) -> remote.ConnectionArgs:
    """How `command.remote` reaches an `ssh://` host: the agent where one runs, else the user's key file.

    Raises `pulumi.RunError` when there is neither: a password is never asked for.
    """
    url = urlsplit(host)
    reach = partial(
        remote.ConnectionArgs, host=url.hostname or "", port=float(url.port or 22), user=url.username or "root"
    )
    if os.environ.get("SSH_AUTH_SOCK"):
        return reach(agent_socket_path=os.environ["SSH_AUTH_SOCK"])
    for key_file in (Path.home() / ".ssh" / name for name in KEY_FILES):
        if key_file.is_file():
            return reach(private_key=pulumi.Output.secret(key_file.read_text()))
    raise pulumi.RunError(
        f"{host}: no SSH agent (SSH_AUTH_SOCK) and no key file {', '.join(KEY_FILES)} in ~/.ssh. "
        "Start an agent with the deployer's key: eval $(ssh-agent) && ssh-add"
    )

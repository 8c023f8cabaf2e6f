"""HostCommand: a shell script that runs on the Docker host, as root, at create, update and delete.

The one place that decides between `command.local` (the engine is on this machine) and `command.remote` (`ssh://`).
It does not copy files and keeps no state on the host: a script must be safe to run twice.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import pulumi
from pulumi_command import local, remote

from settings import ssh


@dataclass(frozen=True)
class HostCommandArgs:
    """What runs on the host.

    `host`: the engine's address (`unix://…` or None is this machine, `ssh://user@host[:port]` another one).
    `create`: POSIX shell text, run with `sh -eu` at creation and again whenever it or `environment` changes.
    `delete`: POSIX shell text, run when the resource goes. `environment`: variables of the script.
    """

    host: str | None
    create: pulumi.Input[str]
    delete: str
    environment: Mapping[str, str] = field(default_factory=dict)


class HostCommand(pulumi.ComponentResource):
    """Runs a script on the Docker host; `stdout` is what its last run printed."""

    stdout: pulumi.Output[str]

    def __init__(self, name: str, args: HostCommandArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("bulkhead:index:HostCommand", name, None, opts)
        # In the other order a replacement's delete would undo what its create has just done: both name the same things.
        child = pulumi.ResourceOptions(parent=self, delete_before_replace=True)
        command: local.Command | remote.Command
        if ssh.is_remote(args.host):
            create = pulumi.Output.from_input(args.create).apply(lambda script: ssh.as_root(script, args.environment))
            command = remote.Command(
                f"{name}-remote",
                connection=connection(args.host or ""),
                create=create,
                update=create,
                delete=ssh.as_root(args.delete, args.environment),
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


def interpreter(uid: int) -> list[str]:
    """The local shell, through sudo (never asking for a password) when the deployer is not root."""
    shell = ["/bin/sh", "-euc"]
    return shell if uid == 0 else ["sudo", "-n", "--preserve-env", *shell]


def connection(host: str) -> remote.ConnectionArgs:
    """How `command.remote` reaches an `ssh://` host: as `ssh` itself would, by the user's configuration.

    The host's key is pinned to the known one. Where an agent runs it is used (the plugin finds it by itself: its
    address changes with each login, and must not be a change here), else the first key file.
    Raises `pulumi.RunError` when there is neither, `SettingsError` when the host is not known.
    """
    target = ssh.target(host)
    private_key = None
    if not ssh.agent_runs():
        if not target.keys:
            raise pulumi.RunError(
                f"{host}: no SSH agent (SSH_AUTH_SOCK) and no key file of those that ssh looks for. "
                "Start an agent with the deployer's key: eval $(ssh-agent) && ssh-add"
            )
        private_key = pulumi.Output.secret(target.keys[0].read_text())
    return remote.ConnectionArgs(
        host=target.host, port=float(target.port), user=target.user, host_key=target.host_key, private_key=private_key
    )

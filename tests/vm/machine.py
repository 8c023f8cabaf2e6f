"""A virtual server under QEMU, without acceleration: booted from an overlay of the cached disk, reached by ssh on
loopback and by nothing else, and stopped with whoever started it."""

import base64
import os
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from engine import build
from tests.vm.image import Image, Say

MEMORY_MIB, CPUS = 3072, 2
# What costs an emulated CPU time and changes nothing that is tested: five levels of page tables, checks of access in
# the kernel, mitigations of faults that it does not have, a clock that is read from a device.
CPU = "max,la57=off,smap=off,smep=off,pku=off"
QUICKER = "mitigations=off tsc=reliable clocksource=tsc"
BOOT_SECONDS = 300
STOP_SECONDS = 30
POWER_OFF_SECONDS = 180
LOAD_SECONDS = 1200
PROGRESS_SECONDS = 15.0
DEPLOYER = "deploy"

# Everything that has to do with the deployer's ssh is in one folder: neither keys nor known hosts of the user who runs
# the tests are read or changed. Connections are shared, since a handshake takes an emulated CPU seconds.
SSH_CONFIG = """\
Host *
  IdentityFile {folder}/key
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  GlobalKnownHostsFile none
  StrictHostKeyChecking yes
  ControlMaster auto
  ControlPath {folder}/%C
  ControlPersist 300
  ServerAliveInterval 15
"""


class MachineError(Exception):
    """The virtual machine did not start, or a command in it failed."""


class Server:
    """A running machine. `folder`: its disk, console log and ssh configuration; its path must be short (sockets).

    `second`: a file that it has as a disk to read, /dev/vdb.
    """

    def __init__(self, folder: Path, image: Image, port: int, say: Say, second: Path | None = None) -> None:
        self.folder, self.image, self.port, self._say, self._second = folder, image, port, say, second
        self._qemu: subprocess.Popen[bytes] | None = None

    def url(self, user: str = DEPLOYER) -> str:
        """The address for `bulkhead:host`."""
        return f"ssh://{user}@127.0.0.1:{self.port}"

    @property
    def key(self) -> Path:
        """The deployer's public key."""
        return self.folder / "key.pub"

    @property
    def console(self) -> Path:
        """What the kernel and the service manager say while booting."""
        return self.folder / "console.log"

    @property
    def overlay(self) -> Path:
        """All that the machine has written to its disk."""
        return self.folder / "overlay"

    def variables(self, base: Mapping[str, str] = os.environ) -> dict[str, str]:
        """`base`, with an `ssh` in front of PATH that has this machine's keys and known hosts, and with no agent."""
        kept = {name: value for name, value in base.items() if name not in ("SSH_AUTH_SOCK", "DOCKER_HOST")}
        return kept | {"PATH": os.pathsep.join([str(self.folder / "bin"), base.get("PATH", os.defpath)])}

    def run(
        self, script: str, *, user: str = "root", check: bool = True, stdin: bytes = b"", timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Runs a shell script on the machine. MachineError with its output if it fails and `check` is set."""
        done = subprocess.run(
            self._ssh(user, f"sh -euc {shlex.quote(script)}"),
            env=self.variables(),
            input=stdin,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
        text = subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        )
        if check and text.returncode:
            raise MachineError(f"{script}\nended with {text.returncode}:\n{text.stdout}{text.stderr}")
        return text

    def said(self, script: str, user: str = "root") -> str:
        """What a script prints, without the last newline."""
        return self.run(script, user=user).stdout.rstrip("\n")

    def boot(self) -> None:
        """Starts the machine, and waits until ssh and the engine answer."""
        self._prepare()
        self._say(f"virtual machine: booting (console: {self.console})")
        # It goes with us, however we end, and takes the CPU that the tests beside it leave.
        qemu = ["nice", "-n", "19", "setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64", *self._options()]
        with (self.folder / "qemu.log").open("wb") as log:
            self._qemu = subprocess.Popen(qemu, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._wait(previous="")

    def reboot(self) -> None:
        """Restarts the machine as `systemctl reboot` does, and waits until it answers again."""
        before = self.boot_id()
        self._say("virtual machine: rebooting")
        self.run("systemctl --no-block reboot")
        self._disconnect()
        self._wait(previous=before)

    def power_off(self) -> None:
        """Shuts the machine down in order, so that its overlay can be used."""
        self.run("systemctl --no-block poweroff")
        if self._qemu:
            self._qemu.wait(POWER_OFF_SECONDS)

    def boot_id(self) -> str:
        return self.said("cat /proc/sys/kernel/random/boot_id")

    def stop(self) -> None:
        """Ends the machine; its disk is lost with the folder."""
        self._disconnect()
        if self._qemu and self._qemu.poll() is None:
            self._qemu.terminate()
            try:
                self._qemu.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._qemu.kill()
                self._qemu.wait()

    def _prepare(self) -> None:
        (self.folder / "bin").mkdir()
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "bulkhead-test", "-f", self.folder / "key"],
            check=True,
        )
        (self.folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {self.image.host_key}\n")
        (self.folder / "config").write_text(SSH_CONFIG.format(folder=self.folder))
        # ssh looks for its files in the home folder of the password database, whatever HOME says.
        wrapper = self.folder / "bin" / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {self.folder}/config "$@"\n')
        wrapper.chmod(0o755)
        kind, base = self.image.base
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-F", kind, "-b", str(base), str(self.overlay)], check=True
        )

    def _options(self) -> list[str]:
        key = base64.b64encode(self.key.read_bytes()).decode()
        network = f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{self.port}-:22"
        return [
            *("-accel", "tcg,thread=multi", "-cpu", CPU, "-smp", str(CPUS), "-m", str(MEMORY_MIB)),
            *("-kernel", str(self.image.kernel), "-initrd", str(self.image.initrd)),
            *("-append", f"root=/dev/vda rw console=ttyS0 {QUICKER} authorized_key={key}"),
            *("-drive", f"file={self.overlay},if=virtio,format=qcow2,cache=unsafe"),
            *(("-drive", f"file={self._second},if=virtio,format=raw,readonly=on") if self._second else ()),
            *("-netdev", network, "-device", "virtio-net-pci,netdev=net", "-device", "virtio-rng-pci"),
            *("-display", "none", "-monitor", "none", "-serial", f"file:{self.console}"),
        ]

    def _ssh(self, user: str, command: str) -> list[str]:
        options = ["-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]
        return [str(self.folder / "bin" / "ssh"), *options, self.url(user), "--", command]

    def _disconnect(self) -> None:
        for control in self.folder.glob("[0-9a-f]" * 40):
            # The destination is not used, only asked for.
            subprocess.run(
                ["ssh", "-o", f"ControlPath={control}", "-O", "exit", "server"], capture_output=True, check=False
            )

    def _wait(self, previous: str) -> None:
        started = said = time.monotonic()
        ready = "docker version >/dev/null && cat /proc/sys/kernel/random/boot_id"
        while (waited := time.monotonic() - started) < BOOT_SECONDS:
            if self._qemu is None or self._qemu.poll() is not None:
                raise MachineError(f"qemu has ended: {(self.folder / 'qemu.log').read_text()[-2000:]}")
            try:
                answer = self.run(ready, check=False, timeout=60)
                if answer.returncode == 0 and answer.stdout.strip() not in ("", previous):
                    self._say(f"virtual machine: ssh and Docker answer after {time.monotonic() - started:.0f} s")
                    return
            except subprocess.TimeoutExpired:
                pass
            if time.monotonic() - said >= PROGRESS_SECONDS:
                said = time.monotonic()
                self._say(f"virtual machine: not up yet, {waited:.0f} s")
            time.sleep(2)
        console = self.console.read_text(errors="replace")
        raise MachineError(f"not up within {BOOT_SECONDS} s; the end of its console:\n{console[-3000:]}")


@contextmanager
def running(folder: Path, image: Image, say: Say, second: Path | None = None) -> Iterator[Server]:
    """A booted server while it lasts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Server(folder, image, port, say, second)
    try:
        server.boot()
        yield server
    finally:
        server.stop()


def with_images(image: Image, archive: Path, say: Say) -> Image:
    """The disk with the container images of a tar, as `docker save` writes it, on the server's engine.

    Kept beside the tar: an emulated CPU takes minutes to load them.
    """
    layer = archive.with_name(f"{archive.stem}-on-{image.folder.name}.qcow2")
    with build.lock(archive.with_name("server.lock"), say):
        if not layer.exists():
            part = layer.with_suffix(".part")
            with (
                tempfile.TemporaryDirectory(prefix="bulkhead-vm-") as folder,
                running(Path(folder), image, say, second=archive) as server,
            ):
                say("virtual machine: loading container images, once (3 to 5 minutes)")
                server.run("docker load --quiet < /dev/vdb", timeout=LOAD_SECONDS)
                server.power_off()
                shutil.move(server.overlay, part)
            part.rename(layer)
            for old in set(layer.parent.glob("images-*.qcow2")) - {layer}:
                old.unlink()
    return replace(image, layer=layer)

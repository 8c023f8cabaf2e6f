"""The disk of a Debian 12 server with systemd, cgroup v2, Docker and sshd, made from Debian's packages without network
access inside. Kept in the cache folder under the hash of its recipe; a virtual machine writes to an overlay of it."""

import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine import base_image, build, setup

Say = Callable[[str], None]

PACKAGES = [
    *("systemd", "systemd-sysv", "udev", "dbus", "linux-image-cloud-amd64", "initramfs-tools", "zstd"),
    *("docker.io", "nftables", "restic", "iptables", "iproute2", "iputils-ping", "procps"),
    "apparmor",  # where the kernel has it, the engine starts containers only if its parser is there
    *("openssh-server", "sudo", "python3", "ca-certificates"),
]

FILES = {
    "/etc/hostname": "server\n",
    "/etc/hosts": "127.0.0.1 localhost\n127.0.1.1 server\n::1 localhost\n",
    "/etc/systemd/network/80-wired.network": "[Match]\nName=en*\n[Network]\nDHCP=yes\n",
    # As a provider does: root's key comes from outside, with the first boot.
    "/etc/systemd/system/authorized-key.service": (
        "[Unit]\nBefore=ssh.service\n"
        "[Service]\nType=oneshot\nExecStart=/bin/sh -euc 'umask 077; mkdir -p /root/.ssh; "
        'tr " " "\\\\n" < /proc/cmdline | sed -n s/^authorized_key=//p | base64 -d > /root/.ssh/authorized_keys\'\n'
        "[Install]\nWantedBy=multi-user.target\n"
    ),
    # What the boot itself needs, and no more: unpacking everything takes an emulated CPU half a minute.
    "/etc/initramfs-tools/conf.d/small": "MODULES=list\n",
    "/etc/initramfs-tools/modules": "virtio_pci\nvirtio_blk\next4\n",
}
COMMANDS = (
    "update-initramfs -u",
    "systemctl enable systemd-networkd ssh docker authorized-key",
    # They would reach for the network, and take CPU from what is tested.
    "systemctl mask apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer fstrim.timer serial-getty@ttyS0.service",
    "passwd --lock root",
    "apt-get clean",
    "rm -rf /var/lib/apt/lists",
)
SIZE = "8G"  # of the file system; the file is sparse and takes what is in it
NEEDED_BYTES = 3 * 2**30  # the folder and the disk, while it is made
REVISION = "2"  # of how the parts below are put together


@dataclass(frozen=True)
class Image:
    """The files of a disk. `host_key`: the server's public key, `type key`.

    `layer`: what was done to the disk since, as a qcow2 file on top of it.
    """

    folder: Path
    layer: Path | None = None

    @property
    def disk(self) -> Path:
        return self.folder / "root.ext4"

    @property
    def base(self) -> tuple[str, Path]:
        """Format and file that an overlay is made of."""
        return ("qcow2", self.layer) if self.layer else ("raw", self.disk)

    @property
    def kernel(self) -> Path:
        return self.folder / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.folder / "initrd.img"

    @property
    def host_key(self) -> str:
        return " ".join((self.folder / "ssh_host_ed25519_key.pub").read_text().split()[:2])


def ensure(say: Say) -> Image:
    """The image of the present recipe, made if it is not in the cache (2 minutes). SetupError with the next step."""
    machine = setup.machine(setup.ROOT, os.environ)
    for package, program in (
        ("mmdebstrap", "mmdebstrap"),
        ("qemu-system-x86", "qemu-system-x86_64"),
        ("qemu-utils", "qemu-img"),
        ("openssh-client", "ssh"),
    ):
        if shutil.which(program) is None:
            setup.apt_install(package, size=setup.GIB)
    recipe = command(base_image._debian_sources(Path("/etc/apt")))
    image = Image(machine.cache / f"server-{key(recipe)}")
    machine.cache.mkdir(parents=True, exist_ok=True)
    with build.lock(machine.cache / "server.lock", say):
        if not image.folder.exists():
            setup.need_space(machine.cache, NEEDED_BYTES, "The disk of a virtual machine")
            make(image.folder, recipe, say)
            for old in set(machine.cache.glob("server-*")) - {image.folder}:
                shutil.rmtree(old)
    return image


def command(sources: tuple[str, ...]) -> list[str]:
    """The whole mmdebstrap command, `{target}` standing for the folder it fills."""
    hooks = [base_image._write(path, "644", text) for path, text in FILES.items()]
    return [
        "mmdebstrap",
        "--variant=minbase",
        "--format=directory",
        f"--include={','.join(PACKAGES)}",
        *(f"--dpkgopt={option}" for option in base_image.DPKG_OPTIONS),
        *(f"--customize-hook={hook}" for hook in hooks),
        *(f'--customize-hook=chroot "$1" {one}' for one in COMMANDS),
        base_image.SUITE,
        "{target}",
        *sources,
    ]


def key(recipe: list[str]) -> str:
    """Names the image by what is in it; the machine's point release (12.11) renews it now and then."""
    release = Path("/etc/debian_version")
    point = release.read_text().strip() if release.is_file() else ""
    return hashlib.sha256("\n".join([*recipe, SIZE, REVISION, point]).encode()).hexdigest()[:12]


def make(folder: Path, recipe: list[str], say: Say) -> None:
    """Fills `folder`, whole or not at all."""
    if os.geteuid() != 0:
        raise setup.SetupError(
            "Making the disk of a virtual machine needs root, since its files belong to several users. "
            "Next step: make test as root, once; the disk is kept."
        )
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="server-making-") as temporary:
        root, part = Path(temporary) / "root", Path(temporary) / "image"
        part.mkdir()
        say("virtual machine: installing Debian with systemd and Docker into a folder (1 to 2 minutes)")
        setup.run([word.replace("{target}", str(root)) for word in recipe], "mmdebstrap")
        for name in ("vmlinuz", "initrd.img"):
            shutil.copy(next((root / "boot").glob(f"{name}-*")), part / name)
        shutil.copy(root / "etc/ssh/ssh_host_ed25519_key.pub", part)
        setup.run(
            ["mke2fs", "-q", "-t", "ext4", "-L", "root", "-d", root, Image(part).disk, SIZE], "writing the file system"
        )
        part.rename(folder)
    used = subprocess.run(["du", "-sm", folder], capture_output=True, text=True, check=True).stdout.split()[0]
    say(f"virtual machine: {folder} made in {time.monotonic() - started:.0f} s, {used} MiB")

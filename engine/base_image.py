"""Makes sure that the engine has `debian:bookworm-slim`, which ordinary Dockerfiles start from.

Pulled where a registry answers, else built from Debian's packages. Standard library only: it runs before any
Python environment exists.
"""

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

IMAGE = "debian:bookworm-slim"
SUITE = "bookworm"
PULL_SECONDS = 60
SPACE = 600 * 1024**2  # bytes: the tar (130 MB), mmdebstrap's unpacked tree and the packages it downloads

LABEL = "bulkhead.base=true"  # tells an image that was made here from a pulled one
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # as in Docker Hub's image

SUITES = (SUITE, f"{SUITE}-updates", f"{SUITE}-security")
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

# What makes Docker Hub's image "slim", and its packages quick to install in a build (both stay in the image).
DPKG_OPTIONS = (
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-include=/usr/share/locale/locale.alias",
    "force-unsafe-io",
)
APT_OPTIONS = (
    'Acquire::Languages "none";',
    'Acquire::GzipIndexes "true";',
    'Dir::Cache::pkgcache "";',
    'Dir::Cache::srcpkgcache "";',
)
# Written last, since mmdebstrap itself needs the packages it downloads. policy-rc.d keeps packages from
# starting their services during a build: there is no service manager in a container.
FILES = {
    "/etc/apt/apt.conf.d/90container": ("644", 'APT::Keep-Downloaded-Packages "false";\n'),
    "/usr/sbin/policy-rc.d": ("755", "#!/bin/sh\nexit 101\n"),
}

# Settings of this machine's apt without which containers would not reach its package mirror.
CARRIED = re.compile(r"Acquire::(https?::.+|Check-Valid-Until|Check-Date|ForceIPv4|Retries)")
CERTIFICATES = Path("/usr/local/share/ca-certificates")

# Docker's and Debian's names of the same processor.
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}

BY_HAND = (
    f"Next step: make a registry reachable, or bring the image from another machine: "
    f"`docker save {IMAGE} | gzip > base.tar.gz` there, `docker load < base.tar.gz` here."
)

Say = Callable[[str], object]


class BaseImageError(RuntimeError):
    """The base image can be neither pulled nor built; the message ends with the next step."""


def ensure(cache: Path, say: Say = print) -> None:
    """Leaves `debian:bookworm-slim` on the engine that `docker` talks to; a no-op when it is there.

    `cache` keeps the built tar, so that another engine (or the same one after a clean-up) gets it at once.
    Raises BaseImageError.
    """
    architecture = _engine_architecture()
    if _docker("image", "inspect", IMAGE).returncode == 0:
        return
    if _pull(say):
        return
    recipe = _recipe(_debian_sources(Path("/etc/apt")), _apt_settings(_apt_dump(), os.environ))
    archive = cache / f"base-image-{_key(recipe, architecture)}.tar"
    if not archive.exists():
        _build(archive, recipe, architecture, say)
    say(f"base image: importing {archive} as {IMAGE}")
    changes = [f"LABEL {LABEL}", f"ENV PATH={PATH}", 'CMD ["bash"]']
    options = [part for change in changes for part in ("--change", change)]
    imported = _docker("import", *options, str(archive), IMAGE)
    if imported.returncode != 0:
        raise BaseImageError(
            f"{archive}: the engine does not import it: {imported.stderr.strip()}. Next step: see that the "
            f"engine's disk has room (`docker system df`), remove the file if it is damaged, run again."
        )


def _docker(*arguments: str, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    command = ["docker", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except FileNotFoundError:
        raise BaseImageError("`docker` is not on PATH. Next step: `apt-get install docker.io`.") from None


def _engine_architecture() -> str:
    answer = _docker("version", "--format", "{{.Server.Arch}}")
    if answer.returncode != 0:
        raise BaseImageError(
            f"no Docker engine answers: {answer.stderr.strip()}. Next step: start it "
            f"(`systemctl start docker`) or set DOCKER_HOST; your user must be in group `docker`."
        )
    return answer.stdout.strip()


def _pull(say: Say) -> bool:
    say(f"base image: pulling {IMAGE} (at most {PULL_SECONDS} s)")
    try:
        pulled = _docker("pull", IMAGE, timeout=PULL_SECONDS)
    except subprocess.TimeoutExpired:
        say(f"base image: not pulled within {PULL_SECONDS} s")
        return False
    if pulled.returncode != 0:
        reason = (pulled.stderr.strip().splitlines() or ["no reason given"])[-1]
        say(f"base image: no registry serves it ({reason})")
    return pulled.returncode == 0


# What the machine's own apt says: where Debian's packages come from, and how to reach them.


def _debian_sources(etc_apt: Path) -> tuple[str, ...]:
    """This machine's sources of Debian bookworm as one-line entries; none, for mmdebstrap's own, if it has none.

    Only `main` of the release, its updates and its security fixes, signed by Debian's own key (others are
    not in the image), over http or https (`file:` and `cdrom:` are out of a container's reach).
    """
    listed = [etc_apt / "sources.list", *sorted((etc_apt / "sources.list.d").glob("*.list"))]
    entries = [entry for path in listed if path.is_file() for entry in _one_line_entries(path.read_text())]
    for path in sorted((etc_apt / "sources.list.d").glob("*.sources")):
        entries += _deb822_entries(path.read_text())
    lines = tuple(dict.fromkeys(f"deb {uri} {suite} main" for uri, suite in entries))
    return lines if any(line.split()[2] == SUITE for line in lines) else ()


def _one_line_entries(text: str) -> Iterable[tuple[str, str]]:
    for line in text.splitlines():
        entry = re.match(r"deb\s+(?:\[([^]]*)\]\s+)?(\S+)\s+(\S+)\s+([^#]+)", line.strip())
        if entry is None:
            continue
        options, uri, suite, components = entry.groups()
        signed_by = re.search(r"signed-by=(\S+)", options or "")
        if _usable(uri, suite, components.split(), signed_by[1] if signed_by else KEYRING):
            yield uri, suite


def _deb822_entries(text: str) -> Iterable[tuple[str, str]]:
    kept = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for stanza in re.split(r"\n\s*\n", kept):
        unfolded = re.sub(r"\n\s+", " ", stanza.strip())
        fields = {
            key.strip().lower(): value.split()
            for key, colon, value in (line.partition(":") for line in unfolded.splitlines())
            if colon
        }
        if "deb" not in fields.get("types", []) or fields.get("enabled") == ["no"]:
            continue
        signed_by = " ".join(fields.get("signed-by", [KEYRING]))
        for uri in fields.get("uris", []):
            for suite in fields.get("suites", []):
                if _usable(uri, suite, fields.get("components", []), signed_by):
                    yield uri, suite


def _usable(uri: str, suite: str, components: list[str], signed_by: str) -> bool:
    served = uri.startswith(("http://", "https://"))
    return served and suite in SUITES and "main" in components and signed_by == KEYRING


def _apt_dump() -> str:
    if shutil.which("apt-config") is None:
        return ""
    command = ["apt-config", "dump", "--no-empty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _apt_settings(dump: str, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The apt options that containers need as well: proxies and the checks this machine has switched off.

    `dump` is the output of `apt-config dump`. Left out: a proxy on loopback, which no container reaches, and
    values that are local paths, since the files are not in the image.
    """
    settings = {}
    for scheme in ("http", "https"):
        proxy = environment.get(f"{scheme}_proxy") or environment.get(f"{scheme.upper()}_PROXY")
        if proxy:
            settings[f"Acquire::{scheme}::Proxy"] = proxy
    for name, value in re.findall(r'^(\S+) "(.*)";$', dump, re.MULTILINE):
        if CARRIED.fullmatch(name) and not name.endswith("Auto-Detect"):
            settings[name] = value
    return tuple(
        f'{name} "{value}";'
        for name, value in sorted(settings.items())
        if not value.startswith("/") and urlsplit(value).hostname not in ("localhost", "127.0.0.1", "::1")
    )


def _recipe(sources: tuple[str, ...], apt_settings: tuple[str, ...]) -> list[str]:
    """The whole mmdebstrap command, `{target}` standing for the tar it writes.

    Certificates go in only where a mirror is reached over https: this machine's own authorities too, then.
    """
    https = any(" https://" in line for line in sources)
    certificates = sorted(CERTIFICATES.glob("*.crt")) if https else []
    return [
        "mmdebstrap",
        "--variant=minbase",
        "--format=tar",
        "--skip=chroot/policy-rc.d",  # or it removes ours
        *(["--include=ca-certificates"] if https else []),
        *(f"--dpkgopt={option}" for option in DPKG_OPTIONS),
        *(f"--aptopt={option}" for option in (*APT_OPTIONS, *apt_settings)),
        *(f"--customize-hook=copy-in {path} {CERTIFICATES}" for path in certificates),
        *(['--customize-hook=chroot "$1" update-ca-certificates'] if certificates else []),
        *(f"--customize-hook={_write(path, mode, text)}" for path, (mode, text) in FILES.items()),
        SUITE,
        "{target}",
        *sources,
    ]


def _write(path: str, mode: str, text: str) -> str:
    """A mmdebstrap hook, in shell, that leaves this file in the image (whose root is its `$1`)."""
    return f'printf %s {shlex.quote(text)} > "$1{path}" && chmod {mode} "$1{path}"'


def _key(recipe: list[str], architecture: str) -> str:
    """Names the tar by what is in it; the machine's point release (12.11) renews it now and then."""
    release = Path("/etc/debian_version")
    point = release.read_text().strip() if release.is_file() else ""
    certificates = [path.read_text() for path in sorted(CERTIFICATES.glob("*.crt"))]
    return hashlib.sha256("\n".join([*recipe, architecture, point, *certificates]).encode()).hexdigest()[:12]


def _build(archive: Path, recipe: list[str], architecture: str, say: Say) -> None:
    here = ARCHITECTURES.get(platform.machine(), platform.machine())
    if here != architecture:
        raise BaseImageError(
            f"{IMAGE}: the engine runs {architecture}, this machine {here}, which cannot build it. {BY_HAND}"
        )
    _need_space(archive.parent)
    _need_mmdebstrap(say)
    part = archive.with_suffix(f".{os.getpid()}.part")
    say(f"base image: building {IMAGE} from Debian's packages with mmdebstrap (15 to 60 s)")
    try:
        _run([word.replace("{target}", str(part)) for word in recipe], say)
        part.rename(archive)
    finally:
        part.unlink(missing_ok=True)


def _need_space(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache).free
    except OSError as error:
        raise BaseImageError(
            f"{cache}: not writable ({error.strerror}). Next step: set XDG_CACHE_HOME to another directory."
        ) from error
    if free < SPACE:
        raise BaseImageError(
            f"{cache}: {free // 1024**2} MiB free, the base image needs {SPACE // 1024**2} MiB. Next step: "
            f"free some space, or set XDG_CACHE_HOME to a directory on a larger disk."
        )


def _need_mmdebstrap(say: Say) -> None:
    if shutil.which("mmdebstrap"):
        return
    if shutil.which("apt-get") is None:
        raise BaseImageError(f"{IMAGE}: no registry serves it, and only Debian can build it. {BY_HAND}")
    if os.geteuid() != 0:
        raise BaseImageError(
            f"{IMAGE}: building it needs mmdebstrap, and installing that needs root. Next step: "
            f"`sudo apt-get install mmdebstrap debian-archive-keyring`, run again."
        )
    say("base image: installing mmdebstrap with apt-get")
    install = ["apt-get", "install", "-y", "--no-install-recommends", "mmdebstrap", "debian-archive-keyring"]
    _run(["apt-get", "update"], say)
    _run(install, say)


def _run(command: list[str], say: Say) -> None:
    """Runs it and says its milestones: mmdebstrap's lines like `I: creating tarball...`."""
    lines: list[str] = []
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"},
    ) as process:
        for line in process.stdout or ():
            lines.append(line.rstrip())
            if milestone := re.match(r"I: (\w+ing .*)\.\.\.$", line):
                say(f"base image:   {milestone[1]}")
    if process.returncode != 0:
        last = "\n  ".join(lines[-8:])
        raise BaseImageError(
            f"`{command[0]}` failed with code {process.returncode}; its last lines:\n  {last}\n"
            f"Next step: see that this machine reaches Debian's packages (`apt-get update`) and has free "
            f"disk, or make a registry reachable that serves {IMAGE}."
        )


if __name__ == "__main__":
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        ensure(cache_home / "bulkhead")
    except BaseImageError as error:
        raise SystemExit(f"error: {error}") from None

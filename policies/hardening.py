"""Hardening: what makes a container more than a container on the host, whatever environment it is in.
The checks of CIS Docker Benchmark 1.6.0 (sections 4 and 5) and Pod Security Standards that inputs decide."""

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, Final

from policies.hostpath import DISKS, ENGINE_DATA, LINKS, MOUNTS, normal, opened, overlaps, socket_in, within
from policies.rule import (
    BEST_EFFORT,
    ENVIRONMENTS,
    EVERYWHERE,
    PROTECTED,
    Finding,
    Option,
    Subject,
    listed,
    number,
    rule,
)
from policies.world import BUILT, CONTAINER, IMAGE, NETWORK, VOLUME, Field, Resource
from settings.reads import STATE

BASELINE_CAPABILITIES = frozenset(
    {
        "AUDIT_WRITE",
        "CHOWN",
        "DAC_OVERRIDE",
        "FOWNER",
        "FSETID",
        "KILL",
        "MKNOD",
        "NET_BIND_SERVICE",
        "SETFCAP",
        "SETGID",
        "SETPCAP",
        "SETUID",
        "SYS_CHROOT",
    }
)
"""Pod Security Standards, baseline: Docker's default set without NET_RAW."""

SAFE_SYSCTLS = frozenset(
    {
        "kernel.shm_rmid_forced",
        "net.ipv4.ip_local_port_range",
        "net.ipv4.ip_unprivileged_port_start",
        "net.ipv4.tcp_syncookies",
        "net.ipv4.ping_group_range",
        "net.ipv4.ip_local_reserved_ports",
        "net.ipv4.tcp_keepalive_time",
        "net.ipv4.tcp_fin_timeout",
        "net.ipv4.tcp_keepalive_intvl",
        "net.ipv4.tcp_keepalive_probes",
    }
)
"""Pod Security Standards, baseline: sysctls that act within the container's namespaces only."""

SELINUX_TYPES = frozenset({"container_t", "container_init_t", "container_kvm_t", "container_engine_t"})
DEVICELESS = frozenset({"tmpfs", "none", "overlay"})
"""File systems whose device is only a word."""

RUNTIMES = frozenset({"", "runc", "io.containerd.runc.v2", "crun", "runsc", "kata", "kata-runtime"})
NO_NEW_PRIVILEGES: Final = "no-new-privileges"
SECRET_NAME = re.compile(r"PASSW(?:OR)?D|PASSPHRASE|SECRET|TOKEN|API_?KEY|PRIVATE_?KEY|CREDENTIAL", re.IGNORECASE)
SECRET_IN_FILE = re.compile(r"(?:_FILE|_PATH)$", re.IGNORECASE)
SSHD = re.compile(r"(?:^|/)(?:sshd|dropbear)$")


def bare(capability: Any) -> str:
    """`CAP_NET_RAW` and `net_raw` as `NET_RAW`."""
    return str(capability).upper().removeprefix("CAP_")


def _carrier(about: Subject) -> bool:
    """Whether the container is never started: it only carries files into a volume."""
    return about.one("start") is False


@rule(
    id="privileged",
    title="no container is privileged",
    references=("PSS baseline: Privileged Containers", "CIS 5.5"),
    reads={CONTAINER: ("privileged",)},
    tiers=EVERYWHERE,
)
def privileged(field: Field, _about: Subject) -> Iterator[Finding]:
    """All capabilities and all devices: the container's root is the host's."""
    if field.value:
        yield Finding(
            "true",
            "it has every capability and device of the host, and so reaches every environment",
            "remove privileged; give it the one capability or device that it needs (cap_add, devices)",
        )


@rule(
    id="engine-socket",
    title="no container gets the engine's socket",
    references=("CIS 5.32", "PSS baseline: HostPath Volumes"),
    reads=MOUNTS,
    links=LINKS,
    tiers=EVERYWHERE,
)
def engine_socket(field: Field, _about: Subject) -> Iterator[Finding]:
    """By its own path, a folder that holds it, or a volume that is a bind in disguise; wherever it was moved to."""
    for path in opened(field):
        if place := socket_in(path):
            yield Finding(
                repr(path),
                f"it opens {place}: whoever writes to it is root on the host",
                "remove the mount; what needs the engine belongs in the host stack",
            )
            return


@rule(
    id="host-namespaces",
    title="no container is in a namespace of the host",
    references=("PSS baseline: Host Namespaces", "CIS 5.10", "CIS 5.16", "CIS 5.17", "CIS 5.31"),
    reads={
        CONTAINER: ("networkMode", "pidMode", "ipcMode", "usernsMode", "cgroupnsMode"),
        IMAGE: ("build.networkMode",),
    },
    links={"networkMode": {NETWORK: "{}", CONTAINER: "container:{}"}}
    | {mode: {CONTAINER: "container:{}"} for mode in ("pidMode", "ipcMode")},
    tiers=EVERYWHERE,
    exemptable=PROTECTED,
)
def host_namespaces(field: Field, about: Subject) -> Iterator[Finding]:
    """Network, processes, IPC, users, cgroups. A protected environment's monitoring agent may be exempted."""
    if str(field.value or "") == "host":
        yield Finding(
            "'host'",
            "in the host's own namespace it sees and reaches every environment",
            f"remove it, so that the container gets a namespace within {about.resource.stack}",
        )


@rule(
    id="added-capabilities",
    title="containers add no capability beyond Docker's default set",
    references=("PSS baseline: Capabilities", "CIS 5.4"),
    reads={CONTAINER: ("capabilities.adds",)},
    tiers=EVERYWHERE,
    exemptable=PROTECTED,
)
def added_capabilities(field: Field, _about: Subject) -> Iterator[Finding]:
    """NET_ADMIN reconfigures networks, SYS_ADMIN mounts, SYS_PTRACE reads others, NET_RAW forges packets."""
    if field.value is not None and bare(field.value) not in BASELINE_CAPABILITIES:
        yield Finding(
            repr(field.value),
            "with it a process acts on the host's kernel, networks or devices, not only on its container",
            "remove it from cap_add; most programs that ask for it run without",
        )


def _drop_net_raw(resource: Resource) -> Mapping[str, Any] | None:
    written = resource.props.get("capabilities") or {}
    if not isinstance(written, Mapping):
        return None
    if "NET_RAW" in map(bare, written.get("adds") or ()):
        return None  # asked for: added-capabilities says what it thinks of that
    return {"capabilities": {**written, "drops": sorted([*(written.get("drops") or ()), "CAP_NET_RAW"])}}


@rule(
    id="net-raw",
    title="containers drop NET_RAW",
    references=("CIS 5.4", "ARP spoofing within a bridge"),
    reads={CONTAINER: ()},
    tiers=EVERYWHERE,
    exemptable=PROTECTED,
    remedy=_drop_net_raw,
)
def net_raw(_field: Field, about: Subject) -> Iterator[Finding]:
    """Docker gives it by default: with it a container answers in the name of its neighbours."""
    if not {"ALL", "NET_RAW"} & set(map(bare, about.all("capabilities.drops"))):
        yield Finding(
            "not dropped",
            "it can forge packets and take over its neighbours' addresses on the bridge",
            "drop it (cap_drop: [NET_RAW], or ALL)",
            at="capabilities.drops",
        )


@rule(
    id="drop-all-capabilities",
    title="containers drop all capabilities and add at most NET_BIND_SERVICE",
    references=("PSS restricted: Capabilities", "CIS 5.4"),
    reads={CONTAINER: ()},
    exemptable=ENVIRONMENTS,
    advised=BEST_EFFORT,
)
def drop_all_capabilities(_field: Field, about: Subject) -> Iterator[Finding]:
    """What a program has not, nobody who takes it over has."""
    if "ALL" not in set(map(bare, about.all("capabilities.drops"))):
        yield Finding(
            "not all dropped",
            "whoever takes the program over has capabilities that it never needed",
            "drop ALL (cap_drop: [ALL])",
            at="capabilities.drops",
        )
    for added in about.all("capabilities.adds"):
        if bare(added) in BASELINE_CAPABILITIES - {"NET_BIND_SERVICE"}:  # the others are added-capabilities'
            yield Finding(
                repr(added),
                "it is more than a program needs that listens on a low port",
                "remove it from cap_add, and run the program as the user who owns its files",
                at="capabilities.adds",
            )


def _options(about: Subject) -> Iterator[tuple[str, str]]:
    """Security options as key and value: `seccomp=unconfined` and `label:disable` alike."""
    for option in about.all("securityOpts"):
        key, _, value = str(option).replace("=", ":", 1).partition(":")
        yield key, value


@rule(
    id="apparmor",
    title="AppArmor is not turned off",
    references=("PSS baseline: AppArmor", "CIS 5.2"),
    reads={CONTAINER: ()},
    tiers=EVERYWHERE,
    exemptable=PROTECTED,
)
def apparmor(_field: Field, about: Subject) -> Iterator[Finding]:
    """The engine's own profile, or one that is loaded on the host."""
    if ("apparmor", "unconfined") in _options(about):
        yield Finding(
            "'apparmor=unconfined'",
            "the profile that keeps containers from mounts and kernel files is off",
            "remove it, or name a profile that is loaded on the host",
            at="securityOpts",
        )


@rule(
    id="selinux",
    title="SELinux labels stay those of containers",
    references=("PSS baseline: SELinux", "CIS 5.3"),
    reads={CONTAINER: ()},
    tiers=EVERYWHERE,
    exemptable=PROTECTED,
)
def selinux(_field: Field, about: Subject) -> Iterator[Finding]:
    """No other user or role, no type but those for containers, not disabled."""
    for key, value in _options(about):
        if key != "label":
            continue
        name, _, written = value.partition(":")
        if not (name == "level" or (name == "type" and written in SELINUX_TYPES)):
            yield Finding(
                repr(f"label={value}"),
                "with another label SELinux treats it as something that is no container",
                f"remove it, or use a type among {', '.join(sorted(SELINUX_TYPES))}",
                at="securityOpts",
            )


@rule(
    id="seccomp",
    title="the system call filter is not turned off",
    references=("PSS baseline: Seccomp", "PSS restricted: Seccomp", "CIS 5.22"),
    reads={CONTAINER: ()},
    tiers=EVERYWHERE,
    exemptable=PROTECTED,
)
def seccomp(_field: Field, about: Subject) -> Iterator[Finding]:
    """The engine's default filter, or `builtin`. What another profile lets through cannot be told from its name."""
    for key, value in _options(about):
        if key == "seccomp" and value not in ("builtin", "default"):
            yield Finding(
                "'seccomp=unconfined'" if value == "unconfined" else "a profile of its own",
                "system calls that the default filter stops reach the kernel, which all environments share",
                "remove it: the engine's default filter then applies",
                at="securityOpts",
            )


KNOWN_OPTIONS = frozenset({NO_NEW_PRIVILEGES, "apparmor", "label", "seccomp"})


@rule(
    id="security-options",
    title="no security option opens what the engine hides",
    references=("PSS baseline: /proc Mount Type",),
    reads={CONTAINER: (), IMAGE: ("build.securityOpts",)},
    tiers=EVERYWHERE,
    exemptable=PROTECTED,
)
def security_options(field: Field, about: Subject) -> Iterator[Finding]:
    """`systempaths=unconfined` shows all of /proc and /sys; options that nobody knows may do the like."""
    found = [(field.value, "")] if field.value is not None else _options(about)
    for key, _ in found:
        if key not in KNOWN_OPTIONS:
            yield Finding(
                repr(key),
                "it opens parts of the host's kernel, or nobody here knows what it does",
                f"remove it; {', '.join(sorted(KNOWN_OPTIONS))} are known",
                at="securityOpts" if field.value is None else "",
            )


def _no_new_privileges(resource: Resource) -> Mapping[str, Any] | None:
    written = resource.props.get("securityOpts")
    if not isinstance(written, list | None):
        return None
    kept = [option for option in written or () if not str(option).startswith(NO_NEW_PRIVILEGES)]
    if len(kept) < len(written or ()):
        return None  # somebody turned it off on purpose
    return {"securityOpts": sorted([*kept, f"{NO_NEW_PRIVILEGES}:true"])}


@rule(
    id="no-new-privileges",
    title="processes gain no privileges by what they execute",
    references=("PSS restricted: Privilege Escalation", "CIS 5.26", "CIS 4.8"),
    reads={CONTAINER: ()},
    exemptable=ENVIRONMENTS,
    advised=BEST_EFFORT,
    remedy=_no_new_privileges,
)
def no_new_privileges(_field: Field, about: Subject) -> Iterator[Finding]:
    """Without it, one setuid program in the image makes a root of any user."""
    if not any(key == NO_NEW_PRIVILEGES and value in ("", "true") for key, value in _options(about)):
        yield Finding(
            "not set",
            "a setuid program in the image makes whoever runs it root",
            "add it (security_opt: [no-new-privileges:true])",
            at="securityOpts",
        )


@rule(
    id="sysctls",
    title="containers set only sysctls of their own namespaces",
    references=("PSS baseline: Sysctls",),
    reads={CONTAINER: ("sysctls.*",)},
    tiers=EVERYWHERE,
    exemptable=PROTECTED,
)
def sysctls(field: Field, _about: Subject) -> Iterator[Finding]:
    """The others weaken the container's own protection, or the kernel's that all share."""
    name = field.path.removeprefix("sysctls.")
    if name not in SAFE_SYSCTLS:
        yield Finding(
            repr(name),
            "it is none of the sysctls that are known to stay within a container",
            "remove it; set it on the host if the machine needs it",
        )


@rule(
    id="host-path",
    title="containers mount no folder of the host but those meant for them",
    references=("PSS baseline: HostPath Volumes", "PSS restricted: Volume Types", "CIS 5.6"),
    reads=MOUNTS,
    links=LINKS,
    tiers=EVERYWHERE,
    exemptable=PROTECTED,
    options={
        "writable": listed(
            ["/srv/{environment}"],
            "Folders of which what is directly in them may be mounted; {environment} is its name.",
        ),
        "readable": listed(
            ["{checkout}", "/etc/localtime", "/etc/timezone"],
            "Folders and files that may be mounted read-only; {checkout} is the folder that holds the ledger.",
        ),
    },
)
def host_path(field: Field, about: Subject) -> Iterator[Finding]:
    """What is directly in a named folder for each environment, and the project's own files read-only.

    Not the folder itself, and nothing deeper: whoever may write in the folder above puts a link there, to the host's
    root, and the engine follows it.
    """
    for path in opened(field):
        if not path.startswith("/") and not field.path.endswith(".device"):
            continue
        disk = field.path.endswith(".device") and overlaps(path, DISKS)
        if path in DEVICELESS or socket_in(path) or overlaps(path, ENGINE_DATA) or disk:
            continue  # no folder at all, or one that engine-socket and engine-data refuse
        read_only = _read_only(field, about)
        named = normal(path)
        own = any(named.rpartition("/")[0] == about.folder(one) for one in about.options["writable"])
        readable = read_only and any(within(named, about.folder(one)) for one in about.options["readable"])
        if readable and overlaps(path, [about.folder(f"{{checkout}}/{STATE}")]):
            yield Finding(
                repr(path),
                "Pulumi's state and its passphrase are in it, and with them the secrets of every environment",
                "mount only the folders that the container needs",
            )
        elif not own and not readable:
            yield Finding(
                repr(path),
                f"it is a folder of the host that is not meant for {about.resource.stack}"
                + ("" if read_only else ", and it is mounted writable"),
                f"use a named volume, {about.folder('/srv/{environment}/<name>')}, or for files of the project a "
                "read-only mount (:ro)",
            )


def _read_only(field: Field, about: Subject) -> bool:
    block = field.path.rpartition(".")[0]
    found: Any = about.resource.props
    for key in block.replace("]", "").replace("[", ".").split("."):
        inner = found[int(key)] if isinstance(found, list) else found.get(key)
        if not isinstance(inner, Mapping | list):
            return False
        found = inner
    return isinstance(found, Mapping) and found.get("readOnly") is True


@rule(
    id="volume-type",
    title="volumes are folders or memory, and no other file system of the host's kernel",
    references=("proc, sysfs and cgroup2 as the type of a local volume", "PSS baseline: HostPath Volumes"),
    reads={VOLUME: ("driverOpts.type",), CONTAINER: ("mounts.volumeOptions.driverOptions.type",)},
    tiers=EVERYWHERE,
    exemptable=PROTECTED,
)
def volume_type(field: Field, about: Subject) -> Iterator[Finding]:
    """The engine mounts a `local` volume in the host's own namespaces: as proc or sysfs it is the host's, writable, as
    cgroup2 all limits, as overlay any folders. `none` is a bind mount, whose folder host-path judges."""
    if field.value not in (None, "", "none", "tmpfs"):
        yield Finding(
            repr(field.value),
            "the engine mounts it on the host, with what the host has there: switches of the kernel, limits of every "
            "environment, folders by other names",
            f"use a plain volume, tmpfs, or type: none with o: bind and a folder in /srv/{about.resource.stack}",
        )


@rule(
    id="devices",
    title="containers get no device of the host",
    references=("CIS 5.18", "PSS baseline: Privileged Containers"),
    reads={
        CONTAINER: ("devices.hostPath", "deviceCgroupRules", "deviceRequests.driver", "gpus"),
    },
    tiers=EVERYWHERE,
    exemptable=PROTECTED,
    options={"allow": listed([], "Device files that may be given to containers, as shell patterns: /dev/dri/*.")},
)
def devices(field: Field, about: Subject) -> Iterator[Finding]:
    """A disk is every environment's data; a device has no budget."""
    asked = field.value is not None or field.path.endswith(".driver")
    path = normal(str(field.value)) if field.path.endswith("hostPath") else ""
    if asked and not (path and any(fnmatchcase(path, allowed) for allowed in about.options["allow"])):
        yield Finding(
            repr(field.value) if field.value else "a device request",
            "a device belongs to the whole host: nothing divides it, and a disk holds every environment's data",
            "remove it; where it is needed, list it in the option allow of this rule",
        )


@rule(
    id="mount-propagation",
    title="mounts made in a container stay in it",
    references=("CIS 5.20",),
    reads={CONTAINER: ("mounts.bindOptions.propagation",)},
    tiers=EVERYWHERE,
    exemptable=PROTECTED,
)
def mount_propagation(field: Field, _about: Subject) -> Iterator[Finding]:
    """`shared` and `rshared` carry a mount from the container to the host, and on to others."""
    if field.value not in (None, "", "private", "rprivate", "slave", "rslave"):
        yield Finding(
            repr(field.value),
            "what it mounts there appears on the host and in other containers",
            "use rprivate (the default) or rslave",
        )


@rule(
    id="runtime",
    title="containers run under a runtime that isolates",
    references=("a runtime decides what a container is",),
    reads={CONTAINER: ("runtime",)},
    tiers=EVERYWHERE,
    exemptable=PROTECTED,
    options={"allow": listed([], "Further runtimes of the engine.")},
)
def runtime(field: Field, about: Subject) -> Iterator[Finding]:
    """Any program can be set up as a runtime, also one that isolates nothing."""
    if str(field.value or "") not in {*RUNTIMES, *about.options["allow"]}:
        yield Finding(
            repr(field.value),
            "nobody here knows what this runtime keeps apart",
            f"remove it, or use one of {', '.join(sorted(RUNTIMES - {''}))}",
        )


@rule(
    id="non-root",
    title="containers run as a user other than root",
    references=("PSS restricted: Running as Non-root", "PSS restricted: Running as Non-root user", "CIS 4.1"),
    reads={CONTAINER: ("user",)},
    exemptable=ENVIRONMENTS,
    advised=BEST_EFFORT,
)
def non_root(field: Field, about: Subject) -> Iterator[Finding]:
    """The image's own USER cannot be seen at preview, so it is written down here too."""
    name = str(field.value or "").partition(":")[0]
    if name.lstrip("0") in ("", "root") and not _carrier(about):
        yield Finding(
            repr(field.value) if field.value else "not set",
            "it runs as root, or as whoever the image names, which is root in most",
            "set user to the image's own user, as in user: '10001:10001'",
        )


@rule(
    id="read-only-root",
    title="the root file system is read-only",
    references=("CIS 5.13",),
    reads={CONTAINER: ("readOnly",)},
    exemptable=ENVIRONMENTS,
    advised=BEST_EFFORT,
)
def read_only_root(field: Field, about: Subject) -> Iterator[Finding]:
    """What is written there grows without a limit and is lost with the container."""
    if field.value is not True and not _carrier(about):
        yield Finding(
            "not set",
            "whoever takes it over can replace its programs, and what it writes there fills the host's disk",
            "set read_only: true, with tmpfs for what it writes while it runs and volumes for what it keeps",
        )


@rule(
    id="memory-limit",
    title="every container has a memory limit",
    references=("CIS 5.11",),
    reads={CONTAINER: ("memory",)},
    exemptable=ENVIRONMENTS,
    advised=BEST_EFFORT,
)
def memory_limit(field: Field, about: Subject) -> Iterator[Finding]:
    """Without one, a leak takes the memory of the environment's other services first."""
    if not field.value and not _carrier(about):
        yield Finding(
            "not set",
            "one service can use up what the whole environment has, and the kernel then kills any of them",
            "set deploy.resources.limits.memory",
        )


@rule(
    id="privileged-ports",
    title="low ports of the host are published only where agreed",
    references=("CIS 5.8", "CIS 5.9", "PSS baseline: Host Ports"),
    reads={CONTAINER: ("ports.external",)},
    exemptable=ENVIRONMENTS,
    advised=BEST_EFFORT,
    options={
        "allow": Option(
            {"type": "array", "items": {"type": "integer"}, "description": "Low ports that may be published."},
            [80, 443],
        )
    },
)
def privileged_ports(field: Field, about: Subject) -> Iterator[Finding]:
    """Below 1024 are the system's own services: SSH, mail, names."""
    if field.value and field.value < 1024 and int(field.value) not in about.options["allow"]:
        yield Finding(
            f"{field.value:g}",
            "ports below 1024 are the host's own services'",
            "publish a port above 1023, or list this one in the option allow of this rule",
        )


@rule(
    id="ulimits",
    title="limits of the engine are raised only as far as needed",
    references=("CIS 5.19",),
    reads={CONTAINER: ("ulimits.hard", "ulimits.soft")},
    exemptable=ENVIRONMENTS,
    advised=BEST_EFFORT,
    options={"most": number(1048576, "The highest limit that may be set.")},
)
def ulimits(field: Field, about: Subject) -> Iterator[Finding]:
    """Unlimited is for locked memory alone, which the memory limit counts."""
    index = int(field.path.partition("[")[2].partition("]")[0])
    name = about.all("ulimits.name")[index]
    if name != "memlock" and field.value is not None and not 0 <= field.value <= about.options["most"]:
        yield Finding(
            f"{name} {field.value:g}",
            "without an upper end one container takes what the kernel has for all",
            f"set a number of at most {about.options['most']:g}",
        )


@rule(
    id="real-time",
    title="a best-effort environment has no limits that give priority",
    references=("rtprio: a thread of SCHED_FIFO runs before every weight of every slice",),
    reads={CONTAINER: ("ulimits.name",)},
    tiers=BEST_EFFORT,
)
def real_time(field: Field, _about: Subject) -> Iterator[Finding]:
    """Raising a thread's priority up to `rtprio` or `nice` needs no capability."""
    if field.value is not None and field.value not in SAFE_ULIMITS:
        yield Finding(
            repr(field.value),
            "its threads may run before prod's, whatever their slices weigh",
            f"remove it; known to be harmless are {', '.join(sorted(SAFE_ULIMITS))}",
        )


SAFE_ULIMITS = frozenset(
    {
        "as",
        "core",
        "cpu",
        "data",
        "fsize",
        "locks",
        "memlock",
        "msgqueue",
        "nofile",
        "nproc",
        "rss",
        "sigpending",
        "stack",
    }
)
"""getrlimit(2), without nice, rtprio and rttime."""


@rule(
    id="sshd",
    title="no SSH server runs in a container",
    references=("CIS 5.7",),
    reads={CONTAINER: ("command", "entrypoints", "ports.internal")},
    exemptable=ENVIRONMENTS,
    advised=BEST_EFFORT,
)
def sshd(field: Field, _about: Subject) -> Iterator[Finding]:
    """Who must look inside uses docker exec, whose users the host knows."""
    port = field.path.endswith("internal")
    if (port and field.value == 22) or (not port and SSHD.search(str(field.value or ""))):
        yield Finding(
            "22" if port else "an SSH server",
            "it is a second door with keys of its own that nobody counts",
            "remove it; use docker exec",
        )


@rule(
    id="secret-variables",
    title="secrets are files, not variables",
    references=("CIS 4.10", "docker inspect shows every variable"),
    reads={CONTAINER: ("envs",), IMAGE: ("build.buildArgs.*",), BUILT: ("build.buildArgs.*",)},
    exemptable=ENVIRONMENTS,
    advised=BEST_EFFORT,
)
def secret_variables(field: Field, _about: Subject) -> Iterator[Finding]:
    """A variable is inherited by every child, written to crash reports, and kept in an image's history."""
    argument = field.path.startswith("build.")
    name, _, value = (
        (field.path.rpartition(".")[2], "", field.value) if argument else str(field.value or "").partition("=")
    )
    if value and SECRET_NAME.search(name) and not SECRET_IN_FILE.search(name):
        yield Finding(
            f"variable {name}",
            "whoever may look at the image reads it in its history"
            if argument
            else "whoever may look at the container reads it, and every child process inherits it",
            "use a build secret" if argument else f"use a secret (secrets:), and {name}_FILE where the image knows it",
        )


@rule(
    id="setuid-files",
    title="no setuid file is put into a container",
    references=("CIS 4.8",),
    reads={CONTAINER: ("uploads.permissions",)},
    tiers=EVERYWHERE,
    exemptable=ENVIRONMENTS,
)
def setuid_files(field: Field, _about: Subject) -> Iterator[Finding]:
    """Such a file runs as its owner, whoever starts it."""
    if field.value and int(str(field.value), 8) & 0o6000:
        yield Finding(
            repr(field.value),
            "whoever runs this file becomes its owner",
            "take the setuid and setgid bits away: 0755",
        )


def _init(_resource: Resource) -> Mapping[str, Any] | None:
    return {"init": True}


@rule(
    id="init",
    title="a container's first process reaps its children",
    references=("a container without an init fills its process table with zombies",),
    reads={CONTAINER: ("init",)},
    exemptable=ENVIRONMENTS,
    advised=ENVIRONMENTS,
    remedy=_init,
)
def init(field: Field, about: Subject) -> Iterator[Finding]:
    """`false`, written out, is for an image that brings an init of its own."""
    if field.value is None and not _carrier(about):
        yield Finding(
            "not set",
            "processes whose parent ended stay in the process table, and signals may not reach the program",
            "set init: true, or false for an image with an init of its own",
        )

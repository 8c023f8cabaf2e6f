"""Availability: what keeps a protected environment serving, and its data there: checks, restarts, graceful stops,
images that cannot change under it, volumes that are kept and backed up."""

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, time, timedelta
from typing import Any

from policies.rule import BEST_EFFORT, ENVIRONMENTS, EVERYWHERE, PROTECTED, Finding, Subject, number, rule
from policies.world import CONTAINER, IMAGE, JOB, STACK, VOLUME, Field, Resource
from settings.ledger import Tier
from settings.model import seconds

DIGEST = re.compile(r"(?:^|@)sha256:[0-9a-f]{64}$")
ROTATING = frozenset({"json-file", "local"})
"""Log drivers that write files of the engine's."""

SHIPPING = frozenset({"journald", "syslog", "fluentd", "gelf", "awslogs", "splunk", "gcplogs", "none"})
"""Log drivers that leave no file with the engine."""

CONNECTING = SHIPPING - {"journald", "none"}
"""Log drivers with which the engine sends what a container prints to an address that its settings name."""

LOG_OPTIONS = {"max-size": "10m", "max-file": "3"}


def _runs(about: Subject) -> bool:
    """Whether the container is meant to keep running: not a carrier of files, not a job that ends."""
    return about.one("start") is not False and about.one("mustRun") is not False


@rule(
    id="healthcheck",
    title="every service has a healthcheck",
    references=("CIS 4.6", "CIS 5.27"),
    reads={CONTAINER: ()},
    exemptable=ENVIRONMENTS,
    advised=BEST_EFFORT,
)
def healthcheck(_field: Field, about: Subject) -> Iterator[Finding]:
    """A deploy waits for it, so that an unhealthy new container never replaces a healthy one."""
    tests = about.all("healthcheck.tests")
    if _runs(about) and (not tests or tests[0] == "NONE"):
        yield Finding(
            "'NONE'" if tests else "not set",
            "nobody notices when it hangs, and a deploy replaces a working container by a broken one",
            "add a healthcheck that asks for what its users ask for",
            at="healthcheck.tests",
        )


@rule(
    id="restart-policy",
    title="services of a protected environment are started again",
    references=("CIS 5.15",),
    reads={CONTAINER: ("restart",)},
    tiers=PROTECTED,
    exemptable=PROTECTED,
)
def restart_policy(field: Field, about: Subject) -> Iterator[Finding]:
    """CIS asks for on-failure:5, after which a service stays down until somebody comes; the engine waits longer
    between tries by itself, so `unless-stopped` and `always` are taken too."""
    policy = str(field.value or "no")
    if policy not in ("always", "unless-stopped", "on-failure") and _runs(about):
        yield Finding(
            repr(policy),
            "after a crash, or a restart of the host, it stays down",
            "set restart: unless-stopped (or on-failure)",
        )


@rule(
    id="graceful-stop",
    title="services of a protected environment are given time to stop",
    references=("requests under way and transactions are finished",),
    reads={CONTAINER: ()},
    tiers=PROTECTED,
    exemptable=PROTECTED,
    options={"drain": number(10, "Seconds within which the proxy and clients let go of a container.")},
)
def graceful_stop(_field: Field, about: Subject) -> Iterator[Finding]:
    """The provider kills at once where `destroyGraceSeconds` is not set, whatever `stopTimeout` says."""
    if not _runs(about):
        return
    for name in ("stopTimeout", "destroyGraceSeconds"):
        seconds = about.one(name)
        if seconds is None or seconds < about.options["drain"]:
            yield Finding(
                "not set" if seconds is None else f"{seconds:g} s",
                f"it is killed before the {about.options['drain']:g} s are over in which others let go of it",
                f"set stop_grace_period to at least {about.options['drain']:g}s"
                + (" (and destroy_grace_seconds, in Python)" if seconds is None else ""),
                at=name,
            )


def _rotation(resource: Resource) -> Mapping[str, Any] | None:
    options = resource.props.get("logOpts")
    if resource.props.get("logDriver") not in (None, "", *ROTATING) or not isinstance(options, Mapping | None):
        return None
    return {"logOpts": {**LOG_OPTIONS, **(options or {})}}


@rule(
    id="log-rotation",
    title="logs do not fill the disk that all share",
    references=("a full disk stops every environment",),
    reads={CONTAINER: ()},
    tiers=EVERYWHERE,
    exemptable=PROTECTED,
    remedy=_rotation,
)
def log_rotation(_field: Field, about: Subject) -> Iterator[Finding]:
    """`json-file` keeps everything for ever unless told a size; `local` rotates by itself."""
    driver = about.one("logDriver") or "json-file"
    if about.tier == Tier.BEST_EFFORT and driver in CONNECTING:
        yield Finding(
            repr(driver),
            "the engine itself would connect to where it says, past every wall between environments",
            f"use one of {', '.join(sorted(ROTATING))}, and ship logs from a service",
            at="logDriver",
        )
    elif about.tier == Tier.BEST_EFFORT and driver == "journald":
        yield Finding(
            repr(driver),
            "what it prints pushes the host's and prod's own lines out of the journal",
            f"use one of {', '.join(sorted(ROTATING))}",
            at="logDriver",
        )
    elif driver not in ROTATING | SHIPPING:
        yield Finding(
            repr(driver),
            "nobody here knows where this driver writes, and how much",
            f"use one of {', '.join(sorted(ROTATING | SHIPPING))}",
            at="logDriver",
        )
    elif driver == "json-file" and about.one("start") is not False:
        size = about.one("logOpts.max-size")
        if size in (None, "", "-1"):
            yield Finding(
                repr(size) if size else "not set",
                "one chatty container fills the disk, and every environment stops",
                'set logging.options: {max-size: 10m, max-file: "3"}',
                at="logOpts.max-size",
            )


@rule(
    id="engine-work",
    title="what the engine itself does for a best-effort environment is bounded",
    references=("the engine's own processor time and memory are in no environment's slice",),
    reads={
        CONTAINER: ("logOpts.*", "healthcheck.interval", "healthcheck.startInterval", "stopTimeout"),
        STACK: (),
    },
    tiers=BEST_EFFORT,
    options={
        "containers": number(100, "Containers that an environment may have: each has a process of the engine's."),
        "ports": number(200, "Ports that an environment may publish: each has two processes of the engine's."),
    },
)
def engine_work(field: Field, about: Subject) -> Iterator[Finding]:
    """A log's `tag` is a template that the engine executes, `max-buffer-size` memory of its own; a healthcheck starts a
    process each time, and a stop of the engine waits for the longest `stop_grace_period` of all containers. A
    container's shim and each proxy of its ports run in the system's share, and have 3 and 1 MiB of their own (Docker
    20.10, measured)."""
    name, value = field.path.rpartition(".")[2], field.value
    if about.resource.type == STACK:
        yield from _too_many(about)
        return
    if value in (None, ""):
        return
    if field.path.startswith("logOpts.") and _ours(about) and not _bounded(name, str(value)):
        yield Finding(
            f"{name}={value}",
            "the engine itself would spend memory, time or disk on it as a container of dev's likes",
            "use max-size up to 100m, max-file up to 10, compress, labels and env",
        )
    elif name in ("interval", "startInterval") and not _seldom(str(value)):
        yield Finding(
            repr(value), "each check starts a process, in the engine's own time", "check once a second at most"
        )
    elif name == "stopTimeout" and value > LONGEST_STOP:
        yield Finding(
            f"{value:g} s", "a restart of the engine waits for it", f"set stop_grace_period to at most {LONGEST_STOP}s"
        )


def _too_many(about: Subject) -> Iterator[Finding]:
    made = [one for one in about.whole().of(CONTAINER) if one.props.get("start") is not False]
    ports = sum(1 for one in made for _ in one.fields("ports.internal"))
    for option, found, what in (("containers", len(made), "containers"), ("ports", ports, "published ports")):
        allowed = about.options[option]
        if found > allowed:
            yield Finding(
                f"{found} {what}",
                "the engine's processes for them take memory that is kept for the system, and prod waits for it",
                f"have at most {allowed:g} (scale, deploy.replicas, ports), or raise the option {option} of this rule",
            )


LONGEST_STOP = 600
"""Seconds. systemd gives Docker's own unit 90 to stop."""

_SIZE = re.compile(r"(\d{1,9})([kmg]?)b?", re.IGNORECASE)


def _ours(about: Subject) -> bool:
    return about.one("logDriver") in (None, "", *ROTATING)  # others are log-rotation's to refuse


def _bounded(name: str, value: str) -> bool:
    if name == "max-size":
        size = _SIZE.fullmatch(value)
        return size is not None and int(size[1]) * 1024 ** " kmg".index(size[2].lower() or " ") <= 100 * 2**20
    if name == "max-file":
        return value.isdecimal() and int(value) <= 10
    return name in ("compress", "labels", "labels-regex", "env", "env-regex") or (name, value) == ("mode", "blocking")


def _seldom(interval: str) -> bool:
    try:
        return not 0 < seconds(interval) < 1
    except ValueError:
        return False


@rule(
    id="image-latest",
    title="images are named with a version",
    references=("CIS 5.28", "CIS 4.2"),
    reads={IMAGE: ("name",)},
    exemptable=ENVIRONMENTS,
    advised=BEST_EFFORT,
)
def image_latest(field: Field, _about: Subject) -> Iterator[Finding]:
    """`latest`, or no tag, is whatever was pushed last."""
    name = str(field.value or "")
    tag = name.rpartition("/")[2].partition(":")[2]
    if "@" not in name and tag in ("", "latest"):
        yield Finding(
            repr(name),
            "what it runs is whatever was pushed last, and nobody can go back to what ran before",
            "name a version, or better its digest",
        )


@rule(
    id="image-digest",
    title="a protected environment runs images by digest",
    references=("CIS 4.5", "CIS 5.28", "a tag can be pushed again"),
    reads={IMAGE: ("name",), CONTAINER: ("image",)},
    links={"image": {IMAGE: "{}@sha256:" + "0" * 64}},
    tiers=PROTECTED,
    exemptable=PROTECTED,
)
def image_digest(field: Field, about: Subject) -> Iterator[Finding]:
    """An image that is built here is named by its content; a container runs the id of an image of this stack."""
    sources = (about.resource, about.world.component(about.resource, "Image"))
    if about.resource.type == IMAGE and any(one is not None and one.props.get("build") is not None for one in sources):
        return
    if not DIGEST.search(str(field.value or "")):
        yield Finding(
            repr(field.value),
            "a tag can be pushed again: two deploys of the same file run different programs",
            "add the digest, as in name:1.2@sha256:… (docker image inspect --format '{{index .RepoDigests 0}}')",
        )


@rule(
    id="volume-protected",
    title="volumes of a protected environment are protected",
    references=("a destroyed stack must not take the data with it",),
    reads={VOLUME: ()},
    tiers=PROTECTED,
    exemptable=PROTECTED,
)
def volume_protected(_field: Field, about: Subject) -> Iterator[Finding]:
    """A volume that only holds files that the deploy brings is made anew with them, and need not be."""
    if not about.resource.protect and about.world.component(about.resource, "Files") is None:
        yield Finding(
            "protect is not set",
            "removed from the program, or renamed, it is deleted with everything in it",
            "set protect=True and retain_on_delete=True (components.volume does both)",
        )


@rule(
    id="volume-backup",
    title="volumes of a protected environment are backed up, or said to be ephemeral",
    references=("a volume without a backup is lost with the disk",),
    reads={VOLUME: ()},
    tiers=PROTECTED,
    exemptable=PROTECTED,
)
def volume_backup(_field: Field, about: Subject) -> Iterator[Finding]:
    """Declared on the volume: `x-bulkhead: {backup: …}`, or `{ephemeral: true}` where nothing would be missed."""
    if about.world.component(about.resource, "Files") is not None:
        return
    declared = about.world.component(about.resource, "Volume")
    props = declared.props if declared else {}
    if not (props.get("backup") or props.get("ephemeral") is True):
        yield Finding(
            "no backup declared",
            "it is lost with the disk, and nobody decided that it may be",
            "write x-bulkhead: {backup: {engine: files, schedule: daily}} or {ephemeral: true} on the volume",
        )


@rule(
    id="backup-verified",
    title="backups of a protected environment were lately restored and checked",
    references=("a backup that was never restored is a hope",),
    reads={JOB: ("volume",)},
    tiers=PROTECTED,
    exemptable=PROTECTED,
    advised=PROTECTED,
)
def backup_verified(field: Field, about: Subject) -> Iterator[Finding]:
    """The host's drills restore and check them, within `verified_within` of the ledger. Where no command of Bulkhead's
    has asked the host, as with `pulumi preview` alone, nothing is said."""
    known = about.world.backups
    if known is None:
        return
    at = known.get(str(field.value), {}).get("last_verified", 0.0)
    within = timedelta(seconds=about.world.settings.backup.verified_within)
    oldest = datetime.combine(about.world.today, time(), UTC) - within
    if at < oldest.timestamp():
        yield Finding(
            repr(field.value),
            f"no restore of its backup was checked in the last {within.days} days: nobody knows whether one succeeds",
            f"run make drill ENV={about.resource.stack}; make verify says what stands in the way",
        )

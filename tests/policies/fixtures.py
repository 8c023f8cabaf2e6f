"""One table of fixtures for each rule: a minimal valid stack, one value changed, and what the rule says to it.
The kinds in `DERIVED` are made from these by the tests, for every rule."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from policies.world import IMAGE, NETWORK, PROVIDER
from tests.policies.harness import LEDGER, SECRET, UNKNOWN, Given, container, network, volume

PASS, FAIL, BOUNDARY, UNSET, UNRESOLVED = "pass", "fail", "boundary", "unset default", "unknown"
WRITTEN = frozenset({PASS, FAIL, BOUNDARY, UNSET, UNRESOLVED})
DERIVED = frozenset({"secret", "permuted order", "child of a component"})


@dataclass(frozen=True)
class Case:
    """A stack and the names of its resources that the rule objects to; `also` are further rules that do.

    `value` must stand in the message.
    """

    kind: str
    says: str
    stack: str
    resources: tuple[Given, ...]
    violates: frozenset[str] = frozenset()
    value: str = ""
    also: frozenset[str] = frozenset()
    ledger: str = LEDGER


def ok(kind: str, says: str, stack: str, *resources: Given, ledger: str = LEDGER) -> Case:
    """A stack that no rule objects to."""
    return Case(kind, says, stack, resources, ledger=ledger)


def bad(
    kind: str, says: str, stack: str, *resources: Given, value: str, also: tuple[str, ...] = (), ledger: str = LEDGER
) -> Case:
    """A stack whose first resource breaks the rule (the stack itself, where there is none)."""
    name = resources[0].name if resources else f"bulkhead-{stack}"
    return Case(kind, says, stack, resources, frozenset({name}), value, frozenset(also), ledger)


def unresolved(says: str, stack: str, *resources: Given, also: tuple[str, ...] = ()) -> Case:
    """A stack in which a value of the first resource stays unknown."""
    return bad(UNRESOLVED, says, stack, *resources, value="not known at preview", also=also)


def attached(name: str) -> list[dict[str, str]]:
    """`networksAdvanced` with one network."""
    return [{"name": name}]


def from_network(name: str, source: Given, stack: str = "dev") -> Given:
    """A container whose network's name was made from another resource."""
    return replace(container(stack, networksAdvanced=attached(name)), after={"networksAdvanced": [source.name]})


OPEN_LEDGER = LEDGER.replace(", reservations: {cpus: 10%, memory: 10%}", "")
HALF_LEDGER = LEDGER.replace("{cpus: 10%, memory: 10%}", "{cpus: 10%}")
FULL_LEDGER = LEDGER.replace("memory: 20%", "memory: 40%")
TIGHT_LEDGER = LEDGER.replace("memory: 20%", "memory: 41%")

HEX = "4f3a2b1c9d8e" * 5 + "0a1b"
MADE = network("dev")
DEV_DATA = volume("dev")
OTHER_CONTAINER = replace(container("dev", name="dev-cache-1-99aa"), name="cache")
LOOKED_UP = Given(NETWORK, "found", {"name": "prod-backend"}, outputs={"id": HEX}, read=True)
REMOTE_DOCKER = Given(PROVIDER, "docker", {"host": "ssh://deploy@one"})
SECOND_DOCKER = Given(PROVIDER, "second", {"host": "ssh://deploy@two"})
COMMAND = Given("command:local:Command", "run", {"create": "echo ready"})
BUILD = Given(
    IMAGE, "image", {"name": "bulkhead/dev-api:1", "build": {"context": ".", "cgroupParent": "/bulkhead-dev"}}
)


def bound(path: str) -> Given:
    """A container of dev with a bind mount."""
    return container("dev", volumes=[{"hostPath": path, "containerPath": "/mnt"}])


def disguised(stack: str = "dev", **options: str) -> Given:
    """A `local` volume with driver options."""
    return volume(stack, driverOpts=options)


FIXTURES: Mapping[str, tuple[Case, ...]] = {
    "protected-reservation": (
        ok(PASS, "prod and prod-eu have reservations", "dev"),
        ok(PASS, "the host's stack, with the same ledger", "host"),
        bad(FAIL, "prod-eu has no reservations", "dev", ledger=OPEN_LEDGER, value="prod-eu"),
        bad(
            FAIL,
            "prod-eu has no memory reserved, seen by the host's stack",
            "host",
            ledger=HALF_LEDGER,
            value="prod-eu",
        ),
        bad(FAIL, "a stack that the ledger does not know", "test", value="test"),
        ok(BOUNDARY, "memory is promised to the last byte", "prod", ledger=FULL_LEDGER),
        bad(BOUNDARY, "memory is promised and one percent more", "prod", ledger=TIGHT_LEDGER, value="101%"),
        bad(UNSET, "a ledger without environments", "host", ledger="config: {}", value="bulkhead:environments"),
        bad(UNRESOLVED, "a ledger that is no YAML", "dev", ledger="config: [", value="Pulumi.host.yaml"),
    ),
    "own-slice": (
        ok(PASS, "in its slice, cgroupfs driver", "dev", container("dev")),
        ok(
            PASS,
            "in its slice, systemd driver",
            "dev-alice",
            container("dev-alice", cgroupParent="bulkhead-dev_alice.slice"),
        ),
        ok(PASS, "a build in its slice", "dev", BUILD),
        ok(PASS, "a system container of the host", "host", container("host", cgroupParent=None)),
        ok(BOUNDARY, "a slice of the host's own", "host", container("host", cgroupParent="/bulkhead-dev-tools")),
        bad(FAIL, "in prod's slice", "dev", container("dev", cgroupParent="/bulkhead-prod"), value="/bulkhead-prod"),
        bad(FAIL, "below prod's slice", "dev", container("dev", cgroupParent="bulkhead-prod-x.slice"), value="of prod"),
        bad(FAIL, "below prod's group", "dev", container("dev", cgroupParent="/bulkhead-prod/x"), value="of prod"),
        bad(
            FAIL,
            "a system container in prod's slice",
            "host",
            container("host", cgroupParent="/bulkhead-prod"),
            value="prod",
        ),
        bad(FAIL, "a build in prod's slice", "dev", BUILD.but(build={"cgroupParent": "/bulkhead-prod"}), value="prod"),
        bad(BOUNDARY, "a longer name", "prod", container("prod", cgroupParent="/bulkhead-prod-eu"), value="of prod-eu"),
        bad(BOUNDARY, "the root of all groups", "dev", container("dev", cgroupParent="/"), value="'/'"),
        bad(UNSET, "no cgroup parent", "dev", container("dev", cgroupParent=None), value="not set"),
        bad(UNSET, "a build without one", "dev", BUILD.but(build={"context": "."}), value="not set"),
        unresolved("from an output that is not there yet", "dev", container("dev", cgroupParent=UNKNOWN)),
    ),
    "protected-cpu-quota": (
        ok(PASS, "a quota in a best-effort environment", "dev", container("dev", cpus="0.5")),
        ok(PASS, "shares are a weight", "prod", container("prod", cpuShares=512)),
        bad(FAIL, "cpus", "prod", container("prod", cpus="1.5"), value="1.5"),
        bad(FAIL, "quota and period", "prod", container("prod", cpuQuota=50000, cpuPeriod=100000), value="50000"),
        bad(FAIL, "CPU set", "prod-eu", container("prod-eu", cpuSet="0-3"), value="0-3"),
        bad(BOUNDARY, "the first CPU only", "prod", container("prod", cpuSet="0"), value="'0'"),
        bad(BOUNDARY, "the least quota", "prod", container("prod", cpus="0.01"), value="0.01"),
        ok(BOUNDARY, "zero is no quota", "prod", container("prod", cpus="0.0", cpuQuota=0)),
        ok(BOUNDARY, "a period alone", "prod", container("prod", cpuPeriod=100000)),
        ok(UNSET, "nothing set", "prod", container("prod")),
        unresolved("cpus from an output", "prod", container("prod", cpus=UNKNOWN)),
    ),
    "network-reach": (
        ok(PASS, "a network of its own by name", "dev", container("dev")),
        ok(PASS, "as network mode", "dev", container("dev", networkMode="dev-backend", networksAdvanced=None)),
        ok(PASS, "no network at all", "dev", container("dev", networkMode="none", networksAdvanced=None)),
        ok(
            PASS,
            "a container of the host on the default bridge",
            "host",
            container("host", cgroupParent=None, networksAdvanced=None),
        ),
        ok(
            PASS,
            "by id, of a network made here",
            "dev",
            container("dev", networksAdvanced=attached(HEX)),
            replace(MADE, outputs={"id": HEX}),
        ),
        ok(PASS, "unknown, but made from a network of its own", "dev", from_network(UNKNOWN, MADE), MADE),
        ok(
            PASS,
            "all unknown, but made from a network of its own",
            "dev",
            replace(container("dev", networksAdvanced=UNKNOWN), after={"networksAdvanced": [MADE.name]}),
            MADE,
        ),
        ok(
            PASS,
            "made here under a name without prefix",
            "dev",
            container("dev", networksAdvanced=attached("backend")),
            MADE.but(name="backend"),
        ),
        bad(
            FAIL,
            "prod's network",
            "dev",
            container("dev", networksAdvanced=attached("prod-backend")),
            value="prod-backend",
        ),
        bad(
            FAIL,
            "second of two",
            "dev",
            container("dev", networksAdvanced=[*attached("dev-backend"), *attached("prod-backend")]),
            value="networksAdvanced[1]",
        ),
        bad(
            FAIL,
            "behind an unknown one",
            "dev",
            replace(
                container("dev", networksAdvanced=[*attached(UNKNOWN), *attached("prod-backend")]),
                after={"networksAdvanced": [MADE.name]},
            ),
            MADE,
            value="prod-backend",
        ),
        bad(
            FAIL,
            "as network mode, beside one of its own",
            "dev",
            container("dev", networkMode="prod-backend"),
            value="networkMode",
        ),
        bad(
            FAIL,
            "by an id that nobody here has",
            "dev",
            container("dev", networksAdvanced=attached(HEX)),
            MADE,
            value=HEX,
        ),
        bad(
            FAIL,
            "a name without owner that is not made here",
            "dev",
            container("dev", networksAdvanced=attached("shared")),
            value="shared",
        ),
        bad(
            FAIL,
            "dev's network in prod",
            "prod",
            container("prod", networksAdvanced=attached("dev-backend")),
            value="dev-backend",
        ),
        bad(
            FAIL,
            "the host's network by name",
            "dev",
            container("dev", networksAdvanced=attached("host")),
            value="'host'",
        ),
        bad(
            FAIL,
            "a looked-up network, unknown at preview",
            "dev",
            from_network(UNKNOWN, LOOKED_UP),
            LOOKED_UP,
            value="prod-backend",
        ),
        bad(
            FAIL,
            "by the id of a looked-up network",
            "dev",
            container("dev", networksAdvanced=attached(HEX)),
            LOOKED_UP,
            value=HEX,
        ),
        bad(
            FAIL,
            "a container of the host on prod's network",
            "host",
            container("host", cgroupParent=None, networksAdvanced=attached("prod-backend")),
            value="prod-backend",
        ),
        bad(
            BOUNDARY,
            "dev-alice is not dev",
            "dev",
            container("dev", networksAdvanced=attached("dev-alice-backend")),
            value="dev-alice",
        ),
        ok(
            BOUNDARY,
            "devel- is no environment, but dev-el is dev's",
            "dev",
            container("dev", networksAdvanced=attached("dev-el")),
        ),
        bad(
            BOUNDARY,
            "the bare name of the environment",
            "dev",
            container("dev", networksAdvanced=attached("dev")),
            value="'dev'",
        ),
        bad(
            UNSET,
            "neither networks nor mode",
            "dev",
            container("dev", networksAdvanced=None, networkMode=None),
            value="default bridge",
        ),
        bad(
            UNSET,
            "the default mode by its other name",
            "dev",
            container("dev", networkMode="default", networksAdvanced=None),
            value="default bridge",
        ),
        bad(
            UNSET,
            "the provider's default mode alone",
            "prod",
            container("prod", networksAdvanced=None),
            value="default bridge",
        ),
        bad(
            UNSET,
            "the default bridge beside its own",
            "dev",
            container("dev", networksAdvanced=[*attached("dev-backend"), *attached("bridge")]),
            value="default bridge",
        ),
        unresolved(
            "a name made from nothing that is known", "dev", container("dev", networksAdvanced=attached(UNKNOWN))
        ),
        unresolved(
            "made from its own network and something else",
            "dev",
            replace(from_network(UNKNOWN, MADE), after={"networksAdvanced": [MADE.name, COMMAND.name]}),
            MADE,
            COMMAND,
        ),
        unresolved(
            "made from a network whose own name is unknown",
            "dev",
            from_network(UNKNOWN, MADE),
            MADE.but(name=UNKNOWN),
            also=("own-names",),
        ),
    ),
    "namespace-reach": (
        ok(PASS, "namespaces of its own", "dev", container("dev", ipcMode="private")),
        ok(
            PASS,
            "shared with a container of its own",
            "dev",
            container("dev", networkMode="container:dev-cache-1-99aa", networksAdvanced=None),
        ),
        ok(PASS, "host processes, in a protected environment", "prod", container("prod", pidMode="host")),
        ok(
            PASS,
            "unknown, but made from a container of its own",
            "dev",
            replace(container("dev", pidMode=UNKNOWN), after={"pidMode": [OTHER_CONTAINER.name]}),
            OTHER_CONTAINER,
        ),
        ok(
            PASS,
            "by id, of a container made here",
            "dev",
            container("dev", pidMode=f"container:{HEX}"),
            replace(OTHER_CONTAINER, outputs={"id": HEX}),
        ),
        bad(
            FAIL,
            "network of a container of prod",
            "dev",
            container("dev", networkMode="container:prod-api-1-4f3a", networksAdvanced=None),
            value="prod-api-1-4f3a",
        ),
        bad(
            FAIL,
            "processes of a container of prod",
            "dev",
            container("dev", pidMode="container:/prod-api-1"),
            value="pidMode",
        ),
        bad(
            FAIL,
            "memory of a container of prod",
            "dev",
            container("dev", ipcMode="container:prod-api-1"),
            value="ipcMode",
        ),
        bad(FAIL, "a container that nobody here knows", "dev", container("dev", pidMode=f"container:{HEX}"), value=HEX),
        bad(
            FAIL,
            "the host's network",
            "dev",
            container("dev", networkMode="host", networksAdvanced=None),
            value="networkMode",
        ),
        bad(FAIL, "the host's processes", "dev", container("dev", pidMode="host"), value="pidMode"),
        bad(FAIL, "the host's memory", "dev", container("dev", ipcMode="host"), value="ipcMode"),
        bad(FAIL, "the host's users", "dev", container("dev", usernsMode="host"), value="usernsMode"),
        bad(
            BOUNDARY,
            "dev-alice is not dev",
            "dev",
            container("dev", pidMode="container:dev-alice-api"),
            value="dev-alice-api",
        ),
        ok(BOUNDARY, "named as the engine lists it", "dev", container("dev", pidMode="container:/dev-cache-1")),
        ok(BOUNDARY, "may be shared", "dev", container("dev", ipcMode="shareable")),
        ok(UNSET, "no mode set", "dev", container("dev", networkMode=None)),
        unresolved("a mode made from an output", "dev", container("dev", pidMode=UNKNOWN)),
    ),
    "volume-reach": (
        ok(
            PASS,
            "its own volume",
            "dev",
            container("dev", volumes=[{"volumeName": "dev-data", "containerPath": "/data"}]),
        ),
        ok(
            PASS,
            "its own volume as a mount",
            "dev",
            container("dev", mounts=[{"type": "volume", "source": "dev-data", "target": "/data"}]),
        ),
        ok(
            PASS,
            "unknown, but made from its own volume",
            "dev",
            replace(container("dev", volumes=[{"volumeName": UNKNOWN}]), after={"volumes": [DEV_DATA.name]}),
            DEV_DATA,
        ),
        bad(
            FAIL,
            "prod's volume",
            "dev",
            container("dev", volumes=[{"volumeName": "prod-data", "readOnly": True}]),
            value="prod-data",
        ),
        bad(
            FAIL,
            "prod's volume as a mount",
            "dev",
            container("dev", mounts=[{"type": "volume", "source": "prod-data"}]),
            value="prod-data",
        ),
        bad(
            FAIL,
            "all volumes of a container of prod",
            "dev",
            container("dev", volumes=[{"fromContainer": "prod-db-1:ro"}]),
            value="prod-db-1",
        ),
        bad(
            FAIL,
            "the same, named as the engine lists it",
            "dev",
            container("dev", volumes=[{"fromContainer": "/prod-db-1"}]),
            value="'prod-db-1'",
        ),
        bad(FAIL, "a volume of nobody", "dev", container("dev", volumes=[{"volumeName": "shared"}]), value="shared"),
        bad(
            BOUNDARY,
            "prod-eu is not prod",
            "prod",
            container("prod", volumes=[{"volumeName": "prod-eu-data"}]),
            value="prod-eu-data",
        ),
        ok(
            BOUNDARY,
            "all volumes of a container of its own",
            "dev",
            container("dev", volumes=[{"fromContainer": "dev-db-1"}]),
        ),
        ok(UNSET, "an anonymous volume", "dev", container("dev", volumes=[{"containerPath": "/cache"}])),
        ok(UNSET, "a tmpfs", "dev", container("dev", mounts=[{"type": "tmpfs", "target": "/tmp"}])),
        unresolved("a container made from an output", "dev", container("dev", volumes=[{"fromContainer": UNKNOWN}])),
        unresolved(
            "a volume made from an output",
            "dev",
            container("dev", volumes=[{"volumeName": UNKNOWN}]),
            also=("engine-data", "engine-socket"),
        ),
    ),
    "engine-data": (
        ok(PASS, "a folder of its own", "dev", bound("/srv/dev/data")),
        ok(PASS, "a tmpfs volume", "dev", disguised(type="tmpfs", device="tmpfs", o="size=100m,uid=1000")),
        bad(
            FAIL,
            "prod's volume by path",
            "dev",
            bound("/var/lib/docker/volumes/prod-data/_data"),
            value="prod-data/_data",
        ),
        bad(FAIL, "a folder above it", "prod", container("prod", volumes=[{"hostPath": "/var/lib"}]), value="/var/lib"),
        bad(
            FAIL,
            "a path in place of a volume's name",
            "dev",
            container("dev", volumes=[{"volumeName": "/var/lib/docker"}]),
            value="volumeName",
        ),
        bad(
            FAIL,
            "as a mount",
            "dev",
            container("dev", mounts=[{"type": "bind", "source": "/var/lib/docker/"}]),
            value="mounts[0].source",
        ),
        bad(
            FAIL,
            "a volume that is a bind",
            "dev",
            disguised(type="none", o="bind", device="/var/lib/docker"),
            value="driverOpts.device",
        ),
        bad(
            FAIL,
            "a volume made in the mount",
            "dev",
            container("dev", mounts=[{"type": "volume", "volumeOptions": {"driverOptions": {"device": "/var/lib"}}}]),
            value="device",
        ),
        bad(
            FAIL,
            "the same, as a list of one",
            "dev",
            container("dev", mounts=[{"type": "volume", "volumeOptions": [{"driverOptions": {"device": "/var/lib"}}]}]),
            value="device",
        ),
        bad(
            FAIL,
            "an overlay over it",
            "dev",
            disguised(type="overlay", device="overlay", o="lowerdir=/a:/var/lib/docker"),
            value="/var/lib/docker",
        ),
        bad(
            FAIL,
            "an overlay from the engine's /",
            "dev",
            disguised(type="overlay", o="lowerdir=var/lib/docker"),
            value="var/lib",
        ),
        bad(
            FAIL,
            "options of a volume made in the mount",
            "dev",
            container(
                "dev",
                mounts=[{"type": "volume", "volumeOptions": {"driverOptions": {"o": "lowerdir=/var/lib/docker"}}}],
            ),
            value="/var/lib/docker",
        ),
        ok(BOUNDARY, "options that are no paths", "dev", disguised(type="tmpfs", device="tmpfs", o="uid=root,dev")),
        bad(FAIL, "a rootless engine's of root", "dev", bound("/root/.local/share/docker"), value="/root"),
        bad(
            FAIL,
            "another driver, in the mount",
            "dev",
            container("dev", mounts=[{"type": "volume", "volumeOptions": {"driverName": "nfs"}}]),
            value="nfs",
        ),
        bad(FAIL, "a disk of the host", "dev", disguised(type="ext4", device="/dev/sda1"), value="/dev/sda1"),
        bad(
            FAIL,
            "a relative device, which starts at the engine's /",
            "dev",
            disguised(o="bind", device="var/lib/docker"),
            value="var/lib/docker",
        ),
        bad(FAIL, "another driver", "dev", volume("dev", driver="vieux/sshfs"), value="sshfs"),
        bad(FAIL, "not written plainly", "dev", bound("/srv/../var//lib/./docker"), value="/srv/../var"),
        bad(FAIL, "by way of a process", "dev", bound("/proc/1/root/var/lib/docker"), value="/proc/1/root"),
        bad(FAIL, "containerd's data", "dev", bound("/var/lib/containerd/x"), value="containerd"),
        bad(FAIL, "a rootless engine's", "dev", bound("/home/ann/.local/share/docker/volumes"), value="ann"),
        ok(BOUNDARY, "an empty driver is the default", "dev", volume("dev", driver="")),
        ok(BOUNDARY, "a name that only begins the same", "dev", bound("/var/lib/docker-backup")),
        ok(BOUNDARY, "a user's own folder", "dev", bound("/home/ann/shop")),
        bad(BOUNDARY, "the whole host", "dev", bound("/"), value="'/'", also=("engine-socket",)),
        bad(BOUNDARY, "all of /var", "dev", bound("/var"), value="/var"),
        ok(UNSET, "no mount, no options", "dev", container("dev"), volume("dev", driver=None)),
        unresolved("a driver from an output", "dev", volume("dev", driver=UNKNOWN)),
        unresolved("a path from an output", "dev", bound(UNKNOWN), also=("engine-socket",)),
        unresolved(
            "a path made from its own volume",
            "dev",
            replace(bound(UNKNOWN), after={"volumes": [DEV_DATA.name]}),
            DEV_DATA,
            also=("engine-socket",),
        ),
    ),
    "own-names": (
        ok(PASS, "its own names", "dev", network("dev"), volume("dev"), container("dev")),
        ok(PASS, "a name without owner", "dev", network("dev", name="backend")),
        bad(FAIL, "a network named as prod's", "dev", network("prod"), value="prod-backend"),
        bad(FAIL, "a volume named as prod's", "dev", volume("prod"), value="prod-data"),
        bad(FAIL, "a container named as prod's", "dev", container("dev", name="prod-api-1"), value="prod-api-1"),
        bad(FAIL, "by the host's stack", "host", network("prod"), value="prod-backend"),
        bad(BOUNDARY, "dev-alice is not dev", "dev", network("dev-alice"), value="dev-alice-backend"),
        ok(BOUNDARY, "dev-bob is dev's", "dev", network("dev-bob")),
        ok(UNSET, "no name", "dev", network("dev", name=None)),
        unresolved("a name from an output", "dev", network("dev", name=UNKNOWN)),
    ),
    "own-subnet": (
        ok(PASS, "within its own", "dev", network("dev", ipamConfigs=[{"subnet": "10.82.1.0/24"}])),
        bad(
            FAIL, "within prod's", "dev", network("dev", ipamConfigs=[{"subnet": "10.81.1.0/24"}]), value="10.81.1.0/24"
        ),
        bad(
            FAIL,
            "around everyone's",
            "prod",
            network("prod", ipamConfigs=[{"subnet": "10.0.0.0/8"}]),
            value="10.0.0.0/8",
        ),
        bad(FAIL, "no subnet at all", "dev", network("dev", ipamConfigs=[{"subnet": "wide"}]), value="wide"),
        bad(
            BOUNDARY,
            "the last address of prod's",
            "dev",
            network("dev", ipamConfigs=[{"subnet": "10.81.255.255/32"}]),
            value="10.81",
        ),
        ok(BOUNDARY, "the first address after prod's", "dev", network("dev", ipamConfigs=[{"subnet": "10.82.0.0/32"}])),
        ok(BOUNDARY, "IPv6", "dev", network("dev", ipamConfigs=[{"subnet": "fd00::/64"}])),
        ok(UNSET, "left to the engine", "dev", network("dev", ipamConfigs=[{"gateway": "10.82.0.1"}])),
        unresolved("a subnet from an output", "dev", network("dev", ipamConfigs=[{"subnet": UNKNOWN}])),
    ),
    "privileged": (
        ok(PASS, "a capability instead", "dev", container("dev", capabilities={"adds": ["CAP_CHOWN"]})),
        bad(FAIL, "in dev", "dev", container("dev", privileged=True), value="true"),
        bad(FAIL, "in prod", "prod", container("prod", privileged=True), value="true"),
        bad(FAIL, "in the host's stack", "host", container("host", cgroupParent=None, privileged=True), value="true"),
        ok(BOUNDARY, "written out as false", "dev", container("dev", privileged=False)),
        ok(UNSET, "not set", "prod", container("prod")),
        unresolved("from an output", "dev", container("dev", privileged=UNKNOWN)),
    ),
    "engine-socket": (
        ok(PASS, "a database's socket", "dev", bound("/run/postgresql")),
        bad(FAIL, "Docker's", "dev", bound("/var/run/docker.sock"), value="/var/run/docker.sock"),
        bad(
            FAIL,
            "containerd's",
            "prod",
            container("prod", volumes=[{"hostPath": "/run/containerd/containerd.sock"}]),
            value="containerd",
        ),
        bad(FAIL, "a rootless engine's", "dev", bound("/run/user/1000/docker.sock"), value="1000"),
        bad(FAIL, "its folder", "dev", bound("/run"), value="/run"),
        bad(FAIL, "its folder by the other name", "dev", bound("/var/run/"), value="/var/run/"),
        bad(FAIL, "not written plainly", "dev", bound("/var/run/../run/docker.sock"), value="/var/run/../run"),
        bad(
            FAIL,
            "as a mount",
            "dev",
            container("dev", mounts=[{"type": "bind", "source": "/run/docker.sock"}]),
            value="mounts",
        ),
        bad(
            FAIL,
            "as a volume that is a bind",
            "dev",
            disguised(type="none", o="bind", device="/run"),
            value="driverOpts.device",
        ),
        bad(FAIL, "moved elsewhere", "dev", bound("/srv/proxy/docker.sock"), value="/srv/proxy"),
        bad(
            FAIL,
            "in the host's stack",
            "host",
            container("host", cgroupParent=None, volumes=[{"hostPath": "/run/docker.sock"}]),
            value="sock",
        ),
        bad(BOUNDARY, "a user's folder of sockets", "dev", bound("/run/user/1000"), value="/run/user/1000"),
        ok(BOUNDARY, "a folder beside it", "dev", bound("/run/docker-plugins")),
        ok(UNSET, "no mount", "dev", container("dev", volumes=[])),
        unresolved("a path from an output", "dev", bound(UNKNOWN), also=("engine-data",)),
    ),
    "unsupported-resource": (
        ok(PASS, "what the pack judges", "dev", container("dev"), BUILD),
        bad(
            FAIL,
            "a Swarm service",
            "dev",
            Given("docker:index/service:Service", "web", {"name": "dev-web"}),
            value="Service",
        ),
        bad(FAIL, "a plugin", "prod", Given("docker:index/plugin:Plugin", "p", {}), value="Plugin"),
        bad(FAIL, "a dynamic provider", "dev", Given("pulumi-python:dynamic:Resource", "d", {}), value="dynamic"),
        bad(FAIL, "a build outside the slice", "dev", Given("docker-build:index:Image", "i", {}), value="docker-build"),
        ok(BOUNDARY, "another provider's resource", "dev", Given("random:index/randomId:RandomId", "r", {})),
        ok(BOUNDARY, "on the host", "host", Given("docker:index/plugin:Plugin", "p", {})),
        ok(UNSET, "an empty stack", "dev"),
        bad(
            UNRESOLVED,
            "whatever its properties are",
            "dev",
            Given("docker:index/service:Service", "web", {"name": UNKNOWN}),
            value="Service",
        ),
    ),
    "engine-command": (
        ok(PASS, "a command that needs no engine", "dev", COMMAND),
        ok(PASS, "the host's own", "host", COMMAND.but(create="docker info")),
        bad(
            FAIL,
            "docker run",
            "dev",
            COMMAND.but(create=f"PASSWORD={SECRET} docker run -v /:/host x"),
            value="'docker'",
        ),
        bad(
            FAIL,
            "at deletion, on a remote machine",
            "dev",
            Given("command:remote:Command", "run", {"create": "true", "delete": "/usr/bin/podman rm -f x"}),
            value="'podman'",
        ),
        bad(FAIL, "as interpreter", "dev", COMMAND.but(interpreter=["docker", "exec", "x"]), value="'docker'"),
        bad(
            FAIL,
            "moved to another group",
            "dev",
            COMMAND.but(create="echo 1 > /sys/fs/cgroup/x/cgroup.procs"),
            value="'cgroup'",
        ),
        ok(BOUNDARY, "a word that only contains it", "dev", COMMAND.but(create="cat dockerfiles.txt")),
        ok(UNSET, "no script", "dev", COMMAND.but(create=None)),
        unresolved("a script from an output", "dev", COMMAND.but(update=UNKNOWN)),
    ),
    "one-docker-host": (
        ok(PASS, "one provider", "dev", REMOTE_DOCKER),
        ok(PASS, "another provider beside it", "dev", REMOTE_DOCKER, Given("pulumi:providers:command", "command", {})),
        Case(
            FAIL,
            "two machines",
            "dev",
            (REMOTE_DOCKER, SECOND_DOCKER),
            frozenset({"docker", "second"}),
            "ssh://deploy@two",
        ),
        Case(
            FAIL,
            "in the host's stack too",
            "host",
            (REMOTE_DOCKER, SECOND_DOCKER),
            frozenset({"docker", "second"}),
            "deploy",
        ),
        ok(BOUNDARY, "two providers for one machine", "dev", REMOTE_DOCKER, replace(REMOTE_DOCKER, name="second")),
        Case(
            UNSET,
            "one named and one by default",
            "dev",
            (REMOTE_DOCKER, SECOND_DOCKER.but(host=None)),
            frozenset({"docker", "second"}),
            "the default",
        ),
        ok(UNSET, "one by default", "dev", REMOTE_DOCKER.but(host=None)),
        unresolved("a machine from an output", "dev", REMOTE_DOCKER.but(host=UNKNOWN)),
    ),
}

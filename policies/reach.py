"""Reach: no container gets to another environment's network, addresses, namespaces, volumes or names.
Who owns a name is told by its prefix, the longest environment of the ledger that it begins with."""

import re
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any

from policies.hostpath import DISKS, ENGINE_DATA, LINKS, MOUNTS, opened, overlaps, within
from policies.rule import (
    BEST_EFFORT,
    EVERYWHERE,
    OPEN,
    PROTECTED,
    Finding,
    Open,
    Subject,
    UndecidedError,
    listed,
    rule,
)
from policies.wire import UNKNOWN
from policies.world import (
    BUILT,
    CONTAINER,
    DECLARED,
    ENVIRONMENT,
    HOST,
    IMAGE,
    NETWORK,
    PROVIDER,
    PUSHED,
    REFERENCE,
    STACK,
    TAG,
    VOLUME,
    Field,
    Graph,
)
from settings.dockerfile import IMAGE_ID
from settings.ledger import Environment, Tier

SHARED_NETWORKS = frozenset({"", "bridge", "default"})
"""What the engine calls its default network, and what it takes when nothing is named."""

JOINS = "container:"
NAMED = "{}"

LOCAL_IMAGES = "bulkhead/"
"""What images that are built here are named under."""


@rule(
    id="network-reach",
    title="containers attach only to networks of their own environment",
    references=("CIS 5.30", "dev to prod over a shared network"),
    reads={CONTAINER: ("networksAdvanced.name", "networkMode")},
    links={
        "networksAdvanced.name": {NETWORK: NAMED},
        "networkMode": {NETWORK: NAMED, CONTAINER: JOINS + NAMED},
    },
    tiers=EVERYWHERE,
)
def network_reach(field: Field, about: Subject) -> Iterator[Finding | Open]:
    """The provider attaches to `networkMode` and to every `networksAdvanced`. Its other modes are namespace-reach's."""
    network = str(field.value or "")
    if network in SHARED_NETWORKS:
        if about.own and not (field.path == "networkMode" and _names_networks(about)):
            yield Finding(
                repr(network) if network else "not set",
                "that is the engine's default bridge, which every container without a network of its own shares, "
                "whatever its environment",
                f"name a network of {about.own.name} in networksAdvanced (networks in Compose)",
            )
    elif field.path != "networkMode" or not _is_mode(network):
        yield from _reach(network, NETWORK, "attached to it, it could talk to everything there", about)


def _is_mode(network: str) -> bool:
    return network in ("none", "host") or network.startswith(JOINS)


def _names_networks(about: Subject) -> bool:
    return any(True for _ in about.resource.fields("networksAdvanced.name"))


def _reach(name: str, kind: str, consequence: str, about: Subject) -> Iterator[Finding | Open]:
    """What is wrong with using the network, volume or container `name`: another environment's, or nobody's known."""
    mine, noun = about.resource.stack, kind.rpartition(":")[2].lower()
    owner = about.world.owner(name)
    if owner is not None and owner != about.own:
        yield Finding(
            repr(name),
            f"this {noun} belongs to {owner.name}; {consequence}",
            f"use a {noun} of {mine}, named {mine}-…",
        )
    elif not name.startswith(f"{mine}-"):
        yield from _unowned(name, kind, consequence, about)


def _unowned(name: str, kind: str, consequence: str, about: Subject) -> Iterator[Finding | Open]:
    mine, noun = about.resource.stack, kind.rpartition(":")[2].lower()
    if about.graph is None:
        yield OPEN
    elif not about.graph.creates(kind, name):
        yield Finding(
            repr(name),
            f"{mine} neither makes this {noun} nor is it named after {mine}, so it may be another environment's; "
            f"{consequence}",
            f"use a {noun} that this stack makes, or whose name begins with {mine}-",
        )


@rule(
    id="namespace-reach",
    title="containers join no namespace of another environment's containers",
    references=("PSS baseline: Host Namespaces", "dev to prod through a shared namespace"),
    reads={CONTAINER: ("networkMode", "pidMode", "ipcMode")},
    links={
        "networkMode": {NETWORK: NAMED, CONTAINER: JOINS + NAMED},
        "pidMode": {CONTAINER: JOINS + NAMED},
        "ipcMode": {CONTAINER: JOINS + NAMED},
    },
    tiers=EVERYWHERE,
)
def namespace_reach(field: Field, about: Subject) -> Iterator[Finding | Open]:
    """`container:` makes it part of that container. The host's own namespaces are host-namespaces'."""
    mode = str(field.value or "")
    if mode.startswith(JOINS):
        container = mode.removeprefix(JOINS).lstrip("/")
        yield from _reach(container, CONTAINER, "in its namespace it would be part of it", about)


@rule(
    id="volume-reach",
    title="containers mount only volumes of their own environment",
    references=("dev to prod over a shared volume",),
    reads={CONTAINER: ("volumes.volumeName", "volumes.fromContainer", "mounts.source")},
    links={
        "volumes.volumeName": {VOLUME: NAMED},
        "volumes.fromContainer": {CONTAINER: NAMED},
        "mounts.source": {VOLUME: NAMED},
    },
    tiers=EVERYWHERE,
)
def volume_reach(field: Field, about: Subject) -> Iterator[Finding | Open]:
    """Paths are engine-data's: the provider takes a `volumeName` or `source` that begins with / as one."""
    name = str(field.value or "")
    if field.path.endswith("fromContainer"):
        name, kind = name.split(":")[0].lstrip("/"), CONTAINER  # `/db:ro` is db, read-only
    else:
        kind = VOLUME
    if name and not name.startswith("/"):
        yield from _reach(name, kind, "mounted, its data could be read or changed", about)


@rule(
    id="engine-data",
    title="no mount opens the engine's data directory or a disk of the host",
    references=("CIS 5.6", "PSS baseline: HostPath Volumes", "dev to prod through /var/lib/docker/volumes"),
    reads={
        CONTAINER: (*MOUNTS[CONTAINER], "mounts.volumeOptions.driverName"),
        VOLUME: (*MOUNTS[VOLUME], "driver"),
    },
    links=LINKS,
    tiers=EVERYWHERE,
)
def engine_data(field: Field, _about: Subject) -> Iterator[Finding]:
    """A `local` volume with a device is a bind in disguise, and another driver may be anything."""
    if field.path.endswith(("driver", "driverName")):
        if field.value not in (None, "", "local"):
            yield Finding(
                repr(field.value),
                "what a volume of another driver opens on the host cannot be told from here",
                "use the local driver",
            )
        return
    for path in opened(field):
        place = overlaps(path, (*ENGINE_DATA, *DISKS)) if field.path.endswith("device") else overlaps(path, ENGINE_DATA)
        if place:
            yield Finding(
                repr(path),
                f"it opens {place}, and with it the volumes and files of every environment",
                "mount a named volume of this environment, or a folder that holds nothing else",
            )
            return


@rule(
    id="own-names",
    title="networks, volumes and containers bear no other environment's name",
    references=("names tell who owns what",),
    reads={NETWORK: ("name",), VOLUME: ("name",), CONTAINER: ("name",)},
    tiers=EVERYWHERE,
)
def own_names(field: Field, about: Subject) -> Iterator[Finding]:
    """Without it, a network made here could pass there for one of its own. The engine makes no second volume of a name
    but hands out the first, so a volume's name has to say whose it is, unless it is random."""
    name, mine = str(field.value or ""), about.resource.stack
    owner = about.world.owner(name)
    if owner is not None and owner != about.own:
        yield Finding(
            repr(field.value),
            f"{owner.name} owns every name that begins with {owner.name}-: "
            f"made by {mine}, it would take {owner.name}'s place or be used by it",
            f"name it {mine}-…",
        )
    elif about.resource.type == VOLUME and name and not _unmistakable(name, about):
        yield Finding(
            repr(field.value),
            "the engine hands out one volume to everybody who asks for that name, in any environment",
            f"name it {mine}-…",
        )


def _unmistakable(name: str, about: Subject) -> bool:
    random = re.escape(about.resource.name) + RANDOM_SUFFIX
    return name.startswith(f"{about.resource.stack}-") or bool(re.fullmatch(random, name))


RANDOM_SUFFIX = "-[0-9a-f]{7}"
"""What Pulumi appends to a resource's name where the program gives none."""


@rule(
    id="own-subnet",
    title="networks take their addresses from their own environment's range",
    references=("dev to prod by address", "overlapping subnets"),
    reads={NETWORK: ()},
    tiers=EVERYWHERE,
)
def own_subnet(_field: Field, about: Subject) -> Iterator[Finding]:
    """IPv4 and IPv6, every pool. Left to the engine, it takes addresses that no firewall rule knows."""
    if about.one("ipamDriver") not in (None, "", "default"):
        yield Finding(
            repr(about.one("ipamDriver")),
            "another address driver hands out what it likes",
            "remove it, and write a subnet",
            at="ipamDriver",
        )
    written = [(path, str(value)) for path, value in about.resource.fields("ipamConfigs.subnet") if value]
    if any(value is UNKNOWN for _, value in about.resource.fields("ipamConfigs.subnet")):
        raise UndecidedError
    versions = set()
    for path, text in written:
        try:
            subnet = ip_network(text, strict=False)
        except ValueError:
            yield Finding(
                repr(text),
                "it is no subnet, so nobody knows whose addresses it takes",
                "write it as a.b.c.d/n",
                at=path,
            )
            continue
        versions.add(subnet.version)
        yield from _outside(subnet, path, about)
    wanted = {4} | ({6} if about.one("ipv6") else set())
    if about.own is None or (written and not versions):
        return
    for version in sorted(wanted - versions):
        yield Finding(
            f"no IPv{version} subnet",
            "the engine would choose addresses from its own pools, which are in no environment's range",
            f"write a subnet in {_range(about.own, version) or 'a subnet6 of the environment in the ledger'}",
            at="ipamConfigs",
        )


def _range(environment: Environment, version: int) -> IPv4Network | IPv6Network | None:
    return environment.subnet if version == 4 else environment.subnet6


def _inside(subnet: IPv4Network | IPv6Network, range_: IPv4Network | IPv6Network) -> bool:
    first, last = int(subnet.network_address), int(subnet.broadcast_address)
    return int(range_.network_address) <= first and last <= int(range_.broadcast_address)


def _outside(subnet: IPv4Network | IPv6Network, path: str, about: Subject) -> Iterator[Finding]:
    """What is wrong with a subnet: another environment's addresses, or ones outside its own environment's range."""
    for other in about.others:
        taken = _range(other, subnet.version)
        if taken is not None and subnet.overlaps(taken):
            yield Finding(
                repr(str(subnet)),
                f"it overlaps {taken} of {other.name}: firewall rules could not tell them apart",
                f"take a part of {_range(about.own, subnet.version)}"
                if about.own
                else "take addresses outside every environment's",
                at=path,
            )
            return
    own = _range(about.own, subnet.version) if about.own else None
    if about.own and (own is None or not _inside(subnet, own)):
        yield Finding(
            repr(str(subnet)),
            f"it is outside {own or 'every IPv6 range that the ledger gives'}: no firewall rule covers it",
            f"take a part of {own}" if own else f"give {about.own.name} a subnet6 in the ledger, and take a part of it",
            at=path,
        )


@rule(
    id="network-driver",
    title="networks are bridges of this host",
    references=("macvlan, ipvlan and overlay networks are reached from outside their bridge", "CIS 5.30"),
    reads={NETWORK: ("driver", "attachable", "ingress")},
    tiers=EVERYWHERE,
)
def network_driver(field: Field, _about: Subject) -> Iterator[Finding]:
    """macvlan and ipvlan share a parent interface with others; attachable overlays take in whoever asks."""
    if field.path == "driver":
        if field.value not in (None, "", "bridge"):
            yield Finding(
                repr(field.value),
                "such a network is no bridge of its own: others may share what is beneath it",
                "use the bridge driver",
            )
    elif field.value:
        yield Finding(
            "true",
            "containers from outside this stack can be attached to it",
            "remove it; it is meant for Swarm",
        )


@rule(
    id="network-options",
    title="networks have only options that keep them closed",
    references=("gateway modes routed and nat-unprotected", "trusted_host_interfaces", "reuse of a bridge"),
    reads={NETWORK: ("options.*",)},
    tiers=EVERYWHERE,
)
def network_options(field: Field, about: Subject) -> Iterator[Finding]:
    """A list of what is known to be harmless: an option that a later engine brings is refused until it is read."""
    name = field.path.removeprefix("options.")
    value = str(field.value)
    allowed = BRIDGE_OPTIONS.get(name)
    own_bridge = name == "com.docker.network.bridge.name" and value.startswith(f"{about.resource.stack}-")
    if not own_bridge and (allowed is None or not allowed.fullmatch(value)):
        yield Finding(
            f"{name.rpartition('.')[2]}={value}",
            "it can open the network's containers to other networks, or join another environment's bridge",
            f"remove it (a bridge's name begins with {about.resource.stack}-)",
        )


ANYTHING = re.compile(r".*")
BRIDGE_OPTIONS: Mapping[str, re.Pattern[str]] = {
    "com.docker.network.driver.mtu": ANYTHING,
    "com.docker.network.container_iface_prefix": ANYTHING,
    "com.docker.network.bridge.enable_icc": ANYTHING,
    "com.docker.network.bridge.enable_ip_masquerade": ANYTHING,
    "com.docker.network.bridge.gateway_mode_ipv4": re.compile("nat|isolated"),
    "com.docker.network.bridge.gateway_mode_ipv6": re.compile("nat|isolated"),
    "com.docker.network.bridge.host_binding_ipv4": re.compile(r"127\.[0-9.]+"),
}
"""Options of the bridge driver, and the values of each with which nobody else gets in."""


def _loopback(address: Any) -> bool:
    try:
        return ip_address(str(address)).is_loopback
    except ValueError:
        return False


def _public(field: Field) -> str:
    """The address that a port is published on, unless it is loopback; of `publishAllPorts`, what it means."""
    if field.path == "publishAllPorts":
        return "every port of the image" if field.value else ""
    return "" if _loopback(field.value) else repr(field.value or "all addresses")


@rule(
    id="public-ports",
    title="a best-effort environment publishes on loopback only",
    references=("CIS 5.14", "databases bound to all addresses"),
    reads={CONTAINER: ("ports.ip", "publishAllPorts")},
    tiers=BEST_EFFORT,
    exemptable=BEST_EFFORT,
)
def public_ports(field: Field, _about: Subject) -> Iterator[Finding]:
    """What dev publishes on all addresses, the internet reaches, past most host firewalls."""
    if public := _public(field):
        yield Finding(
            public,
            "whoever reaches the machine reaches it, past the host's own firewall",
            "publish it on 127.0.0.1 (and come through SSH: ssh -L)",
        )


@rule(
    id="gateway-ports",
    title="what a protected environment publishes is not reached from other environments",
    references=("CIS 5.14", "a published port is reachable through every gateway address of the host"),
    reads={CONTAINER: ("ports.ip", "publishAllPorts")},
    tiers=PROTECTED,
    exemptable=PROTECTED,
)
def gateway_ports(field: Field, about: Subject) -> Iterator[Finding]:
    """DOCKER-USER does not stop it; the host's own table does, and then the host stack says so (`firewall`)."""
    public = _public(field)
    if not public:
        return
    if about.world.promised is None:
        raise UndecidedError
    covered = about.world.promised.get("firewall")
    if not (isinstance(covered, Mapping) and about.resource.stack in (covered.get("environments") or ())):
        yield Finding(
            public,
            "containers of best-effort environments reach it through any gateway address of the host, and the host "
            "stack has no firewall table that stops them",
            "publish it on 127.0.0.1 behind the host's own proxy, or exempt it with a reason if all the world may "
            "reach it anyway",
        )


@rule(
    id="address-reach",
    title="containers are told no address of another environment or of the host",
    references=("extra_hosts naming prod or host-gateway", "dev to prod by address"),
    reads={
        CONTAINER: (
            "hosts.ip",
            "hosts.host",
            "dns",
            "networksAdvanced.ipv4Address",
            "networksAdvanced.ipv6Address",
        ),
        IMAGE: ("build.extraHosts",),
    },
    tiers=EVERYWHERE,
)
def address_reach(field: Field, about: Subject) -> Iterator[Finding]:
    """Nothing needs another environment's address but who wants to reach it."""
    if not field.value:
        return
    text = str(field.value)
    address = text.replace("=", ":", 1).partition(":")[2]  # `db:10.81.0.3`, as builds have it
    for word in (text, address):
        other = _owner_of(word.strip("[]"), about)
        whose = other or "the host itself, and what every environment publishes there"
        if word == "host-gateway" or (other and about.own is not None):
            yield Finding(
                repr(text),
                f"it leads out of {about.resource.stack}, to {whose}",
                "remove it; services of one environment find each other by their names",
            )
            return


def _owner_of(word: str, about: Subject) -> str:
    """The other environment that an address or a host's name belongs to."""
    try:
        address = ip_address(word)
    except ValueError:
        owner = about.world.owner(word)
        return owner.name if owner and owner != about.own else ""
    for other in about.others:
        taken = _range(other, address.version)
        if taken is not None and address in taken:
            return other.name
    return ""


def naming(text: Any, about: Subject) -> str:
    """The protected environment, other than its own, that a path, an image or a user is named after."""
    words = re.split(r"[^a-z0-9-]+", str(text).lower())
    for word in words:
        owner = about.world.owner(f"{word}-")
        if owner and owner != about.own and owner.tier is Tier.PROTECTED:
            return owner.name
    return ""


@rule(
    id="image-owner",
    title="images, tags and build caches are no other environment's",
    references=(
        "an image built as prod's is run by prod",
        "FROM bulkhead/prod-api reads prod's files",
        "a tag postgres:15 of dev's is what prod's next build begins with",
        "prod's build cache",
    ),
    reads={
        IMAGE: ("name", "build.tags", "build.cacheFroms", "build.cacheTos"),
        BUILT: ("build.images",),
        TAG: ("targetImage", "sourceImage"),
        PUSHED: ("name",),
        CONTAINER: ("image",),
    },
    links={"image": {IMAGE: "{}"}},
    tiers=EVERYWHERE,
)
def image_owner(field: Field, about: Subject) -> Iterator[Finding]:
    """`bulkhead/prod-api:…` is prod's: built or tagged by dev, prod would run it; run or built upon, dev would read it.

    An id tells nobody whose it is: a container runs that of an image of its own stack.
    """
    if about.own is None:
        return
    written = str(field.value or "")
    text = written.partition("@")[0]
    if about.resource.type == CONTAINER and IMAGE_ID.fullmatch(written) and _made_here(written, about.whole()):
        return
    for part in re.split(r"[/,=\s]", text):
        owner = about.world.owner(part.partition(":")[0] + "-")
        ours = text.startswith(LOCAL_IMAGES) or (owner is not None and owner.tier is Tier.PROTECTED)
        if owner and owner != about.own and ours:
            yield Finding(
                repr(text),
                f"images and caches of that name are {owner.name}'s: written, {owner.name} would run what was built "
                "here; read, its files are open",
                f"name it {about.resource.stack}-…",
            )
            return
    if IMAGE_ID.fullmatch(written):
        yield Finding(
            repr(text),
            "an id may be of another environment's image, and no image of this stack has it",
            "name the image, or give the container the output of a RemoteImage of this stack",
        )
    elif (
        field.path == "targetImage"
        and about.tier == Tier.BEST_EFFORT
        and about.world.owner(text.rpartition("/")[2]) != about.own
    ):
        yield Finding(
            repr(text),
            "whoever names that image next, in a Dockerfile of prod's too, gets what was tagged here",
            f"name it {about.resource.stack}-…",
        )


def _made_here(image: str, stack: Graph) -> bool:
    return any(stack.puts_out(one, "imageId") == image for one in stack.of(IMAGE))


@rule(
    id="build-reach",
    title="builds of a best-effort environment reach neither the engine's network nor another's cache",
    references=(
        "ADD http://169.254.169.254 is fetched by the engine, past every firewall rule",
        "a proxy is in no cache key: what it put into a layer, prod's build takes",
    ),
    reads={BUILT: ("build.fetches", "build.buildArgs.*"), IMAGE: ("build.context",)},
    tiers=BEST_EFFORT,
)
def build_reach(field: Field, about: Subject) -> Iterator[Finding]:
    """What RUN does, happens on the engine's default bridge and under the firewall; what the builder does, does not."""
    if about.resource.type == IMAGE:
        yield Finding(
            "built by the provider",
            "what its Dockerfile makes the engine fetch is not known here",
            "build it with components.image (build in Compose)",
        )
    elif field.path.startswith("build.buildArgs."):
        name = field.path.removeprefix("build.buildArgs.")
        if PREDEFINED.fullmatch(name):
            yield Finding(
                name,
                "it changes what a build fetches or where it caches, and not the cache's key: prod's builds would take "
                "what was made with it",
                "remove it; a proxy of the engine's own is set in its config.json",
            )
    elif field.value is None:
        yield Finding("not set", "what its Dockerfile makes the engine fetch is not known", "build it with Compose")
    else:
        yield Finding(
            repr(field.value),
            "the engine fetches it itself, from the host's own network: metadata, the host's and every environment's "
            "ports",
            "write a name without variables, or fetch it with RUN, which the firewall sees; with Docker's own frontend",
        )


PREDEFINED = re.compile(r"BUILDKIT_\w+|(?:HTTPS?|FTP|NO|ALL)_PROXY", re.IGNORECASE)
"""Build arguments that BuildKit reads itself (docs.docker.com, "Dockerfile reference", Predefined ARGs)."""


@rule(
    id="foreign-files",
    title="no file or credential of a protected environment is used elsewhere",
    references=("prod's secrets and configs", "a registry or build cache credential of prod in dev"),
    reads={
        ENVIRONMENT: ("reads.*.path", "reads.*.owner"),
        CONTAINER: ("uploads.source",),
        IMAGE: (
            "build.context",
            "build.additionalContexts",
            "build.secrets.src",
            "build.authConfigs.userName",
            "build.authConfigs.hostName",
            "build.authConfigs.serverAddress",
        ),
        BUILT: ("build.context",),
        PROVIDER: ("registryAuth.address", "registryAuth.username", "registryAuth.configFile"),
    },
    tiers=EVERYWHERE,
    options={
        "folders": listed(
            ["/srv/{environment}"],
            "Folders outside the checkout from which a best-effort environment's Compose files may take files.",
        )
    },
)
def foreign_files(field: Field, about: Subject) -> Iterator[Finding]:
    """Told by the name (`secrets/prod/key`, `prod-deploy`), and for files of a Compose file by what the protected
    environments name as theirs; what is outside the checkout may be anybody's. The value itself is not shown."""
    if field.path.startswith("reads.") and about.own is not None:
        yield from _read_by_compose(field, about)
        return
    owner = naming(field.value, about) if field.value and about.own is not None else ""
    if owner:
        yield Finding(
            f"named after {owner}",
            f"with {owner}'s files or credentials this environment can do what only {owner} may",
            f"give {about.resource.stack} files and credentials of its own",
        )


def _read_by_compose(field: Field, about: Subject) -> Iterator[Finding]:
    path, mine = str(field.value or ""), about.resource.stack
    own_file = f"give {mine} a file of its own in the checkout, or a secret under bulkhead:secrets"
    if field.path.endswith(".owner"):
        if path and path != mine:
            yield _of_another(path, field.path.removeprefix("reads.").removesuffix(".owner"), own_file, about)
    elif owner := naming(path, about):
        yield Finding(f"named after {owner}", f"what is {owner}'s would be in {mine}", own_file)
    elif about.tier == Tier.BEST_EFFORT and not _free(path, about):
        yield Finding(
            "outside the checkout" if path.startswith("/") else "a path with a variable in it",
            "whose it is cannot be told from here, and the deployer may read prod's",
            own_file + ", or list its folder in the option folders of this rule",
        )


def _of_another(owner: str, key: str, own_file: str, about: Subject) -> Finding:
    mine, why = about.resource.stack, about.resource.props["reads"].get(key, {}).get("unreadable")
    if key.endswith("build.context"):
        own_file = "leave it out in .dockerignore by its plain path (secrets, not **/secrets), or build another folder"
    consequence = f"deployed by somebody who may read it, {mine} would have it too"
    if why:
        found = f"it may be a secret of {owner}, whose Compose files cannot be read here ({why})"
        return Finding(found, consequence, f"make them readable, or {own_file}")
    elsewhere = f"what only {owner} needs belongs into a Compose file that {mine} does not name"
    return Finding(f"a secret of {owner}", consequence, f"{own_file}; {elsewhere}")


def _free(path: str, about: Subject) -> bool:
    allowed = (within(path, about.folder(one)) for one in about.options["folders"])
    return "$" not in path and (not path.startswith("/") or any(allowed))


@rule(
    id="refresh-masked",
    title="a copy of real data is masked, and goes to best-effort environments only",
    references=("customers' data in dev",),
    reads={DECLARED: ("refresh.mask",)},
)
def refresh_masked(field: Field, about: Subject) -> Iterator[Finding]:
    """`make refresh-dev` puts a copy of a protected environment's data into a volume that says so with `x-bulkhead:
    {refresh: …}`; its `mask` is SQL that takes out of the copy what nobody in dev may see."""
    if about.tier == Tier.PROTECTED:
        yield Finding(
            "refresh is set",
            "it would put another environment's data in place of this one's",
            "remove it: data of a protected environment comes back with make restore",
        )
    elif not field.value:
        yield Finding(
            "no mask",
            f"everybody who may look into {about.resource.stack} would see real customers",
            "name a file of SQL; one that has nothing to take out says so in a comment",
        )


@rule(
    id="stack-reference",
    title="an environment reads the outputs of the host's stack only",
    references=("prod's outputs, and the secrets in them",),
    reads={STACK: ()},
)
def stack_reference(_field: Field, about: Subject) -> Iterator[Finding]:
    """Outputs of prod are addresses, names and perhaps secrets of prod. The engine shows a reference only where
    something is made from it, and of it only the name that the program gives it."""
    for urn, name in about.whole().made_from(REFERENCE):
        if name.rpartition("/")[2] != HOST:
            yield Finding(
                f"{urn.rpartition('::')[2]} is made from StackReference {name!r}",
                "what that stack puts out, its secrets too, becomes part of this one",
                "read the host stack only; what two environments share goes into the ledger",
            )

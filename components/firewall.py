"""Firewall: Bulkhead's own nftables table, made from the ledger: what one environment's packets may be sent to.

`ruleset` is the whole of it, as text for `nft -f`. It touches no other table, and the engine's own rules not at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network

import pulumi

from components.host_command import HostCommand, HostCommandArgs
from settings.ledger import INTERNET, NO_EGRESS, Environment, Tier

TABLE = "bulkhead"
FILE = "/etc/bulkhead/firewall.nft"
UNIT = "bulkhead-firewall.service"
UNITS = "/etc/systemd/system"

# Not the internet: RFC 1918, RFC 6598 (carrier NAT), RFC 2544, multicast and reserved; unique local and multicast.
PRIVATE4 = ("10.0.0.0/8", "100.64.0.0/10", "172.16.0.0/12", "192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/3")
PRIVATE6 = ("fc00::/7", "ff00::/8")
# RFC 3927 and RFC 4291. Clouds serve a machine's own credentials there (169.254.169.254).
LINK_LOCAL4, LINK_LOCAL6 = "169.254.0.0/16", "fe80::/10"
# Azure's and, once, Oracle's: neither private nor link-local (learn.microsoft.com, "What is IP address 168.63.129.16").
METADATA4 = "{ 168.63.129.16, 192.0.0.0/24 }"
# Without these IPv6 finds no neighbour. Routers and redirects are not among them: a container is no router.
NEIGHBOURS = "{ nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit, mld-listener-report, mld2-listener-report }"
# Bridges that the engine names itself, and its default one, where builds run. Not every bridge (`meta iifkind`): a
# host's way to the internet may be one, and its router and DHCPv6 server speak from link-local addresses.
BRIDGES, DEFAULT_BRIDGE = '"br-*"', '"docker0"'
INTERFACE_NAME = 15  # bytes at most: the kernel's IFNAMSIZ, of which the last is 0
# How many connections the kernel tracks by default, with 1 to 4 GB of memory and with more (nf_conntrack_init_start).
# Of a larger table no more is given: `ct count` walks all that it counts for each new one, 0.1 µs each (measured).
CONNECTIONS, CONNECTIONS_AT_MOST = 65_536, 262_144


@dataclass(frozen=True)
class FirewallArgs:
    """The environments of the ledger. `connections`: how many the host's kernel tracks at most, None where it tracks
    none yet. `host`: the engine's address.

    `boot`: an id of the host's current boot, where no service manager loads the table again after a reboot:
    the next `pulumi up` then does.
    """

    environments: Sequence[Environment]
    connections: int | None
    host: str | None = None
    boot: str = ""


class Firewall(pulumi.ComponentResource):
    """The table on the host. `environments` are those that it keeps apart, known once it is loaded."""

    environments: pulumi.Output[list[str]]

    def __init__(self, name: str, args: FirewallArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("bulkhead:index:Firewall", name, None, opts)
        names = sorted(environment.name for environment in args.environments)
        create, delete = scripts(ruleset(args.environments, args.connections or CONNECTIONS))
        command = HostCommand(
            f"{name}-table",
            HostCommandArgs(
                host=args.host,
                create=create,
                delete=delete,
                environment={"BOOT_ID": args.boot} if args.boot else {},
            ),
            opts=pulumi.ResourceOptions(parent=self),
        )
        self.environments = command.stdout.apply(lambda _: names)
        self.register_outputs({"environments": self.environments})


def ruleset(environments: Sequence[Environment], connections: int = CONNECTIONS) -> str:
    """The table as `nft -f` reads it, replaced as one: there is no moment without it.

    Packets are judged after connection tracking, so that answers pass, and before the engine rewrites the addresses
    of published ports: what a container sends to a gateway address of the host is still addressed to the host.
    `@RESOLVERS4@` and `@RESOLVERS6@` stand for the host's own name servers, which only the host knows.
    """
    everyone = sorted(environments, key=lambda one: one.name)
    best_effort = [one for one in everyone if one.tier is not Tier.PROTECTED]
    counted = [*(one.name for one in best_effort), "default_bridge", "link_local"]
    share = min(connections, CONNECTIONS_AT_MOST) // 2 // len(counted)
    bridges = [BRIDGES, *(_named(one) for one in best_effort if len(one.name) < INTERFACE_NAME)]
    return "\n".join(
        [
            "# Written by Bulkhead from the ledger; replaced by the next deploy.",
            f"add table inet {TABLE}",
            f"delete table inet {TABLE}",
            f"table inet {TABLE} {{",
            *_set("environments4", "ipv4_addr", [str(one.subnet) for one in everyone]),
            *_set("environments6", "ipv6_addr", [str(one.subnet6) for one in everyone if one.subnet6]),
            *_set("private4", "ipv4_addr", PRIVATE4),
            *_set("private6", "ipv6_addr", PRIVATE6),
            "  set resolvers4 { type ipv4_addr; @RESOLVERS4@ }",
            "  set resolvers6 { type ipv6_addr; @RESOLVERS6@ }",
            "",
            "  chain within {",
            '    comment "between services of one environment nothing is tracked, so nothing holds it up"',
            "    type filter hook prerouting priority raw; policy accept;",
            *(line for one in best_effort for line in _untracked(one)),
            "  }",
            "",
            "  chain sent {",
            "    type filter hook prerouting priority mangle; policy accept;",
            "    ct direction reply accept",
            f"    icmpv6 type {NEIGHBOURS} accept",
            *_spoofed(bridges),
            *(line for one in everyone for line in _jump(one, f"from_{one.name}")),
            f'    iifname {DEFAULT_BRIDGE} jump from_default_bridge comment "builds, and containers of no network"',
            f"    ip daddr @environments4 {_drop('to an environment from outside')}",
            f"    ip6 daddr @environments6 {_drop('to an environment from outside')}",
            f"    iifname {DEFAULT_BRIDGE} goto {_tracked('default_bridge')}",
            *(f"    iifname {one} ip6 saddr {LINK_LOCAL6} goto {_tracked('link_local')}" for one in bridges),
            "  }",
            "",
            "  chain passed_on {",
            '    comment "once more, with the addresses that the engine has put in for published ports"',
            "    type filter hook forward priority filter - 1; policy accept;",
            "    ct direction reply accept",
            *(line for one in everyone for line in _jump(one, f"others_of_{one.name}")),
            "  }",
            "",
            "  chain arrived {",
            '    comment "what else would reach the host itself: multicast, link-local IPv6"',
            "    type filter hook input priority filter - 1; policy accept;",
            "    ct direction reply accept",
            f"    icmpv6 type {NEIGHBOURS} accept",
            *(line for one in best_effort for line in _sent_by(one, _drop(f"from {one.name} to the host"))),
            f"    iifname {DEFAULT_BRIDGE} {_drop('from builds to the host')}",
            *(f"    iifname {one} ip6 saddr {LINK_LOCAL6} {_drop('link-local IPv6 to the host')}" for one in bridges),
            "  }",
            *(line for one in everyone for line in (*_others(one), *_from(one))),
            "",
            "  chain from_default_bridge {",
            *_resolvers(f"goto {_tracked('default_bridge')}"),
            f"    fib daddr type local {_drop('to the host')}",
            *_metadata(),
            "  }",
            *(line for name in counted for line in _counted(name, share)),
            "}",
            "",
        ]
    )


def _set(name: str, kind: str, elements: Sequence[str]) -> list[str]:
    inside = f"elements = {{ {', '.join(elements)} }}; " if elements else ""
    return [f"  set {name} {{ type {kind}; flags interval; {inside}}}"]


def _named(one: Environment) -> str:
    """Bridges that an environment names itself: by policy (network-options) with its own name at the beginning."""
    return f'"{f"{one.name}-*"[:INTERFACE_NAME]}"'


def _spoofed(bridges: Sequence[str]) -> list[str]:
    """A sender that the host would not answer through the same bridge is not who it says it is."""
    whose = ["ip saddr @environments4", "ip6 saddr @environments6", *(f"iifname {one}" for one in bridges)]
    return [f"    {one} fib saddr . iif oif missing {_drop('forged sender')}" for one in whose]


def _jump(one: Environment, chain: str) -> list[str]:
    return _sent_by(one, f"jump {chain}")


def _ranges(one: Environment) -> list[tuple[str, IPv4Network | IPv6Network]]:
    """An environment's ranges, by nft's word for their family."""
    return [(family, range_) for family, range_ in (("ip", one.subnet), ("ip6", one.subnet6)) if range_]


def _sent_by(one: Environment, verdict: str) -> list[str]:
    return [f"    {family} saddr {range_} {verdict}" for family, range_ in _ranges(one)]


def _to(one: Environment, verdict: str) -> list[str]:
    return [f"    {family} daddr {range_} {verdict}" for family, range_ in _ranges(one)]


def _untracked(one: Environment) -> list[str]:
    """Where the kernel filters bridged packets, it tracks them too, and a load test in dev would use up its share. What
    goes to the host is left out: those are answers, of published ports for example, that `sent` must know as such."""
    return [
        f"    {family} saddr {range_} {family} daddr {range_} fib daddr type unicast notrack"
        for family, range_ in _ranges(one)
    ]


def _drop(what: str) -> str:
    return f'counter drop comment "{what}"'


def _resolvers(verdict: str) -> list[str]:
    return [
        f"    {family} daddr @resolvers{version} meta l4proto {{ tcp, udp }} th dport 53 {verdict}"
        for family, version in (("ip", 4), ("ip6", 6))
    ]


def _others(one: Environment) -> list[str]:
    """To other environments: never, whatever the tier."""
    return [
        "",
        f"  chain others_of_{one.name} {{",
        *_to(one, "accept"),
        f"    ip daddr @environments4 {_drop('to another environment')}",
        f"    ip6 daddr @environments6 {_drop('to another environment')}",
        "  }",
    ]


def _from(one: Environment) -> list[str]:
    """All that an environment sends: first whom it may never reach, then what its egress says."""
    never, passes = [f"    jump others_of_{one.name}"], "accept"
    if one.tier is not Tier.PROTECTED:
        passes = f"goto {_tracked(one.name)}"
        # Before the rest: a gateway address of its own networks is an address of the host.
        never = [f"    fib daddr type local {_drop('to the host')}", *_to(one, passes), *never]
    # Within a bridge these pass here too, where the kernel filters bridged packets; the host's own ear is `arrived`.
    within = f"    fib daddr type {{ broadcast, multicast }} {passes}"
    return ["", f"  chain from_{one.name} {{", *never, within, *_egress(one, passes), "  }"]


def _egress(one: Environment, passes: str) -> list[str]:
    if one.egress is None:
        return [f"    {passes}"]
    local = _metadata()
    # Its own name servers are all that a container needs of a private network to find what it may reach.
    names = _resolvers(passes) if one.egress != (NO_EGRESS,) else []
    listed = [
        f"    {'ip6' if isinstance(to, IPv6Network) else 'ip'} daddr {to} {passes}"
        for to in one.egress
        if isinstance(to, IPv4Network | IPv6Network)
    ]
    if INTERNET not in one.egress:
        return [*names, *local, *listed, f"    {_drop('egress')}"]
    return [
        *names,
        *local,
        *listed,
        f"    ip daddr @private4 {_drop('to private networks')}",
        f"    ip6 daddr @private6 {_drop('to private networks')}",
        f"    {passes}",
    ]


def _metadata() -> list[str]:
    """Where clouds serve a machine's own credentials and settings, and all else that is link-local."""
    return [
        f"    ip daddr {LINK_LOCAL4} {_drop('to link-local addresses')}",
        f"    ip daddr {METADATA4} {_drop('to metadata addresses')}",
        f"    ip6 daddr {LINK_LOCAL6} {_drop('to link-local addresses')}",
    ]


def _tracked(name: str) -> str:
    return f"tracked_of_{name}"


def _counted(name: str, share: int) -> list[str]:
    """What is accepted, within a share of the one table of connections that all of the host is tracked in.

    `ct count` leaves out TCP connections that are closed, which stay in the table for 120 s more
    (nf_conntrack_tcp_timeout_time_wait), and for a moment counts what is dropped here. So there is a rate too, and it
    comes first. Together they are at most share/16 open + share/8 at once + 120 s of share/160, below the share.
    """
    rate = f"limit rate over {max(1, share // 160)}/second burst {max(1, share // 8)} packets"
    return [
        "",
        f"  chain {_tracked(name)} {{",
        "    ct status confirmed accept",
        f"    ct state new {rate} {_drop('too many new connections')}",
        f"    ct state new ct count over {max(1, share // 16)} {_drop('too many open connections')}",
        "    accept",
        "  }",
    ]


def scripts(table: str) -> tuple[str, str]:
    """The create and delete scripts. The table is checked before it is put in force, and loaded as one."""
    create = (
        "command -v nft >/dev/null || { echo 'nftables is not installed: apt-get install nftables' >&2; exit 1; }\n"
        f"mkdir -p {FILE.rpartition('/')[0]}\n"
        # systemd-resolved writes its loopback address into the first file, and the real ones into the second.
        "resolvers() {\n"
        "  cat /etc/resolv.conf /run/systemd/resolve/resolv.conf 2>/dev/null |\n"
        '    awk -v six="$1" \'$1 == "nameserver" && (index($2, ":") > 0) == six && $2 !~ /^127\\.|^::1$|%/ '
        "{ print $2 }' |\n"
        "    sort -u | paste -sd, - | sed 's/..*/elements = { & };/'\n"
        "}\n"
        f"cat > {FILE}.new <<'TABLE'\n{table}TABLE\n"
        'sed -i -e "s/@RESOLVERS4@/$(resolvers 0)/" -e "s/@RESOLVERS6@/$(resolvers 1)/" ' + f"{FILE}.new\n"
        f"nft --check --file {FILE}.new || {{\n"
        "  echo 'nft refuses the table, so what was in force before stays. If the kernel does not know something that"
        " is underlined above: modprobe -a nft_connlimit nft_fib_inet nft_limit nft_ct' >&2\n"
        "  exit 1\n}\n"
        f"mv {FILE}.new {FILE}\n"
    )
    create += (
        "if [ -d /run/systemd/system ]; then\n"
        f"cat > {UNITS}/{UNIT} <<'UNIT'\n{unit()}UNIT\n"
        f"systemctl daemon-reload\nsystemctl enable --quiet {UNIT}\nsystemctl restart {UNIT}\n"
        f"else\nnft --file {FILE}\nfi\n"
    )
    delete = (
        f"if [ -e {UNITS}/{UNIT} ]; then\n  systemctl disable --quiet --now {UNIT}\n  rm -f {UNITS}/{UNIT}\n"
        "  systemctl daemon-reload\nfi\n"
        f"if nft list table inet {TABLE} >/dev/null 2>&1; then nft delete table inet {TABLE}; fi\nrm -f {FILE}\n"
        # Whoever removes the last of the host's files removes their folder.
        f"rmdir --ignore-fail-on-non-empty {FILE.rpartition('/')[0]} 2>/dev/null || true\n"
    )
    return create, delete


def unit() -> str:
    """The systemd unit: in force before the engine starts its first container, and again when nftables is reloaded."""
    return (
        "[Unit]\nDescription=Bulkhead: firewall between environments\nDefaultDependencies=no\n"
        # `nftables.service` flushes every table when it is restarted or reloaded.
        "After=local-fs.target nftables.service\nPartOf=nftables.service\nReloadPropagatedFrom=nftables.service\n"
        "Before=network-pre.target docker.service\nWants=network-pre.target\nConflicts=shutdown.target\n"
        "Before=shutdown.target\n"
        f"[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/usr/sbin/nft --file {FILE}\n"
        f"ExecReload=/usr/sbin/nft --file {FILE}\n"
        "[Install]\nWantedBy=docker.service sysinit.target\n"
    )

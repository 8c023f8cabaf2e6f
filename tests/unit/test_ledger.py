"""The ledger: what is written becomes absolute amounts, and a promise that the machine cannot keep is refused.
One case per behaviour: the changed line of a valid ledger, and the exact message or amount."""

import itertools
from datetime import date
from decimal import Decimal
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from settings.errors import SettingsError
from settings.ledger import (
    DEFAULT_IO,
    DEFAULT_PIDS,
    RESOURCES,
    Budget,
    Capacity,
    Ledger,
    LedgerSettings,
    Tier,
    promise,
    slice_name,
)
from settings.units import NANO, UNITS, Percent, format_bytes, parse_bytes, parse_cpus, parse_percent

GiB = 2**30
MACHINE = {"cpus": 12, "memory": 16 * GiB, "disk": 10**12}
VALID = """\
config:
  bulkhead:capacity: {}
  bulkhead:system: {cpus: 5%, memory: 10%}
  bulkhead:environments:
    prod: {tier: protected, subnet: 10.81.0.0/16, reservations: {cpus: 60%, memory: 50%}}
    dev: {tier: best-effort, subnet: 10.82.0.0/16, limits: {cpus: 100%, memory: 30%, pids: 512}}
"""
PROD = "    prod: {tier: protected, subnet: 10.81.0.0/16, reservations: {cpus: 60%, memory: 50%}}\n"
DEV = "    dev: {tier: best-effort, subnet: 10.82.0.0/16, limits: {cpus: 100%, memory: 30%, pids: 512}}\n"


def settings(text: str, folder: Path) -> LedgerSettings:
    path = folder / "Pulumi.host.yaml"
    path.write_text(text, encoding="utf-8")
    return LedgerSettings.read(path)


def ledger(text: str, folder: Path) -> Ledger:
    return settings(text, folder).resolve(MACHINE)


def test_percentages_become_amounts_of_the_asked_capacity(tmp_path: Path) -> None:
    resolved = ledger(VALID, tmp_path)
    assert resolved.capacity == Capacity(cpus=12.0, memory=16 * GiB, disk=10**12)
    assert resolved.system == Budget(cpus=0.6, memory=16 * GiB // 10)
    assert resolved.environment("prod").reservations == Budget(cpus=7.2, memory=8 * GiB)
    assert resolved.environment("prod").limits is None
    assert resolved.environment("dev").limits == Budget(cpus=12.0, memory=16 * GiB * 3 // 10, pids=512, io=0.5)
    assert resolved.environment("dev").reservations is None
    assert resolved.host is None


def test_the_hosts_outward_addresses_are_tried_only_where_it_is_written(tmp_path: Path) -> None:
    assert not ledger(VALID, tmp_path).outward
    assert ledger(f"{VALID}  bulkhead:outward: true\n", tmp_path).outward


def test_declared_capacity_is_not_asked_for(tmp_path: Path) -> None:
    written = settings(VALID.replace("capacity: {}", "capacity: {cpus: 2.5, memory: 4GiB}"), tmp_path)
    assert written.missing_capacity == {"disk"}
    resolved = written.resolve({"cpus": 99, "memory": 99, "disk": 5})
    assert resolved.capacity == Capacity(cpus=2.5, memory=4 * GiB, disk=5)
    assert resolved.environment("prod").reservations == Budget(cpus=1.5, memory=2 * GiB)


def test_absolute_and_relative_amounts_mix(tmp_path: Path) -> None:
    resolved = ledger(VALID.replace("cpus: 60%, memory: 50%", "cpus: 1.5, memory: 512 MB, disk: 10%"), tmp_path)
    assert resolved.environment("prod").reservations == Budget(cpus=1.5, memory=512_000_000, disk=10**11)


def test_promises_of_exactly_the_whole_machine_fit(tmp_path: Path) -> None:
    rows = {row.resource: row for row in ledger(VALID.replace("memory: 50%", "memory: 60%"), tmp_path).rows()}
    assert rows["memory"].free <= 2  # bytes lost to rounding down


def test_a_best_effort_environment_without_pids_gets_the_default_ceiling(tmp_path: Path) -> None:
    limits = ledger(VALID.replace(", pids: 512", ""), tmp_path).environment("dev").limits
    assert limits is not None
    assert limits.pids == DEFAULT_PIDS


def test_a_best_effort_environment_gets_half_of_the_disks_speed_or_what_is_written(tmp_path: Path) -> None:
    written = ledger(VALID.replace("pids: 512", "pids: 512, io: 12.5%"), tmp_path).environment("dev").limits
    default = ledger(VALID, tmp_path).environment("dev").limits
    assert written is not None
    assert default is not None
    assert (written.io, default.io) == (0.125, DEFAULT_IO)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("none", ("none",)),
        ("internet", ("internet",)),
        ("[internet]", ("internet",)),
        ("null", ("internet",)),
        ("192.168.5.0/24", (IPv4Network("192.168.5.0/24"),)),
        (
            '[internet, 192.168.5.0/24, "fd00:5::/64"]',
            ("internet", IPv4Network("192.168.5.0/24"), IPv6Network("fd00:5::/64")),
        ),
    ],
)
def test_egress_is_a_word_or_networks(tmp_path: Path, written: str, meant: tuple[object, ...]) -> None:
    resolved = ledger(VALID.replace("pids: 512}", f"pids: 512}}, egress: {written}"), tmp_path)
    assert resolved.environment("dev").egress == meant


def test_without_egress_best_effort_has_the_internet_and_a_protected_environment_is_not_closed(tmp_path: Path) -> None:
    resolved = ledger(VALID, tmp_path)
    assert resolved.environment("dev").egress == ("internet",)
    assert resolved.environment("prod").egress is None
    closed = ledger(VALID.replace("memory: 50%}}", "memory: 50%}, egress: none}"), tmp_path)
    assert closed.environment("prod").egress == ("none",)


def test_cpu_limits_of_best_effort_environments_promise_nothing(tmp_path: Path) -> None:
    (cpus, memory, disk) = ledger(VALID, tmp_path).rows()
    assert cpus.promised == {"prod": 7.2, "dev": 0.0}
    assert cpus.free == 4.2
    assert memory.promised == {"prod": 8 * GiB, "dev": 16 * GiB * 3 // 10}
    assert disk.promised == {"prod": 0, "dev": 0}


def test_a_protected_limit_above_its_reservation_counts_as_promised(tmp_path: Path) -> None:
    text = VALID.replace("memory: 50%}}", "memory: 50%}, limits: {memory: 55%}}")
    assert ledger(text, tmp_path).rows()[1].promised["prod"] == 16 * GiB * 55 // 100


def test_any_further_environment_can_be_named(tmp_path: Path) -> None:
    staging = "    staging: {tier: best-effort, subnet: 192.168.4.0/24, limits: {memory: 5%}}\n"
    assert ledger(VALID + staging, tmp_path).environment("staging").tier is Tier.BEST_EFFORT


def test_keys_of_other_namespaces_are_left_alone(tmp_path: Path) -> None:
    assert ledger(VALID + '  pulumi:disable-default-providers: ["*"]\n', tmp_path)


def test_the_order_of_environments_makes_no_difference(tmp_path: Path) -> None:
    one = ledger(VALID, tmp_path)
    other = ledger(VALID.replace(PROD + DEV, DEV + PROD), tmp_path)
    assert one == other


def test_an_unknown_environment_is_named_with_the_known_ones(tmp_path: Path) -> None:
    for known in (ledger(VALID, tmp_path), settings(VALID, tmp_path)):
        with pytest.raises(SettingsError) as refused:
            known.environment("prd")
        assert str(refused.value) == (
            "Pulumi.host.yaml: bulkhead:environments: 'prd': no such environment in the ledger. "
            "Add it with a tier and a subnet. Did you mean 'prod'?"
        )


def test_capacity_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as refused:
        settings(VALID, tmp_path).resolve({"cpus": 2, "memory": 0})
    assert str(refused.value) == (
        "Pulumi.host.yaml:2: bulkhead:capacity: {}: disk and memory not declared, and the engine did not say. "
        "Start the engine, or declare it, as in {cpus: 12, memory: 16GiB, disk: 1TB}."
    )


ENVIRONMENTS = "bulkhead:environments"
SIZE = "Use one of B, kB, MB, GB, TB, KB, KiB, MiB, GiB, TiB, or plain bytes."
REFUSED = {
    "broken YAML": (
        ("30%, pids: 512}}", "30%, pids: 512}"),
        "Pulumi.host.yaml:7: not valid YAML: did not find expected ',' or '}'. "
        "Correct the line (indentation, quotes and brackets are the usual causes).",
    ),
    "a key written twice": (
        ("memory: 10%}", "memory: 10%, memory: 20%}"),
        "Pulumi.host.yaml:3: memory: written twice in the same mapping. Keep one: YAML would silently take the last.",
    ),
    "an unknown setting": (
        ("bulkhead:system", "bulkhead:sytem"),
        "Pulumi.host.yaml:3: bulkhead:sytem: unknown key. Did you mean 'bulkhead:system'?",
    ),
    "an unknown key of an environment": (
        ("limits:", "limit:"),
        f"Pulumi.host.yaml:6: {ENVIRONMENTS}.dev.limit: unknown key. Did you mean 'limits'?",
    ),
    "an unknown resource": (
        ("pids:", "pid:"),
        f"Pulumi.host.yaml:6: {ENVIRONMENTS}.dev.limits.pid: unknown key. Did you mean 'pids'?",
    ),
    "a ceiling among reservations": (
        ("memory: 50%}", "memory: 50%, pids: 5}"),
        f"Pulumi.host.yaml:5: {ENVIRONMENTS}.prod.reservations.pids: unknown key. Known: cpus, disk, memory.",
    ),
    "a unit that does not exist": (
        ("memory: 50%", "memory: 12XB"),
        f"Pulumi.host.yaml:5: {ENVIRONMENTS}.prod.reservations.memory: '12XB': unknown unit 'XB'. {SIZE}",
    ),
    "a size that is none": (
        ("memory: 50%", "memory: much"),
        f"Pulumi.host.yaml:5: {ENVIRONMENTS}.prod.reservations.memory: 'much': not a size. "
        "Write a number with a unit, such as 512MiB, 16GiB or 1TB.",
    ),
    "CPUs that are none": (
        ("cpus: 60%", "cpus: many"),
        f"Pulumi.host.yaml:5: {ENVIRONMENTS}.prod.reservations.cpus: 'many': not a number of CPUs. "
        "Write a decimal such as 12 or 0.5.",
    ),
    "limits that are no mapping": (
        ("limits: {cpus: 100%, memory: 30%, pids: 512}", "limits: 30%"),
        f"Pulumi.host.yaml:6: {ENVIRONMENTS}.dev.limits: '30%': not a mapping. Write {{key: value}}.",
    ),
    "pids that are no number": (
        ("pids: 512", "pids: many"),
        f"Pulumi.host.yaml:6: {ENVIRONMENTS}.dev.limits.pids: 'many': not a whole number. Write digits only.",
    ),
    "a speed that is no share": (
        ("pids: 512", "io: 10MB"),
        f"Pulumi.host.yaml:6: {ENVIRONMENTS}.dev.limits.io: '10MB': not a share of the disk's speed. "
        "Write a percentage such as 50%.",
    ),
    "a protected environment with a ceiling on IO": (
        ("memory: 50%}", "memory: 50%}, limits: {io: 50%}"),
        f"Pulumi.host.yaml:5: {ENVIRONMENTS}.prod: a protected environment's reads and writes have no ceiling. "
        "Remove limits.io, or lower that of the best-effort environments.",
    ),
    "variables that are no list of names": (
        ("pids: 512}", "pids: 512}, inherit: TAG"),
        f"Pulumi.host.yaml:6: {ENVIRONMENTS}.dev.inherit: 'TAG': not a list of variables' names. "
        "Write it like [TAG, GIT_SHA].",
    ),
    "variables for an environment that reads them all": (
        ("memory: 50%}", "memory: 50%}, inherit: [TAG]"),
        f"Pulumi.host.yaml:5: {ENVIRONMENTS}.prod: a protected environment reads every variable of its deployer. "
        "Remove inherit.",
    ),
    **{
        f"an egress of {written}": (
            ("pids: 512}", f"pids: 512}}, egress: {written}"),
            f"Pulumi.host.yaml:6: {ENVIRONMENTS}.dev.egress: {shown}: egress {fault}. Write none, internet, or a list "
            "of networks and internet, as in [internet, 192.168.5.0/24].",
        )
        for written, shown, fault in (
            ("all", "'all'", "'all'"),
            ("[]", "[]", "[]"),
            ("false", "False", "False"),
            ("[internet, none]", "['internet', 'none']", "'none'"),
            ("[192.168.5.1/24]", "['192.168.5.1/24']", "'192.168.5.1/24'"),
        )
    },
    "no pids at all": (
        ("pids: 512", "pids: 0"),
        f"Pulumi.host.yaml:6: {ENVIRONMENTS}.dev.limits.pids: 0: must be greater than 0",
    ),
    "a share above the machine": (
        ("memory: 50%", "memory: 140%"),
        f"Pulumi.host.yaml:5: {ENVIRONMENTS}.prod.reservations.memory: '140%': "
        "140 % is not a share of the machine. Write more than 0 and at most 100 %.",
    ),
    "140 % promised": (
        ("memory: 50%", "memory: 100%"),
        f"Pulumi.host.yaml:4: {ENVIRONMENTS}: '140%': memory: 22.4 GiB promised of 16GiB "
        "(system 1.6 GiB, prod 16GiB, dev 4.8 GiB). Lower reservations, best-effort limits or the system's share "
        "by 6.4 GiB, or declare the larger machine in bulkhead:capacity.",
    ),
    "more CPU reserved than there is": (
        ("cpus: 60%", "cpus: 11.5"),
        f"Pulumi.host.yaml:4: {ENVIRONMENTS}: '100.8%': cpus: 12.1 CPUs promised of 12 CPUs "
        "(system 0.6 CPUs, prod 11.5 CPUs). Lower reservations, best-effort limits or the system's share "
        "by 0.1 CPUs, or declare the larger machine in bulkhead:capacity.",
    ),
    "a limit above the machine": (
        ("cpus: 100%", "cpus: 13"),
        f"Pulumi.host.yaml:6: {ENVIRONMENTS}.dev.limits.cpus: '13 CPUs': more than the machine has (12 CPUs). "
        "Lower it to 100% or less.",
    ),
    "a limit below the reservation": (
        ("memory: 50%}}", "memory: 50%}, limits: {memory: 4GiB}}"),
        f"Pulumi.host.yaml:5: {ENVIRONMENTS}.prod.limits.memory: '4GiB': below its own reservation of 8GiB. "
        "Raise the limit or lower the reservation.",
    ),
    "a public subnet": (
        ("10.82.0.0", "11.82.0.0"),
        f"Pulumi.host.yaml:6: {ENVIRONMENTS}.dev.subnet: '11.82.0.0/16': outside the private ranges. "
        "Choose a network within 10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16.",
    ),
    "loopback, which is not RFC 1918": (
        ("10.82.0.0", "127.1.0.0"),
        f"Pulumi.host.yaml:6: {ENVIRONMENTS}.dev.subnet: '127.1.0.0/16': outside the private ranges. "
        "Choose a network within 10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16.",
    ),
    "an address in place of a network": (
        ("10.82.0.0/16", "10.82.0.1/16"),
        f"Pulumi.host.yaml:6: {ENVIRONMENTS}.dev.subnet: '10.82.0.1/16': not an IPv4 network address with a prefix "
        "(10.82.0.1/16 has host bits set). Write it like 10.81.0.0/16.",
    ),
    "a subnet too small to divide": (
        ("10.82.0.0/16", "10.82.0.0/25"),
        f"Pulumi.host.yaml:6: {ENVIRONMENTS}.dev.subnet: '10.82.0.0/25': prefix /25. Choose one between /16 and /24.",
    ),
    "overlapping subnets": (
        ("10.82.0.0/16", "10.81.128.0/24"),
        f"Pulumi.host.yaml:6: {ENVIRONMENTS}.dev.subnet: '10.81.128.0/24': overlaps 10.81.0.0/16 of prod. "
        "Give every environment addresses of its own.",
    ),
    "an unknown tier": (
        ("tier: protected", "tier: gold"),
        f"Pulumi.host.yaml:5: {ENVIRONMENTS}.prod.tier: 'gold': unknown tier. Use protected or best-effort.",
    ),
    "no tier": (
        ("tier: protected, ", ""),
        f"Pulumi.host.yaml:5: {ENVIRONMENTS}.prod.tier: missing. Add the key.",
    ),
    "a protected environment without reservations": (
        (", reservations: {cpus: 60%, memory: 50%}", ""),
        f"Pulumi.host.yaml:5: {ENVIRONMENTS}.prod: a protected environment needs reservations of cpus and memory. "
        "Add for example reservations: {cpus: 60%, memory: 50%}.",
    ),
    "a protected environment that reserves no memory": (
        (", memory: 50%", ""),
        f"Pulumi.host.yaml:5: {ENVIRONMENTS}.prod: a protected environment needs reservations of cpus and memory. "
        "Add for example reservations: {cpus: 60%, memory: 50%}.",
    ),
    "a best-effort environment without limits": (
        (", limits: {cpus: 100%, memory: 30%, pids: 512}", ""),
        f"Pulumi.host.yaml:6: {ENVIRONMENTS}.dev: a best-effort environment needs a memory limit. "
        "Add for example limits: {cpus: 100%, memory: 30%, pids: 4096}.",
    ),
    "a best-effort environment with reservations": (
        ("limits:", "reservations: {cpus: 1}, limits:"),
        f"Pulumi.host.yaml:6: {ENVIRONMENTS}.dev: a best-effort environment gives way and cannot have reservations. "
        "Remove them, or make its tier protected.",
    ),
    "an environment named like the host stack": (
        ("dev:", "host:"),
        f"Pulumi.host.yaml:6: {ENVIRONMENTS}.host: 'host' is the stack of the machine itself. "
        "Choose another environment name.",
    ),
    "a name with two dashes": (
        ("dev:", "dev--a:"),
        f"Pulumi.host.yaml:6: {ENVIRONMENTS}.dev--a: not an environment name. Use up to 31 lower-case letters, "
        "digits and single dashes, starting with a letter and not ending with a dash.",
    ),
    "a machine reached over plain TCP": (
        ("  bulkhead:capacity", "  bulkhead:host: tcp://10.0.0.1:2375\n  bulkhead:capacity"),
        "Pulumi.host.yaml:2: bulkhead:host: 'tcp://10.0.0.1:2375': host commands reach a machine only locally or by "
        "SSH. Write unix:///… or ssh://user@machine.",
    ),
    "no environments": (
        (PROD + DEV, ""),
        "Pulumi.host.yaml:4: bulkhead:environments: lists no environment. Write one, as in "
        "`prod: {tier: protected, subnet: 10.81.0.0/16, reservations: {cpus: 60%, memory: 50%}}`.",
    ),
    "an empty file": (
        (VALID, ""),
        "Pulumi.host.yaml: bulkhead:environments: lists no environment. Write one, as in "
        "`prod: {tier: protected, subnet: 10.81.0.0/16, reservations: {cpus: 60%, memory: 50%}}`.",
    ),
    "a list in place of settings": (
        (VALID, "- 1\n"),
        "Pulumi.host.yaml: bulkhead:environments: lists no environment. Write one, as in "
        "`prod: {tier: protected, subnet: 10.81.0.0/16, reservations: {cpus: 60%, memory: 50%}}`.",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    assert change[0] in VALID
    with pytest.raises(SettingsError) as refused:
        ledger(VALID.replace(*change), tmp_path)
    assert str(refused.value) == message


def test_shared_addresses_are_refused_before_anybody_asks_for_capacity(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"overlaps 10\.81\.0\.0/16 of prod"):
        settings(VALID.replace("10.82.0.0", "10.81.0.0"), tmp_path)


def test_every_fault_is_listed_in_the_order_of_lines(tmp_path: Path) -> None:
    text = VALID.replace("tier: best-effort", "tier: no").replace("cpus: 5%", "cpus: -1").replace("50%", "12XB")
    with pytest.raises(SettingsError) as refused:
        ledger(text, tmp_path)
    assert [line.split(": ")[0] for line in str(refused.value).splitlines()] == [
        "Pulumi.host.yaml:3",
        "Pulumi.host.yaml:5",
        "Pulumi.host.yaml:6",
    ]


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"Pulumi\.host\.yaml: No such file or directory\. Check the path\."):
        LedgerSettings.read(tmp_path / "Pulumi.host.yaml")


SLICES = {
    ("prod", "cgroupfs"): "/bulkhead-prod",
    ("dev-alice", "cgroupfs"): "/bulkhead-dev-alice",
    ("prod", "systemd"): "bulkhead-prod.slice",
    ("dev-alice", "systemd"): "bulkhead-dev_alice.slice",
}


@pytest.mark.parametrize(("environment", "driver"), SLICES)
def test_slice_is_spelt_as_the_cgroup_driver_wants_it(environment: str, driver: str) -> None:
    assert slice_name(environment, driver) == SLICES[environment, driver]


def test_a_driver_without_slices_is_refused() -> None:
    with pytest.raises(SettingsError, match="Run the engine with the cgroupfs or the systemd driver"):
        slice_name("prod", "none")


QUANTITIES = {
    "16GiB": 16 * GiB,
    "512 MiB": 512 * 2**20,
    "1TB": 10**12,
    "1.5GB": 1_500_000_000,
    "500kB": 500_000,
    "1024": 1024,
    "7B": 7,
}


@pytest.mark.parametrize("written", QUANTITIES)
def test_size_is_read(written: str) -> None:
    assert parse_bytes(written) == QUANTITIES[written]


@pytest.mark.parametrize(
    "written", ["", "0", "-1GB", "1.5", "0.3B", "GiB", "1 G B", "1gib", "१GB", "1e9", True, None, 1.5]
)
def test_size_is_refused(written: object) -> None:
    with pytest.raises(ValueError, match=r"size|unit|whole number"):
        parse_bytes(written)


@pytest.mark.parametrize("written", [0, -1, "nan", "inf", "x", "", True, None, "1e-10"])
def test_cpus_are_refused(written: object) -> None:
    with pytest.raises(ValueError, match="CPU"):
        parse_cpus(written)


sizes = st.integers(min_value=1, max_value=2**60)
percents = st.decimals(min_value=Decimal("0.01"), max_value=100, places=2).map(Percent)


@given(sizes)
def test_size_survives_a_round_trip(size: int) -> None:
    assert parse_bytes(format_bytes(size)) == size == parse_bytes(size) == parse_bytes(str(size))


@given(st.integers(min_value=1, max_value=10**6), st.sampled_from(sorted(UNITS)))
def test_a_unit_multiplies(number: int, unit: str) -> None:
    assert parse_bytes(f"{number}{unit}") == number * UNITS[unit]


@given(st.integers(min_value=1, max_value=1024 * NANO))
def test_cpus_survive_a_round_trip(nano: int) -> None:
    assert parse_cpus(str(Decimal(nano) / NANO)) == nano


@given(percents)
def test_percentage_survives_a_round_trip(percent: Percent) -> None:
    assert parse_percent(str(percent)) == percent


@given(percents, sizes)
def test_a_share_is_between_nothing_and_the_whole_and_exact_to_one_unit(percent: Percent, capacity: int) -> None:
    share = percent.of(capacity)
    assert 0 <= share <= capacity
    assert share * 100 <= Decimal(capacity) * percent.value < (share + 1) * 100


@given(percents, percents, sizes)
def test_a_larger_percentage_is_never_a_smaller_share(one: Percent, other: Percent, capacity: int) -> None:
    less, more = sorted((one, other), key=lambda percent: percent.value)
    assert less.of(capacity) <= more.of(capacity)


@given(percents, sizes, sizes)
def test_a_larger_machine_never_gives_a_smaller_share(percent: Percent, one: int, other: int) -> None:
    assert percent.of(min(one, other)) <= percent.of(max(one, other))


amounts = st.one_of(
    st.integers(min_value=1, max_value=90).map(lambda percent: f"{percent}%"),
    st.integers(min_value=1, max_value=16 * GiB),
)
environments = st.lists(st.tuples(st.sampled_from(list(Tier)), amounts, amounts), min_size=1, max_size=5)


def written(drawn: list[tuple[Tier, str | int, str | int]]) -> LedgerSettings:
    entries = {}
    for index, (tier, memory, limit) in enumerate(drawn):
        entry: dict[str, object] = {"tier": tier.value, "subnet": f"10.{index}.0.0/16", "limits": {"memory": limit}}
        if tier is Tier.PROTECTED:
            entry["reservations"] = {"cpus": "3%", "memory": memory}
        entries[f"e{index}"] = entry
    return LedgerSettings.model_validate({"environments": entries})


def attempt(ledger_settings: LedgerSettings) -> tuple[Ledger | None, str]:
    try:
        return ledger_settings.resolve(MACHINE), ""
    except SettingsError as refused:
        return None, str(refused)


@given(environments)
def test_what_is_promised_and_free_is_the_capacity_or_it_is_refused(
    drawn: list[tuple[Tier, str | int, str | int]],
) -> None:
    resolved, refusal = attempt(written(drawn))
    assert (resolved is None) == any(reason in refusal for reason in ("promised of", "below its own reservation"))
    if resolved is None:
        return
    for row in resolved.rows():
        assert row.free >= 0
        assert row.system + sum(row.promised.values()) + row.free == pytest.approx(row.capacity, abs=1e-6)
    for environment, resource in itertools.product(resolved.environments.values(), RESOURCES):
        assert promise(environment, resource) >= 0


@given(environments, st.randoms())
def test_the_order_of_writing_changes_no_promise(
    drawn: list[tuple[Tier, str | int, str | int]], random: Random
) -> None:
    one = written(drawn)
    names = list(one.environments)
    random.shuffle(names)
    other = one.model_copy(update={"environments": {name: one.environments[name] for name in names}})
    assert attempt(one)[0] == attempt(other)[0]


@pytest.mark.parametrize("written", ["2099-12-31", '"2099-12-31"', "2099-12-31 00:00:00 +0000 UTC"])
def test_the_date_of_an_exemption_is_read_as_written_and_as_pulumi_writes_it_anew(tmp_path: Path, written: str) -> None:
    path = tmp_path / "Pulumi.host.yaml"
    exempt = f"{{rule: lowered-reservation, reason: moved to a second host, owner: ann, expires: {written}}}"
    path.write_text(VALID + f"  bulkhead:exempt: [{exempt.replace('{', '{environment: prod, ', 1)}]\n")
    (read,) = LedgerSettings.read(path).exempt
    assert read.expires == date(2099, 12, 31)

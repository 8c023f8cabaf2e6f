"""Slices: what is promised in the ledger as cgroup files and slice units, for both drivers and cgroup versions."""

from collections.abc import Iterable
from ipaddress import IPv4Network
from typing import Any

import pulumi
import pytest

from components import device
from components.slice import Setting, SliceArgs, effective_files, scripts, v1_settings, v2_settings
from settings.host import Disk, HostFacts
from settings.ledger import Budget, Capacity, Environment, Ledger, Tier
from stacks.host import not_lowered

GIB = 1024**3
SPEED = {"read_bps": 800_000_000, "write_bps": 400_000_000, "read_iops": 30_000, "write_iops": 1}
DISK = Disk(number="254:0", name="vda", size=10**12, schedulers=("mq-deadline",))
FACTS = HostFacts(
    address="unix:///var/run/docker.sock",
    server_version="28.3.3",
    cpus=12,
    memory=16 * GIB,
    disk=10**12,
    disk_free=10**11,
    data_root="/var/lib/docker",
    cgroup_driver="cgroupfs",
    cgroup_version=1,
    security_options=(),
    live_restore=True,
    kernel="6.1.0-26-cloud-amd64",
    system="Debian",
    boot="a-boot",
    systemd=252,
    controllers=frozenset({"cpu", "memory", "pids", "io", "blkio"}),
    recursive_memory=True,
    device=DISK,
)
V1 = FACTS
V2 = FACTS.model_copy(update={"cgroup_version": 2})
UNITS = FACTS.model_copy(update={"cgroup_version": 2, "cgroup_driver": "systemd"})
OLD = {"kernel": "5.10.0-26-amd64"}  # without the idle class
RESERVED = Budget(cpus=7.2, memory=8 * GIB)
LIMITS = Budget(cpus=12, memory=4 * GIB + 1, pids=4096, io=0.5)


def prod(facts: HostFacts = V1, reservations: Budget = RESERVED, system: Budget | None = None) -> SliceArgs:
    return _args("prod", Tier.PROTECTED, reservations, LIMITS, facts, system)


def dev(facts: HostFacts = V1, limits: Budget = LIMITS) -> SliceArgs:
    return _args("dev", Tier.BEST_EFFORT, RESERVED, limits, facts, None)


def _args(
    name: str, tier: Tier, reservations: Budget, limits: Budget, facts: HostFacts, system: Budget | None
) -> SliceArgs:
    environments = {
        "prod": Environment(
            name="prod", tier=Tier.PROTECTED, subnet=IPv4Network("10.81.0.0/16"), reservations=reservations
        ),
        "dev": Environment(name="dev", tier=Tier.BEST_EFFORT, subnet=IPv4Network("10.82.0.0/16"), limits=limits),
    }
    ledger = Ledger(
        file="Pulumi.host.yaml",
        host=None,
        capacity=Capacity(cpus=12, memory=16 * GIB, disk=10**12),
        system=system or Budget(cpus=0.6, memory=GIB),
        environments=environments,
    )
    assert environments[name].tier is tier
    return SliceArgs(environments[name], ledger, facts)


def without(facts: HostFacts, **changed: Any) -> HostFacts:
    return facts.model_copy(update=changed)


def written(settings: Iterable[Setting]) -> dict[str, str]:
    """What is in the files in the end."""
    return {one.file: one.value for one in settings if one.value is not None}


def unit(script: str, name: str) -> list[str]:
    """The lines of a unit that a script writes."""
    return script.split(f"/etc/systemd/system/{name}.$$ <<'UNIT'\n")[1].split("UNIT\n")[0].splitlines()


def test_a_protected_weight_stands_to_the_systems_as_its_reservation_to_the_systems_share() -> None:
    assert written(v1_settings(prod()))["cpu/cpu.shares"] == str(1024 * 12)
    assert written(v2_settings(prod(V2)))["cpu.weight"] == str(100 * 12)


def test_weights_stay_within_the_kernels_bounds() -> None:
    huge = Budget(cpus=12 * 1000, memory=1)
    assert written(v1_settings(prod(reservations=huge, system=Budget())))["cpu/cpu.shares"] == "262144"
    assert written(v2_settings(prod(V2, huge, Budget())))["cpu.weight"] == "10000"


def test_a_best_effort_environment_is_of_the_idle_class_and_its_weight_is_left_to_the_kernel() -> None:
    v1, v2 = written(v1_settings(dev())), written(v2_settings(dev(V2)))
    assert (v1["cpu/cpu.idle"], v2["cpu.idle"]) == ("1", "1")
    assert "cpu/cpu.shares" not in v1
    assert "cpu.weight" not in v2


def test_without_the_idle_class_a_best_effort_environment_has_the_lowest_weight() -> None:
    v1, v2 = written(v1_settings(dev(without(V1, **OLD)))), written(v2_settings(dev(without(V2, **OLD))))
    assert (v1["cpu/cpu.shares"], v2["cpu.weight"]) == ("2", "1")
    assert "cpu/cpu.idle" not in v1
    assert "cpu.idle" not in v2
    lines = unit(scripts(dev(without(UNITS, systemd=249)))[0], "bulkhead-dev.slice")
    assert "CPUWeight=1" in lines


def test_a_slice_that_becomes_protected_leaves_the_idle_class_before_it_gets_its_weight() -> None:
    """The kernel refuses a weight until then, and resets it."""
    for settings, weight in ((v1_settings(prod()), "cpu/cpu.shares"), (v2_settings(prod(V2)), "cpu.weight")):
        files = [one.file for one in settings]
        assert files.index(weight) > files.index(weight.replace("shares", "idle").replace("weight", "idle"))
    assert written(v1_settings(prod()))["cpu/cpu.idle"] == "0"


def test_memory_and_pids_of_a_best_effort_environment_are_hard_ceilings_in_whole_pages() -> None:
    v1, v2 = written(v1_settings(dev())), written(v2_settings(dev(V2)))
    assert v1["memory/memory.limit_in_bytes"] == v1["memory/memory.memsw.limit_in_bytes"] == str(4 * GIB)
    assert v1["pids/pids.max"] == v2["pids.max"] == "4096"
    assert v2["memory.max"] == str(4 * GIB)
    assert v2["memory.high"] == str(4 * GIB * 31 // 32)
    assert v2["memory.swap.max"] == "0"


def test_a_protected_environment_has_no_quota_and_no_ceiling_and_on_v2_its_memory_is_kept() -> None:
    v1, v2 = written(v1_settings(prod())), written(v2_settings(prod(V2)))
    assert v1["cpu/cpu.cfs_quota_us"] == "-1"
    assert v1["memory/memory.limit_in_bytes"] == "-1"
    assert v2["cpu.max"] == "max 100000"
    assert v2["memory.min"] == v2["memory.low"] == str(8 * GIB)
    assert v2["memory.high"] == v2["memory.max"] == "max"
    assert written(v2_settings(dev(V2)))["memory.min"] == "0"


def test_a_best_effort_environment_has_a_quota_only_below_the_whole_machine() -> None:
    half = Budget(cpus=6, memory=GIB, pids=1)
    assert written(v1_settings(dev()))["cpu/cpu.cfs_quota_us"] == "-1"
    assert written(v1_settings(dev(limits=half)))["cpu/cpu.cfs_quota_us"] == "600000"
    assert written(v2_settings(dev(V2, half)))["cpu.max"] == "600000 100000"
    assert "CPUQuota=600.00%" in unit(scripts(dev(UNITS, half))[0], "bulkhead-dev.slice")


def test_a_quota_is_one_that_systemd_can_spell() -> None:
    third = Budget(cpus=2 / 3, memory=GIB, pids=1)
    assert written(v2_settings(dev(V2, third)))["cpu.max"] == "66660 100000"
    assert "CPUQuota=66.66%" in unit(scripts(dev(UNITS, third))[0], "bulkhead-dev.slice")


def test_reads_and_writes_of_best_effort_have_a_share_of_what_was_measured() -> None:
    v1 = written(v1_settings(dev(), SPEED))
    assert v1["blkio/blkio.throttle.read_bps_device"] == "254:0 400000000"
    assert v1["blkio/blkio.throttle.write_bps_device"] == "254:0 200000000"
    assert v1["blkio/blkio.throttle.read_iops_device"] == "254:0 15000"
    assert v1["blkio/blkio.throttle.write_iops_device"] == "254:0 1"  # 0 would be no ceiling
    assert written(v2_settings(dev(V2), SPEED))["io.max"] == "254:0 rbps=400000000 wbps=200000000 riops=15000 wiops=1"
    lines = unit(scripts(dev(UNITS), SPEED)[0], "bulkhead-dev.slice")
    assert {"IOReadBandwidthMax=/dev/vda 400000000", "IOWriteIOPSMax=/dev/vda 1"} <= set(lines)


@pytest.mark.parametrize("speed", [SPEED, None])
def test_ceilings_of_a_protected_environment_are_taken_away_whatever_it_was_before(
    speed: dict[str, int] | None,
) -> None:
    assert written(v1_settings(prod(), speed))["blkio/blkio.throttle.read_bps_device"] == "254:0 0"
    assert written(v2_settings(prod(V2), speed))["io.max"] == "254:0 rbps=max wbps=max riops=max wiops=max"
    assert "IOReadBandwidthMax=/dev/vda infinity" in unit(scripts(prod(UNITS), speed)[0], "bulkhead-prod.slice")


def test_nothing_is_throttled_before_it_is_measured() -> None:
    assert written(v2_settings(dev(V2), None))["io.max"] == "254:0 rbps=max wbps=max riops=max wiops=max"


@pytest.mark.parametrize(
    ("disk", "file", "high", "low"),
    [
        (DISK.model_copy(update={"schedulers": ("bfq",)}), "io.bfq.weight", "1000", "1"),
        (DISK.model_copy(update={"iocost": True}), "io.weight", "10000", "1"),
    ],
)
def test_where_the_scheduler_honours_weights_they_divide_instead_of_ceilings(
    disk: Disk, file: str, high: str, low: str
) -> None:
    facts = without(V2, device=disk)
    assert written(v2_settings(prod(facts), SPEED))[file] == high
    assert written(v2_settings(dev(facts), SPEED))[file] == low
    assert written(v2_settings(dev(facts), SPEED))["io.max"] == "254:0 rbps=max wbps=max riops=max wiops=max"
    assert effective_files(dev(facts), SPEED)[f"/sys/fs/cgroup/bulkhead-dev/{file}"] == f"default {low}"
    script = scripts(dev(without(UNITS, device=disk)), SPEED)[0]
    assert "IOWeight=1" in unit(script, "bulkhead-dev.slice")
    assert "IOWeight=10000" in unit(script, "bulkhead.slice")


def test_units_on_v1_have_no_ceilings_on_io_since_none_would_reach_a_container() -> None:
    hybrid = without(V1, cgroup_driver="systemd")
    assert not [line for line in unit(scripts(dev(hybrid), SPEED)[0], "bulkhead-dev.slice") if line[:2] == "IO"]
    weighted = without(hybrid, device=DISK.model_copy(update={"schedulers": ("bfq",)}))
    assert "IOWeight=1" in unit(scripts(dev(weighted), SPEED)[0], "bulkhead-dev.slice")


def test_without_a_device_or_a_controller_no_file_of_io_is_touched() -> None:
    for facts in (without(V2, device=None), without(V2, controllers=frozenset({"cpu", "memory", "pids"}))):
        assert not [one for one in v2_settings(dev(facts), SPEED) if one.file.startswith("io.")]
        systemd = without(facts, cgroup_driver="systemd")
        assert not [line for line in unit(scripts(dev(systemd), SPEED)[0], "bulkhead-dev.slice") if line[:2] == "IO"]


def test_v1_groups_are_made_in_each_hierarchy_and_removed_from_all() -> None:
    create, delete = scripts(dev())
    assert "mkdir -p /sys/fs/cgroup/pids/bulkhead-dev" in create
    assert "echo '4096' > /sys/fs/cgroup/pids/bulkhead-dev/pids.max" in create
    assert "/sys/fs/cgroup/*/bulkhead-dev" in delete


def test_swap_ceilings_are_written_only_where_the_kernel_accounts_for_swap() -> None:
    """Memory and swap together go up before memory does, and down after it."""
    names = [one.file.rpartition("/")[2] for one in v1_settings(dev()) if one.file.startswith("memory/")]
    assert names == ["memory.memsw.limit_in_bytes", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"]
    for settings in (v1_settings(dev(without(V1, swap_limit=False))), v2_settings(dev(without(V2, swap_limit=False)))):
        assert not [one for one in settings if "sw" in one.file]


def test_v2_controllers_are_enabled_before_the_group_is_made() -> None:
    lines = scripts(dev(V2))[0].splitlines()
    assert lines[:3] == [
        "echo '+cpu +memory +pids' > /sys/fs/cgroup/cgroup.subtree_control",
        "! grep -qw io /sys/fs/cgroup/cgroup.controllers || echo +io > /sys/fs/cgroup/cgroup.subtree_control",
        "mkdir -p /sys/fs/cgroup/bulkhead-dev",
    ]


def test_the_systemd_driver_gets_a_unit_since_raw_writes_are_undone_by_daemon_reload() -> None:
    create, delete = scripts(dev(UNITS))
    lines = unit(create, "bulkhead-dev.slice")
    for line in (
        "CPUWeight=idle",
        f"MemoryMax={4 * GIB}",
        f"MemoryHigh={4 * GIB * 31 // 32}",
        "MemoryMin=0",
        "MemorySwapMax=0",
        "TasksMax=4096",
        "CPUQuota=",
    ):
        assert line in lines
    assert "systemctl start bulkhead-dev.slice" in create
    assert "rm -f /etc/systemd/system/bulkhead-dev.slice" in delete


def test_the_common_parent_slice_has_the_weight_and_the_memory_of_all_protected_environments() -> None:
    create, delete = scripts(prod(UNITS))
    parent = unit(create, "bulkhead.slice")
    assert {"CPUWeight=1200", f"MemoryMin={8 * GIB}", f"MemoryLow={8 * GIB}"} <= set(parent)
    assert "ls /etc/systemd/system/bulkhead-*.slice" in delete  # and goes with the last of them


def test_the_systems_services_keep_the_systems_memory() -> None:
    create, _ = scripts(prod(UNITS))
    assert unit(create, "system.slice.d/bulkhead.conf") == ["[Slice]", f"MemoryLow={GIB}"]
    assert effective_files(prod(UNITS))["/sys/fs/cgroup/system.slice/memory.low"] == str(GIB)


def test_a_slice_with_processes_is_never_stopped() -> None:
    for facts in (UNITS, V1, V2):
        assert "still holds processes: stop them first: make down" in scripts(dev(facts))[1]


def test_effective_files_are_absolute_and_what_the_kernel_shows() -> None:
    v1 = effective_files(dev(), SPEED)
    assert v1["/sys/fs/cgroup/cpu/bulkhead-dev/cpu.shares"] == "3"  # of the idle class
    assert v1["/sys/fs/cgroup/blkio/bulkhead-dev/blkio.throttle.write_bps_device"] == "254:0 200000000"
    assert v1["/sys/fs/cgroup/memory/bulkhead-dev/memory.memsw.limit_in_bytes"] == str(4 * GIB)
    assert effective_files(dev(V2), SPEED)["/sys/fs/cgroup/bulkhead-dev/cpu.idle"] == "1"
    assert not [path for path in effective_files(prod(V2), SPEED) if path.endswith("io.max")]  # then it shows nothing


def test_effective_files_of_units_are_where_systemd_nests_them() -> None:
    files = effective_files(prod(UNITS), SPEED)
    folder = "/sys/fs/cgroup/bulkhead.slice"
    assert files[f"{folder}/bulkhead-prod.slice/cpu.weight"] == files[f"{folder}/cpu.weight"] == "1200"
    assert files[f"{folder}/bulkhead-prod.slice/memory.min"] == files[f"{folder}/memory.min"] == str(8 * GIB)
    hybrid = effective_files(dev(without(V1, cgroup_driver="systemd")), SPEED)
    assert hybrid == {
        "/sys/fs/cgroup/memory/bulkhead.slice/bulkhead-dev.slice/memory.limit_in_bytes": str(4 * GIB),
        "/sys/fs/cgroup/pids/bulkhead.slice/bulkhead-dev.slice/pids.max": "4096",
    }


def test_the_disk_is_measured_by_the_program_itself_wherever_the_host_is() -> None:
    script = device.script(FACTS)
    assert script.startswith(f"python3 - /var/lib/docker 254:0 {10**12} <<'PROGRAM'\n")
    assert script.endswith("PROGRAM\n")
    assert script.count("PROGRAM") == 2
    assert device.PROGRAM.read_text() in script


def test_what_the_program_printed_is_the_speed() -> None:
    assert device.speed('{"device": "254:0", "read_bps": 4, "write_bps": 3, "read_iops": 2, "write_iops": 1}') == {
        "read_bps": 4,
        "write_bps": 3,
        "read_iops": 2,
        "write_iops": 1,
    }
    assert device.speed("") is None
    with pytest.raises(pulumi.RunError, match="printed no measurement of the disk, but: hello"):
        device.speed("hello")


def reserved(**budget: float) -> dict[str, Any]:
    """An environment as the host stack puts it out."""
    return {"tier": "protected", "budget": {"reservations": budget, "limits": None}}


@pytest.mark.parametrize(
    ("deployed", "now", "shown"),
    [
        ({}, {"prod": reserved(cpus=2)}, {"prod": reserved(cpus=2)}),
        ({"prod": reserved(cpus=2)}, {"prod": reserved(cpus=2)}, {"prod": reserved(cpus=2)}),
        ({"prod": reserved(cpus=2)}, {"prod": reserved(cpus=3)}, {"prod": reserved(cpus=3)}),
        ({"prod": reserved(cpus=2)}, {"prod": reserved(cpus=1)}, {"prod": reserved(cpus=2)}),
        ({"prod": reserved(cpus=2)}, {}, {"prod": reserved(cpus=2)}),
        ({"prod": reserved(cpus=2, memory=5)}, {"prod": reserved(cpus=3)}, {"prod": reserved(cpus=2, memory=5)}),
        ({"dev": {"budget": {"reservations": None}}}, {"dev": {"tier": "x"}}, {"dev": {"tier": "x"}}),
    ],
)
def test_policies_see_what_a_deploy_would_lower_as_it_is_deployed(
    deployed: dict[str, Any], now: dict[str, Any], shown: dict[str, Any]
) -> None:
    told = not_lowered({"environments": deployed}, {"capacity": {"cpus": 2}, "environments": now})
    assert told == {"capacity": {"cpus": 2}, "environments": shown}

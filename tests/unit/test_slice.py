"""Slices: what is promised in the ledger as cgroup files and slice units, for both drivers and cgroup versions."""

from dataclasses import replace
from typing import Any

import pytest

from components.slice import SliceArgs, scripts, v1_files, v2_files
from settings.ledger import Budget, Tier
from stacks.host import not_lowered

GIB = 1024**3
PROD = SliceArgs(
    environment="prod",
    tier=Tier.PROTECTED,
    reservations=Budget(cpus=7.2, memory=8 * GIB),
    limits=None,
    driver="cgroupfs",
    cgroup_version=1,
    capacity_cpus=12,
    system_cpus=0.6,
)
DEV = replace(
    PROD,
    environment="dev",
    tier=Tier.BEST_EFFORT,
    reservations=None,
    limits=Budget(cpus=12, memory=4 * GIB + 1, pids=4096),
)


def test_a_protected_weight_stands_to_the_systems_as_its_reservation_to_the_systems_share() -> None:
    assert v1_files(PROD)["cpu/cpu.shares"] == str(1024 * 12)
    assert v2_files(PROD)["cpu.weight"] == str(100 * 12)


def test_a_best_effort_environment_has_the_lowest_weight() -> None:
    assert v1_files(DEV)["cpu/cpu.shares"] == "2"
    assert v2_files(DEV)["cpu.weight"] == "1"


def test_weights_stay_within_the_kernels_bounds() -> None:
    huge = replace(PROD, system_cpus=0.0, reservations=Budget(cpus=12 * 1000, memory=1))
    assert v1_files(huge)["cpu/cpu.shares"] == "262144"
    assert v2_files(huge)["cpu.weight"] == "10000"


def test_memory_and_pids_of_a_best_effort_environment_are_hard_ceilings_in_whole_pages() -> None:
    assert v1_files(DEV)["memory/memory.limit_in_bytes"] == str(4 * GIB)
    assert v1_files(DEV)["pids/pids.max"] == "4096"
    assert v2_files(DEV)["memory.max"] == str(4 * GIB)
    assert v2_files(DEV)["memory.swap.max?"] == "0"
    assert v2_files(DEV)["pids.max"] == "4096"


def test_a_protected_environment_has_no_quota_and_no_ceiling_and_on_v2_its_memory_is_kept() -> None:
    assert v1_files(PROD)["cpu/cpu.cfs_quota_us"] == "-1"
    assert v1_files(PROD)["memory/memory.limit_in_bytes"] == "-1"
    assert v2_files(PROD)["cpu.max"] == "max 100000"
    assert v2_files(PROD)["memory.low"] == str(8 * GIB)


def test_a_best_effort_environment_has_a_quota_only_below_the_whole_machine() -> None:
    half = replace(DEV, limits=Budget(cpus=6, memory=GIB, pids=1))
    assert v1_files(DEV)["cpu/cpu.cfs_quota_us"] == "-1"
    assert v1_files(half)["cpu/cpu.cfs_quota_us"] == "600000"
    assert v2_files(half)["cpu.max"] == "600000 100000"


def test_v1_groups_are_made_in_each_hierarchy_and_removed_from_all() -> None:
    create, delete = scripts(DEV, "/bulkhead-dev")
    assert "mkdir -p /sys/fs/cgroup/pids/bulkhead-dev" in create
    assert "echo '4096' > /sys/fs/cgroup/pids/bulkhead-dev/pids.max" in create
    assert "/sys/fs/cgroup/*/bulkhead-dev" in delete


def test_swap_ceilings_are_written_only_where_the_kernel_accounts_for_swap() -> None:
    create, _ = scripts(DEV, "/bulkhead-dev")
    file = "/sys/fs/cgroup/memory/bulkhead-dev/memory.memsw.limit_in_bytes"
    assert f"[ ! -e {file} ] || echo '{4 * GIB}' > {file}" in create


def test_v2_controllers_are_enabled_before_the_group_is_made() -> None:
    create, _ = scripts(replace(DEV, cgroup_version=2), "/bulkhead-dev")
    lines = create.splitlines()
    assert lines[:2] == [
        "echo '+cpu +memory +pids' > /sys/fs/cgroup/cgroup.subtree_control",
        "mkdir -p /sys/fs/cgroup/bulkhead-dev",
    ]


def test_the_systemd_driver_gets_a_unit_since_raw_writes_are_undone_by_daemon_reload() -> None:
    create, delete = scripts(replace(DEV, driver="systemd", cgroup_version=2), "bulkhead-dev.slice")
    assert "cat > /etc/systemd/system/bulkhead-dev.slice" in create
    for line in ("CPUWeight=1", f"MemoryMax={4 * GIB}", "MemorySwapMax=0", "TasksMax=4096", "CPUQuota="):
        assert line in create.splitlines()
    assert "systemctl start bulkhead-dev.slice" in create
    assert "rm -f /etc/systemd/system/bulkhead-dev.slice" in delete


def test_the_common_parent_slice_has_the_weight_and_the_memory_of_all_protected_environments() -> None:
    unit = replace(PROD, driver="systemd", cgroup_version=2, protected=Budget(cpus=9, memory=10 * GIB))
    parent = scripts(unit, "bulkhead-prod.slice")[0].splitlines()[:10]
    assert parent[0].startswith("cat > /etc/systemd/system/bulkhead.slice")
    assert {"CPUWeight=1500", f"MemoryLow={10 * GIB}"} <= set(parent)


def test_a_slice_with_processes_is_never_stopped() -> None:
    for driver, name in (("systemd", "bulkhead-dev.slice"), ("cgroupfs", "/bulkhead-dev")):
        _, delete = scripts(replace(DEV, driver=driver), name)
        assert "still holds processes: stop them first: make down" in delete


def test_a_unit_with_a_quota_gives_it_in_percent_of_one_cpu() -> None:
    half = replace(DEV, driver="systemd", limits=Budget(cpus=6, memory=GIB, pids=1))
    assert "CPUQuota=600%" in scripts(half, "bulkhead-dev.slice")[0].splitlines()


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

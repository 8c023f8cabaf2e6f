"""The picture of a deployment: everything the outputs tell is in it, and nothing in it breaks the drawing."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from cli.diagram import render, write
from cli.pulumi import PulumiError

ROOT = Path(__file__).parents[2]
GIB = 2**30


def service(name: str, replicas: int = 1, health: str = "healthy", build: str = "0123456789ab") -> dict[str, Any]:
    """One service's outputs."""
    return {
        "containers": [f"{number:064x}" for number in range(1, replicas + 1)],
        "health": health,
        "image": {"name": f"bulkhead/{name}:{build}", "id": f"sha256:{1:064x}", "digest": f"sha256:{1:064x}"},
        "networks": ["prod-backend"],
        "memory": 256 * 2**20,
        "restart": "unless-stopped",
        "completes": False,
    }


def environment(name: str, tier: str, budget: dict[str, Any], octet: int, port: int) -> dict[str, Any]:
    """The shop's outputs in one environment."""
    return {
        "environment": name,
        "tier": tier,
        "slice": {"cgroup_parent": f"/bulkhead-{name}", "budget": budget},
        "endpoints": [
            {"service": "web", "address": "127.0.0.1", "port": port, "target": 8080, "protocol": "tcp"},
        ],
        "networks": {
            f"{name}-backend": {"subnet": f"10.{octet}.44.0/24", "internal": True, "external": False},
            f"{name}-frontend": {"subnet": f"10.{octet}.7.0/24", "internal": False, "external": False},
        },
        "backups": {},
        "volumes": [f"{name}-cache-data", f"{name}-db-data"],
        "services": {
            key: service(f"{name}-{key}", 2 if key == "api" and name == "prod" else 1)
            for key in ("api", "cache", "db", "web", "worker")
        },
    }


PROD = {"reservations": {"cpus": 7.2, "memory": 8 * GIB}}
DEV = {"limits": {"cpus": 12.0, "memory": 5153960755, "pids": 4096}}
OUTPUTS: dict[str, Any] = {
    "host": {
        "capacity": {"cpus": 12.0, "memory": 16 * GIB, "disk": 10**12},
        "system": {"cpus": 0.6, "memory": 1717986918, "disk": None, "pids": None},
        "engine": {
            "version": "20.10.24+dfsg1",
            "cgroup_driver": "cgroupfs",
            "cgroup_version": 1,
        },
        "firewall": {"family": "inet", "table": "bulkhead", "environments": ["dev", "prod"]},
        "environments": {
            name: {
                "tier": tier,
                "subnet": f"10.{octet}.0.0/16",
                "cgroup_parent": f"/bulkhead-{name}",
                "budget": budget,
            }
            for name, tier, octet, budget in (("dev", "best-effort", 82, DEV), ("prod", "protected", 81, PROD))
        },
    },
    "prod": environment("prod", "protected", PROD, 81, 8080),
    "dev": environment("dev", "best-effort", DEV, 82, 8081),
}


def more(**environments: Any) -> dict[str, Any]:
    """The outputs with further environments in the host's ledger, which promises each a little memory."""
    outputs = deepcopy(OUTPUTS)
    for name, told in environments.items():
        outputs["host"]["environments"][name] = outputs["host"]["environments"]["dev"] | {
            "budget": {"limits": {"memory": GIB // 2}}
        }
        if told is not None:
            outputs[name] = told
    return outputs


def test_the_sample_is_what_stacks_put_out() -> None:
    schema = json.loads((ROOT / "docs/outputs.schema.json").read_text())
    for stack, told in OUTPUTS.items():
        kind = "host" if stack == "host" else "environment"
        jsonschema.validate(told, schema | {"$ref": f"#/$defs/{kind}"})


def test_everything_that_the_outputs_tell_is_in_the_picture() -> None:
    drawn = render(OUTPUTS).source
    for word in (
        "12 CPUs, 16GiB, 1TB, Docker 20.10.24+dfsg1, cgroup v1, cgroupfs driver",
        "prod reserved 7.2 CPUs",
        "dev limit 4.8 GiB",
        "slice /bulkhead-prod, addresses 10.81.0.0/16",
        "reserved 7.2 CPUs, 8GiB memory",
        "at most 12 CPUs, 4.8 GiB memory, 4096 processes",
        "127.0.0.1:8080",
        "healthy, 2 replicas",
        "healthy",
        "prod-worker:0123456789ab",
        "prod-backend",
        "10.81.44.0/24",
        "internal",
        "has a way out",
        "prod-db-data",
        "kept by make down",
    ):
        assert word in drawn, word


def test_a_protected_environment_comes_first_and_has_walls_of_its_own_colour() -> None:
    drawn = render(OUTPUTS).source
    assert drawn.index("slice /bulkhead-prod") < drawn.index("slice /bulkhead-dev")
    assert drawn.count('fillcolor="#edf4fb"') == 1
    assert drawn.count('fillcolor="#fdf5e8"') == 1


def test_an_environment_that_only_the_ledger_knows_is_drawn_as_not_deployed() -> None:
    assert "best-effort, not deployed" in render(more(staging=None)).source


def test_a_service_with_several_ports_has_one_tag_and_one_arrow() -> None:
    outputs = deepcopy(OUTPUTS)
    outputs["prod"]["endpoints"].append(
        {"service": "web", "address": "::", "port": None, "target": 53, "protocol": "udp"}
    )
    drawn = render(outputs).source
    assert "[::]:*→53/udp" in drawn
    assert drawn.count("e0_ports:d") == 1


def test_a_network_that_another_party_makes_is_drawn_without_a_range() -> None:
    outputs = deepcopy(OUTPUTS)
    outputs["dev"]["networks"]["shared"] = {"external": True}
    assert "made by another party" in render(outputs).source


def test_names_are_text_and_never_markup() -> None:
    outputs = deepcopy(OUTPUTS)
    outputs["dev"]["services"]["a<b>&c"] = service("a<b>&c", health="unchecked")
    assert "a&lt;b&gt;&amp;c" in render(outputs).source


def test_without_graphviz_the_next_step_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PulumiError, match="apt-get install graphviz"):
        write(OUTPUTS, tmp_path / "picture.svg")


def test_the_picture_is_as_wide_as_a_page(tmp_path: Path) -> None:
    crowded = environment("staging", "best-effort", DEV, 83, 8082)
    crowded["services"] |= {f"odd <name> {number}": service("odd", 1, "unchecked") for number in range(7)}
    target = tmp_path / "new" / "picture.svg"
    for outputs in (OUTPUTS, more(staging=crowded, later=None)):
        write(outputs, target)
        drawn = target.read_text()
        points = float(drawn.split('<svg width="')[1].split("pt")[0])
        assert 1000 <= points * 96 / 72 <= 1320
    assert "odd &lt;name&gt; 6" in drawn

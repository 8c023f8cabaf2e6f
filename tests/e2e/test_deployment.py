"""The main job, told in order: two environments of a real application on one engine, kept apart; a bad change stopped
before it is applied; a bad release that leaves the old one running; and nothing left at the end."""

import html
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import docker
import jsonschema
import pytest
import yaml

from tests.deployed import CHECKOUT, groups
from tests.e2e.conftest import DEV, LEDGER, PORTS, PROD, STAGING, Deployment, ours, running

pytestmark = pytest.mark.e2e


def http(environment: str, path: str, body: Mapping[str, Any] | None = None, method: str | None = None) -> Any:
    """A request to the shop's front end of one environment, on loopback; the parsed answer."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORTS[environment]}{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
        method=method,
    )
    with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
        return json.loads(answer.read())


def eventually(check: Callable[[], bool], seconds: float = 90) -> bool:
    """Whether `check` becomes true in time; errors of the network count as not yet."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if check():
                return True
        except (OSError, urllib.error.URLError, json.JSONDecodeError):
            pass
        time.sleep(1)
    return False


def health(engine: docker.DockerClient, environment: str) -> dict[str, set[str]]:
    """Health of each service's containers."""
    found: dict[str, set[str]] = {}
    for container in running(engine, environment):
        state = engine.api.inspect_container(container.id)["State"]
        found.setdefault(container.labels["bulkhead.service"], set()).add(
            state.get("Health", {}).get("Status", state["Status"])
        )
    return found


def healthy(engine: docker.DockerClient, environment: str) -> bool:
    return health(engine, environment) == {service: {"healthy"} for service in SHOP}


def has_order(environment: str) -> bool:
    """Whether the order that the suite placed in this environment is there."""
    return f"only-{environment}" in json.dumps(http(environment, "/orders"))


def fingerprint(engine: docker.DockerClient) -> set[str]:
    """Ids of all that is ours on the engine: the same set before and after means nothing was applied."""
    return {item.id for items in ours(engine).values() for item in items}


SHOP = {"web", "api", "worker", "db", "cache"}


def test_up_brings_host_and_both_environments_healthy(deployment: Deployment, engine: docker.DockerClient) -> None:
    deployment.done("up")
    for environment in (PROD, DEV):
        assert healthy(engine, environment), health(engine, environment)


def test_orders_are_in_their_own_environments_database_only(deployment: Deployment) -> None:
    for environment in (PROD, DEV):
        http(environment, "/orders", {"customer": f"only-{environment}", "items": [{"sku": "anchor", "quantity": 1}]})
    for environment, other in ((PROD, DEV), (DEV, PROD)):
        listed = json.dumps(http(environment, "/orders"))
        assert f"only-{environment}" in listed
        assert f"only-{other}" not in listed


def test_every_container_runs_in_its_environments_slice(deployment: Deployment, engine: docker.DockerClient) -> None:
    for environment in (PROD, DEV):
        assert running(engine, environment)
        for container in running(engine, environment):
            inspected = engine.api.inspect_container(container.id)
            parent = inspected["HostConfig"]["CgroupParent"]
            assert parent == deployment.outputs(environment)["slice"]["cgroup_parent"]
            lines = Path(f"/proc/{inspected['State']['Pid']}/cgroup").read_text().splitlines()
            placed = [line for line in lines if ":memory:" in line or ":cpu" in line or line.startswith("0::/bulkhead")]
            assert placed
            assert all(f"/{parent.lstrip('/')}/" in line for line in placed if ":cpuset:" not in line)


def test_slices_hold_what_the_ledger_promises(deployment: Deployment) -> None:
    memory = Path(f"/sys/fs/cgroup/memory/bulkhead-{DEV}/memory.limit_in_bytes")
    pids = Path(f"/sys/fs/cgroup/pids/bulkhead-{DEV}/pids.max")
    if not memory.exists():
        memory = Path(f"/sys/fs/cgroup/bulkhead-{DEV}/memory.max")
        pids = Path(f"/sys/fs/cgroup/bulkhead-{DEV}/pids.max")
    limits = deployment.outputs(DEV)["slice"]["budget"]["limits"]
    assert int(memory.read_text()) == limits["memory"] // 4096 * 4096
    assert int(pids.read_text()) == limits["pids"] == 2048


CONFIRMED: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, Any]], bool]] = {
    "CIS 4.1 non-root": lambda config, _: config["User"] not in ("", "0", "root"),
    "CIS 4.6 healthcheck": lambda config, _: bool(config["Healthcheck"]["Test"]),
    "CIS 5.2 apparmor": lambda _, host: not any("apparmor=unconfined" in one for one in host["SecurityOpt"]),
    "CIS 5.3 selinux": lambda _, host: not any(one.startswith("label") for one in host["SecurityOpt"]),
    "CIS 5.4 drop-all-capabilities": lambda _, host: host["CapDrop"] == ["ALL"] and not host["CapAdd"],
    "CIS 5.5 privileged": lambda _, host: host["Privileged"] is False,
    "CIS 5.6 host-path": lambda _, host: not any(one.startswith("/") for one in host["Binds"] or ()),
    "CIS 5.8 privileged-ports": lambda _, host: all(int(one["HostPort"]) > 1023 for one in ports(host)),
    "CIS 5.10 host-namespaces": lambda _, host: host["NetworkMode"] != "host",
    "CIS 5.11 memory-limit": lambda _, host: host["Memory"] > 0,
    "CIS 5.13 read-only-root": lambda _, host: host["ReadonlyRootfs"] is True,
    "CIS 5.14 public-ports": lambda _, host: all(one["HostIp"] == "127.0.0.1" for one in ports(host)),
    "CIS 5.15 restart-policy": lambda _, host: host["RestartPolicy"]["Name"] == "unless-stopped",
    "CIS 5.16 host-namespaces": lambda _, host: host["PidMode"] != "host",
    "CIS 5.17 host-namespaces": lambda _, host: host["IpcMode"] != "host",
    "CIS 5.18 devices": lambda _, host: not host["Devices"] and not host["DeviceCgroupRules"],
    "CIS 5.19 ulimits": lambda _, host: not host["Ulimits"],
    "CIS 5.20 mount-propagation": lambda _, host: not any("shared" in str(one) for one in host.get("Mounts") or ()),
    "CIS 5.22 seccomp": lambda _, host: not any("seccomp" in one for one in host["SecurityOpt"]),
    "CIS 5.25 own-slice": lambda _, host: "bulkhead-e2e" in host["CgroupParent"],
    "CIS 5.26 no-new-privileges": lambda _, host: "no-new-privileges:true" in host["SecurityOpt"],
    "CIS 5.31 host-namespaces": lambda _, host: host["UsernsMode"] != "host",
    "CIS 5.32 engine-socket": lambda _, host: "docker.sock" not in str(host["Binds"]),
    "init": lambda _, host: host["Init"] is True,
    "log-rotation": lambda _, host: host["LogConfig"]["Config"]["max-size"] == "10m",
    "graceful-stop": lambda config, _: config["StopTimeout"] >= 10,
    "image-digest": lambda config, _: config["Image"].startswith("sha256:"),
}
"""What the pack accepts as hardened, as the engine's inspection has it: `Config` and `HostConfig` of a container."""


def ports(host: Mapping[str, Any]) -> list[Mapping[str, str]]:
    """The bindings of a container's published ports."""
    return [one for bound in (host["PortBindings"] or {}).values() for one in bound]


@pytest.mark.parametrize("check", CONFIRMED)
def test_an_inspection_confirms_what_the_policies_accept_as_hardened(check: str, engine: docker.DockerClient) -> None:
    containers = [one for environment in (PROD, DEV) for one in running(engine, environment)]
    assert len(containers) >= 11
    failing = {one.name for one in containers if not CONFIRMED[check](one.attrs["Config"], one.attrs["HostConfig"])}
    assert failing == set()


def test_no_container_is_on_the_default_bridge_as_cis_5_30_has_it(engine: docker.DockerClient) -> None:
    containers = [one for environment in (PROD, DEV) for one in running(engine, environment)]
    assert not any("bridge" in one.attrs["NetworkSettings"]["Networks"] for one in containers)


def test_containers_of_the_two_environments_share_no_network(engine: docker.DockerClient) -> None:
    attached = {
        environment: {
            name
            for container in running(engine, environment)
            for name in engine.api.inspect_container(container.id)["NetworkSettings"]["Networks"]
        }
        for environment in (PROD, DEV)
    }
    assert attached[PROD] == {f"{PROD}-frontend", f"{PROD}-backend"}
    assert not attached[PROD] & attached[DEV]


def test_the_secret_is_a_file_of_those_who_asked_and_in_no_plain_text(
    deployment: Deployment, engine: docker.DockerClient
) -> None:
    containers = {one.labels["bulkhead.service"]: one for one in running(engine, PROD)}
    secret = containers["db"].exec_run(["cat", "/run/secrets/db_password"]).output.decode()
    assert len(secret) >= 40
    assert containers["web"].exec_run(["cat", "/run/secrets/db_password"]).exit_code != 0
    for container in containers.values():
        assert secret not in json.dumps(engine.api.inspect_container(container.id))
    assert secret not in json.dumps(deployment.outputs(PROD))
    state = Path(deployment.environment["XDG_STATE_HOME"])
    written = [path for path in state.rglob("*") if path.is_file()]
    assert any(path.name.endswith(".json") for path in written)
    assert not [path for path in written if secret.encode() in path.read_bytes()]


def test_a_second_up_changes_nothing_also_from_another_checkout(
    deployment: Deployment, engine: docker.DockerClient, tmp_path: Path
) -> None:
    before = fingerprint(engine)
    other = Deployment(tmp_path / "elsewhere", Path(deployment.environment["XDG_STATE_HOME"]))
    shutil.copytree(deployment.folder, other.folder, symlinks=True)
    other.done("up")
    assert fingerprint(engine) == before


def test_a_refresh_finds_no_drift(deployment: Deployment) -> None:
    deployment.done("drift")


def test_outputs_are_what_the_schema_says(deployment: Deployment) -> None:
    schema = json.loads((CHECKOUT / "docs/outputs.schema.json").read_text())
    for stack, kind in (("host", "host"), (PROD, "environment"), (DEV, "environment")):
        jsonschema.validate(deployment.outputs(stack), schema | {"$ref": f"#/$defs/{kind}"})


def test_plan_doctor_and_diagram_tell_what_there_is(deployment: Deployment, tmp_path: Path) -> None:
    plan = deployment.done("plan")
    assert PROD in plan
    assert "memory" in plan
    report = deployment.done("doctor")
    for line in ("Docker version", "cgroup driver", "IO isolation", "swap", "live-restore"):
        assert line in report
    picture = tmp_path / "picture.svg"
    deployment.done("diagram", args=str(picture))
    assert f"{PROD}-backend" in html.unescape(picture.read_text())


def overlay(deployment: Deployment, stack: str, document: Mapping[str, Any]) -> None:
    """One more compose file on top of the stack's own."""
    name = "overlay.yaml"
    (deployment.folder / name).write_text(yaml.safe_dump(dict(document)))
    files = yaml.safe_load((deployment.folder / f"Pulumi.{stack}.yaml").read_text())["config"]["bulkhead:compose"]
    deployment.settings(stack, compose=[*[file for file in files if file != name], name])


def on_worker(**keys: Any) -> dict[str, Any]:
    return {"services": {"worker": keys}}


BAD_CHANGES: dict[str, tuple[str, dict[str, Any], str]] = {
    "dev attached to prod's network": (
        DEV,
        {
            "services": {"worker": {"networks": ["theirs"]}},
            "networks": {"theirs": {"external": True, "name": f"{PROD}-backend"}},
        },
        f"{PROD}-backend",
    ),
    "a prod service with a cpus limit": (PROD, on_worker(deploy={"resources": {"limits": {"cpus": "0.5"}}}), "cpus"),
}
"""The other rules' are in the corpus, which takes less time: nothing is deployed there."""


def refused(ran: subprocess.CompletedProcess[str], *named: str) -> None:
    """The command failed with a message that names each of these and says what to do."""
    assert ran.returncode != 0, ran.stdout[-3000:]
    for word in named:
        assert word in ran.stdout, f"{word!r} is not named in:\n{ran.stdout[-5000:]}"
    assert "Traceback" not in ran.stdout


@pytest.mark.parametrize("change", BAD_CHANGES)
def test_preview_stops(change: str, deployment: Deployment, engine: docker.DockerClient) -> None:
    stack, document, named = BAD_CHANGES[change]
    before = fingerprint(engine)
    kept = (deployment.folder / f"Pulumi.{stack}.yaml").read_text()
    try:
        overlay(deployment, stack, document)
        refused(deployment.make("preview", stack), named, "Fix:")
    finally:
        (deployment.folder / f"Pulumi.{stack}.yaml").write_text(kept)
    assert fingerprint(engine) == before


def test_preview_stops_prods_reservation_removed_from_the_ledger(
    deployment: Deployment, engine: docker.DockerClient
) -> None:
    before = fingerprint(engine)
    ledger = deployment.folder / "Pulumi.host.yaml"
    kept = ledger.read_text()
    changed = json.loads(json.dumps(LEDGER))
    del changed["bulkhead:environments"][PROD]["reservations"]
    try:
        ledger.write_text(yaml.safe_dump({"config": changed}))
        refused(deployment.make("preview", "host"), PROD, "reservations")
    finally:
        ledger.write_text(kept)
    assert fingerprint(engine) == before


UNKNOWN_NETWORK = '''"""A stack that adds a container to a network whose name nobody knows before it is made."""
import pulumi, pulumi_docker as docker
from stacks import environment

def build():
    built = environment.build()
    own = pulumi.ResourceOptions(parent=built)
    named = docker.Volume("unnamed", opts=own)
    docker.Container("spy", image="debian:bookworm-slim", networks_advanced=[{"name": named.mountpoint}], opts=own)
'''


def test_preview_stops_a_network_whose_name_is_unknown(deployment: Deployment, engine: docker.DockerClient) -> None:
    before = fingerprint(engine)
    module = deployment.folder / "stacks" / f"{DEV.replace('-', '_')}.py"
    try:
        module.write_text(UNKNOWN_NETWORK)
        refused(deployment.make("preview", DEV), "spy", "preview", "Fix:")
    finally:
        module.unlink()
    assert fingerprint(engine) == before


BAD_INPUT: dict[str, tuple[str, tuple[str, ...]]] = {
    "broken YAML": ("services: [unclosed", ("overlay.yaml",)),
    "an unknown key": ("services: {worker: {cgroup_parent: /x}}", ("overlay.yaml", "worker", "cgroup_parent")),
    "a memory limit in a unit that does not exist": (
        "services: {worker: {deploy: {resources: {limits: {memory: 12XB}}}}}",
        ("overlay.yaml", "12XB"),
    ),
    "an image that does not exist": (
        "services: {extra: {image: 'no-such-image-anywhere:1'}}",
        ("extra", "no-such-image-anywhere:1"),
    ),
}


@pytest.mark.parametrize("fault", BAD_INPUT)
def test_preview_explains(fault: str, deployment: Deployment, engine: docker.DockerClient) -> None:
    text, named = BAD_INPUT[fault]
    before = fingerprint(engine)
    kept = (deployment.folder / f"Pulumi.{DEV}.yaml").read_text()
    try:
        overlay(deployment, DEV, {})
        (deployment.folder / "overlay.yaml").write_text(text)
        refused(deployment.make("preview", DEV), *named)
    finally:
        (deployment.folder / f"Pulumi.{DEV}.yaml").write_text(kept)
    assert fingerprint(engine) == before


BAD_LEDGERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "memory in a unit that does not exist": (lambda envs: envs[DEV]["limits"].update(memory="12XB"), "12XB"),
    "more memory promised than there is": (lambda envs: envs[DEV]["limits"].update(memory="90%"), "memory"),
    "a subnet outside the private ranges": (lambda envs: envs[DEV].update(subnet="8.8.0.0/16"), "8.8.0.0/16"),
}


@pytest.mark.parametrize("fault", BAD_LEDGERS)
def test_preview_explains_a_bad_ledger(fault: str, deployment: Deployment) -> None:
    change, named = BAD_LEDGERS[fault]
    ledger = deployment.folder / "Pulumi.host.yaml"
    kept = ledger.read_text()
    changed = json.loads(json.dumps(LEDGER))
    change(changed["bulkhead:environments"])
    try:
        ledger.write_text(yaml.safe_dump({"config": changed}))
        refused(deployment.make("preview", "host"), "Pulumi.host.yaml", named)
    finally:
        ledger.write_text(kept)


def test_a_build_runs_in_its_slice_and_one_that_fails_leaves_the_environment_as_it_was(
    deployment: Deployment, engine: docker.DockerClient
) -> None:
    before = fingerprint(engine)
    dockerfile = deployment.folder / "examples/shop/api/Dockerfile"
    kept = dockerfile.read_text()
    settings = (deployment.folder / f"Pulumi.{DEV}.yaml").read_text()
    try:
        dockerfile.write_text("FROM debian:bookworm-slim\nRUN cat /proc/self/cgroup && exit 3\n")
        refused(deployment.make("up", DEV), "api", f"bulkhead-{DEV}")
    finally:
        dockerfile.write_text(kept)
        (deployment.folder / f"Pulumi.{DEV}.yaml").write_text(settings)
    assert fingerprint(engine) == before


def test_a_release_that_never_turns_healthy_leaves_the_old_one_running(
    deployment: Deployment, engine: docker.DockerClient
) -> None:
    old = {one.id for one in running(engine, DEV) if one.labels["bulkhead.service"] == "api"}
    kept = (deployment.folder / f"Pulumi.{DEV}.yaml").read_text()
    sick = {"test": ["CMD", "false"], "interval": "1s", "timeout": "1s", "retries": 2, "start_period": "0s"}
    try:
        overlay(deployment, DEV, {"services": {"api": {"healthcheck": sick}}})
        refused(deployment.make("up", DEV), f"{DEV}-api")
        assert old <= {one.id for one in engine.containers.list(filters={"label": "bulkhead.service=api"})}
        assert http(DEV, "/orders")
    finally:
        (deployment.folder / f"Pulumi.{DEV}.yaml").write_text(kept)
    deployment.done("up", DEV)
    now = {one.id for one in running(engine, DEV) if one.labels["bulkhead.service"] == "api"}
    assert len(now) == 1
    assert healthy(engine, DEV), health(engine, DEV)


def test_another_environment_of_the_ledger_needs_only_its_settings(
    deployment: Deployment, engine: docker.DockerClient
) -> None:
    (deployment.folder / "features.yaml").write_text((CHECKOUT / "tests/e2e/files/features.yaml").read_text())
    deployment.settings(STAGING, compose=["features.yaml"], variables={"GREETING": "hello"})
    deployment.done("up", STAGING)
    containers: dict[str, list[Any]] = {}
    for container in running(engine, STAGING):
        containers.setdefault(container.labels["bulkhead.service"], []).append(container)
    assert {service: len(found) for service, found in containers.items()} == {
        "replicated": 3,
        "named": 1,
        "keeper": 1,
        "sidecar": 1,
        "once": 1,
    }
    one = containers["replicated"][0]
    assert one.exec_run(["cat", "/etc/app.conf"]).output == b"greeting = hello\n"
    assert one.exec_run(["stat", "-c", "%a %u", "/run/secrets/token"]).output == b"400 1000\n"
    assert one.exec_run(["touch", "/root-is-read-only"], user="0").exit_code != 0
    assert one.exec_run(["cat", "/done/by-once"]).output == b"migrated\n"
    assert one.exec_run(["getent", "hosts", "also-known-as"]).exit_code == 0
    shared = engine.api.inspect_container(containers["sidecar"][0].id)["HostConfig"]["NetworkMode"]
    assert shared.removeprefix("container:") in {container.id for container in containers["replicated"]}


def test_a_changed_replica_count_touches_only_that_service(deployment: Deployment, engine: docker.DockerClient) -> None:
    kept = {one.id for one in running(engine, STAGING)}
    overlay(deployment, STAGING, {"services": {"replicated": {"deploy": {"replicas": 4}}}})
    deployment.done("up", STAGING)
    now = {one.id for one in running(engine, STAGING)}
    assert kept < now
    assert len(now - kept) == 1


def test_a_renamed_service_takes_over_its_volume_without_two_of_them_running(
    deployment: Deployment, engine: docker.DockerClient
) -> None:
    path = deployment.folder / "features.yaml"
    path.write_text(path.read_text().replace("  keeper:", "  caretaker:"))
    assert "stopped, since caretaker takes over" in deployment.done("up", STAGING)
    services = {one.labels["bulkhead.service"] for one in running(engine, STAGING)}
    assert "caretaker" in services
    assert "keeper" not in services


def test_a_volume_of_somebody_else_is_not_taken(deployment: Deployment, engine: docker.DockerClient) -> None:
    engine.volumes.create("e2e-somebodys", labels={"bulkhead.environment": "e2e-none"})
    kept = (deployment.folder / f"Pulumi.{DEV}.yaml").read_text()
    try:
        overlay(deployment, DEV, {"volumes": {"db-data": {"name": "e2e-somebodys"}}})
        refused(deployment.make("preview", DEV), "e2e-somebodys", "external: true")
    finally:
        (deployment.folder / f"Pulumi.{DEV}.yaml").write_text(kept)
        engine.volumes.get("e2e-somebodys").remove()


def test_a_label_or_another_length_of_a_secret_leaves_volumes_and_secrets_as_they_are(
    deployment: Deployment, engine: docker.DockerClient
) -> None:
    before = fingerprint(engine)
    kept = (deployment.folder / f"Pulumi.{DEV}.yaml").read_text()
    try:
        overlay(
            deployment,
            DEV,
            {
                "volumes": {"db-data": {"labels": {"team": "shop"}}},
                "secrets": {"db_password": {"external": True, "x-bulkhead": {"generate": 48}}},
            },
        )
        deployment.done("up", DEV)
    finally:
        (deployment.folder / f"Pulumi.{DEV}.yaml").write_text(kept)
    assert fingerprint(engine) == before


def test_preview_stops_a_ledger_that_lowers_prods_tier_or_drops_it(deployment: Deployment) -> None:
    ledger = deployment.folder / "Pulumi.host.yaml"
    kept = ledger.read_text()
    lowered, dropped = json.loads(json.dumps(LEDGER)), json.loads(json.dumps(LEDGER))
    prod = lowered["bulkhead:environments"][PROD]
    prod |= {"tier": "best-effort", "limits": {"cpus": "50%", "memory": "20%"}}
    del prod["reservations"], dropped["bulkhead:environments"][PROD]
    try:
        for changed, remedy in ((lowered, "BULKHEAD_CONFIRM"), (dropped, "make down")):
            ledger.write_text(yaml.safe_dump({"config": changed}))
            refused(deployment.make("preview", "host"), PROD, remedy)
    finally:
        ledger.write_text(kept)


def test_a_full_disk_for_the_state_is_explained(deployment: Deployment, tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(tmp_path)], check=True)
    try:
        ran = deployment.make("preview", "host", XDG_STATE_HOME=str(tmp_path))
        refused(ran, "space", str(tmp_path))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_down_of_a_protected_environment_asks_for_its_name(deployment: Deployment, engine: docker.DockerClient) -> None:
    before = fingerprint(engine)
    refused(deployment.make("down", PROD), PROD, "BULKHEAD_CONFIRM")
    assert fingerprint(engine) == before


def test_down_leaves_only_prods_volumes(deployment: Deployment, engine: docker.DockerClient) -> None:
    deployment.done("down", BULKHEAD_CONFIRM=PROD)
    left = ours(engine)
    assert not left["containers"]
    assert not left["networks"]
    assert not left["images"]
    assert {volume.name for volume in left["volumes"]} == {f"{PROD}-db-data", f"{PROD}-cache-data"}
    assert not [group for name in (PROD, DEV, STAGING) for group in groups(name)]


def test_up_again_finds_prods_orders(deployment: Deployment) -> None:
    deployment.done("up", "host")
    deployment.done("up", PROD)
    assert eventually(partial(has_order, PROD))
    deployment.done("down", BULKHEAD_CONFIRM=PROD)

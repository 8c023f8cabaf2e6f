"""The documentation is held to the code: its examples run, its commands and files exist, its claims hold."""

import hashlib
import json
import re
import tomllib
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import pulumi
import pytest
from pulumi.runtime.mocks import MockMonitor

from components.backup import Backups, repository_key
from settings.host import Disk, HostFacts
from settings.ledger import Tier

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))

# --- docs/components.md: each example is a program -----------------------------------------------------------

EXAMPLES: dict[str, str] = dict(
    re.findall(
        r"^## (\w+)\n.*?^```python\n(.*?)^```", (ROOT / "docs/components.md").read_text(), re.MULTILINE | re.DOTALL
    )
)
COMMAND = "command:local:Command"
CONTAINER = "docker:index/container:Container"
NETWORK = "docker:index/network:Network"
VOLUME = "docker:index/volume:Volume"
IMAGE = "docker:index/remoteImage:RemoteImage"


SPEED = {"read_bps": 800_000_000, "write_bps": 400_000_000, "read_iops": 30_000, "write_iops": 20_000}


class Engine(pulumi.runtime.Mocks):
    """Records what would be registered, as `type::name`. `references`: outputs of other stacks."""

    def __init__(self, references: Mapping[str, Any]) -> None:
        self.seen: dict[str, pulumi.runtime.MockResourceArgs] = {}
        self.references = references

    def new_resource(self, args: pulumi.runtime.MockResourceArgs) -> tuple[str | None, dict[Any, Any]]:
        self.seen[f"{args.typ}::{args.name}"] = args
        digest = hashlib.sha256(args.name.encode()).hexdigest()
        told: dict[str, Any] = {"imageId": f"sha256:{digest}"} if args.typ == IMAGE else {}
        if args.typ == "command:local:Command":
            told = {"stdout": json.dumps(SPEED) if args.name.startswith("device") else digest}
        if args.typ == "pulumi:pulumi:StackReference":
            told = {"outputs": self.references.get(args.inputs["name"].rpartition("/")[2], {}), "secretOutputNames": []}
        return digest, dict(args.inputs) | told

    def call(self, _args: pulumi.runtime.MockCallArgs) -> tuple[dict[Any, Any], list[tuple[str, str]] | None]:
        return {}, None


class Protection(MockMonitor):
    """Notes which resources are protected, which mocks are not told."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.protected: set[str] = set()

    def RegisterResource(self, request: Any) -> Any:  # noqa: N802 - the protocol's name
        if request.protect:
            self.protected.add(request.name)
        return super().RegisterResource(request)


class Ran(NamedTuple):
    """What a program registers: resources as `type::name`, and the names of the protected ones."""

    seen: Mapping[str, pulumi.runtime.MockResourceArgs]
    protected: set[str]

    def all(self, kind: str) -> dict[str, Any]:
        """Inputs of every resource of a type, by name."""
        return {key.split("::")[1]: one.inputs for key, one in self.seen.items() if key.startswith(f"{kind}::")}


def run(program: Callable[[], object], stack: str = "docs", references: Mapping[str, Any] = {}) -> Ran:
    """What a program registers with Pulumi's mocks."""
    engine = Engine(references)
    monitor = Protection(engine)
    pulumi.runtime.set_mocks(engine, project="docs", stack=stack, monitor=monitor)

    @pulumi.runtime.test
    def registered() -> None:
        program()

    registered()
    return Ran(engine.seen, monitor.protected)


def slice_(ran: Ran) -> None:
    script = ran.all(COMMAND)["dev-cgroup-local"]["create"]
    memory = int(FACTS.memory * 0.3) // 4096 * 4096
    for line in ("CPUWeight=idle", f"MemoryMax={memory}", "MemorySwapMax=0", "TasksMax=4096"):
        assert line in script.splitlines()


def device(ran: Ran) -> None:
    script = ran.all(COMMAND)["device-speed-local"]["create"]
    assert script.startswith(f"python3 - /var/lib/docker 8:0 {10**12} <<")


def firewall(ran: Ran) -> None:
    script = ran.all(COMMAND)["firewall-table-local"]["create"]
    assert "ip saddr 10.82.0.0/16 jump from_dev" in script
    assert "nft --check --file" in script
    assert f"ct count over {262_144 // 2 // 3 // 16} " in script


def agent(ran: Ran) -> None:
    script = ran.all(COMMAND)["agent-program-local"]["create"]
    assert "/usr/local/lib/bulkhead/host.pyz" in script
    assert '"cgroup_parent": "/bulkhead-dev"' in script
    assert '"outward": false' in script


def promises(ran: Ran) -> None:
    assert ran.all("bulkhead:index:Promises")["promises"] == {"outputs": {}}


def network(ran: Ran) -> None:
    inputs = ran.all(NETWORK)["prod-backend-bridge"]
    assert inputs["name"] == "prod-backend"
    assert inputs["internal"] is True
    assert inputs["ipamConfigs"] == [{"subnet": "10.81.44.0/24"}]
    assert {"label": "bulkhead.environment", "value": "prod"} in inputs["labels"]


def volume(ran: Ran) -> None:
    assert {name: inputs["name"] for name, inputs in ran.all(VOLUME).items()} == {
        "prod-db-data": "prod-db-data",
        "dev-db-data": "dev-db-data",
    }
    assert ran.protected == {"prod-db-data"}


def image(ran: Ran) -> None:
    images = ran.all(IMAGE)
    assert images["dev-proxy-pull"]["name"] == "nginx:1.27"
    assert images["dev-proxy-pull"]["keepLocally"] is True
    built = next(inputs for name, inputs in images.items() if name.startswith("dev-web-"))
    assert re.fullmatch(r"bulkhead/dev-web:[0-9a-f]{12}", built["name"])
    assert ran.all("bulkhead:index:Image")["dev-web"]["build"]["cgroupParent"] == "/bulkhead-dev"
    assert "build" not in built
    assert "keepLocally" not in built


def secret(ran: Ran) -> None:
    commands = ran.all(COMMAND)
    assert list(commands) == ["prod-db-password-generated"] == list(ran.protected)
    assert "head -c 32 /dev/urandom" in commands["prod-db-password-generated"]["create"]


def backup_job(ran: Ran) -> None:
    (job,) = ran.all("bulkhead:index:BackupJob").values()
    assert job == {
        "volume": "prod-db-data",
        "service": "db",
        "engine": "postgres",
        "schedule": "03:00",
        "targets": ["disk"],
    }


@pytest.mark.parametrize("other", [{"password": "another"}, {"refresh": {"db": {"mask": "delete from people"}}}])
def test_whatever_changes_of_what_the_host_is_told_of_backups_is_a_change_that_is_deployed(
    other: dict[str, Any],
) -> None:
    """An output alone is none: a new key or mask would be set, and not there."""

    def digest(**document: Any) -> str:
        ran = run(lambda: Backups("prod-backups", {"jobs": pulumi.Output.from_input({}), **document}))
        return str(ran.all("bulkhead:index:Backups")["prod-backups"]["digest"])

    told = {"password": "key", "refresh": {}}
    assert digest(**told) == digest(**told)
    assert digest(**told) != digest(**{**told, **other})


def test_a_key_that_was_generated_stays_where_one_is_given() -> None:
    """It is protected, as prod's data is: the engine would refuse to take it away."""
    known: list[str] = []

    def program() -> object:
        key = repository_key("prod-backup-key", Tier.PROTECTED, "given", pulumi.ResourceOptions())
        return key.value.apply(known.append)

    assert list(run(program).all(COMMAND)) == ["prod-backup-key-generated"]
    assert known == ["given"]


def backups(ran: Ran) -> None:
    (one,) = ran.all("bulkhead:index:Backups").values()
    assert set(one) == {"digest"}
    assert len(one["digest"]["value"]) == 64  # a secret


def service(ran: Ran) -> None:
    containers = ran.all(CONTAINER)
    assert sorted(containers) == ["dev-api-1", "dev-api-2"]
    inputs = containers["dev-api-1"]
    assert "name" not in inputs
    assert inputs["cgroupParent"] == "/bulkhead-dev"
    assert inputs["securityOpts"] == ["no-new-privileges:true"]
    dropped = {"AUDIT_WRITE", "MKNOD", "NET_RAW", "SETFCAP", "SETPCAP", "SYS_CHROOT"}
    assert {name.removeprefix("CAP_") for name in inputs["capabilities"]["drops"]} == dropped
    assert inputs["logOpts"] == {"max-size": "10m", "max-file": "3"}
    assert inputs["memory"] == inputs["memorySwap"] == 128
    assert inputs["ports"] == [{"internal": 8000, "protocol": "tcp", "ip": "127.0.0.1"}]
    assert inputs["networksAdvanced"] == [{"name": "dev-backend", "aliases": ["api"]}]
    assert inputs["wait"] is True
    assert inputs["uploads"][0]["file"] == "/run/secrets/token"


def files(ran: Ran) -> None:
    assert list(ran.all(VOLUME)) == ["dev-api-files-0"]
    carrier = ran.all(CONTAINER)["dev-api-files-carrier"]
    assert carrier["start"] is False
    assert carrier["networkMode"] == "none"
    assert carrier["capabilities"] == {"drops": ["ALL"]}
    assert carrier["uploads"][0]["file"] == "/run/secrets/token"


def environment(ran: Ran) -> None:
    started = {name for name, inputs in ran.all(CONTAINER).items() if inputs.get("start") is not False}
    assert started == {f"dev-{name}-1" for name in ("api", "cache", "db", "web", "worker")}
    networks = {inputs["name"]: inputs["internal"] for inputs in ran.all(NETWORK).values()}
    assert networks == {"dev-frontend": False, "dev-backend": True}
    named = {inputs["name"] for inputs in ran.all(VOLUME).values() if "name" in inputs}
    assert named == {"dev-db-data", "dev-cache-data"}
    assert all(inputs["name"].startswith("bulkhead/dev-") for inputs in ran.all(IMAGE).values())
    assert not ran.protected


def host_command(ran: Ran) -> None:
    inputs = ran.all(COMMAND)["forwarding-local"]
    assert inputs["create"] == inputs["update"] == "sysctl -w net.ipv4.ip_forward=1"
    assert inputs["interpreter"][-2:] == ["/bin/sh", "-euc"]


REGISTERS: dict[str, Callable[[Ran], None]] = {
    "Slice": slice_,
    "Device": device,
    "Firewall": firewall,
    "Agent": agent,
    "Promises": promises,
    "Network": network,
    "Volume": volume,
    "Image": image,
    "Secret": secret,
    "Service": service,
    "Files": files,
    "BackupJob": backup_job,
    "Backups": backups,
    "Environment": environment,
    "HostCommand": host_command,
}


@pytest.mark.parametrize("component", REGISTERS)
def test_the_example_registers_what_its_text_says(component: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("settings.host.facts", lambda _: FACTS)
    program = compile(EXAMPLES[component], "docs/components.md", "exec")
    REGISTERS[component](run(lambda: exec(program, {"__name__": "__main__"})))  # noqa: S102 - our own pages


def test_every_component_has_an_example() -> None:
    classes = {
        name
        for file in (ROOT / "components").glob("*.py")
        for name in re.findall(r"^class (\w+)\(pulumi\.ComponentResource\)", file.read_text(), re.MULTILINE)
    }
    assert classes == set(EXAMPLES) == set(REGISTERS)


# --- docs/outputs.schema.json ---------------------------------------------------------------------------------

FACTS = HostFacts(
    address="unix:///var/run/docker.sock",
    server_version="20.10.24+dfsg1",
    cpus=12,
    memory=16 * 2**30,
    disk=10**12,
    disk_free=10**12,
    data_root="/var/lib/docker",
    cgroup_driver="systemd",
    cgroup_version=2,
    security_options=(),
    live_restore=True,
    kernel="6.1.0",
    system="Debian GNU/Linux 12 (bookworm)",
    systemd=252,
    controllers=frozenset({"cpu", "memory", "pids", "io"}),
    recursive_memory=True,
    connections=(1000, 262_144),
    device=Disk(number="8:0", name="sda", size=10**12, schedulers=("mq-deadline",)),
)


def outputs(
    stack: str, monkeypatch: pytest.MonkeyPatch, references: Mapping[str, Any] = {}, *, preview: bool = False
) -> dict[str, Any]:
    """What a stack of this checkout exports, deployed to mocks."""
    exported: dict[str, Any] = {}
    known: dict[str, Any] = {}
    module = import_module("stacks.host" if stack == "host" else "stacks.environment")

    def program() -> pulumi.Output[None]:
        module.build()
        return pulumi.Output.from_input(exported).apply(known.update)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(pulumi, "export", exported.__setitem__)
    monkeypatch.setattr("settings.host.facts", lambda _: FACTS)
    monkeypatch.setattr("settings.host.missing_images", lambda *_: {})
    monkeypatch.setattr(pulumi.runtime, "is_dry_run", lambda: preview)
    run(program, stack, references)
    return known


def test_what_the_stacks_put_out_is_what_the_schema_says(monkeypatch: pytest.MonkeyPatch) -> None:
    schema = json.loads((ROOT / "docs/outputs.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    host = outputs("host", monkeypatch)
    jsonschema.validate(host, schema | {"$ref": "#/$defs/host"})
    assert set(host["environments"]) == {"prod", "dev"}
    for environment in host["environments"]:
        told = outputs(environment, monkeypatch, {"host": host})
        jsonschema.validate(told, schema | {"$ref": "#/$defs/environment"})
        assert set(told["services"]) == {"api", "cache", "db", "web", "worker"}


def test_a_deploy_puts_out_what_the_host_knows_of_backups_and_a_preview_what_is_deployed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def told(known: Mapping[str, Any] | None, *, preview: bool = False) -> dict[str, Any]:
        if known is not None:
            monkeypatch.setenv("BULKHEAD_BACKUPS", json.dumps(known))
        references = {"host": host, "prod": {"backups": deployed}}
        put_out = outputs("prod", monkeypatch, references, preview=preview)["backups"]
        return {key: one["when_deployed"] for key, one in put_out.items()}

    host, deployed = outputs("host", monkeypatch), {}
    assert told(None) == {"db-data": {}, "cache-data": {}}  # nobody has asked, as at the first deploy
    known = {"prod-db-data": {"last_success": 1000.9, "last_verified": 900}, "prod-cache-data": {"last_success": 800.0}}
    now = {"db-data": {"last_success": 1000, "last_verified": 900}, "cache-data": {"last_success": 800}}
    assert told(known) == now
    assert told(known, preview=True) == {"db-data": {}, "cache-data": {}}
    deployed = {key: {"when_deployed": at} for key, at in now.items()}
    assert told({}, preview=True) == now
    assert told({}) == now  # the host could not be asked


# --- Every page: commands and files exist --------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_make_command_exists(page: Path) -> None:
    code = re.findall(r"```.*?\n(.*?)```|`([^`\n]+)`", page.read_text(), re.DOTALL)
    named = {name for text in code for name in re.findall(r"\bmake ([a-z-]+)", "\n".join(text))}
    assert named <= TARGETS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_linked_file_exists(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_named_in_code_exists(page: Path) -> None:
    folders = "cli|components|docs|engine|examples|policies|settings|stacks|tests"
    named = set(re.findall(rf"`((?:{folders})/[\w./-]+\.\w+)`", page.read_text()))
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_changelog_has_the_current_version_on_top() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    versions = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] in {version, "Unreleased"}
    assert version in versions


DECISIONS = sorted((ROOT / "docs/adr").glob("*.md"))


@pytest.mark.parametrize("decision", DECISIONS, ids=lambda decision: decision.stem)
def test_a_decision_says_context_decision_and_consequences_in_a_page(decision: Path) -> None:
    text = decision.read_text()
    number = int(decision.name[:4])
    assert text.startswith(f"# {number}. ")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ["Context", "Decision", "Consequences"]
    assert len(text.splitlines()) <= 40


def test_decisions_are_numbered_without_a_gap() -> None:
    assert [int(decision.name[:4]) for decision in DECISIONS] == list(range(1, len(DECISIONS) + 1))

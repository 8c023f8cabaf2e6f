"""Compose files become typed models through the real Compose, or an error that names file, line, service and key.
One case per behaviour: a compose file in, the exact message or model out."""

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from settings import compose_cli
from settings.compose import Project, Service, find_compose, read
from settings.compose_cli import refusal
from settings.errors import SettingsError
from settings.model import Dependency, carried, kind, seconds
from settings.remedies import LOST, REMEDIES
from settings.sources import Sources

DATA = Path(__file__).parent / "data"
SCHEMA: Mapping[str, list[str]] = json.loads((DATA / "compose-keys-2.35.1.json").read_text(encoding="utf-8"))
Write = Callable[..., list[Path]]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def files(*texts: str, **named: str) -> list[Path]:
        numbered = {f"compose{index or ''}.yaml": text for index, text in enumerate(texts)}
        for name, text in {**{name.replace("__", "."): text for name, text in named.items()}, **numbered}.items():
            (tmp_path / name).write_text(text, encoding="utf-8")
        return [tmp_path / name for name in numbered]

    return files


def refused(files: list[Path], **options: Any) -> str:
    with pytest.raises(SettingsError) as error:
        read(files, environment="prod", **options)
    return str(error.value)


def plain(project: Project) -> Any:
    return json.loads(project.model_dump_json(exclude_defaults=True, exclude={"files", "variable_files"}))


# What every key becomes


def test_every_key_that_is_carried_over_arrives() -> None:
    folder = DATA / "compose"
    project = read([folder / "everything.yaml"], environment="prod", variables={"NAME": "you"})
    assert plain(project) == {
        "environment": "prod",
        "services": {
            "api": {
                "image": "registry.example/api:1",
                "build": {
                    "context": str(folder / "app"),
                    "dockerfile": "Containerfile",
                    "args": {"LEVEL": "2"},
                    "target": "run",
                },
                "command": ["serve", "--port", "$PORT"],
                "entrypoint": ["/sbin/tini", "--"],
                "environment": {"A": "1", "B": "2", "EQ": "="},
                "ports": [
                    {"target": 80, "published": 8080},
                    {"target": 9000, "published": 9000, "host_ip": "127.0.0.1", "protocol": "udp"},
                    {"target": 9001, "published": 9001, "host_ip": "127.0.0.1", "protocol": "udp"},
                    {"target": 70},
                ],
                "expose": ["3000"],
                "networks": {"backend": {"aliases": ["api.internal"], "ipv4_address": "10.81.3.5"}, "default": {}},
                "volumes": [
                    {"type": "volume", "source": "data", "target": "/data", "read_only": True},
                    {"type": "bind", "source": str(folder / "app"), "target": "/src", "create_host_path": True},
                    {
                        "type": "bind",
                        "source": "/srv/x",
                        "target": "/x",
                        "create_host_path": True,
                        "propagation": "rslave",
                    },
                    {"type": "tmpfs", "target": "/t", "tmpfs_size": 10 * 2**20, "tmpfs_mode": 0o700},
                    {"type": "volume", "source": "data", "target": "/d2", "nocopy": True, "subpath": "a"},
                ],
                "tmpfs": ["/run:size=64m"],
                "depends_on": {
                    "db": {"condition": "service_healthy"},
                    "init": {"condition": "service_completed_successfully", "restart": True},
                },
                "healthcheck": {
                    "test": ["CMD-SHELL", "curl localhost"],
                    "interval": "1m30s",
                    "timeout": "1.5s",
                    "retries": 3,
                    "start_period": "1m0s",
                    "start_interval": "1s",
                },
                "deploy": {
                    "update_config": {"order": "start-first"},
                    "resources": {
                        "limits": {"cpus": 0.5, "memory": 64 * 2**20},
                        "reservations": {"cpus": 0.25, "memory": 32 * 2**20},
                    },
                },
                "restart": "on-failure:3",
                "user": "1000:1000",
                "working_dir": "/srv",
                "read_only": True,
                "cap_add": ["NET_BIND_SERVICE"],
                "cap_drop": ["ALL"],
                "security_opt": ["no-new-privileges:true"],
                "stop_signal": "SIGINT",
                "stop_grace_period": 90.0,
                "labels": {"com.example.a": "1"},
                "secrets": [
                    {"source": "token", "target": "/run/secrets/token"},
                    {"source": "tls", "target": "/run/secrets/key.pem", "uid": "1", "gid": "2", "mode": 0o400},
                ],
                "configs": [{"source": "motd", "target": "/motd"}, {"source": "motd", "target": "/etc/motd"}],
                "ulimits": {"nofile": {"soft": 100, "hard": 100}, "nproc": {"soft": 1, "hard": 2}},
                "sysctls": {"net.core.somaxconn": "1024"},
                "init": True,
                "logging": {"driver": "json-file", "options": {"max-size": "10m", "max-file": "3"}},
                "extra_hosts": [{"host": "gateway", "ip": "10.81.0.1"}, {"host": "six", "ip": "::1"}],
                "dns": ["10.81.0.53"],
                "hostname": "api",
                "shm_size": 64 * 2**20,
                "devices": [{"source": "/dev/null", "target": "/dev/n", "permissions": "rw"}],
                "platform": "linux/amd64",
                "runtime": "runc",
                "stdin_open": True,
                "tty": True,
                "privileged": True,
                "ipc": "host",
                "pid": "host",
            },
            "db": {"image": "db", "network_mode": "none", "healthcheck": {"disable": True}},
            "init": {"image": "init", "networks": {"default": {"aliases": ["setup"]}}},
        },
        "networks": {
            "backend": {
                "internal": True,
                "labels": {"a": "b"},
                "subnet": "10.81.3.0/24",
                "x_bulkhead": {"egress": True},
            },
            "default": {},
        },
        "volumes": {
            "data": {"driver_opts": {"type": "none", "o": "bind", "device": "/srv/data"}, "labels": {"a": "b"}}
        },
        "secrets": {
            "tls": {"file": str(folder / "tls.pem")},
            "token": {"external": True, "x_bulkhead": {"generate": 32}},
        },
        "configs": {"motd": {"content": "hello you"}},
        "notes": [
            "service init: container_name 'setup' became a network alias: containers are named by the deploy, "
            "so that a new one can start before the old one stops"
        ],
    }


def test_every_key_that_is_not_carried_over_is_named() -> None:
    with pytest.raises(SettingsError) as error:
        read([DATA / "compose" / "refused.yaml"], environment="prod")
    found = [error.value, *error.value.others]
    assert {fault.problem for fault in found} == {"not carried over"}
    named = {
        kind(("services", "api", *_words(fault.key)) if fault.service else tuple(_words(fault.key))) for fault in found
    }
    assert named == set(REMEDIES)
    lines = [int(fault.file.removeprefix("refused.yaml:")) for fault in found]
    assert lines == sorted(lines)


def _words(key: str) -> list[str]:
    return [word.partition("[")[0] for word in key.split(".")]


def _open_paths() -> list[str]:
    """The mappings of the schema below which keys are carried one by one."""
    return [
        path
        for path in SCHEMA
        if path and all(".".join(path.split(".")[:length]) not in REMEDIES for length in range(2, path.count(".") + 2))
    ]


@pytest.mark.parametrize("path", _open_paths())
def test_every_key_of_the_schema_is_carried_or_has_a_remedy(path: str) -> None:
    # The long form `external: {name: …}` is one that Compose rewrites.
    keys = {f"{path}.{key}" for key in SCHEMA[path] if not path.endswith((".external", ".env_file", ".extends"))}
    assert not keys - REMEDIES.keys() - {f"{path}.{key}" for key in carried(path)}


def test_no_remedy_is_for_a_key_that_the_schema_does_not_have() -> None:
    known = {f"{path}.{key}" for path, keys in SCHEMA.items() for key in keys}
    assert not REMEDIES.keys() - known


def test_a_remedy_for_a_key_that_is_carried_is_about_its_other_values() -> None:
    both = [key for key in REMEDIES if key.rpartition(".")[2] in carried(key.rpartition(".")[0])]
    assert sorted(both) == ["network.driver", "service.deploy.mode", "service.volumes.type", "volume.driver"]


def test_keys_that_compose_loses_are_looked_for_in_the_files() -> None:
    assert REMEDIES.keys() >= LOST


# Compose files as people write them

REAL = {
    "wordpress": ["db", "wordpress"],
    "nextcloud": (
        "nextcloud.yaml:8: service db: volumes[0].bind.selinux: 'Z': not carried over. "
        "Label the files on the host instead (chcon); remove z or Z.\n"
        "nextcloud.yaml:18: service app: links: not carried over. "
        "Services on a common network reach each other by name: use networks and depends_on.\n"
        "nextcloud.yaml:19: service app: volumes[0].bind.selinux: 'z': not carried over. "
        "Label the files on the host instead (chcon); remove z or Z."
    ),
    "gitea": ["db", "server"],
    "monitoring": (
        "monitoring.yaml:29: service grafana: mem_limit: '536870912': not carried over. "
        "Write it as deploy.resources.limits.memory."
    ),
}


@pytest.mark.parametrize("application", REAL)
def test_a_compose_file_as_people_write_it_is_read_or_says_what_to_change(application: str) -> None:
    try:
        outcome: object = read([DATA / "compose" / f"{application}.yaml"], environment="dev").order()
    except SettingsError as error:
        outcome = str(error)
    assert outcome == REAL[application]


def test_what_policy_judges_is_carried_as_it_stands(write: Write) -> None:
    text = (DATA / "compose" / "monitoring.yaml").read_text(encoding="utf-8").replace("    mem_limit: 512m\n", "")
    services = read(write(text), environment="dev").services
    assert services["cadvisor"].privileged
    assert (services["node-exporter"].pid, services["node-exporter"].network_mode) == ("host", "host")
    assert services["node-exporter"].volumes[0].propagation == "rslave"
    assert services["node-exporter"].cap_add == ("SYS_TIME",)


# What is refused

WEB = "services:\n  web:\n    image: nginx\n"
REFUSED = {
    "broken YAML": (
        "services:\n  web: {image: nginx\n",
        "compose.yaml:3: not valid YAML: did not find expected ',' or '}'. "
        "Correct the line (indentation, quotes and brackets are the usual causes).",
    ),
    "a key written twice": (
        WEB + "    image: other\n",
        "compose.yaml:4: image: written twice in the same mapping. Keep one: YAML would silently take the last.",
    ),
    "an unknown key of a service": (
        WEB + "    imge: x\n",
        "compose.yaml:4: service web: imge: unknown key. Did you mean 'image'?",
    ),
    "an unknown key below a service": (
        WEB + "    healthcheck: {tset: x}\n",
        "compose.yaml:4: service web: healthcheck.tset: unknown key. Did you mean 'test'?",
    ),
    "an unknown section": (
        "servces: {}\n",
        "compose.yaml:1: servces: unknown key. Did you mean 'services'?",
    ),
    "the cgroup parent": (
        WEB + "    cgroup_parent: /x\n",
        "compose.yaml:4: service web: cgroup_parent: '/x': not carried over. "
        "Bulkhead sets the cgroup parent itself: it is the environment's slice. Remove the key.",
    ),
    "a value of the wrong kind": (
        WEB + "    ports: 80\n",
        "compose.yaml:4: service web: ports: '80': must be a list. Correct the value.",
    ),
    "a memory size that is none": (
        WEB + "    deploy: {resources: {limits: {memory: 12XB}}}\n",
        "compose.yaml:4: service web: deploy.resources.limits.memory: '12XB': invalid suffix: 'xb'. Correct the value.",
    ),
    "a number that is none": (
        WEB + "    deploy: {replicas: many}\n",
        "compose.yaml:4: service web: deploy.replicas: 'many': strconv.Atoi: parsing \"many\": invalid syntax. "
        "Correct the value.",
    ),
    "a service without image and build": (
        "services:\n  web: {command: x}\n",
        "compose.yaml:2: service web: image: neither image nor build. Name an image, or the folder to build one from.",
    ),
    "a missing network": (
        WEB + "    networks: [front]\n",
        "compose.yaml:4: service web: networks: 'front': no such network. "
        "Define it under the top-level networks:, or correct the name.",
    ),
    "a missing volume": (
        WEB + '    volumes: ["data:/data"]\n',
        "compose.yaml:4: service web: volumes: 'data': no such volume. "
        "Define it under the top-level volumes:, or correct the name.",
    ),
    "a missing secret": (
        WEB + "    secrets: [token]\n",
        "compose.yaml:4: service web: secrets: 'token': no such secret. "
        "Define it under the top-level secrets:, or correct the name.",
    ),
    "a missing config": (
        WEB + "    configs: [motd]\n",
        "compose.yaml:4: service web: configs: 'motd': no such config. "
        "Define it under the top-level configs:, or correct the name.",
    ),
    "a missing service": (
        WEB + "    depends_on: [db]\n",
        "compose.yaml:4: service web: depends_on: 'db': no such service, or its profile is not enabled. "
        "Correct the name, enable the profile, or write required: false.",
    ),
    "a dependency on a service whose profile is off": (
        WEB + "    depends_on: [db]\n  db: {image: db, profiles: [full]}\n",
        "compose.yaml:4: service web: depends_on: 'db': no such service, or its profile is not enabled. "
        "Correct the name, enable the profile, or write required: false.",
    ),
    "services that wait for each other": (
        WEB + "    depends_on: [db]\n  db: {image: db, depends_on: [web]}\n",
        "compose.yaml:5: service db: depends_on: 'db -> web -> db': services wait for each other. "
        "Remove one of these dependencies.",
    ),
    "a service that waits for itself": (
        WEB + "    depends_on: [web]\n",
        "compose.yaml:4: service web: depends_on: 'web -> web': services wait for each other. "
        "Remove one of these dependencies.",
    ),
    "a variable without a value": (
        WEB + "    hostname: a-${NOT_SET_HERE}\n",
        "compose.yaml:4: ${NOT_SET_HERE}: the variable has no value, and Compose would put nothing in its place. "
        "Set it under bulkhead:variables or in the environment, or write ${NOT_SET_HERE:-default}.",
    ),
    "a required variable without a value": (
        WEB + '    hostname: "${NOT_SET_HERE:?name the host}"\n',
        "compose.yaml:4: service web: hostname: '${NOT_SET_HERE:?name the host}': variable NOT_SET_HERE has "
        "no value: name the host. Set it under bulkhead:variables, or in the environment.",
    ),
    "a variable that cannot be read": (
        WEB + '    hostname: "${NAME"\n',
        "compose.yaml:4: service web: hostname: '${NAME': not a variable that Compose can read. "
        "Write ${NAME} or ${NAME:-default}, and $$ for a dollar sign.",
    ),
    "a build context that is not there": (
        "services:\n  web:\n    build: ./nowhere\n",
        "compose.yaml:3: service web: build: the build context {folder}/nowhere does not exist. Correct the path.",
    ),
    "a build context without Dockerfile": (
        "services:\n  web:\n    build: .\n",
        "compose.yaml:3: service web: build: {folder}/Dockerfile does not exist. Correct context or dockerfile.",
    ),
    "a build context elsewhere": (
        "services:\n  web:\n    build: https://git.example/app.git\n",
        "compose.yaml:3: service web: build: the build context is not a local folder. "
        "Check the repository out and name its folder.",
    ),
    "an anonymous volume": (
        WEB + "    volumes: [/data]\n",
        "compose.yaml:4: service web: volumes[0]: an anonymous volume loses its data with the container. "
        "Name it, as in data:/data, or use a tmpfs.",
    ),
    "a port that the engine would choose from a range": (
        WEB + '    ports: [{target: 80, published: "8000-8010"}]\n',
        "compose.yaml:4: service web: ports[0].published: '8000-8010': a range leaves the choice of port to the "
        "engine. Publish one port per entry.",
    ),
    "a port that several replicas would share": (
        WEB + '    ports: ["8080:80"]\n    deploy: {replicas: 2}\n',
        "compose.yaml:4: service web: ports[0]: 8080: 2 replicas cannot publish the same port of the host. "
        "Publish it from one service in front of them, or set deploy.replicas to 1.",
    ),
    "several address pools": (
        WEB + "    networks: [n]\nnetworks:\n  n: {ipam: {config: [{subnet: 10.0.1.0/24}, {subnet: 10.0.2.0/24}]}}\n",
        "compose.yaml:6: networks.n: several address pools. Write one subnet, or none.",
    ),
    "a generated secret with another source": (
        WEB + "    secrets: [s]\nsecrets:\n  s: {environment: HOME, x-bulkhead: {generate: 32}}\n",
        "compose.yaml:6: secrets.s: a generated secret has no other source. Write external: true beside it.",
    ),
    "a generated secret that is too short": (
        WEB + "    secrets: [s]\nsecrets:\n  s: {external: true, x-bulkhead: {generate: 4}}\n",
        "compose.yaml:6: secrets.s.x-bulkhead.generate: 4: must be greater than or equal to 16",
    ),
    "an extension of a network that does not exist": (
        WEB + "    networks: [n]\nnetworks:\n  n: {x-bulkhead: {ingress: true}}\n",
        "compose.yaml:6: networks.n.x-bulkhead.ingress: True: not supported. "
        "A network's x-bulkhead has egress: true or false.",
    ),
    "an extension of a service": (
        WEB + "    x-bulkhead: {egress: true}\n",
        "compose.yaml:4: service web: x-bulkhead.egress: True: not supported. "
        "A service's x-bulkhead has exempt: a list of {rule, reason, owner, expires}.",
    ),
    "an exemption without a reason": (
        WEB + "    x-bulkhead: {exempt: [{rule: non-root, reason: no, owner: ann, expires: 2027-01-31}]}\n",
        "compose.yaml:4: service web: x-bulkhead.exempt[0].reason: 'no': a reason of at least 15 characters is needed. "
        "Write why the rule cannot be kept here.",
    ),
    "an exemption that never ends": (
        WEB
        + "    x-bulkhead: {exempt: [{rule: non-root, reason: opens port 80 as root, owner: ann, expires: never}]}\n",
        "compose.yaml:4: service web: x-bulkhead.exempt[0].expires: 'never': not a date. "
        "Write the last day on which it holds, as in 2027-01-31.",
    ),
    "a volume both backed up and ephemeral": (
        WEB
        + "    volumes: [data:/data]\n"
        + "volumes: {data: {x-bulkhead: {ephemeral: true, backup: {engine: files, schedule: daily}}}}\n",
        "compose.yaml:5: volumes.data.x-bulkhead: both a backup and ephemeral. "
        "Decide whether its data may be lost, and keep one of them.",
    ),
    "an extension where none is read": (
        WEB + "    deploy: {x-bulkhead: {a: 1}}\n",
        "compose.yaml:4: service web: deploy.x-bulkhead: not read at this place. "
        "Write it in a network (egress) or a secret (generate).",
    ),
    "an extension of the whole file": (
        WEB + "x-bulkhead: {a: 1}\n",
        "compose.yaml:4: x-bulkhead: not read at this place. Write it in a network (egress) or a secret (generate).",
    ),
    "a value that is none of those allowed": (
        WEB + "    deploy: {update_config: {order: sideways}}\n",
        "compose.yaml:4: service web: deploy.update_config.order: 'sideways': must be one of the "
        'following: "start-first", "stop-first". Correct the value.',
    ),
    "an entry of a list that is none": (
        WEB + "    networks: {n: {aliases: [a, {b: 1}]}}\nnetworks: {n: }\n",
        "compose.yaml:4: service web: networks.n.aliases[1]: unexpected type "
        "map[string]interface {}. Correct the value.",
    ),
    "an extension that is no mapping": (
        WEB + "    networks: [n]\nnetworks: {n: {x-bulkhead: open}}\n",
        "compose.yaml:5: networks.n.x-bulkhead: 'open': not a mapping. Write {key: value}.",
    ),
    "an empty file": (
        "",
        "compose.yaml: Compose refuses it: empty compose file. Correct the file.",
    ),
    "an environment file that is not there": (
        WEB + "    env_file: nope.env\n",
        "compose.yaml:4: env_file: {folder}/nope.env does not exist. Correct the path.",
    ),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(text: str, message: str, write: Write, tmp_path: Path) -> None:
    assert refused(write(text)) == message.replace("{folder}", str(tmp_path))


def test_a_compose_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert refused([tmp_path / "nope.yaml"]) == f"{tmp_path}/nope.yaml: No such file or directory. Check the path."


def test_confidential_values_are_not_repeated_in_messages(write: Write) -> None:
    text = WEB + "    environment: {PASSWORD: {a: hunter2}}\n"
    assert "hunter2" not in refused(write(text))
    text = (
        WEB + "    annotations: {PASSWORD: hunter2}\n    build: {context: ., args: {PASSWORD: hunter2}, pull: true}\n"
    )
    assert "hunter2" not in refused(write(text))


# Several files, variables, profiles, secrets


def test_the_file_that_holds_the_key_is_named(write: Write) -> None:
    overlay = "services:\n  web:\n    labels: {a: b}\n    mem_limit: 64m\n"
    assert refused(write(WEB, overlay)).startswith("compose1.yaml:4: service web: mem_limit")
    assert refused(write(overlay, WEB)).startswith("compose.yaml:4: service web: mem_limit")


@pytest.mark.parametrize(
    "text",
    ["include: [other.yaml]\n", "services:\n  web: {extends: {file: other.yaml, service: web}}\n"],
    ids=["include", "extends"],
)
def test_a_key_of_an_included_or_extended_file_is_found_there(text: str, write: Write) -> None:
    assert refused(write(text, other__yaml=WEB + "    cpus: 1\n")).startswith("other.yaml:4: service web: cpus: 1")


def test_an_extension_of_an_included_file_is_read(write: Write) -> None:
    other = WEB + "    networks: [n]\nnetworks:\n  n: {x-bulkhead: {egress: true}}\n"
    project = read(write("include: [other.yaml]\n", other__yaml=other), environment="prod")
    assert project.networks["n"].x_bulkhead.egress


def test_files_merge_as_compose_merges_them(write: Write) -> None:
    overlay = "services:\n  web:\n    image: nginx:2\n    ports: !reset []\n    environment: {B: 2}\n"
    web = read(write(WEB + "    ports: ['80:80']\n    environment: {A: 1}\n", overlay), environment="prod").services[
        "web"
    ]
    assert (web.image, web.ports, web.environment) == ("nginx:2", (), {"A": "1", "B": "2"})


def test_a_container_name_without_a_network_is_left_out_and_noted(write: Write) -> None:
    project = read(write(WEB + "    container_name: shop\n    network_mode: none\n"), environment="prod")
    assert project.notes == (
        "service web: container_name 'shop' is left out, as there is no network: containers are named by the deploy, "
        "so that a new one can start before the old one stops",
    )


def test_a_profile_brings_its_services(write: Write) -> None:
    files = write(WEB + "  debug: {image: shell, profiles: [tools]}\n")
    assert list(read(files, environment="prod").services) == ["web"]
    assert list(read(files, environment="prod", profiles=["tools"]).services) == ["debug", "web"]


def test_an_optional_dependency_whose_profile_is_off_is_left_out(write: Write) -> None:
    text = (
        WEB + "    depends_on: {db: {condition: service_started, required: false}}\n  db: {image: db, profiles: [x]}\n"
    )
    assert read(write(text), environment="prod").services["web"].depends_on == {}


def test_variables_win_over_the_environment_and_the_env_file(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("B", "process")
    monkeypatch.setenv("C", "process")
    monkeypatch.setenv("COMPOSE_FILE", "/nowhere.yaml")
    monkeypatch.setenv("COMPOSE_PROFILES", "debug")
    files = write(WEB + "    hostname: ${A}-${B}-${C}-${D:-default}\n", **{"__env": "A=file\nB=file\nC=file\n"})
    web = read(files, environment="prod", variables={"C": "settings"}).services["web"]
    assert web.hostname == "file-process-settings-default"


def test_dollar_signs_stay_as_written(write: Write) -> None:
    web = read(write(WEB + "    command: [echo, '$$1 $$$$ {a}']\n"), environment="prod").services["web"]
    assert web.command == ("echo", "$1 $$ {a}")


def test_an_environment_variable_without_value_is_left_unset_and_noted(write: Write) -> None:
    project = read(write(WEB + "    environment: [NOT_SET_HERE]\n"), environment="prod")
    assert project.services["web"].environment == {}
    assert project.notes == ("service web: environment.NOT_SET_HERE has no value here and is left unset",)


def test_derived_names_are_ours_and_written_ones_are_kept(write: Write) -> None:
    top = "networks: {a: , b: {name: x}, c: {external: true}, d: {name: y, external: true}}\n"
    text = WEB + "    networks: [a, b, c, d]\n" + top
    networks = read(write(text), environment="prod").networks
    assert {key: (network.name, network.external) for key, network in networks.items()} == {
        "a": (None, False),
        "b": ("x", False),
        "c": (None, True),
        "d": ("y", True),
    }


def test_a_secret_variable_reaches_the_environment_as_a_placeholder(write: Write) -> None:
    files = write(WEB + "    environment: {URL: 'postgres://app:${DB_PASSWORD}@db'}\n")
    web = read(files, environment="prod", secrets=["DB_PASSWORD"]).services["web"]
    assert web.environment == {"URL": "postgres://app:bulkhead-secret:DB_PASSWORD:@db"}


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("command: run --password ${DB_PASSWORD}", "command[2]"),
        ("labels: {a: '${DB_PASSWORD}'}", "labels.a"),
        ("environment: ['${DB_PASSWORD}=1']", "environment"),
        ("build: {context: ., args: {A: '${DB_PASSWORD}'}}", "build.args.A"),
    ],
)
def test_a_secret_variable_anywhere_else_is_refused(line: str, key: str, write: Write) -> None:
    message = refused(write(f"{WEB}    {line}\n", Dockerfile="FROM scratch"), secrets=["DB_PASSWORD"])
    assert message == (
        f"compose.yaml:4: service web: {key}: the secret DB_PASSWORD would be readable in the plan and on the engine. "
        "Use it as a value in environment, or mount it as a file under secrets."
    )


def test_the_order_of_writing_makes_no_difference(write: Write) -> None:
    services = ["  a: {image: a, depends_on: [b]}\n", "  b: {image: b, networks: [x, y]}\n", "  c: {image: c}\n"]
    rest = "networks: {x: , y: }\n"
    outcomes = [
        plain(read(write("services:\n" + "".join(order) + rest), environment="prod"))
        for order in itertools.permutations(services)
    ]
    assert all(outcome == outcomes[0] for outcome in outcomes)


# Order of services


def project(dependencies: Mapping[str, list[str]], **services: Service) -> Project:
    return Project(
        environment="prod",
        files=("compose.yaml",),
        services={
            **{
                name: Service(
                    image="x", depends_on={other: Dependency(condition="service_started") for other in others}
                )
                for name, others in dependencies.items()
            },
            **services,
        },
    )


def test_services_stand_after_those_they_wait_for_and_ties_go_by_name() -> None:
    assert project({"web": ["api"], "api": ["db", "cache"], "db": [], "cache": []}).order() == [
        "cache",
        "db",
        "api",
        "web",
    ]


def test_a_shared_namespace_is_a_dependency() -> None:
    assert project({"z": []}, a=Service(image="x", network_mode="service:z")).order() == ["z", "a"]


def test_a_cycle_is_named() -> None:
    with pytest.raises(SettingsError) as error:
        project({"a": ["b"], "b": ["c"], "c": ["a"], "d": []}).order()
    assert str(error.value) == (
        "compose.yaml: service a: depends_on: 'a -> b -> c -> a': services wait for each other. "
        "Remove one of these dependencies."
    )


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=20), st.randoms())
def test_order_respects_every_dependency_however_services_are_written(
    pairs: list[tuple[int, int]], random: Random
) -> None:
    waits = {
        str(name): sorted({str(before) for after, before in pairs if after == name and before < name})
        for name in range(10)
    }
    order = project(waits).order()
    assert sorted(order) == sorted(waits)
    assert all(order.index(before) < order.index(name) for name, others in waits.items() for before in others)
    names = list(waits)
    random.shuffle(names)
    assert project({name: waits[name] for name in names}).order() == order


# Compose itself


def test_durations_are_seconds() -> None:
    assert [seconds(text) for text in ("10s", "1m30s", "1h0m0s", "1.5s", "250ms", "0s")] == [10, 90, 3600, 1.5, 0.25, 0]
    with pytest.raises(ValueError, match="is not a duration"):
        seconds("soon")


def test_the_projects_own_compose_is_used_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "bin" / "docker-compose"
    binary.parent.mkdir()
    binary.write_text("#!/bin/sh\n", encoding="utf-8")
    binary.chmod(0o755)
    monkeypatch.setenv("PULUMI_HOME", str(tmp_path))
    assert find_compose() == [str(binary)]


@pytest.mark.parametrize(
    ("answer", "found"),
    [("v2.35.1", True), ("2.20.0", True), ("2.19.1", False), ("5.0.0", True), ("unknown", False)],
)
def test_the_docker_clis_compose_is_used_if_it_is_new_enough(
    answer: str, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docker = tmp_path / "docker"
    docker.write_text(f"#!/bin/sh\necho {answer}\n", encoding="utf-8")
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("PULUMI_HOME", raising=False)
    monkeypatch.setattr(compose_cli, "CHECKOUT", tmp_path)
    if found:
        assert find_compose() == ["docker", "compose"]
    else:
        with pytest.raises(SettingsError, match="Run `make setup`"):
            find_compose()


def test_a_compose_that_hangs_is_an_error(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "bin" / "docker-compose"
    binary.parent.mkdir()
    binary.write_text("#!/bin/sh\nexec sleep 60\n", encoding="utf-8")
    binary.chmod(0o755)
    monkeypatch.setenv("PULUMI_HOME", str(tmp_path))
    monkeypatch.setattr(compose_cli, "TIMEOUT", 0.1)
    assert "did not run: " in refused(write(WEB))


def test_what_compose_says_is_passed_on_when_it_is_not_known(write: Write) -> None:
    stderr = (
        'time="2026-01-01T00:00:00Z" level=warning msg="something"\nnew kind of\nfailure: invalid compose project\n'
    )
    assert str(refusal(stderr, Sources(write(WEB)))) == (
        "compose.yaml: Compose refuses it: new kind of failure. Correct the file."
    )

"""A compose service as container arguments: one readable case for each behaviour, each starting from a plain service
and changing one thing."""

from typing import Any

import pulumi
import pytest

from components.files import File, folders
from components.service import Attachment, ServiceArgs, container_args, cpus, health_timeout, starts_first
from settings.ledger import Tier
from settings.model import Healthcheck, Service

DROPPED = ["CAP_AUDIT_WRITE", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_SYS_CHROOT"]
PLAIN = {
    "image": "sha256:1",
    "cgroup_parent": "/bulkhead-prod",
    "labels": [
        {"label": "bulkhead.environment", "value": "prod"},
        {"label": "bulkhead.service", "value": "api"},
        {"label": "bulkhead.tier", "value": "protected"},
    ],
    "stop_timeout": 10,
    "destroy_grace_seconds": 10,
    "log_driver": "json-file",
    "log_opts": {"max-size": "10m", "max-file": "3"},
    "capabilities": {"adds": [], "drops": DROPPED},
    "security_opts": ["no-new-privileges:true"],
}


def args(service: dict[str, Any] | None = None, **rest: Any) -> dict[str, Any]:
    """Container arguments of service `api` in prod, with one thing changed."""
    given: dict[str, Any] = {
        "environment": "prod",
        "tier": Tier.PROTECTED,
        "key": "api",
        "service": Service.model_validate({"image": "api"} | (service or {})),
        "image_id": "sha256:1",
        "cgroup_parent": "/bulkhead-prod",
    } | rest
    return container_args(ServiceArgs(**given))


def test_a_plain_service_is_hardened_and_nothing_else() -> None:
    assert args() == PLAIN


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "command": ({"command": ["serve", "-v"]}, {"command": ["serve", "-v"]}),
    "entrypoint": ({"entrypoint": ["/run.sh"]}, {"entrypoints": ["/run.sh"]}),
    "user": ({"user": "1000:1000"}, {"user": "1000:1000"}),
    "working_dir": ({"working_dir": "/srv"}, {"working_dir": "/srv"}),
    "hostname": ({"hostname": "api.local"}, {"hostname": "api.local"}),
    "read_only": ({"read_only": True}, {"read_only": True}),
    "init": ({"init": True}, {"init": True}),
    "stdin_open and tty": ({"stdin_open": True, "tty": True}, {"stdin_open": True, "tty": True}),
    "platform and runtime": (
        {"platform": "linux/amd64", "runtime": "runsc"},
        {"platform": "linux/amd64", "runtime": "runsc"},
    ),
    "privileged is carried for policy to refuse": ({"privileged": True}, {"privileged": True}),
    "shm_size in MiB": ({"shm_size": 64 * 1024**2}, {"shm_size": 64}),
    "sysctls": ({"sysctls": {"net.core.somaxconn": "1024"}}, {"sysctls": {"net.core.somaxconn": "1024"}}),
    "dns": ({"dns": ["10.0.0.53"]}, {"dns": ["10.0.0.53"]}),
    "extra_hosts": (
        {"extra_hosts": [{"host": "mail", "ip": "10.0.0.9"}]},
        {"hosts": [{"host": "mail", "ip": "10.0.0.9"}]},
    ),
    "ulimits": (
        {"ulimits": {"nofile": {"soft": 1, "hard": 2}}},
        {"ulimits": [{"name": "nofile", "soft": 1, "hard": 2}]},
    ),
    "devices": (
        {"devices": [{"source": "/dev/fuse"}]},
        {"devices": [{"host_path": "/dev/fuse", "container_path": "/dev/fuse", "permissions": "rwm"}]},
    ),
    "tmpfs": ({"tmpfs": ["/tmp", "/run:size=1m"]}, {"tmpfs": {"/tmp": "", "/run": "size=1m"}}),
    "a tmpfs volume": (
        {"volumes": [{"type": "tmpfs", "target": "/t", "tmpfs": {"size": 1024, "mode": 0o700}}]},
        {"tmpfs": {"/t": "size=1024,mode=700"}},
    ),
    "a graceful stop also when the container is deleted": (
        {"stop_signal": "SIGINT", "stop_grace_period": "1m30s"},
        {"stop_signal": "SIGINT", "stop_timeout": 90, "destroy_grace_seconds": 90},
    ),
    "own logging options": (
        {"logging": {"driver": "json-file", "options": {"max-size": "1m"}}},
        {"log_opts": {"max-size": "1m"}},
    ),
    "another log driver has no file to rotate": (
        {"logging": {"driver": "syslog"}},
        {"log_driver": "syslog", "log_opts": None},
    ),
    "cap_add brings a dropped capability back": (
        {"cap_add": ["net_raw", "SYS_NICE"]},
        {
            "capabilities": {
                "adds": ["CAP_NET_RAW", "CAP_SYS_NICE"],
                "drops": [name for name in DROPPED if name != "CAP_NET_RAW"],
            }
        },
    ),
    "cap_drop ALL is enough": (
        {"cap_drop": ["ALL"], "cap_add": ["CHOWN"]},
        {"capabilities": {"adds": ["CAP_CHOWN"], "drops": ["ALL"]}},
    ),
    "no-new-privileges can be written": (
        {"security_opt": ["no-new-privileges=false", "seccomp=x.json"]},
        {"security_opts": ["no-new-privileges:false", "seccomp=x.json"]},
    ),
    "restart": ({"restart": "unless-stopped"}, {"restart": "unless-stopped"}),
    "restart with a count": ({"restart": "on-failure:3"}, {"restart": "on-failure", "max_retry_count": 3}),
    "memory limit in MiB, no swap": (
        {"deploy": {"resources": {"limits": {"memory": 256 * 1024**2}}}},
        {"memory": 256, "memory_swap": 256},
    ),
    "cpus limit is carried for policy to judge": (
        {"deploy": {"resources": {"limits": {"cpus": 0.5}}}},
        {"cpus": "0.5"},
    ),
    "whole cpus are written as the provider reads them": (
        {"deploy": {"resources": {"limits": {"cpus": 2}}}},
        {"cpus": "2.0"},
    ),
    "a cpu reservation is a weight": ({"deploy": {"resources": {"reservations": {"cpus": 0.5}}}}, {"cpu_shares": 512}),
    "a healthcheck holds the deploy until healthy": (
        {"healthcheck": {"test": ["CMD", "ok"], "interval": "5s", "timeout": "1s", "retries": 2, "start_period": "3s"}},
        {
            "healthcheck": {
                "tests": ["CMD", "ok"],
                "interval": "5s",
                "timeout": "1s",
                "start_period": "3s",
                "retries": 2,
            },
            "wait": True,
            "wait_timeout": 31,
        },
    ),
    "a disabled healthcheck": ({"healthcheck": {"disable": True}}, {"healthcheck": {"tests": ["NONE"]}}),
    "ports as Compose in a protected environment": (
        {"ports": [{"target": 80, "published": 8080}, {"target": 53, "protocol": "udp"}]},
        {"ports": [{"internal": 80, "protocol": "tcp", "external": 8080}, {"internal": 53, "protocol": "udp"}]},
    ),
    "a bind whose host path may be made": (
        {
            "volumes": [
                {"type": "bind", "source": "/s", "target": "/x", "read_only": True, "bind": {"create_host_path": True}}
            ]
        },
        {"volumes": [{"host_path": "/s", "container_path": "/x", "read_only": True}]},
    ),
    "a bind whose host path must be there": (
        {"volumes": [{"type": "bind", "source": "/s", "target": "/x", "bind": {"propagation": "rslave"}}]},
        {"mounts": [{"type": "bind", "source": "/s", "target": "/x", "bind_options": {"propagation": "rslave"}}]},
    ),
}


@pytest.mark.parametrize("behaviour", CHANGES)
def test_one_key_changes_only_its_own_arguments(behaviour: str) -> None:
    written, expected = CHANGES[behaviour]
    changed = {key: value for key, value in (PLAIN | expected).items() if value is not None}
    assert args(written) == changed


def test_a_named_volume_is_mounted_by_the_engines_name_for_it() -> None:
    mount = {"volumes": [{"type": "volume", "source": "data", "target": "/d"}]}
    assert args(mount, volumes={"data": "prod-data"})["volumes"] == [
        {"volume_name": "prod-data", "container_path": "/d"}
    ]


def test_a_volume_without_copy_takes_the_long_form() -> None:
    mount = {
        "volumes": [{"type": "volume", "source": "data", "target": "/d", "volume": {"nocopy": True, "subpath": "a"}}]
    }
    assert args(mount, volumes={"data": "prod-data"})["mounts"] == [
        {
            "type": "volume",
            "source": "prod-data",
            "target": "/d",
            "volume_options": {"no_copy": True, "subpath": "a"},
        }
    ]


def test_a_best_effort_environment_publishes_on_loopback_unless_an_address_is_written() -> None:
    ports = {"ports": [{"target": 80, "published": 1}, {"target": 81, "published": 2, "host_ip": "10.0.0.1"}]}
    addresses = [port["ip"] for port in args(ports, tier=Tier.BEST_EFFORT)["ports"]]
    assert addresses == ["127.0.0.1", "10.0.0.1"]


def test_a_service_answers_to_its_own_name_and_its_aliases() -> None:
    attachments = [Attachment("prod-backend", ["db", "store"], "10.81.0.9")]
    assert args(attachments=attachments)["networks_advanced"] == [
        {"name": "prod-backend", "aliases": ["api", "db", "store"], "ipv4_address": "10.81.0.9"}
    ]


def test_files_are_uploaded_with_their_mode_and_owner() -> None:
    files = [File("/run/secrets/b", "2", uid="7", gid="8", mode="0400"), File("/run/secrets/a", "1")]
    assert args(files=files)["uploads"] == [
        {"file": "/run/secrets/a", "content": "1", "permissions": "0444"},
        {"file": "/run/secrets/b", "content": "2", "permissions": "0400", "owner": "7", "group": "8"},
    ]


def test_nothing_is_uploaded_below_a_read_only_root() -> None:
    assert args({"read_only": True}, files=[File("/run/secrets/a", "1")]) == PLAIN | {"read_only": True}


def test_a_file_in_a_read_only_root_itself_names_the_file_and_the_remedy() -> None:
    with pytest.raises(pulumi.RunError, match=r"/app.conf.*read-only.*target: /etc/app/app.conf"):
        folders([File("/app.conf", "1")])


def test_a_service_that_others_wait_for_to_complete_need_not_keep_running() -> None:
    found = args({"healthcheck": {"test": ["CMD", "ok"]}}, runs_to_completion=True)
    assert (found["must_run"], found["attach"], "wait" in found) == (False, True, False)


def test_network_mode_stands_alone() -> None:
    assert args(modes={"network": "none", "pid": "host", "ipc": "private"}) == PLAIN | {
        "network_mode": "none",
        "pid_mode": "host",
        "ipc_mode": "private",
    }


def test_the_health_timeout_covers_every_chance_that_the_check_gives() -> None:
    assert health_timeout(Healthcheck(test=("CMD", "ok"))) == (30 + 30) * 4 + 10


@pytest.mark.parametrize(
    ("written", "first"),
    [
        ({}, True),
        ({"ports": [{"target": 80}]}, True),
        ({"ports": [{"target": 80, "published": 80}]}, False),
        ({"volumes": [{"type": "volume", "source": "d", "target": "/d"}]}, False),
        ({"volumes": [{"type": "volume", "source": "d", "target": "/d", "read_only": True}]}, True),
        ({"volumes": [{"type": "tmpfs", "target": "/d"}]}, True),
        ({"network_mode": "host"}, False),
        ({"deploy": {"update_config": {"order": "stop-first"}}}, False),
        ({"ports": [{"target": 80, "published": 80}], "deploy": {"update_config": {"order": "start-first"}}}, True),
    ],
)
def test_a_new_container_starts_first_where_two_can_run_at_once(written: dict[str, Any], first: bool) -> None:
    assert starts_first(Service.model_validate({"image": "api"} | written)) is first


@pytest.mark.parametrize(
    ("limit", "written"),
    [
        (2, "2.0"), (10, "10."), (12, "12.0"), (20, "20."), (100, "100."), (0.5, "0.5"), (0.25, "0.25"), (1.5, "1.5"),
        (10.5, "10.5"), (0.1, "0.1"), (0.05, "0.0501"), (20.05, "20.0501"), (0.001, "0.0011"),
    ],
)  # fmt: skip
def test_a_cpu_limit_is_written_as_the_provider_reads_it_back(limit: float, written: str) -> None:
    assert cpus(limit) == written

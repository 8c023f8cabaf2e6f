"""An environment's settings file: which compose files, profiles, variables and secrets; and ports across environments.
One case per behaviour: a settings file in, the exact message or the settings out."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from settings.backup import BackupSettings
from settings.compose import Build, Port, Project, Service
from settings.errors import SettingsError
from settings.ledger import LedgerSettings, Tier
from settings.project import (
    backed_up,
    check_ports,
    foreign_reads,
    host_address,
    others,
    published_ports,
    read_environment,
    read_project,
    refreshed,
    root,
)
from settings.reads import left_out
from settings.sources import Sources

LEDGER = LedgerSettings.model_validate(
    {
        "environments": {
            "prod": {"tier": "protected", "subnet": "10.81.0.0/16", "reservations": {"cpus": 1, "memory": "1GiB"}},
            "dev": {"tier": "best-effort", "subnet": "10.82.0.0/16", "limits": {"memory": "1GiB"}},
        }
    }
)
WEB = "services:\n  web:\n    image: nginx\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "Pulumi.yaml").write_text("name: bulkhead\n", encoding="utf-8")
    (tmp_path / "compose.yaml").write_text(WEB, encoding="utf-8")
    return tmp_path


def settings(checkout: Path, lines: str, name: str = "prod") -> None:
    (checkout / f"Pulumi.{name}.yaml").write_text(f"config:\n{lines}", encoding="utf-8")


VALID = """\
  bulkhead:compose: [compose.yaml]
  bulkhead:profiles: [web]
  bulkhead:variables: {LOG_LEVEL: info, PORT: 8080, DEBUG: false}
  bulkhead:secrets:
    DB_PASSWORD: {secure: v1:abc}
  docker:host: unix:///var/run/docker.sock
"""


def test_an_environments_settings_are_read(checkout: Path) -> None:
    settings(checkout, VALID)
    found = read_environment("prod", checkout)
    assert found.name == "prod"
    assert found.compose == (checkout / "compose.yaml",)
    assert found.profiles == ("web",)
    assert found.variables == {"LOG_LEVEL": "info", "PORT": "8080", "DEBUG": "false"}
    assert found.secret_names == {"DB_PASSWORD"}


def test_only_compose_files_are_needed(checkout: Path) -> None:
    settings(checkout, "  bulkhead:compose: [compose.yaml]\n")
    assert read_project(read_environment("prod", checkout), LEDGER).order() == ["web"]


REFUSED = {
    "broken YAML": (
        (": [compose.yaml]", ": [compose.yaml"),
        "Pulumi.prod.yaml:3: not valid YAML: did not find expected ',' or ']'. "
        "Correct the line (indentation, quotes and brackets are the usual causes).",
    ),
    "an unknown key": (
        ("bulkhead:profiles", "bulkhead:profile"),
        "Pulumi.prod.yaml:3: bulkhead:profile: unknown key. Did you mean 'bulkhead:profiles'?",
    ),
    "no compose files": (
        ("  bulkhead:compose: [compose.yaml]\n", ""),
        "Pulumi.prod.yaml:1: bulkhead:compose: missing. Name the environment's compose files: [compose.yaml].",
    ),
    "compose files that are not a list": (
        ("[compose.yaml]", "compose.yaml"),
        "Pulumi.prod.yaml:2: bulkhead:compose: not a list. Write it like [compose.yaml].",
    ),
    "a compose file that is not there": (
        ("[compose.yaml]", "[compose.yaml, nope.yaml]"),
        "Pulumi.prod.yaml:2: bulkhead:compose: nope.yaml does not exist. Paths are relative to {folder}.",
    ),
    "variables that are not a mapping": (
        ("{LOG_LEVEL: info, PORT: 8080, DEBUG: false}", "[LOG_LEVEL=info]"),
        "Pulumi.prod.yaml:4: bulkhead:variables: not a mapping. Write it like {LOG_LEVEL: info}.",
    ),
    "a variable name that is none": (
        ("LOG_LEVEL", "LOG-LEVEL"),
        "Pulumi.prod.yaml:4: bulkhead:variables: 'LOG-LEVEL' is not a variable name. "
        "Use letters, digits and underscores.",
    ),
    "a variable that Compose takes for an option": (
        ("LOG_LEVEL: info", "COMPOSE_ENV_FILES: /srv/prod/prod.env"),
        "Pulumi.prod.yaml:4: bulkhead:variables: COMPOSE_ENV_FILES would be an option of Compose, such as a file to "
        "read. Use another name.",
    ),
    "a secret among the variables": (
        ("LOG_LEVEL: info", "LOG_LEVEL: {secure: v1:abc}"),
        "Pulumi.prod.yaml:4: bulkhead:variables: LOG_LEVEL is not plain text. A secret belongs under bulkhead:secrets.",
    ),
    "a secret in plain text": (
        ("{secure: v1:abc}", "hunter2"),
        "Pulumi.prod.yaml:5: bulkhead:secrets: DB_PASSWORD is not encrypted. "
        "Set it with `make pulumi ARGS=\"config set --secret --path 'bulkhead:secrets.DB_PASSWORD'\"`.",
    ),
    "secrets encrypted as a whole": (
        ("    DB_PASSWORD: {secure: v1:abc}", "    secure: v1:abc"),
        "Pulumi.prod.yaml:5: bulkhead:secrets: encrypted as a whole, so its names cannot be read. "
        "Set each secret with `make pulumi ARGS=\"config set --secret --path 'bulkhead:secrets.NAME'\"`.",
    ),
    "a name that is variable and secret": (
        ("LOG_LEVEL", "DB_PASSWORD"),
        "Pulumi.prod.yaml:4: bulkhead:variables: DB_PASSWORD is a variable and a secret. "
        "Keep it in bulkhead:secrets only.",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(change: tuple[str, str], message: str, checkout: Path) -> None:
    assert change[0] in VALID
    settings(checkout, VALID.replace(*change))
    with pytest.raises(SettingsError) as error:
        read_environment("prod", checkout)
    assert str(error.value) == message.replace("{folder}", str(checkout))


def test_an_environment_without_a_file_says_what_to_create(checkout: Path) -> None:
    with pytest.raises(SettingsError) as error:
        read_environment("staging", checkout)
    assert str(error.value) == (
        "Pulumi.staging.yaml: bulkhead:compose: the file does not exist. "
        "Create it with `config: {bulkhead:compose: [compose.yaml]}`, naming its compose files."
    )


def test_the_checkout_is_found_from_below_it(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / "a" / "b").mkdir(parents=True)
    monkeypatch.delenv("BULKHEAD_PROJECT", raising=False)
    monkeypatch.chdir(checkout / "a" / "b")
    assert root() == checkout


def test_the_checkout_can_be_named(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BULKHEAD_PROJECT", str(checkout))
    assert root() == checkout
    monkeypatch.setenv("BULKHEAD_PROJECT", str(checkout / "nowhere"))
    with pytest.raises(SettingsError, match="this is not a Bulkhead project"):
        root()


# Secrets


def test_an_external_secret_comes_from_the_settings(checkout: Path) -> None:
    compose = WEB + "    secrets: [DB_PASSWORD]\nsecrets: {DB_PASSWORD: {external: true}}\n"
    (checkout / "compose.yaml").write_text(compose, encoding="utf-8")
    settings(checkout, VALID)
    assert read_project(read_environment("prod", checkout), LEDGER).secrets["DB_PASSWORD"].external


def test_an_external_secret_without_value_is_refused(checkout: Path) -> None:
    compose = WEB + "    secrets: [token]\nsecrets: {token: {external: true}}\n"
    (checkout / "compose.yaml").write_text(compose, encoding="utf-8")
    settings(checkout, VALID)
    with pytest.raises(SettingsError) as error:
        read_project(read_environment("prod", checkout), LEDGER)
    assert str(error.value) == (
        "Pulumi.prod.yaml: bulkhead:secrets.token: missing: the compose files take secret 'token' from here. "
        "Set it with `make pulumi ARGS=\"config set --stack prod --secret --path 'bulkhead:secrets.token'\"`, "
        "or let it be made once with x-bulkhead: {generate: 32}."
    )


def test_a_generated_secret_needs_no_value(checkout: Path) -> None:
    compose = WEB + "    secrets: [token]\nsecrets: {token: {external: true, x-bulkhead: {generate: 32}}}\n"
    (checkout / "compose.yaml").write_text(compose, encoding="utf-8")
    settings(checkout, "  bulkhead:compose: [compose.yaml]\n")
    assert read_project(read_environment("prod", checkout), LEDGER).secrets["token"].x_bulkhead.generate == 32


def test_a_secret_from_a_variable_that_is_not_set_is_refused(checkout: Path) -> None:
    compose = WEB + "    secrets: [token]\nsecrets: {token: {environment: NOT_SET_HERE}}\n"
    (checkout / "compose.yaml").write_text(compose, encoding="utf-8")
    settings(checkout, "  bulkhead:compose: [compose.yaml]\n")
    with pytest.raises(SettingsError) as error:
        read_project(read_environment("prod", checkout), LEDGER)
    assert str(error.value) == (
        "compose.yaml: secrets.token.environment: 'NOT_SET_HERE': the variable has no value. "
        "Set it under bulkhead:secrets or bulkhead:variables."
    )


def test_a_secret_variable_becomes_a_placeholder_in_the_environment(checkout: Path) -> None:
    (checkout / "compose.yaml").write_text(WEB + "    environment: {P: '${DB_PASSWORD}'}\n", encoding="utf-8")
    settings(checkout, VALID)
    web = read_project(read_environment("prod", checkout), LEDGER).services["web"]
    assert web.environment == {"P": "bulkhead-secret:DB_PASSWORD:"}


# Ports of the host


def project(environment: str, services: Mapping[str, Port]) -> Project:
    return Project(
        environment=environment,
        files=("compose.yaml",),
        services={name: Service(image="x", ports=(port,)) for name, port in services.items()},
    )


def port(published: int | None, host_ip: str | None = None, protocol: str = "tcp") -> Port:
    return Port.model_validate({"target": 80, "published": published, "host_ip": host_ip, "protocol": protocol})


ADDRESSES = {
    "protected, none written": (None, Tier.PROTECTED, None),
    "protected, one written": ("10.0.0.5", Tier.PROTECTED, "10.0.0.5"),
    "best-effort, none written": (None, Tier.BEST_EFFORT, "127.0.0.1"),
    "best-effort, one written": ("0.0.0.0", Tier.BEST_EFFORT, "0.0.0.0"),
}


@pytest.mark.parametrize(("written", "tier", "address"), ADDRESSES.values(), ids=ADDRESSES)
def test_the_address_a_port_is_bound_to(written: str | None, tier: Tier, address: str | None) -> None:
    assert host_address(port(80, written), tier) == address


def test_published_ports_are_listed_with_their_owner() -> None:
    projects = [
        project("prod", {"web": port(80), "db": port(None)}),
        project("dev", {"web": port(8080), "dns": port(53, "127.0.0.1", "udp")}),
    ]
    assert published_ports(projects, LEDGER) == {
        ("0.0.0.0", 80, "tcp"): "prod/web",
        ("127.0.0.1", 8080, "tcp"): "dev/web",
        ("127.0.0.1", 53, "udp"): "dev/dns",
    }


TWICE = {
    "the same port on all addresses": (port(80), port(80, "0.0.0.0"), "0.0.0.0:80/tcp"),
    "one address among all": (port(80), port(80, "127.0.0.1"), "127.0.0.1:80/tcp"),
    "best-effort on loopback among all": (port(80), port(80), "127.0.0.1:80/tcp"),
    "the same address": (port(80, "10.0.0.5"), port(80, "10.0.0.5"), "10.0.0.5:80/tcp"),
}


@pytest.mark.parametrize(("prods", "devs", "value"), TWICE.values(), ids=TWICE)
def test_a_port_published_twice_is_refused(prods: Port, devs: Port, value: str) -> None:
    with pytest.raises(SettingsError) as error:
        published_ports([project("prod", {"web": prods}), project("dev", {"site": devs})], LEDGER)
    assert str(error.value) == (
        f"compose.yaml: service site: ports: '{value}': dev/site publishes the same port of the host as prod/web. "
        "Publish another port, or write different addresses in front of the ports."
    )


APART = {
    "other ports": (port(80), port(81)),
    "other protocols": (port(53), port(53, None, "udp")),
    "other addresses": (port(80, "10.0.0.5"), port(80, "10.0.0.6")),
    "loopback beside one address": (port(80, "10.0.0.5"), port(80)),
    "a port that the engine picks": (port(80), port(None)),
}


@pytest.mark.parametrize(("prods", "devs"), APART.values(), ids=APART)
def test_ports_that_do_not_meet_are_fine(prods: Port, devs: Port) -> None:
    published_ports([project("prod", {"web": prods}), project("dev", {"web": devs})], LEDGER)


@given(st.lists(st.tuples(st.integers(1, 5), st.sampled_from([None, "10.0.0.5", "10.0.0.6"])), max_size=4))
def test_whether_ports_meet_does_not_depend_on_the_order(drawn: list[tuple[int, str | None]]) -> None:
    def refused(entries: list[tuple[int, str | None]]) -> bool:
        services = {f"s{index}": port(number, address) for index, (number, address) in enumerate(entries)}
        try:
            published_ports([project("prod", services)], LEDGER)
        except SettingsError:
            return True
        return False

    assert refused(drawn) == refused(drawn[::-1])


def test_ports_are_checked_across_the_environments_of_the_checkout(checkout: Path) -> None:
    (checkout / "compose.yaml").write_text(WEB + "    ports: ['8080:80']\n", encoding="utf-8")
    settings(checkout, "  bulkhead:compose: [compose.yaml]\n", "prod")
    assert check_ports(LEDGER, deploying(checkout, "prod"), others("prod", LEDGER, checkout).values()) == {
        ("0.0.0.0", 8080, "tcp"): "prod/web"
    }
    settings(checkout, "  bulkhead:compose: [compose.yaml]\n", "dev")
    for asking, refused in (("prod", "prod/web publishes"), ("dev", "dev/web publishes")):
        with pytest.raises(SettingsError, match=refused):
            check_ports(LEDGER, deploying(checkout, asking), others(asking, LEDGER, checkout).values())


def deploying(checkout: Path, environment: str) -> Project:
    """The project whose deploy asks."""
    return read_project(read_environment(environment, checkout), LEDGER)


def test_a_broken_environment_does_not_keep_another_from_its_deploy(checkout: Path) -> None:
    settings(checkout, "  bulkhead:compose: [compose.yaml]\n", "prod")
    settings(checkout, "  bulkhead:compose: [gone.yaml]\n", "dev")
    assert check_ports(LEDGER, deploying(checkout, "prod"), others("prod", LEDGER, checkout).values()) == {}
    with pytest.raises(SettingsError, match=r"gone\.yaml does not exist"):
        deploying(checkout, "dev")


# --- what a deploy reads where it runs


def reading(checkout: Path, compose: str, name: str = "dev") -> Project:
    """The project of an environment whose own Compose file beside `compose.yaml` is this text."""
    (checkout / f"{name}.yaml").write_text(compose)
    settings(checkout, f"  bulkhead:compose: [compose.yaml, {name}.yaml]\n", name)
    return read_project(read_environment(name, checkout), LEDGER)


def test_a_best_effort_environment_reads_only_the_variables_that_the_ledger_names(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAG", "1.2")
    text = "services: {web: {image: 'nginx:${TAG:-none}', environment: [TAG]}}\n"
    assert reading(checkout, text, "prod").services["web"].image == "nginx:1.2"
    dev = reading(checkout, text)
    assert (dev.services["web"].image, dict(dev.services["web"].environment)) == ("nginx:none", {})
    assert "variable TAG is set here, and not read: set it under bulkhead:variables, or name it in the" in str(
        dev.notes
    )
    entry = LEDGER.environments["dev"].model_copy(update={"inherit": ("TAG",)})
    told = LEDGER.model_copy(update={"environments": {**LEDGER.environments, "dev": entry}})
    named = read_project(read_environment("dev", checkout), told)
    assert (named.services["web"].image, dict(named.services["web"].environment)) == ("nginx:1.2", {"TAG": "1.2"})
    assert named.notes == ()


def test_a_variable_that_is_not_read_has_no_value(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PULUMI_CONFIG_PASSPHRASE", "prod's")
    said = r"dev\.yaml:1: \$\{PULUMI_CONFIG_PASSPHRASE\}: .* a best-effort environment does not read it.*inherit"
    with pytest.raises(SettingsError, match=said):
        reading(checkout, "services: {web: {environment: {X: '${PULUMI_CONFIG_PASSPHRASE}'}}}\n")
    with pytest.raises(SettingsError, match=r"secrets\.x\.environment: 'PULUMI_CONFIG_PASSPHRASE': .* no value"):
        reading(
            checkout,
            "services: {web: {secrets: [x]}}\nsecrets: {x: {environment: PULUMI_CONFIG_PASSPHRASE}}\n",
        )


def told(checkout: Path, compose: str, name: str = "dev") -> dict[str, dict[str, str]]:
    """What policies are told of the files that an environment reads."""
    project = reading(checkout, compose, name)
    return foreign_reads(project, LEDGER, others(name, LEDGER, checkout), checkout)


SECRET = "services: {web: {secrets: [x]}}\nsecrets: {x: {file: ./token}}\n"


def test_a_secret_file_of_prods_is_told_from_devs_own(checkout: Path) -> None:
    for name in ("token", "own"):
        (checkout / name).write_text("x")
    assert told(checkout, SECRET) == {"secrets.x.file": {"path": "token", "owner": ""}}
    assert told(checkout, SECRET, "prod") == {"secrets.x.file": {"path": "token", "owner": ""}}
    assert told(checkout, SECRET)["secrets.x.file"]["owner"] == "prod"
    assert told(checkout, SECRET.replace("token", "own"))["secrets.x.file"] == {"path": "own", "owner": ""}
    (checkout / "link").symlink_to("token")
    assert told(checkout, SECRET.replace("token", "link"))["secrets.x.file"] == {"path": "token", "owner": "prod"}


def test_whatever_opens_prods_secret_is_told(checkout: Path) -> None:
    (checkout / "secrets").mkdir()
    for name in ("secrets/token", "secrets/vars", "Dockerfile"):
        (checkout / name).write_text("A=1\n" if name.endswith("vars") else "FROM scratch\n")
    prod = "services: {web: {secrets: [x], env_file: [{path: secrets/vars}]}}\nsecrets: {x: {file: secrets/token}}\n"
    reading(checkout, prod, "prod")
    dev = (
        "services:\n  web: {env_file: secrets/vars, build: ., configs: [c], volumes: ['./secrets:/s:ro', '/opt:/o']}\n"
        "configs: {c: {file: secrets/token}}\n"
    )
    assert {key: one["owner"] for key, one in told(checkout, dev).items()} == {
        "configs.c.file": "prod",
        "services.web.env_file": "prod",
        "services.web.build.context": "prod",
        "services.web.build.dockerfile": "",
        "services.web.volumes": "prod",
    }
    (checkout / ".dockerignore").write_text("secrets\n")
    assert told(checkout, dev)["services.web.build.context"] == {"path": ".", "owner": ""}


def ignoring(checkout: Path, **ignored: str) -> bool:
    """Whether a build of dev's is told to have prod's secret in it, with these files of what to leave out."""
    reading(checkout, "services: {web: {secrets: [x]}}\nsecrets: {x: {file: ctx/secret}}\n", "prod")
    files(checkout, ctx__secret="x", ctx__Dockerfile="FROM scratch\n")
    for name, text in ignored.items():
        (checkout / "ctx" / name).write_text(text)
    dev = "services: {web: {build: ctx}}\n"
    return told(checkout, dev)["services.web.build.context"]["owner"] == "prod"


@pytest.mark.parametrize(
    "pattern",
    [
        *("[!x]ecret", "[^s]ecret\nother", "sec\\ret", "secret\n![s]ecret", "secret\n!\\secret", "#secret", "other"),
        *("SECRET", "x\u2028secret", "x\rsecret", "x\x0csecret", "secret\n!secret", "*\n!secret", "secret\n!*"),
        *(
            "secret\n!**/secret",
            "secret/..",
            "secret\x1c",
            "secrets",
            "[s]ecret",
            "s?cret",
            "**/secret",
        ),  # the last may leave it out
    ],
)
def test_what_a_builder_may_not_leave_out_is_in_the_build(pattern: str, checkout: Path) -> None:
    assert ignoring(checkout, **{".dockerignore": pattern})


@pytest.mark.parametrize(
    "pattern", ["secret", "*\n!Dockerfile", " /secret ", "**", "!secret\n./secret", "\ufeffsecret\r"]
)
def test_what_every_builder_leaves_out_is_not_in_the_build(pattern: str, checkout: Path) -> None:
    assert not ignoring(checkout, **{".dockerignore": pattern})


def test_a_dockerfile_is_sent_whatever_is_left_out_and_all_that_its_name_fits_to(checkout: Path) -> None:
    reading(checkout, "services: {web: {secrets: [x]}}\nsecrets: {x: {file: ctx/secret}}\n", "prod")
    files(checkout, ctx__secret="x")
    for name in ("secre*", "Containerfile"):
        (checkout / "ctx" / name).write_text("FROM scratch\n")
    (checkout / "ctx/.dockerignore").write_text("*")
    owners = [
        told(checkout, f"services: {{web: {{build: {{context: ctx, dockerfile: '{name}'}}}}}}\n")
        for name in ("secre*", "Containerfile")
    ]
    assert [one["services.web.build.context"]["owner"] for one in owners] == ["prod", ""]


@pytest.mark.parametrize(("pattern", "sent"), [("keys", False), ("keys\n!keys/public", True), ("keys/a", True)])
def test_a_folder_of_prods_is_left_out_as_a_whole(pattern: str, sent: bool, checkout: Path) -> None:
    files(checkout, ctx__keys__a="x", ctx__keys__public="x", ctx__Dockerfile="FROM scratch\n")
    build = Build(context=str(checkout / "ctx"))
    (checkout / "ctx/.dockerignore").write_text(pattern)
    assert left_out(build, Path("keys")) is not sent


def test_what_only_one_builder_leaves_out_of_a_build_is_in_it(checkout: Path) -> None:
    """BuildKit takes the file beside the Dockerfile instead, the first builder the usual one."""
    assert ignoring(checkout, **{".dockerignore": "secret\n", "Dockerfile.dockerignore": "other\n"})
    assert ignoring(checkout, **{".dockerignore": "other\n", "Dockerfile.dockerignore": "secret\n"})
    assert not ignoring(checkout, **{".dockerignore": "secret\n", "Dockerfile.dockerignore": "secret\n"})


def test_pulumis_state_in_a_build_is_told(checkout: Path) -> None:
    reading(checkout, WEB, "prod")
    (checkout / "Dockerfile").write_text("FROM scratch\n")
    (checkout / ".bulkhead").mkdir()
    (checkout / ".bulkhead/passphrase").write_text("x")
    dev = "services: {web: {build: .}}\n"
    assert told(checkout, dev)["services.web.build.context"]["owner"] == "prod"


def test_pulumis_state_where_the_user_keeps_it_is_told(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(checkout / "state"))
    reading(checkout, WEB, "prod")
    dev = SECRET.replace("./token", "./state/bulkhead/passphrase")
    assert told(checkout, dev)["secrets.x.file"]["owner"] == "prod"


def test_the_env_file_that_compose_reads_unasked_is_prods_too(checkout: Path) -> None:
    (checkout / ".env").write_text("PASSWORD=x\n")
    reading(checkout, WEB, "prod")
    assert told(checkout, WEB)[".env"] == {"path": ".env", "owner": "prod"}


def files(checkout: Path, **written: str) -> None:
    """Files below the checkout, `__` standing for a folder's `/` and `_` for a name's dot."""
    for name, text in written.items():
        path = checkout / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


INCLUDED = "services: {job: {image: x, env_file: ./inner.env}}\n"
OF_PROD = "services: {web: {env_file: [srv/prod.env]}}\n"

OPENED = {
    "replaced": ("services: {web: {env_file: !override [srv/prod.env]}}", "services.web.env_file", "srv/prod.env"),
    "replaced whole": (
        "services: !override {web: {image: x, env_file: srv/prod.env}}",
        "services.web.env_file",
        "srv/prod.env",
    ),
    "a service by a word for true": (
        "services: {on: {image: x, env_file: srv/prod.env}}",
        "services.on.env_file",
        "srv/prod.env",
    ),
    "as base64": ("services: {web: {env_file: !!binary c3J2L3Byb2QuZW52}}", "services.web.env_file", "srv/prod.env"),
    "of the home folder": ("services: {web: {env_file: ~/prod.env}}", "services.web.env_file", "srv/prod.env"),
    "back through a link": (
        "services: {web: {env_file: link/../srv/prod.env}}",
        "services.web.env_file",
        "srv/prod.env",
    ),
    "of an include": ("include: [{path: inc/i.yaml, env_file: srv/prod.env}]", "include.env_file", "srv/prod.env"),
    "beside what is included": ("include: [inc/i.yaml]", "include.env_file", "inc/.env"),
    "in a project directory": (
        "include: [{path: inc/i.yaml, project_directory: other}]",
        "include.env_file",
        "other/.env",
    ),
    "from an included file's folder": ("include: [inc/i.yaml]", "services.job.env_file", "inc/inner.env"),
    "from an include's project directory": (
        "include: [{path: inc/i.yaml, project_directory: other}]",
        "services.job.env_file",
        "other/inner.env",
    ),
    "from an extended file's folder": (
        "services: {web: {extends: {file: inc/i.yaml, service: job}}}",
        "services.web.env_file",
        "inc/inner.env",
    ),
    "by an extended service": (
        "services: {web: {extends: base}, base: {image: x, env_file: srv/prod.env}}",
        "services.web.env_file",
        "srv/prod.env",
    ),
}


@pytest.mark.parametrize(("dev", "key", "path"), OPENED.values(), ids=OPENED)
def test_a_file_of_variables_is_told_as_compose_finds_it(
    dev: str, key: str, path: str, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(checkout / "srv"))
    files(checkout, srv__prod_env="A=1\n", inc__i_yaml=INCLUDED, inc___env="B=1\n", other___env="C=1\n")
    files(checkout, inc__inner_env="A=1\n", other__inner_env="A=1\n", far__away__x="")
    (checkout / "link").symlink_to("far/away")
    assert told(checkout, dev)[key] == {"path": path, "owner": ""}
    reading(checkout, f"services: {{web: {{env_file: {path}}}}}", "prod")
    assert told(checkout, dev)[key]["owner"] == "prod"


def test_every_file_of_a_list_is_read_from_the_folder_of_the_first(checkout: Path) -> None:
    files(checkout, b__c__dev_yaml="services: {web: {env_file: ./srv/prod.env}}\n", srv__prod_env="A=1\n")
    reading(checkout, OF_PROD, "prod")
    settings(checkout, "  bulkhead:compose: [compose.yaml, b/c/dev.yaml]\n", "dev")
    dev = read_project(read_environment("dev", checkout), LEDGER)
    assert foreign_reads(dev, LEDGER, others("dev", LEDGER, checkout), checkout) == {
        "services.web.env_file": {"path": "srv/prod.env", "owner": "prod"}
    }


def test_the_home_folder_is_the_one_that_compose_is_given(checkout: Path) -> None:
    files(checkout, srv__prod_env="A=1\n")
    reading(checkout, OF_PROD, "prod")
    (checkout / "dev.yaml").write_text("services: {web: {env_file: ~/prod.env}}\n")
    variables = f"  bulkhead:variables: {{HOME: {checkout}/srv}}\n"
    settings(checkout, f"  bulkhead:compose: [compose.yaml, dev.yaml]\n{variables}", "dev")
    dev = read_project(read_environment("dev", checkout), LEDGER)
    found = foreign_reads(dev, LEDGER, others("dev", LEDGER, checkout), checkout)
    assert found["services.web.env_file"]["owner"] == "prod"


@pytest.mark.parametrize(
    ("dev", "key", "path"),
    [
        ("include: ['${INC:-inc.yaml}']", "include", "${INC:-inc.yaml}"),
        ("include: [{path: ['inc.yaml', '${INC:-two.yaml}']}]", "include", "${INC:-two.yaml}"),
        ("services: {web: {extends: {file: '${INC:-inc.yaml}', service: job}}}", "services.web.extends.file", "${INC"),
        ("services: {web: {env_file: '${INC:-inner}.env'}}", "services.web.env_file", "${INC:-inner}.env"),
    ],
    ids=["an include", "one of several", "an extended file", "variables"],
)
def test_a_file_that_only_compose_can_find_is_not_known(dev: str, key: str, path: str, checkout: Path) -> None:
    files(checkout, inc_yaml=INCLUDED, two_yaml="services: {}\n", inner_env="A=1\n")
    for name in ("${INC:-inc.yaml}", "${INC:-two.yaml}"):
        (checkout / name).write_text("services: {}\n")  # Compose does not open it
    assert path in told(checkout, dev)[key]["path"]


@pytest.mark.parametrize("reference", ["https://x.example/y.git", "github.com/x/y", "oci://x/y", "git@x:y"])
def test_a_reference_that_compose_may_fetch_is_not_followed(reference: str, checkout: Path) -> None:
    files(checkout, dev_yaml=f"include: ['{reference}']\n")
    decoy = checkout / reference
    decoy.parent.mkdir(parents=True, exist_ok=True)
    decoy.write_text(INCLUDED)
    assert [*Sources([checkout / "dev.yaml"]).variable_files("/")] == [("include", f"$({reference})")]


NOT_OPENED = {
    "reset": "services: {web: {env_file: !reset null}}",
    "replaced": "services: {web: {env_file: !override [own.env]}}",
    "with its service": "services: {web: !override {image: x}}",
    "with all services": "services: !override {web: {image: x}}",
}


@pytest.mark.parametrize("dev", NOT_OPENED.values(), ids=NOT_OPENED)
def test_what_a_later_file_takes_away_is_not_read(dev: str, checkout: Path) -> None:
    files(checkout, compose_yaml="services: {web: {image: x, env_file: prod.env}}\n", prod_env="", own_env="")
    assert told(checkout, WEB)["services.web.env_file"]["path"] == "prod.env"
    assert "prod.env" not in {one["path"] for one in told(checkout, dev).values()}


def test_the_including_file_takes_away_no_service_of_what_it_includes(checkout: Path) -> None:
    files(checkout, inc__i_yaml=INCLUDED, inc__inner_env="A=1\n")
    dev = "include: [inc/i.yaml]\nservices: !override {web: {image: x}}"
    assert told(checkout, dev)["services.job.env_file"]["path"] == "inc/inner.env"


def test_a_service_that_no_profile_enables_reads_nothing_and_its_files_are_prods_all_the_same(checkout: Path) -> None:
    files(checkout, tool_env="A=1\n")
    tool = "services: {tool: {image: x, env_file: tool.env, profiles: [tool]}}"
    assert told(checkout, tool) == {}
    reading(checkout, tool, "prod")
    assert told(checkout, "services: {web: {env_file: tool.env}}")["services.web.env_file"]["owner"] == "prod"


def test_a_secret_may_be_prods_as_long_as_prods_compose_files_cannot_be_read(checkout: Path) -> None:
    (checkout / "token").write_text("x")
    settings(checkout, "  bulkhead:compose: [gone.yaml]\n", "prod")
    found = told(checkout, SECRET)["secrets.x.file"]
    assert found["owner"] == "prod"
    assert "gone.yaml" in found["unreadable"]


def test_a_file_outside_the_checkout_is_told_by_its_whole_path(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside") / "token"
    outside.write_text("x")
    assert told(checkout, SECRET.replace("./token", str(outside)))["secrets.x.file"]["path"] == str(outside)


# --- backups and masked copies


def volumes(checkout: Path, declared: str, services: str = "db", secret: str = "") -> tuple[Project, LedgerSettings]:
    """A project whose volume `data` declares something, mounted by these services; the ledger has a bucket too."""
    mounts = "".join(f"  {name}: {{image: x, volumes: ['data:/data']}}\n" for name in services.split())
    text = f"services:\n{mounts}volumes:\n  data:\n    x-bulkhead: {declared}\n"
    (checkout / "compose.yaml").write_text(text)
    secrets = f"  bulkhead:secrets:\n    {secret}: {{secure: v1:x}}\n" if secret else ""
    settings(checkout, f"  bulkhead:compose: [compose.yaml]\n{secrets}")
    targets = {"disk": {"path": "/srv/backup"}, "off-site": {"endpoint": "https://s3", "bucket": "acme"}}
    ledger = LEDGER.model_copy(update={"backup": BackupSettings.model_validate({"targets": targets})})
    return read_project(read_environment("prod", checkout), LEDGER), ledger


def test_a_backup_is_taken_through_the_only_service_that_has_the_volume(checkout: Path) -> None:
    project, ledger = volumes(checkout, "{backup: {engine: files, schedule: daily, target: disk}}")
    (found,) = backed_up(project, ledger, read_environment("prod", checkout)).items()
    assert (found[0], found[1][1]) == ("data", "db")


@pytest.mark.parametrize(
    ("backup", "services", "said"),
    [
        ("target: dsk", "db", r"volumes.data.x-bulkhead.backup.target: 'dsk': no such target. Did you mean 'disk'"),
        ("target: disk", "db web", r"backup.service: 2 services have this volume.*Name one of them: db, web"),
        ("target: disk, service: api", "db web", r"backup.service: 2 services"),
        (
            "target: off-site",
            "db",
            r"Pulumi.prod.yaml: bulkhead:secrets.backup_off_site_key_id: missing: backups go to",
        ),
    ],
    ids=["an unknown target", "several services", "a service without it", "a bucket without credentials"],
)
def test_a_backup_that_cannot_run_is_an_error_that_names_the_key(
    backup: str, services: str, said: str, checkout: Path
) -> None:
    project, ledger = volumes(checkout, f"{{backup: {{engine: files, schedule: daily, {backup}}}}}", services)
    with pytest.raises(SettingsError, match=said):
        backed_up(project, ledger, read_environment("prod", checkout))


def test_a_mask_is_read_beside_the_first_compose_file(checkout: Path) -> None:
    project, ledger = volumes(checkout, "{refresh: {environment: prod, mask: mask.sql}}")
    (checkout / "mask.sql").write_text("select 1;")
    found = refreshed(project, ledger, read_environment("prod", checkout))
    assert found == {"data": {"environment": "prod", "mask": "select 1;"}}


@pytest.mark.parametrize(
    ("refresh", "said"),
    [
        ("environment: prod, mask: mask.sql", r"volumes.data.x-bulkhead.refresh.mask: 'mask.sql': .*cannot be read"),
        ("environment: prd, mask: mask.sql", r"refresh.environment: 'prd': no protected environment.*'prod'"),
        ("environment: dev, mask: mask.sql", r"refresh.environment: 'dev': no protected environment"),
    ],
    ids=["no such file", "no such environment", "one that is not protected"],
)
def test_a_copy_that_cannot_be_made_is_an_error_that_names_the_key(refresh: str, said: str, checkout: Path) -> None:
    project, ledger = volumes(checkout, f"{{refresh: {{{refresh}}}}}")
    with pytest.raises(SettingsError, match=said):
        refreshed(project, ledger, read_environment("prod", checkout))


def test_a_copy_without_a_mask_is_left_to_the_policies(checkout: Path) -> None:
    project, ledger = volumes(checkout, "{refresh: {environment: prod}}")
    assert refreshed(project, ledger, read_environment("prod", checkout)) == {}

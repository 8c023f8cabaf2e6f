"""An environment from its compose files: names, ranges, what is internal, and the resources under Pulumi's mocks."""

from ipaddress import IPv4Network
from typing import Any

import pulumi
import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.environment import Environment, EnvironmentArgs, allocate, is_internal, notes
from components.image import ImageArgs, build_command, own_cache
from settings.compose import Build, Network, Project
from settings.dockerfile import fetches, images
from settings.errors import SettingsError
from settings.ledger import Tier

RANGE = IPv4Network("10.81.0.0/16")
KEYS = st.sets(st.from_regex(r"[a-z][a-z0-9_-]{0,12}", fullmatch=True), min_size=1, max_size=40)


def project(**parts: Any) -> Project:
    """A project of environment prod with the given services, networks and so on."""
    return Project.model_validate({"environment": "prod", "files": ("compose.yaml",), "services": {}} | parts)


@given(keys=KEYS)
def test_ranges_lie_in_the_environments_and_never_overlap(keys: set[str]) -> None:
    found = list(allocate(RANGE, {key: Network() for key in keys}).values())
    assert len(found) == len(keys)
    assert all(one.subnet_of(RANGE) for one in found)
    assert not any(a.overlaps(b) for i, a in enumerate(found) for b in found[:i])


@given(keys=KEYS)
def test_ranges_do_not_depend_on_the_order_of_the_file(keys: set[str]) -> None:
    assert allocate(RANGE, {key: Network() for key in sorted(keys)}) == allocate(
        RANGE, {key: Network() for key in sorted(keys, reverse=True)}
    )


def test_a_network_keeps_its_range_when_another_comes() -> None:
    before = allocate(RANGE, {"backend": Network()})
    after = allocate(RANGE, {"backend": Network(), "frontend": Network()})
    assert after["backend"] == before["backend"]


def test_a_written_range_is_kept_and_others_avoid_it() -> None:
    wanted = str(allocate(RANGE, {"backend": Network()})["backend"])
    found = allocate(RANGE, {"admin": Network(subnet=wanted), "backend": Network()})
    assert str(found["admin"]) == wanted
    assert not found["backend"].overlaps(found["admin"])


def test_a_written_range_outside_the_environments_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"192.168.50.0/24.*outside the environment's range 10.81.0.0/16"):
        allocate(RANGE, {"admin": Network(subnet="192.168.50.0/24")})


def test_more_networks_than_fit_name_the_range_and_the_remedy() -> None:
    small = IPv4Network("10.81.0.0/27")
    with pytest.raises(SettingsError, match=r"10.81.0.0/27.*room for 2 networks.*/16"):
        allocate(small, {"a": Network(), "b": Network(), "c": Network()})


def test_a_network_is_internal_unless_a_service_on_it_publishes_or_the_user_opens_it() -> None:
    given_project = project(
        services={"web": {"image": "web", "networks": {"front": {}}, "ports": [{"target": 80, "published": 80}]}},
        networks={
            "front": {},
            "back": {},
            "out": {"x_bulkhead": {"egress": True}},
            "shut": {"internal": True, "x_bulkhead": {"egress": True}},
        },
    )
    assert {key: is_internal(key, given_project) for key in given_project.networks} == {
        "front": False,
        "back": True,
        "out": False,
        "shut": True,
    }


def test_the_run_says_where_it_differs_from_compose() -> None:
    given_project = project(
        services={"web": {"image": "web", "networks": {"front": {}}, "ports": [{"target": 80, "published": 80}]}},
        networks={"front": {}, "back": {}},
    )
    told = notes(given_project, Tier.BEST_EFFORT)
    assert any("network back: internal" in note and "egress" in note for note in told)
    assert any("service web: port 80 is published on 127.0.0.1 only" in note for note in told)
    assert len(notes(given_project, Tier.PROTECTED)) == 1


class Engine(pulumi.runtime.Mocks):
    """Records what would be registered; every id is the resource's name."""

    def __init__(self) -> None:
        self.seen: dict[str, pulumi.runtime.MockResourceArgs] = {}

    def new_resource(self, args: pulumi.runtime.MockResourceArgs) -> tuple[str | None, dict[Any, Any]]:
        self.seen[f"{args.typ}::{args.name}"] = args
        extra = {"imageId": "sha256:1"} if args.typ.endswith("RemoteImage") else {}
        return args.name, dict(args.inputs) | extra

    def call(self, _args: pulumi.runtime.MockCallArgs) -> tuple[dict[Any, Any], list[tuple[str, str]] | None]:
        return {}, None


@pytest.fixture
def engine() -> Engine:
    mocks = Engine()
    pulumi.runtime.set_mocks(mocks, project="bulkhead", stack="prod")
    return mocks


def deployed(engine: Engine, given_project: Project, tier: Tier = Tier.PROTECTED, **rest: Any) -> Environment:
    """The environment of a project, registered with the mocks."""
    made: list[Environment] = []

    @pulumi.runtime.test
    def run() -> pulumi.Output[Any]:
        made.append(
            Environment(
                "prod",
                EnvironmentArgs(project=given_project, tier=tier, subnet=RANGE, cgroup_parent="/bulkhead-prod", **rest),
            )
        )
        return made[0].services

    run()
    return made[0]


SHOP = {
    "services": {
        "api": {
            "image": "api",
            "environment": {"TOKEN": "Bearer bulkhead-secret:token:!"},
            "networks": {"backend": {}},
            "secrets": [{"source": "db_password"}],
            "depends_on": {"db": {"condition": "service_healthy"}},
            "deploy": {"replicas": 2},
        },
        "db": {
            "image": "db",
            "networks": {"backend": {}},
            "volumes": [{"type": "volume", "source": "data", "target": "/d"}],
            "healthcheck": {"test": ["CMD", "ok"]},
        },
    },
    "networks": {"backend": {}},
    "volumes": {"data": {}},
    "secrets": {"db_password": {"external": True, "x_bulkhead": {"generate": 32}}},
}
CONTAINER = "docker:index/container:Container"


def test_every_name_that_another_party_must_know_is_explicit_and_derived(engine: Engine) -> None:
    deployed(engine, project(**SHOP), secrets={"token": "t"})
    assert engine.seen["docker:index/network:Network::prod-backend-bridge"].inputs["name"] == "prod-backend"
    assert engine.seen["docker:index/volume:Volume::prod-data-data"].inputs["name"] == "prod-data"


def test_containers_are_auto_named_one_for_each_replica_in_the_environments_slice(engine: Engine) -> None:
    deployed(engine, project(**SHOP), secrets={"token": "t"})
    names = sorted(key.split("::")[1] for key in engine.seen if key.startswith(CONTAINER))
    assert names == ["prod-api-1", "prod-api-2", "prod-db-1"]
    for name in names:
        inputs = engine.seen[f"{CONTAINER}::{name}"].inputs
        assert inputs["cgroupParent"] == "/bulkhead-prod"
        assert "name" not in inputs


def test_a_secret_reaches_only_the_service_that_asks_for_it(engine: Engine) -> None:
    deployed(engine, project(**SHOP), secrets={"token": "t"})
    uploads = engine.seen[f"{CONTAINER}::prod-api-1"].inputs["uploads"]["value"]  # a secret, as its content is
    assert [file["file"] for file in uploads] == ["/run/secrets/db_password"]
    assert "uploads" not in engine.seen[f"{CONTAINER}::prod-db-1"].inputs


def test_a_secret_variable_is_put_into_the_environment_at_deploy(engine: Engine) -> None:
    deployed(engine, project(**SHOP), secrets={"token": "hunter2"})
    envs = engine.seen[f"{CONTAINER}::prod-api-1"].inputs["envs"]
    assert envs == ["TOKEN=Bearer hunter2!"]


def test_a_secret_without_a_value_names_itself_and_both_remedies(engine: Engine) -> None:
    lost = project(services={"a": {"image": "a"}}, secrets={"key": {"external": True}})
    with pytest.raises(SettingsError, match=r"secrets.key.*no value.*config set.*generate"):
        deployed(engine, lost)


def test_an_external_network_is_attached_by_name_and_not_made(engine: Engine) -> None:
    deployed(
        engine,
        project(
            services={"a": {"image": "a", "networks": {"other": {}}}},
            networks={"other": {"external": True, "name": "prod-backend"}},
        ),
    )
    assert not [key for key in engine.seen if "Network" in key and key.startswith("docker")]
    assert engine.seen[f"{CONTAINER}::prod-a-1"].inputs["networksAdvanced"][0]["name"] == "prod-backend"


def test_an_image_is_exempted_where_a_service_that_runs_it_is(engine: Engine) -> None:
    exempt = {"rule": "image-digest", "reason": "nobody pushes this tag again", "owner": "ann", "expires": "2099-01-31"}
    services = {"a": {"image": "x:1"}, "b": {"image": "x:1", "x_bulkhead": {"exempt": [exempt]}}, "c": {"image": "y:1"}}
    deployed(engine, project(services=services))
    shown = {key: args.inputs for key, args in engine.seen.items() if key.startswith("bulkhead:index:Image")}
    assert shown == {"bulkhead:index:Image::prod-a": {"exempt": [exempt]}, "bulkhead:index:Image::prod-c": {}}


def test_policies_see_how_an_image_is_built_and_the_provider_only_finds_it(engine: Engine, tmp_path: Any) -> None:
    (tmp_path / "Dockerfile").write_text("ARG VERSION=2\nFROM python:$VERSION\n")
    deployed(engine, project(services={"a": {"build": {"context": str(tmp_path), "args": {"VERSION": "1"}}}}))
    built = engine.seen["bulkhead:index:Image::prod-a"].inputs["build"]
    assert built == {
        "context": str(tmp_path),
        "dockerfile": "Dockerfile",
        "buildArgs": {"VERSION": "1"},
        "fetches": [],
        "images": ["python:1"],
        "cgroupParent": "/bulkhead-prod",
    }
    (found,) = (args.inputs for key, args in engine.seen.items() if key.startswith("docker:index/remoteImage"))
    assert set(found) == {"name"}


def test_a_build_runs_in_its_environments_slice(tmp_path: Any) -> None:
    (tmp_path / "Dockerfile").write_text("FROM scratch\n")
    build = Build(context=str(tmp_path), target="run", args={"VERSION": "1"})
    args = ImageArgs(environment="dev", tier=Tier.BEST_EFFORT, service="api", cgroup_parent="", build=build)
    command = build_command("bulkhead/dev-api:1", args, build, "/bulkhead-dev")
    assert command[:6] == ["docker", "build", "--tag", "bulkhead/dev-api:1", "--cgroup-parent", "/bulkhead-dev"]
    assert command[-1] == str(tmp_path)
    assert {"--build-arg", "VERSION=1", "--target", "run", "bulkhead.environment=dev"} <= set(command)


def test_a_build_shares_no_cache_mount_with_another_environments(tmp_path: Any) -> None:
    (tmp_path / "Dockerfile").write_text("FROM scratch\n")
    build = Build(context=str(tmp_path), args={"BUILDKIT_CACHE_MOUNT_NS": "prod"})
    args = ImageArgs(environment="dev", tier=Tier.BEST_EFFORT, service="api", cgroup_parent="", build=build)
    command = build_command("bulkhead/dev-api:1", args, build, "/bulkhead-dev")
    assert own_cache(Tier.PROTECTED, buildkit=True) == ["--no-cache"]
    assert not own_cache(Tier.BEST_EFFORT, buildkit=True)
    assert not own_cache(Tier.PROTECTED, buildkit=False)
    # Of two values of one argument docker takes the last.
    assert [word for word in command if "CACHE_MOUNT_NS" in word][-1] == "BUILDKIT_CACHE_MOUNT_NS=dev"


@pytest.mark.parametrize(
    ("dockerfile", "found"),
    [
        ("FROM python:3.11\nCOPY . /app\nADD data.tar /\nADD ./local /\n", []),
        ("FROM a\nADD https://example.org/x /x\n", ["ADD https://example.org/x"]),
        ("FROM a\n  add --checksum=sha256:00 http://10.81.0.3/x /x\n", ["ADD http://10.81.0.3/x"]),
        ('FROM a\nADD ["http://10.81.0.3/x", "/x"]\n', ["ADD http://10.81.0.3/x"]),
        ("FROM a\nADD $URL /x\n", ["ADD $URL"]),
        ("FROM a\nADD git@github.com:o/r.git /x\n", ["ADD git@github.com:o/r.git"]),
        ("FROM a\nONBUILD ADD http://x /x\n", ["ADD http://x"]),
        ("FROM a\nAD\\\n# a comment\n\nD http://x /x\n", ["ADD http://x"]),
        ("# escape=`\nFROM a\nRUN echo \\\nAD`\nD http://x /x\n", ["ADD http://x"]),
        ("FROM a\r\nADD \\\r\n http://x /x\r\n", ["ADD http://x"]),
        ("FROM a\nRUN <<EOF\necho \\\nEOF\nADD http://x /x\n", ["ADD http://x"]),
        ("FROM a\nRUN <<'E\\'\n", ["a heredoc <<'E\\'"]),
        ("# syntax=docker/dockerfile:1.7-labs\nFROM a\n", []),
        ("# syntax=evil/frontend\nFROM a\n", ["syntax=evil/frontend"]),
        ("\ufeff#syntax=docker/dockerfile2\nFROM a\n", ["syntax=docker/dockerfile2"]),
        ("FROM 10.81.0.3:5000/a\n", ["FROM 10.81.0.3:5000/a"]),
        ("FROM --platform=linux/amd64 localhost/a AS b\n", ["FROM localhost/a"]),
        ("FROM a AS b\nCOPY --from=b /x /x\nRUN --mount=type=bind,from=127.0.0.1/c x\n", ["FROM 127.0.0.1/c"]),
        ("ARG V=3.11\nARG BASE=python\nFROM ${BASE}:$V\nFROM base-${TARGETARCH}\n", []),
        ("FROM python:${OTHER}\n", ["FROM python:${OTHER}"]),
        ("# x \\\nA\\\nDD http://x /x\nFROM a\n", ["ADD http://x"]),
        ("FROM a\nRUN echo \\\\\nA\\\nDD http://x /x\n", ["ADD http://x"]),
        ("FROM a\nADD http:\\/\\/10.81.0.3/x /x\n", ["ADD http:\\/\\/10.81.0.3/x"]),
        ('FROM a\nADD "http:"//10.81.0.3/x /x\n', ['ADD "http:"//10.81.0.3/x']),
        ('FROM a\nADD ["http:\\u002f\\u002f10.81.0.3/x", "/x"]\n', ["ADD http://10.81.0.3/x"]),
        ("FROM a\nADD --chown=1:1\rhttp://x /x\n", ["ADD http://x"]),
        ("FROM a\nADD user@10.81.0.3:data /x\n", ["ADD user@10.81.0.3:data"]),
        ('{"s\\u0079ntax": "evil/frontend"}', ["a Dockerfile in JSON"]),
        ('FROM "10.81.0.3:5000"/x\n', ['FROM "10.81.0.3:5000"/x']),
        ("ARG B=10.81.0.3:5000\nFROM $B/x\nARG B=alpine\n", ["FROM 10.81.0.3:5000/x"]),
        ("FROM a AS b\nFROM b\nRUN cat <<< x && echo $((1<<4)) --from=$DATE\n", []),
        ("ARG V=1\nFROM a\nARG V=1\nADD app-${V}.tar.gz /x\n", []),
        ("ARG BASE=python\nFROM $BASE\nFROM $GIVEN\n", ["FROM 10.81.0.3/a"]),
        ("FROM $UNKNOWN/x\n", ["FROM $UNKNOWN/x"]),
        ("FROM a\nA\\\n\xa0\nDD http://x /x\n", ["ADD http://x"]),
        ("FROM a\n\xa0ADD http://x /x\n", ["ADD http://x"]),
        ("FROM a\nADD http://x \x1c\n", ["ADD http://x"]),
        ("FROM a\nADD x \\\n\x1c# \\\n http://x /x\n", ["ADD \x1c#", "ADD http://x"]),
        ("FROM a\n#!/x\n", []),
        ('#!/x\n {"syntax": "evil"}', ["a Dockerfile in JSON"]),
        ('ARG B="10.81.0.3:5000"/x\nFROM $B\n', ['FROM "10.81.0.3:5000"/x']),
        ("ARG 1localhost=x\nFROM $1localhost/x\n", ["FROM $1localhost/x"]),
        ("FROM a\nARG U=x\nENV U=http://x\nADD $U /x\n", ["ADD $U"]),
        ("FROM a\nARG U=x\nENV \\U=http://x\nADD $U /x\n", ["ADD $U"]),
        ('FROM a\nARG U=x\nENV A=1 U""=http://x\nADD $U /x\n', ["ADD $U"]),
        ("FROM a\nCOPY --chown=\xe0--from=b /x /x\n", ["an option --chown=\xe0--from=b"]),
        ("FROM a\nCMD --\xe0 x\nLABEL --from x\n", []),
        ("FROM a\nCOPY --from b /x /x\n", ["an option --from"]),
        ('FROM a\nCOPY --from="b /x /x\n', ['an option --from="b']),
        ('FROM a\nRUN cat <<<"$x" && echo $((1<<4))\nENV X=<<"a\n', []),
        ("FROM a\nRUN <<-'EOF' cat\nx\nEOF\nADD <<EOF /x\nEOF\n", []),
        ("FROM a\nADD x \\\n  # a comment\n  y /x\n", []),
        ('FROM a\nADD ["x", "y", "/x"]\nADD a*.tar b?.tar $HOME/\n', []),
        ("FROM base-${TARGETARCH} AS localhost\nCOPY --from=localhost /x /x\n", []),
        ('FROM a\nRUN --mount=type=bind,"from=localhost/x" x\n', ["FROM localhost/x"]),
        ("FROM a\nRUN <<EOF\nFROM a AS b\nEOF\nFROM b\n", []),
    ],
)
def test_what_a_dockerfile_makes_the_engine_fetch(dockerfile: str, found: list[str]) -> None:
    assert list(fetches(dockerfile, {"GIVEN": "10.81.0.3/a"})) == found


@pytest.mark.parametrize(
    ("dockerfile", "found"),
    [
        ("FROM bulkhead/prod-api:1\n", ["bulkhead/prod-api:1"]),
        ("FROM a AS b\nFROM b\nCOPY --from=bulkhead/prod-x /x /x\nCOPY --from=b /x /x\n", ["a", "bulkhead/prod-x"]),
        ("ARG O=prod\nFROM bulkhead/$O-api:1\n", ["bulkhead/prod-api:1"]),
        ("FROM a\nRUN --mount=type=bind,from=4f3a2b,target=/x cat /x\n", ["a", "4f3a2b"]),
        ("FROM $GIVEN\nFROM $UNKNOWN\nFROM scratch\n", ["10.81.0.3/a", "$UNKNOWN"]),
        ("\ufeffFROM a\r\nFR\\\r\nOM b\r\n", ["a", "b"]),
        ("FROM a AS fe\nRUN cat <<E\nE\nFROM b\nCOPY --from=fe /x /x\nCOPY --from=ab /x /x\n", ["a", "b", "ab"]),
        ("FROM fa3b1c AS fa3b1c\nRUN cat <<EOF\nEOF\n", ["fa3b1c"]),
        ("FROM fa3b1c\nRUN echo AS fa3b1c\nFROM fa3b1c\n", ["fa3b1c"]),
    ],
)  # fmt: skip
def test_the_images_that_a_dockerfile_names(dockerfile: str, found: list[str]) -> None:
    assert images(dockerfile, {"GIVEN": "10.81.0.3/a"}) == found


def test_services_with_the_same_build_share_one_image(engine: Engine, tmp_path: Any) -> None:
    (tmp_path / "Dockerfile").write_text("FROM scratch")
    build = {"context": str(tmp_path)}
    deployed(engine, project(services={"a": {"build": build}, "b": {"build": build}}))
    assert len([key for key in engine.seen if key.startswith("docker:index/remoteImage")]) == 1


def test_a_config_that_is_no_text_names_itself_and_the_remedy(engine: Engine, tmp_path: Any) -> None:
    (tmp_path / "logo.png").write_bytes(b"\xff\xfe")
    given_project = project(
        services={"a": {"image": "a", "configs": [{"source": "logo"}]}},
        configs={"logo": {"file": str(tmp_path / "logo.png")}},
    )
    with pytest.raises(SettingsError, match=r"logo.png.*cannot be read as text.*volume"):
        deployed(engine, given_project)


def test_network_mode_service_becomes_the_container_of_that_service(engine: Engine) -> None:
    deployed(engine, project(services={"a": {"image": "a"}, "b": {"image": "b", "network_mode": "service:a"}}))
    assert engine.seen[f"{CONTAINER}::prod-b-1"].inputs["networkMode"] == "container:prod-a-1"

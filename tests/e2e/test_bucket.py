"""The bucket of a backup target at a real S3 server: what is set holds, what the server cannot do is said, and the
policies keep dev from prod's backups and a writer from its own snapshots."""

import io
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from rich.console import Console

from cli import bucket as command
from host import bucket
from host.bucket import Credentials, Role, State
from host.restic import BackupError, Repository, Snapshot
from settings.backup import BucketTarget
from settings.errors import SettingsError
from tests.s3 import Server, server

pytestmark = pytest.mark.e2e

DENIED = "AccessDenied"


def answer(call: Callable[..., Any], **arguments: Any) -> str:
    """The code that a call is refused with; empty where it works."""
    try:
        call(**arguments)
    except ClientError as error:
        return str(error.response["Error"]["Code"])
    return ""


def states(target: BucketTarget, environment: str, owner: Credentials, **how: Any) -> Mapping[str, State]:
    return {one.name: one.state for one in bucket.ensure(target, environment, owner, **how)}


def test_a_bucket_is_made_and_the_second_call_changes_nothing(s3: Server) -> None:
    target = s3.target("made", lock="2d")
    first = states(target, "prod", s3.owner)
    assert first["bucket"] is State.SET
    assert first["object lock"] is State.SET
    # What this server cannot do is said, each time.
    cannot = {name for name, state in first.items() if state is State.UNSUPPORTED}
    assert cannot == {"lifecycle", "public access blocked"}
    second = states(target, "prod", s3.owner)
    assert set(second.values()) == {State.KEPT, State.UNSUPPORTED, State.NOT_ASKED}
    assert {name for name, state in second.items() if state is State.UNSUPPORTED} == cannot


def test_what_is_overwritten_or_deleted_can_be_read_back(s3: Server) -> None:
    target = s3.target("versions")
    assert states(target, "prod", s3.owner)["versioning"] is State.SET
    client = bucket.connect(target, s3.owner)
    key = "prod/snapshots/1"
    before = client.put_object(Bucket="versions", Key=key, Body=b"before")["VersionId"]
    client.put_object(Bucket="versions", Key=key, Body=b"after")
    assert client.get_object(Bucket="versions", Key=key)["Body"].read() == b"after"
    client.delete_object(Bucket="versions", Key=key)
    assert answer(client.get_object, Bucket="versions", Key=key) == "NoSuchKey"
    assert client.get_object(Bucket="versions", Key=key, VersionId=before)["Body"].read() == b"before"


@pytest.mark.parametrize("compliance", [False, True])
def test_a_locked_version_cannot_be_deleted(s3: Server, compliance: bool) -> None:
    target = s3.target(f"locked-{compliance}".lower(), lock="1d")
    assert states(target, "prod", s3.owner, compliance=compliance)["object lock"] is State.SET
    client = bucket.connect(target, s3.owner)
    made = client.put_object(Bucket=target.bucket, Key="prod/data/1", Body=b"data")
    one = {"Bucket": target.bucket, "Key": "prod/data/1", "VersionId": made["VersionId"]}
    assert answer(client.delete_object, **one) == DENIED
    # Only a lock that its owner may lift is lifted, and only on purpose.
    assert answer(client.delete_object, **one, BypassGovernanceRetention=True) == (DENIED if compliance else "")


def test_an_object_that_is_locked_can_still_be_removed_from_sight(s3: Server) -> None:
    """restic removes its own locks; what it removes is a marker in front of versions that stay."""
    target = s3.target("removed", lock="1d")
    states(target, "prod", s3.owner)
    client = bucket.connect(target, s3.owner)
    version = client.put_object(Bucket="removed", Key="prod/locks/1", Body=b"lock")["VersionId"]
    client.delete_object(Bucket="removed", Key="prod/locks/1")
    assert client.list_objects_v2(Bucket="removed", Prefix="prod/locks/")["KeyCount"] == 0
    assert client.get_object(Bucket="removed", Key="prod/locks/1", VersionId=version)["Body"].read() == b"lock"


# Users with the policies of their roles, in both environments.


class Users:
    """A bucket with an object of each kind in each environment, and the clients of all roles."""

    def __init__(self, s3: Server) -> None:
        self.target = s3.target("users", prefix="shop")
        everyone = {
            (environment, role): s3.user(f"{environment}-{role}") for environment in ("prod", "dev") for role in Role
        }
        self.clients = {who: bucket.connect(self.target, credentials) for who, credentials in everyone.items()}
        self.states = {}
        for environment in ("prod", "dev"):
            principals = {role: [everyone[environment, role].access] for role in Role}
            self.states[environment] = states(self.target, environment, s3.owner, principals=principals)
        owner = bucket.connect(self.target, s3.owner)
        for environment in ("prod", "dev"):
            for kind in ("data", "keys", "locks", "snapshots"):
                owner.put_object(Bucket="users", Key=f"shop/{environment}/{kind}/1", Body=environment.encode())

    def tried(self, environment: str, role: Role, where: str) -> Mapping[str, str]:
        """How each call on an object, and a list of its folder, is answered: the code of the refusal, or nothing."""
        client, folder = self.clients[environment, role], where.rpartition("/")[0]
        return {
            "get": answer(client.get_object, Bucket="users", Key=where),
            "list": answer(client.list_objects_v2, Bucket="users", Prefix=f"{folder}/"),
            "put": answer(client.put_object, Bucket="users", Key=where, Body=b"again"),
            "delete": answer(client.delete_object, Bucket="users", Key=where),
        }


@pytest.fixture(scope="module")
def users(s3: Server) -> Users:
    return Users(s3)


def test_policies_are_applied_to_the_named_users(users: Users, s3: Server) -> None:
    for environment in ("prod", "dev"):
        assert {users.states[environment][f"policy of the {role}"] for role in Role} == {State.SET}
    client = bucket.connect(users.target, s3.owner)
    statements = json.loads(client.get_bucket_policy(Bucket="users")["Policy"])["Statement"]
    assert len(statements) == 2 * 7


@pytest.mark.parametrize("role", Role)
def test_devs_users_reach_nothing_of_prods(users: Users, role: Role) -> None:
    for kind in ("data", "keys", "locks", "snapshots"):
        tried = users.tried("dev", role, f"shop/prod/{kind}/1")
        assert tried == dict.fromkeys(("get", "list", "put", "delete"), DENIED)
    everything = {"Bucket": "users"}
    assert answer(users.clients["dev", role].list_objects_v2, **everything) == DENIED


@pytest.mark.parametrize(
    ("role", "kind", "refused"),
    [
        (Role.WRITER, "snapshots", {"delete"}),
        (Role.WRITER, "data", {"delete"}),
        (Role.WRITER, "keys", {"delete"}),
        (Role.WRITER, "locks", set()),
        (Role.PRUNER, "snapshots", set()),
        (Role.RESTORER, "data", {"put", "delete"}),
        (Role.RESTORER, "locks", {"put", "delete"}),
    ],
)
def test_a_role_may_do_what_it_needs_in_its_own_environment(
    users: Users, s3: Server, role: Role, kind: str, refused: set[str]
) -> None:
    where = f"shop/prod/{kind}/{role}"
    bucket.connect(users.target, s3.owner).put_object(Bucket="users", Key=where, Body=b"prod")
    tried = users.tried("prod", role, where)
    assert {call: code for call, code in tried.items() if code} == dict.fromkeys(refused, DENIED)


def test_nobody_but_the_owner_deletes_a_version_or_changes_the_bucket(users: Users, s3: Server) -> None:
    owner = bucket.connect(users.target, s3.owner)
    version = owner.put_object(Bucket="users", Key="shop/prod/data/2", Body=b"prod")["VersionId"]
    for client in users.clients.values():
        one = {"Bucket": "users", "Key": "shop/prod/data/2", "VersionId": version}
        assert answer(client.delete_object, **one) == DENIED
        off = {"Status": "Suspended"}
        assert answer(client.put_bucket_versioning, Bucket="users", VersioningConfiguration=off) == DENIED
        assert answer(client.delete_bucket_policy, Bucket="users") == DENIED


def test_restic_needs_no_more_than_its_roles_have(s3: Server, tmp_path: Path) -> None:
    target = s3.target("restic", prefix="shop", lock="1d")
    users = {role: s3.user(f"restic-{role}") for role in Role}
    states(target, "prod", s3.owner, principals={role: [user.access] for role, user in users.items()})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "order").write_text("rope")

    def restic(who: Credentials, *words: str) -> int:
        variables = {"AWS_ACCESS_KEY_ID": who.access, "AWS_SECRET_ACCESS_KEY": who.secret, "PATH": os.environ["PATH"]}
        own = {"RESTIC_REPOSITORY": target.repository("prod"), "RESTIC_PASSWORD": "key"}
        return subprocess.run(
            ["restic", "--no-cache", *words], env=variables | own, cwd=tmp_path, capture_output=True, timeout=120
        ).returncode

    # It asks for the bucket as a whole, once; no role may.
    assert restic(s3.owner, "init") == 0
    writer, pruner, restorer = (users[role] for role in Role)
    assert restic(writer, "backup", "data") == 0
    assert restic(writer, "backup", "data") == 0
    assert restic(restorer, "restore", "latest", "--no-lock", "--target", "restored") == 0
    assert (tmp_path / "restored" / "data" / "order").read_text() == "rope"
    assert restic(pruner, "forget", "--keep-last", "1", "--prune") == 0
    assert restic(pruner, "check") == 0


def writers(s3: Server, target: BucketTarget, folder: Path) -> Repository:
    """An environment's repository in a new bucket, as its host has it: with the writer's credentials."""
    writer = s3.user(f"{target.bucket}-writer")
    states(target, "prod", s3.owner, principals={Role.WRITER: [writer.access]})
    variables = {"AWS_ACCESS_KEY_ID": writer.access, "AWS_SECRET_ACCESS_KEY": writer.secret}
    return Repository(target.repository("prod"), "key", folder / "cache", variables, append_only=True)


def saved(there: Repository, text: str) -> Snapshot:
    return there.save_stream(["printf", text], "file", ["job:j", "kind:base"], 60)


def test_only_the_owner_makes_a_repository_and_a_writer_adds_to_it(s3: Server, tmp_path: Path) -> None:
    target = s3.target("first", lock="1d")
    there = writers(s3, target, tmp_path)
    with pytest.raises(BackupError, match="make bucket"):
        saved(there, "one")
    assert command.repository(target, "prod", s3.variables, None).state is State.NOT_ASKED
    assert command.repository(target, "prod", s3.variables, "key").state is State.SET
    assert command.repository(target, "prod", s3.variables, "key").state is State.KEPT
    another = command.repository(target, "prod", s3.variables, "another")
    assert another.lacking
    assert "lost-key.md" in another.note
    for text in ("one", "two", "three"):
        saved(there, text)
    there.forget({"last": 1}, "job:j")
    assert len(there.snapshots()) == 3


def test_what_was_destroyed_with_stolen_credentials_comes_back_as_it_was(s3: Server, tmp_path: Path) -> None:
    """docs/runbooks/ransomware.md: a thief who may write and prune overwrites and deletes all that there is."""
    target = s3.target("stolen", lock="1d")
    there = writers(s3, target, tmp_path)
    command.repository(target, "prod", s3.variables, "key")
    good = saved(there, "the orders")
    pruner = s3.user("stolen-pruner")
    states(target, "prod", s3.owner, principals={Role.PRUNER: [pruner.access]})
    thief = bucket.connect(target, pruner)
    objects = [one["Key"] for one in thief.list_objects_v2(Bucket="stolen", Prefix="prod/")["Contents"]]
    for number, key in enumerate(objects):
        thief.put_object(Bucket="stolen", Key=key, Body=b"pay us")
        if number % 2:
            thief.delete_object(Bucket="stolen", Key=key)
    thief.put_object(Bucket="stolen", Key="prod/data/note", Body=b"pay us")
    for one in bucket.connect(target, s3.owner).list_object_versions(Bucket="stolen", Prefix="prod/")["Versions"]:
        refused = answer(thief.delete_object, Bucket="stolen", Key=one["Key"], VersionId=one["VersionId"])
        assert refused == DENIED
    with pytest.raises(BackupError):
        there.snapshots()

    console = Console(file=io.StringIO(), width=200)
    assert command.bring_back(target, "prod", s3.variables, console) == 0
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"{len(objects)} objects brought back, 1 that restic did not write hidden" in said
    there.check()
    done = subprocess.run(there.dump(good.id, "/file"), env=there.environment, capture_output=True, check=True)
    assert done.stdout == b"the orders"
    assert bucket.brought_back(target, "prod", s3.owner).brought_back == 0


def test_revoked_credentials_and_a_server_that_is_away_are_said_at_once(tmp_path: Path) -> None:
    with server(tmp_path) as s3:
        target = s3.target("refused")
        there = writers(s3, target, tmp_path)
        command.repository(target, "prod", s3.variables, "key")
        kept = saved(there, "one")
        for wrong in ({"AWS_SECRET_ACCESS_KEY": "revoked"}, {"AWS_ACCESS_KEY_ID": "revoked"}):
            with pytest.raises(BackupError, match="backup_<target>_key_id"):
                saved(replace(there, variables={**there.variables, **wrong}), "two")
        assert [one.id[:8] for one in there.snapshots()] == [kept.id]
    with pytest.raises(BackupError, match="does not answer"):
        saved(there, "three")
    with server(tmp_path, again=s3):
        assert [one.id[:8] for one in there.snapshots()] == [kept.id]


def test_a_server_that_goes_and_comes_back_in_the_middle_loses_nothing(tmp_path: Path) -> None:
    source, sent = tmp_path / "source", tmp_path / "sent"
    source.write_bytes(os.urandom(60_000_000))
    slow = ["sh", "-c", f"head -c 30000000 {source}; touch {sent}; sleep 2; tail -c +30000001 {source}"]
    with ThreadPoolExecutor(1) as pool:
        with server(tmp_path) as s3:
            target = s3.target("middle")
            there = writers(s3, target, tmp_path)
            command.repository(target, "prod", s3.variables, "key")
            running = pool.submit(there.save_stream, slow, "file", ["job:j"], 120)
            while not sent.exists() and not running.done():
                time.sleep(0.05)
        time.sleep(3)
        assert not running.done()
        with server(tmp_path, again=s3):
            made = running.result(timeout=200)
            back = subprocess.run(there.dump(made.id, "/file"), env=there.environment, capture_output=True, check=True)
    assert back.stdout == source.read_bytes()


@contextmanager
def small(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system that is soon full."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_said_and_leaves_no_snapshot(tmp_path: Path) -> None:
    with small(tmp_path / "small", 3) as disk:
        there = Repository(str(disk / "prod"), "key", tmp_path / "cache")
        kept = saved(there, "one")
        with pytest.raises(BackupError, match="make room"):
            there.save_stream(["head", "-c", "20000000", "/dev/urandom"], "file", ["job:j"], 60)
        assert [one.id[:8] for one in there.snapshots()] == [kept.id]


def test_a_full_bucket_is_said_and_leaves_no_snapshot(tmp_path: Path) -> None:
    """The server's own disk is full, since it knows no quota."""
    with small(tmp_path / "objects", 20), server(tmp_path) as s3:
        target = s3.target("full")
        there = writers(s3, target, tmp_path)
        command.repository(target, "prod", s3.variables, "key")
        kept = saved(there, "one")
        with pytest.raises(BackupError, match="make room"):
            there.save_stream(["head", "-c", "60000000", "/dev/urandom"], "file", ["job:j"], 300)
        assert [one.id[:8] for one in there.snapshots()] == [kept.id]


def test_with_tls_required_a_user_comes_in_with_it_and_not_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two servers over the same folder: one with TLS, one without."""
    with server(tmp_path, tls=True) as secure, server(tmp_path) as plain:
        monkeypatch.setenv("AWS_CA_BUNDLE", str(secure.authority))
        user = plain.user("restorer")
        target = secure.target("tls")
        found = states(target, "prod", secure.owner, principals={Role.RESTORER: [user.access]})
        assert found["TLS required"] is found["policy of the restorer"] is State.SET
        bucket.connect(target, secure.owner).put_object(Bucket="tls", Key="prod/config", Body=b"prod")
        one = {"Bucket": "tls", "Key": "prod/config"}
        assert answer(bucket.connect(target, user).get_object, **one) == ""
        assert answer(bucket.connect(plain.target("tls"), user).get_object, **one) == DENIED


# The command.


def test_the_command_shows_what_was_done_and_wrong_credentials_what_to_do(s3: Server, tmp_path: Path) -> None:
    variables = s3.variables
    output = io.StringIO()
    console = Console(file=output, width=120)
    target = s3.target("command", lock="1d")
    note = tmp_path / "state/buckets.json"
    assert command.ensure(target, "prod", variables, [], None, console, compliance=False, note=note) == 0
    assert "not supported by this endpoint" in output.getvalue()
    (known,) = command.noted(note).values()
    assert set(known["lacking"]) == {"lifecycle", "public access blocked"}  # which make doctor names
    for wrong in ({"AWS_SECRET_ACCESS_KEY": "wrong"}, {"AWS_ACCESS_KEY_ID": "nobody"}):
        with pytest.raises(SettingsError, match="Next step: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to"):
            command.ensure(target, "prod", variables | wrong, [], None, console, compliance=False)

"""The bucket of a backup target: which calls are made of an endpoint, what they leave alone, what the policies allow.
moto plays S3; what it cannot do otherwise (refuse, ignore) a client around it does. A real server: tests/e2e."""

import io
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from moto import mock_aws
from rich.console import Console

from cli import bucket as command
from host import bucket
from host.__main__ import VERBS
from host.bucket import Credentials, Feature, Role, State
from host.machine import Undecided
from settings.backup import BackupSettings, BucketTarget
from settings.errors import SettingsError

OWNER = Credentials("owner", "secret")
ENDPOINT = "https://s3.us-east-1.amazonaws.com"
WRITER = "arn:aws:iam::123456789012:user/prod-writer"
DAY = 24 * 3600


def target(**changed: Any) -> BucketTarget:
    return BucketTarget(**{"endpoint": ENDPOINT, "bucket": "backups", "prefix": "shop", "lock": "14d"} | changed)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "PAUSES", (0.0,))


@pytest.fixture
def s3() -> Iterator[Any]:
    """The owner's client, of an S3 without buckets."""
    with mock_aws():
        yield bucket.connect(target(), OWNER)


def states(features: list[Feature]) -> dict[str, State]:
    return {one.name: one.state for one in features}


def retention(s3: Any) -> tuple[str, int]:
    """Mode and days of the bucket's lock."""
    rule = s3.get_object_lock_configuration(Bucket="backups")["ObjectLockConfiguration"]["Rule"]["DefaultRetention"]
    return rule["Mode"], rule["Days"]


ALL_SET = {
    "bucket": State.SET,
    "versioning": State.SET,
    "object lock": State.SET,
    "lifecycle": State.SET,
    "public access blocked": State.SET,
    "TLS required": State.SET,
    "policy of the writer": State.SET,
    "policy of the pruner": State.NOT_ASKED,
    "policy of the restorer": State.NOT_ASKED,
}


def test_a_bucket_is_made_with_all_that_backups_rely_on_and_then_left_alone(s3: Any) -> None:
    given = {Role.WRITER: [WRITER]}
    first = states(bucket.ensure(target(), "prod", OWNER, principals=given))
    # A bucket that is made with a lock has versions from the start.
    assert first == ALL_SET | {"versioning": State.KEPT}
    assert retention(s3) == ("GOVERNANCE", 14)
    (rule,) = s3.get_bucket_lifecycle_configuration(Bucket="backups")["Rules"]
    assert rule["Filter"] == {"Prefix": "shop/prod/"}
    assert rule["NoncurrentVersionExpiration"]["NoncurrentDays"] == 30
    assert all(s3.get_public_access_block(Bucket="backups")["PublicAccessBlockConfiguration"].values())
    tls, *grants = json.loads(s3.get_bucket_policy(Bucket="backups")["Policy"])["Statement"]
    assert (tls["Effect"], tls["Condition"]) == ("Deny", {"Bool": {"aws:SecureTransport": "false"}})
    assert {one["Principal"]["AWS"][0] for one in grants} == {WRITER}
    second = bucket.ensure(target(), "prod", OWNER, principals=given)
    assert {one.state for one in second} == {State.KEPT, State.NOT_ASKED}
    assert not any(one.lacking for one in second)


def test_without_a_lock_versions_are_turned_on_and_the_lack_is_said(s3: Any) -> None:
    found = bucket.ensure(target(lock=None), "prod", OWNER)
    assert states(found)["versioning"] is State.SET
    assert next(one for one in found if one.name == "object lock").state is State.NOT_ASKED
    assert s3.get_bucket_versioning(Bucket="backups")["Status"] == "Enabled"


@pytest.mark.parametrize(("lock", "days"), [("36h", 2), ("14d", 14), ("1s", 1)])
def test_a_lock_is_of_whole_days(s3: Any, lock: str, days: int) -> None:
    bucket.ensure(target(lock=lock), "prod", OWNER)
    assert retention(s3) == ("GOVERNANCE", days)


def test_old_versions_outlive_the_lock(s3: Any) -> None:
    bucket.ensure(target(lock="90d"), "prod", OWNER)
    (rule,) = s3.get_bucket_lifecycle_configuration(Bucket="backups")["Rules"]
    assert rule["NoncurrentVersionExpiration"]["NoncurrentDays"] == 97


def test_a_lock_is_made_longer_and_stricter_but_never_weaker(s3: Any) -> None:
    def lock(written: str, *, compliance: bool) -> State:
        return states(bucket.ensure(target(lock=written), "prod", OWNER, compliance=compliance))["object lock"]

    assert lock("14d", compliance=False) is State.SET
    assert lock("20d", compliance=True) is State.SET
    assert lock("14d", compliance=False) is State.KEPT
    assert retention(s3) == ("COMPLIANCE", 20)
    assert lock("30d", compliance=False) is State.SET
    assert retention(s3) == ("COMPLIANCE", 30)


def test_a_stricter_lock_is_no_shorter(s3: Any) -> None:
    bucket.ensure(target(lock="90d"), "prod", OWNER)
    bucket.ensure(target(lock="14d"), "prod", OWNER, compliance=True)
    assert retention(s3) == ("COMPLIANCE", 90)


def test_a_region_is_told_except_the_one_that_s3_does_not_take() -> None:
    with mock_aws():
        away = target(endpoint="https://s3.eu-central-1.amazonaws.com", region="eu-central-1")
        assert states(bucket.ensure(away, "prod", OWNER))["bucket"] is State.SET
        where = bucket.connect(away, OWNER).get_bucket_location(Bucket="backups")
        assert where["LocationConstraint"] == "eu-central-1"


def test_what_others_set_on_the_bucket_stays(s3: Any) -> None:
    s3.create_bucket(Bucket="backups")
    rule = {"ID": "logs", "Status": "Enabled", "Filter": {"Prefix": "logs/"}, "Expiration": {"Days": 3}}
    s3.put_bucket_lifecycle_configuration(Bucket="backups", LifecycleConfiguration={"Rules": [rule]})
    statement = {
        "Sid": "Theirs",
        "Effect": "Allow",
        "Principal": {"AWS": WRITER},
        "Action": "s3:GetObject",
        "Resource": "arn:aws:s3:::backups/logs/*",
    }
    s3.put_bucket_policy(Bucket="backups", Policy=json.dumps({"Version": "2012-10-17", "Statement": [statement]}))
    for environment in ("prod", "dev"):
        bucket.ensure(target(lock=None), environment, OWNER, principals={Role.PRUNER: [f"{WRITER}-{environment}"]})
    rules = s3.get_bucket_lifecycle_configuration(Bucket="backups")["Rules"]
    assert [one["ID"] for one in rules] == ["logs", "bulkhead shop/prod", "bulkhead shop/dev"]
    statements = json.loads(s3.get_bucket_policy(Bucket="backups")["Policy"])["Statement"]
    assert len(statements) == len({one["Sid"] for one in statements}) == 1 + 1 + 2 * 2
    assert statement in statements


def test_another_principal_takes_the_place_of_the_former(s3: Any) -> None:
    for name in ("first", "second"):
        bucket.ensure(target(), "prod", OWNER, principals={Role.RESTORER: [f"arn:aws:iam::123456789012:user/{name}"]})
    assert "first" not in s3.get_bucket_policy(Bucket="backups")["Policy"]


# Endpoints that can do less.


def refusal(code: str, operation: str, status: int = 400) -> ClientError:
    said = {"Error": {"Code": code, "Message": "No."}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(said, operation)  # type: ignore[arg-type]


class Endpoint:
    """The client of an endpoint that answers some operations otherwise: with an error, or with nothing done."""

    def __init__(self, client: Any, answers: Mapping[str, ClientError | Mapping[str, Any]]) -> None:
        self._client, self._answers = client, answers

    def __getattr__(self, operation: str) -> Any:
        answer = self._answers.get(operation)
        if answer is None:
            return getattr(self._client, operation)

        def otherwise(**_: object) -> Mapping[str, Any]:
            if isinstance(answer, ClientError):
                raise answer
            return answer

        return otherwise


@pytest.fixture
def answering(s3: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the endpoint answer operations otherwise."""
    return lambda **answers: monkeypatch.setattr(bucket, "connect", lambda *_: Endpoint(s3, answers))


@pytest.mark.parametrize(
    ("operation", "feature"),
    [
        ("put_bucket_versioning", "versioning"),
        ("get_object_lock_configuration", "object lock"),
        ("get_bucket_lifecycle_configuration", "lifecycle"),
        ("put_public_access_block", "public access blocked"),
        ("get_bucket_policy", "TLS required"),
    ],
)
@pytest.mark.parametrize(("code", "status"), [("NotImplemented", 501), ("MethodNotAllowed", 405), ("Odd", 501)])
def test_what_an_endpoint_refuses_is_named(
    s3: Any, answering: Any, operation: str, feature: str, code: str, status: int
) -> None:
    s3.create_bucket(Bucket="backups")  # without versions
    answering(**{operation: refusal(code, operation, status)})
    found = next(one for one in bucket.ensure(target(), "prod", OWNER) if one.name == feature)
    assert (found.state, found.note) == (State.UNSUPPORTED, f"it answered {code}")
    assert found.lacking == (feature in ("versioning", "object lock"))


@pytest.mark.parametrize(
    ("operation", "feature"),
    [
        ("put_bucket_versioning", "versioning"),
        ("put_bucket_lifecycle_configuration", "lifecycle"),
        ("put_public_access_block", "public access blocked"),
        ("put_bucket_policy", "TLS required"),
    ],
)
def test_what_an_endpoint_ignores_is_named(s3: Any, answering: Any, operation: str, feature: str) -> None:
    s3.create_bucket(Bucket="backups")
    answering(**{operation: {}})
    found = next(one for one in bucket.ensure(target(lock=None), "prod", OWNER) if one.name == feature)
    assert found.state is State.UNSUPPORTED
    assert found.note == "it took the setting, but does not have it when asked"


def test_an_endpoint_that_knows_no_lock_makes_the_bucket_without(s3: Any, answering: Any) -> None:
    made: list[Mapping[str, Any]] = []

    def create(**arguments: Any) -> None:
        if "ObjectLockEnabledForBucket" in arguments:
            raise refusal("NotImplemented", "CreateBucket", 501)
        made.append(arguments)
        s3.create_bucket(**arguments)

    endpoint = Endpoint(s3, {"get_object_lock_configuration": refusal("NotImplemented", "GetObjectLock…", 501)})
    endpoint.__dict__["create_bucket"] = create
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bucket, "connect", lambda *_: endpoint)
        found = states(bucket.ensure(target(), "prod", OWNER))
    assert made == [{"Bucket": "backups"}]
    assert (found["bucket"], found["object lock"]) == (State.SET, State.UNSUPPORTED)


def test_a_policy_that_shuts_out_everybody_is_taken_back(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.ensure(target(lock=None), "prod", OWNER)
    s3.delete_bucket_policy(Bucket="backups")

    class WithoutConditions(Endpoint):
        def list_objects_v2(self, **arguments: Any) -> Any:
            denied = bucket._setting(s3.get_bucket_policy, "backups")
            if denied:
                raise refusal("AccessDenied", "ListObjectsV2", 403)
            return s3.list_objects_v2(**arguments)

    monkeypatch.setattr(bucket, "connect", lambda *_: WithoutConditions(s3, {}))
    found = next(one for one in bucket.ensure(target(lock=None), "prod", OWNER) if one.name == "TLS required")
    assert found.state is State.UNSUPPORTED
    assert "taken back" in found.note
    with pytest.raises(ClientError, match="NoSuchBucketPolicy"):
        s3.get_bucket_policy(Bucket="backups")


def test_on_loopback_there_is_no_tls_to_require() -> None:
    local = target(endpoint="http://127.0.0.1:7070")
    found = bucket._Bucket(bucket.connect(local, OWNER), local, "prod").tls_only()
    assert found.state is State.NOT_ASKED


def test_a_call_that_fails_says_the_next_step_and_the_others_are_made(s3: Any, answering: Any) -> None:
    answering(put_public_access_block=refusal("AccessDenied", "PutPublicAccessBlock", 403))
    found = {one.name: one for one in bucket.ensure(target(), "prod", OWNER)}
    assert found["public access blocked"].state is State.FAILED
    assert "PutPublicAccessBlock: AccessDenied: No. Next step: set AWS_ACCESS_KEY_ID" in (
        found["public access blocked"].note
    )
    assert found["public access blocked"].lacking
    assert found["TLS required"].state is State.SET


@pytest.mark.parametrize(
    ("code", "step"),
    [
        ("InvalidAccessKeyId", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("SignatureDoesNotMatch", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("AccessDenied", "name your own in the ledger"),
        ("PermanentRedirect", "write the bucket's own region"),
        ("SlowDown", "see what the endpoint's own log says"),
    ],
)
def test_an_endpoint_that_does_not_open_the_bucket_is_undecided(answering: Any, code: str, step: str) -> None:
    answering(list_objects_v2=refusal(code, "ListObjectsV2", 403))
    with pytest.raises(Undecided, match=rf"ListObjectsV2: {code}: No\. Next step: .*{step}"):
        bucket.ensure(target(), "prod", OWNER)


def test_an_endpoint_that_is_not_there_is_undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nobody:
        def list_objects_v2(self, **_: object) -> None:
            raise EndpointConnectionError(endpoint_url=ENDPOINT)

    monkeypatch.setattr(bucket, "connect", lambda *_: Nobody())
    with pytest.raises(Undecided, match=r"Could not connect.*Next step: check the endpoint"):
        bucket.ensure(target(), "prod", OWNER)


def test_secrets_are_not_shown() -> None:
    assert "secret" not in repr(Credentials("owner", "secret", "secret token"))


# What the policies allow.


def allows(document: Mapping[str, Any], action: str, resource: str, prefix: str | None = None) -> bool:
    """As IAM decides for documents that only allow: no match is a denial."""
    for one in document["Statement"]:
        assert one["Effect"] == "Allow"
        needed = one.get("Condition", {}).get("StringLike", {}).get("s3:prefix")
        if needed and (prefix is None or not fnmatchcase(prefix, needed)):
            continue
        if action in one["Action"] and fnmatchcase(resource, one["Resource"]):
            return True
    return False


BUCKET = "arn:aws:s3:::backups"
PROD, DEV = f"{BUCKET}/shop/prod", f"{BUCKET}/shop/dev"
EVERY_ACTION = (
    "s3:GetObject",
    "s3:PutObject",
    "s3:DeleteObject",
    "s3:DeleteObjectVersion",
    "s3:BypassGovernanceRetention",
    "s3:PutObjectRetention",
    "s3:PutBucketVersioning",
    "s3:PutLifecycleConfiguration",
    "s3:PutBucketPolicy",
)


@pytest.mark.parametrize(
    ("role", "wanted"),
    [
        (Role.WRITER, {"s3:GetObject", "s3:PutObject"}),
        (Role.PRUNER, {"s3:GetObject", "s3:PutObject", "s3:DeleteObject"}),
        (Role.RESTORER, {"s3:GetObject"}),
    ],
)
def test_a_role_may_do_what_it_needs_and_nothing_else(role: Role, wanted: set[str]) -> None:
    document = bucket.policy(target(), "prod", role)
    for what in ("config", "data/00/0001", "index/1", "keys/1", "snapshots/1"):
        assert {action for action in EVERY_ACTION if allows(document, action, f"{PROD}/{what}")} == wanted
    assert allows(document, "s3:DeleteObject", f"{PROD}/locks/1") == (role is not Role.RESTORER)
    assert not any(allows(document, action, BUCKET) for action in EVERY_ACTION)


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("prefix", ["shop", "", "/shop/"])
def test_devs_documents_cover_nothing_of_prods(role: Role, prefix: str) -> None:
    document = bucket.policy(target(prefix=prefix), "dev", role)
    inside = f"{prefix.strip('/')}/".lstrip("/")
    for key in (f"{inside}prod/config", f"{inside}prod/locks/1", f"{inside}dev2/config", f"{inside}dev", "dev.txt"):
        assert not any(allows(document, action, f"{BUCKET}/{key}") for action in EVERY_ACTION)
    for listed in (None, "", inside, f"{inside}prod/", f"{inside}dev"):
        assert not allows(document, "s3:ListBucket", BUCKET, listed)
    assert allows(document, "s3:ListBucket", BUCKET, f"{inside}dev/snapshots/")


def test_two_environments_have_statements_of_their_own() -> None:
    names = [
        statement["Sid"]
        for environment in ("prod", "dev")
        for role in Role
        for statement in bucket.policy(target(), environment, role)["Statement"]
    ]
    assert len(names) == len(set(names)) == 14
    assert all(name.isalnum() for name in names)


# The command.

BACKUP: dict[str, Any] = {
    "targets": {
        "disk": {"path": "/srv/backup"},
        "offsite": {"endpoint": ENDPOINT, "bucket": "backups"},
    }
}


def test_a_target_is_chosen_by_name_or_is_the_only_bucket() -> None:
    one = BackupSettings(**BACKUP)
    two = BackupSettings(targets=BACKUP["targets"] | {"second": {"endpoint": ENDPOINT, "bucket": "second"}})
    assert command.chosen(one, None, "ledger").bucket == "backups"
    assert command.chosen(two, "second", "ledger").bucket == "second"
    for backup, name, says in (
        (BackupSettings(), None, r"ledger: bulkhead:backup.targets: lists no bucket. Write one, as in"),
        (two, None, r"lists several buckets. Name one with --target: offsite, second"),
        (two, "ofsite", r"targets.ofsite: lists no such bucket. Did you mean 'offsite'?"),
        (one, "disk", r"targets.disk: lists no such bucket. Known: offsite"),
    ):
        with pytest.raises(SettingsError, match=says):
            command.chosen(backup, name, "ledger")


def test_a_target_is_read_from_the_ledger_for_an_environment_that_it_has(tmp_path: Path) -> None:
    ledger = {
        "bulkhead:environments": {
            "dev": {"tier": "best-effort", "subnet": "10.82.0.0/16", "limits": {"memory": "30%"}}
        },
        "bulkhead:backup": BACKUP,
    }
    (tmp_path / "Pulumi.host.yaml").write_text(json.dumps({"config": ledger}))
    assert command.read(tmp_path, "dev", "offsite").key("dev") == "dev"
    with pytest.raises(SettingsError, match="no such environment in the ledger"):
        command.read(tmp_path, "prod", "offsite")


def test_credentials_come_from_the_variables_of_awss_own_tools() -> None:
    variables = {"AWS_ACCESS_KEY_ID": "owner", "AWS_SECRET_ACCESS_KEY": "secret"}
    assert command.credentials(variables) == OWNER
    assert command.credentials(variables | {"AWS_SESSION_TOKEN": "token"}).token == "token"
    for missing in variables:
        with pytest.raises(SettingsError, match=rf"^{missing}: not set. Export"):
            command.credentials({name: text for name, text in variables.items() if name != missing})


def test_principals_are_given_by_role() -> None:
    assert command.grants(["writer=a", "writer=b", "pruner=c=d"]) == {Role.WRITER: ["a", "b"], Role.PRUNER: ["c=d"]}
    for wrong in ("writer", "writer=", "owner=a", "=a"):
        with pytest.raises(SettingsError, match="roles: writer, pruner, restorer"):
            command.grants([wrong])


def test_policies_are_printed_for_each_role_with_and_without_principals() -> None:
    documents = json.loads(command.policies(target(), "prod", [f"writer={WRITER}"]))
    assert documents == {
        role: bucket.policy(target(), "prod", role, [WRITER] if role is Role.WRITER else []) for role in Role
    }
    assert "Principal" not in json.dumps(documents["pruner"])


@pytest.mark.usefixtures("s3")
def test_the_command_shows_every_feature_and_says_when_nothing_changed() -> None:
    variables = {"AWS_ACCESS_KEY_ID": "owner", "AWS_SECRET_ACCESS_KEY": "secret"}
    shown = []
    for _ in range(2):
        console = Console(file=io.StringIO(), width=120)
        assert command.ensure(target(), "prod", variables, [], None, console, compliance=False) == 0
        shown.append(console.file.getvalue())  # type: ignore[attr-defined]
    assert "5 of 10 changed." in shown[0]
    assert "Nothing changed." in shown[1]
    assert all(name in shown[1] for name in ALL_SET)


def test_the_command_fails_with_the_endpoints_words(answering: Any) -> None:
    answering(list_objects_v2=refusal("InvalidAccessKeyId", "ListObjectsV2", 403))
    variables = {"AWS_ACCESS_KEY_ID": "owner", "AWS_SECRET_ACCESS_KEY": "secret"}
    with pytest.raises(SettingsError, match=r"^bucket backups: .*InvalidAccessKeyId.*Next step: set AWS_ACCESS"):
        command.ensure(target(), "prod", variables, [], None, Console(file=io.StringIO()), compliance=False)


def test_the_command_fails_where_backups_lack_what_they_rely_on(answering: Any) -> None:
    answering(get_object_lock_configuration=refusal("NotImplemented", "GetObjectLockConfiguration", 501))
    variables = {"AWS_ACCESS_KEY_ID": "owner", "AWS_SECRET_ACCESS_KEY": "secret"}
    console = Console(file=io.StringIO(), width=120)
    assert command.ensure(target(), "prod", variables, [], None, console, compliance=False) == 1
    assert "not supported by this endpoint" in console.file.getvalue()  # type: ignore[attr-defined]


def test_what_runs_on_the_host_and_the_commands_start_without_boto3() -> None:
    loaded = ", ".join(["cli.app", "host.__main__", *(f"host.{verb}" for verb in VERBS)])
    without = f"import sys; sys.modules['boto3'] = sys.modules['botocore'] = None; import {loaded}"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", without], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

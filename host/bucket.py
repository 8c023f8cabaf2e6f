"""The bucket of a backup target: made, or compared with what backups rely on; and the policies of those who use it.
Needs boto3, which a host does not have: the command line loads this when it is asked to, and no verb of host.pyz does.
"""

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from host.machine import Undecided
from settings.backup import BucketTarget

if TYPE_CHECKING:
    from types_boto3_s3.client import S3Client
    from types_boto3_s3.type_defs import LifecycleRuleTypeDef, PublicAccessBlockConfigurationTypeDef

DAY = 24 * 3600
ABORT_DAYS = 7  # a single object of restic's is uploaded in minutes
KEEP_DAYS = 30  # how long a deleted or overwritten object can be brought back, at least
AFTER_LOCK_DAYS = 7  # to notice a deletion before the last lock on what was deleted has ended
CONFIG = "config"
NAMED = re.compile(r"(?:data/[0-9a-f]{2}|index|keys|snapshots)/[0-9a-f]{64}")
"""restic's files, but for its locks: those of a run that is over would only be in the way."""
PAUSES = (0.0, 1.0, 2.0, 4.0)  # seconds before each look: what is written to a bucket may show only after a while

VERSIONING, LOCK = "versioning", "object lock"
RELIED_ON = frozenset({VERSIONING, LOCK})
"""Without these, whoever may write can destroy what was written."""


class State(StrEnum):
    """How a feature of the bucket stands. `as it was`: the call changed nothing."""

    SET = "set"
    KEPT = "as it was"
    NOT_ASKED = "not asked for"
    UNSUPPORTED = "not supported by this endpoint"
    FAILED = "failed"


class Feature(NamedTuple):
    """One line of what was found or done; `note` says what it is for, or what to do next."""

    name: str
    state: State
    note: str

    @property
    def lacking(self) -> bool:
        """Whether backups lack something that they rely on, or a call has failed."""
        unsupported = self.state is State.UNSUPPORTED and self.name in RELIED_ON
        return unsupported or self.state is State.FAILED


@dataclass(frozen=True)
class Credentials:
    """Of the bucket's owner. `token`: of temporary ones."""

    access: str
    secret: str = field(repr=False)
    token: str | None = field(default=None, repr=False)


# --- policies


class Role(StrEnum):
    """Who uses one environment's repository: backs it up, removes old snapshots, restores."""

    WRITER = "writer"
    PRUNER = "pruner"
    RESTORER = "restorer"


# Nobody deletes a version, bypasses a lock or changes the bucket. The writer may put over an object, since S3 has no
# right to create alone; the version before is kept.
ON_OBJECTS: Mapping[Role, Sequence[str]] = {
    Role.WRITER: ("s3:AbortMultipartUpload", "s3:GetObject", "s3:PutObject"),
    Role.PRUNER: ("s3:AbortMultipartUpload", "s3:DeleteObject", "s3:GetObject", "s3:PutObject"),
    Role.RESTORER: ("s3:GetObject",),
}


def policy(target: BucketTarget, environment: str, role: Role, principals: Sequence[str] = ()) -> dict[str, Any]:
    """The least that `role` needs in an environment's own prefix, as an IAM document.

    Without `principals` it is to be attached to a user; with them (ARNs, or as the endpoint names its users) it is one
    for the bucket. A writer that is stolen can delete no snapshot, only restic's locks.
    """
    return {"Version": "2012-10-17", "Statement": _statements(target, environment, role, principals)}


def _statements(target: BucketTarget, environment: str, role: Role, principals: Sequence[str]) -> list[dict[str, Any]]:
    key = target.key(environment)
    inside = f"{_arn(target)}/{key}"
    written: list[tuple[str, Sequence[str], str, Mapping[str, Any]]] = [
        ("List", ("s3:ListBucket",), _arn(target), {"Condition": {"StringLike": {"s3:prefix": f"{key}/*"}}}),
        ("Objects", ON_OBJECTS[role], f"{inside}/*", {}),
    ]
    if role is Role.WRITER:
        written.append(("Locks", ("s3:DeleteObject",), f"{inside}/locks/*", {}))
    who = {"Principal": {"AWS": sorted(principals)}} if principals else {}
    return [
        {
            "Sid": f"Bulkhead{role.title()}{what}{_mark(key)}",
            "Effect": "Allow",
            **who,
            "Action": list(actions),
            "Resource": resource,
            **condition,
        }
        for what, actions, resource, condition in written
    ]


def _tls_only(target: BucketTarget) -> list[dict[str, Any]]:
    return [
        {
            "Sid": "BulkheadTlsOnly",
            "Effect": "Deny",
            "Principal": "*",
            "Action": "s3:*",
            "Resource": [_arn(target), f"{_arn(target)}/*"],
            "Condition": {"Bool": {"aws:SecureTransport": "false"}},
        }
    ]


def _arn(target: BucketTarget) -> str:
    return f"arn:aws:s3:::{target.bucket}"


def _mark(key: str) -> str:
    """Tells statements of one prefix from those of another: a Sid takes letters and digits only."""
    return hashlib.sha256(key.encode()).hexdigest()[:8]


# --- the bucket


def ensure(
    target: BucketTarget,
    environment: str,
    credentials: Credentials,
    *,
    compliance: bool = False,
    principals: Mapping[Role, Sequence[str]] = {},
) -> list[Feature]:
    """Makes the bucket or brings it to what backups rely on; a second call changes nothing.

    What others set on the bucket stays, and nothing is made weaker than it is. `compliance`: a lock that not even the
    owner can lift; else one that only the owner can. `principals`: who gets each role's policy, as part of the
    bucket's. Undecided, with the next step, where the endpoint does not answer or refuses the credentials.
    """
    bucket = _Bucket(connect(target, credentials), target, environment)
    with _answering(target):
        return [
            bucket.made(),
            bucket.versioning(),
            bucket.lock(compliance),
            bucket.lifecycle(),
            bucket.not_public(),
            bucket.tls_only(),
            *(bucket.granted(role, principals.get(role, ())) for role in Role),
        ]


@contextmanager
def _answering(target: BucketTarget) -> Iterator[None]:
    """Undecided, with the next step, where the endpoint does not answer or refuses."""
    try:
        yield
    except ClientError as error:
        raise Undecided(f"{target.endpoint}: {_said(error)}") from None
    except BotoCoreError as error:
        raise Undecided(f"{target.endpoint}: {error}. Next step: check the endpoint in the ledger") from None


def connect(target: BucketTarget, credentials: Credentials) -> "S3Client":
    """A client with these credentials and no others that the machine may have."""
    return boto3.session.Session().client(
        "s3",
        endpoint_url=target.endpoint,
        region_name=target.region,
        aws_access_key_id=credentials.access,
        aws_secret_access_key=credentials.secret,
        aws_session_token=credentials.token,
        config=Config(
            # The bucket in the path and no checksums beyond what S3 always asked for: every S3 server takes these.
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            connect_timeout=10,
            read_timeout=60,
            retries={"mode": "standard", "max_attempts": 3},
        ),
    )


class _Unsupported(Exception):
    """The endpoint took a call and did something else; the text says what."""


@dataclass(frozen=True)
class _Bucket:
    """A bucket as its owner sees it: each method brings one feature about and says how it stands."""

    s3: "S3Client"
    target: BucketTarget
    environment: str

    @property
    def name(self) -> str:
        return self.target.bucket

    @property
    def lock_days(self) -> int:
        """Whole days, since S3 counts no less; 0 without a lock."""
        return math.ceil((self.target.lock or 0) / DAY)

    def made(self) -> Feature:
        """The bucket itself. ClientError where it cannot be opened or made."""
        if self._opens():
            return Feature("bucket", State.KEPT, self.name)
        arguments: dict[str, Any] = {"Bucket": self.name}
        if self.target.region != "us-east-1":  # which is the one that S3 does not want to be told
            arguments["CreateBucketConfiguration"] = {"LocationConstraint": self.target.region}
        locked: dict[str, Any] = {"ObjectLockEnabledForBucket": True} if self.lock_days else {}
        try:
            self.s3.create_bucket(**arguments, **locked)
        except ClientError as error:
            if not (locked and _unsupported(error)):
                raise
            self.s3.create_bucket(**arguments)  # lock() says what is missing
        return Feature("bucket", State.SET, f"{self.name} made")

    def _opens(self) -> bool:
        try:
            self.s3.list_objects_v2(Bucket=self.name, Prefix=f"{self.target.key(self.environment)}/", MaxKeys=1)
        except ClientError as error:
            if _code(error) == "NoSuchBucket":
                return False
            raise
        return True

    def versioning(self) -> Feature:
        """Every version of an object is kept."""
        return _established(
            VERSIONING,
            "what is deleted or overwritten can be brought back",
            lambda: self.s3.get_bucket_versioning(Bucket=self.name).get("Status") == "Enabled",
            lambda: self.s3.put_bucket_versioning(Bucket=self.name, VersioningConfiguration={"Status": "Enabled"}),
        )

    def lock(self, compliance: bool) -> Feature:
        """No version is deleted before its time. A lock that is longer or stricter stays."""
        if not self.lock_days:
            return Feature(LOCK, State.NOT_ASKED, "the target has no lock: who may delete versions can delete backups")

        def there() -> tuple[int, bool]:
            """Days, and whether not even the owner can lift it."""
            found = _setting(self.s3.get_object_lock_configuration, self.name).get("ObjectLockConfiguration", {})
            rule = found.get("Rule", {}).get("DefaultRetention", {})
            return rule.get("Days", 0) or 365 * rule.get("Years", 0), rule.get("Mode") == "COMPLIANCE"

        def holds() -> bool:
            days, strict = there()
            return days >= self.lock_days and (strict or not compliance)

        def write() -> None:
            days, strict = there()
            self.s3.put_object_lock_configuration(
                Bucket=self.name,
                ObjectLockConfiguration={
                    "ObjectLockEnabled": "Enabled",
                    "Rule": {
                        "DefaultRetention": {
                            "Mode": "COMPLIANCE" if strict or compliance else "GOVERNANCE",
                            "Days": max(days, self.lock_days),
                        }
                    },
                },
            )

        lifted = "nobody can lift that" if compliance else "at most the owner can lift that"
        return _established(
            LOCK, f"no version younger than {self.lock_days} days can be deleted; {lifted}", holds, write
        )

    def lifecycle(self) -> Feature:
        """What is no longer current goes in the end. Rules of others stay."""
        key = self.target.key(self.environment)
        days = max(KEEP_DAYS, self.lock_days + AFTER_LOCK_DAYS)
        own: LifecycleRuleTypeDef = {
            "ID": f"bulkhead {key}",
            "Status": "Enabled",
            "Filter": {"Prefix": f"{key}/"},
            "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": ABORT_DAYS},
            "NoncurrentVersionExpiration": {"NoncurrentDays": days},
            "Expiration": {"ExpiredObjectDeleteMarker": True},
        }

        def rules() -> list[Any]:
            return list(_setting(self.s3.get_bucket_lifecycle_configuration, self.name).get("Rules", []))

        def write() -> None:
            others = [rule for rule in rules() if rule.get("ID") != own["ID"]]
            self.s3.put_bucket_lifecycle_configuration(
                Bucket=self.name, LifecycleConfiguration={"Rules": [*others, own]}
            )

        return _established(
            "lifecycle",
            f"{key}/: versions that are no longer current go after {days} days, unfinished uploads after {ABORT_DAYS}",
            lambda: own in rules(),
            write,
        )

    def not_public(self) -> Feature:
        """Nothing in the bucket can be made public."""
        every: PublicAccessBlockConfigurationTypeDef = {
            "BlockPublicAcls": True,
            "IgnorePublicAcls": True,
            "BlockPublicPolicy": True,
            "RestrictPublicBuckets": True,
        }
        return _established(
            "public access blocked",
            "no policy or ACL can open the bucket to everybody",
            lambda: _setting(self.s3.get_public_access_block, self.name).get("PublicAccessBlockConfiguration") == every,
            lambda: self.s3.put_public_access_block(Bucket=self.name, PublicAccessBlockConfiguration=every),
        )

    def tls_only(self) -> Feature:
        """The bucket answers nobody who comes without TLS."""
        name = "TLS required"
        if urlsplit(self.target.endpoint).scheme == "http":  # settings.backup allows that on loopback only
            return Feature(name, State.NOT_ASKED, "the endpoint is on loopback, without TLS")

        def write() -> None:
            before = self._policy()
            self._put_statements(_tls_only(self.target))
            try:
                self._opens()
            except ClientError as error:
                self._put_policy(before)
                raise _Unsupported(f"its policy shut out TLS as well ({_code(error)}); it was taken back") from None

        return _established(
            name, "requests without TLS are denied", lambda: self._has_statements(_tls_only(self.target)), write
        )

    def granted(self, role: Role, principals: Sequence[str]) -> Feature:
        """A role's policy as part of the bucket's."""
        name = f"policy of the {role}"
        if not principals:
            return Feature(
                name,
                State.NOT_ASKED,
                "no principal named, what was set before stays; or attach the document to its user",
            )
        own = _statements(self.target, self.environment, role, principals)
        return _established(
            name, ", ".join(principals), lambda: self._has_statements(own), lambda: self._put_statements(own)
        )

    def _policy(self) -> list[Any]:
        text = _setting(self.s3.get_bucket_policy, self.name).get("Policy")
        return list(json.loads(text)["Statement"]) if text else []

    def _has_statements(self, own: Sequence[Mapping[str, Any]]) -> bool:
        there = [_plain(statement) for statement in self._policy()]
        return all(_plain(statement) in there for statement in own)

    def _put_statements(self, own: Sequence[Mapping[str, Any]]) -> None:
        """Into the bucket's policy, in place of their former versions; statements of others stay."""
        names = {statement["Sid"] for statement in own}
        self._put_policy([*(one for one in self._policy() if one.get("Sid") not in names), *own])

    def _put_policy(self, statements: Sequence[Mapping[str, Any]]) -> None:
        if statements:
            document = {"Version": "2012-10-17", "Statement": list(statements)}
            self.s3.put_bucket_policy(Bucket=self.name, Policy=json.dumps(document))
        else:
            self.s3.delete_bucket_policy(Bucket=self.name)


def _established(name: str, note: str, holds: Callable[[], bool], write: Callable[[], object]) -> Feature:
    """Writes a feature that does not hold yet, and looks again: an endpoint may take a call and ignore it."""
    try:
        if holds():
            return Feature(name, State.KEPT, note)
        write()
        for pause in PAUSES:
            time.sleep(pause)
            if holds():
                return Feature(name, State.SET, note)
    except ClientError as error:
        if _unsupported(error):
            return Feature(name, State.UNSUPPORTED, f"it answered {_code(error)}")
        return Feature(name, State.FAILED, _said(error))
    except _Unsupported as ignored:
        return Feature(name, State.UNSUPPORTED, str(ignored))
    return Feature(name, State.UNSUPPORTED, "it took the setting, but does not have it when asked")


def _setting(ask: Callable[..., Any], bucket: str) -> Mapping[str, Any]:
    """What the bucket has of something that need not be set; empty if it is not."""
    try:
        return dict(ask(Bucket=bucket))
    except ClientError as error:
        if _code(error) in UNSET:
            return {}
        raise


def _plain(statement: Any) -> Any:
    """Statements that mean the same look the same: servers write one-element lists as their element, in any order."""
    if isinstance(statement, Mapping):
        return {key: _plain(value) for key, value in statement.items()}
    if isinstance(statement, list):
        return _plain(statement[0]) if len(statement) == 1 else sorted(statement)
    return statement


# --- back to what was there


class BroughtBack(NamedTuple):
    """How many objects were brought back, were hidden since restic did not write them, and were left alone."""

    brought_back: int
    hidden: int
    kept: int


def brought_back(target: BucketTarget, environment: str, credentials: Credentials) -> BroughtBack:
    """Undoes what was deleted or overwritten in an environment's repository, as far as its versions go.

    restic names its files by the SHA-256 of what is in them and never overwrites one, so that the genuine version of
    each is known without the times that a server tells. Snapshots that were let go of in order come back too. Nothing
    is lost by it: what is there now stays as an older version. Undecided where the endpoint does not answer or refuses.
    """
    s3 = connect(target, credentials)
    inside = f"{target.key(environment)}/"
    with _answering(target):
        found = _versions(s3, target.bucket, inside)
        done = [_genuine(s3, target.bucket, key, key.removeprefix(inside), found[key]) for key in sorted(found)]
    return BroughtBack(*(done.count(what) for what in BroughtBack._fields))


class _Versions(NamedTuple):
    """Of one object: the ids of its versions, the newest first, and whether the newest is to be seen."""

    ids: Sequence[str]
    there: bool


def _versions(s3: "S3Client", bucket: str, inside: str) -> Mapping[str, _Versions]:
    found: dict[str, list[str]] = {}
    there: set[str] = set()
    for page in s3.get_paginator("list_object_versions").paginate(Bucket=bucket, Prefix=inside):
        for one in page.get("Versions", ()):
            found.setdefault(one["Key"], []).append(one["VersionId"])
            if one["IsLatest"]:
                there.add(one["Key"])
    return {key: _Versions(ids, key in there) for key, ids in found.items()}


def _genuine(s3: "S3Client", bucket: str, key: str, name: str, versions: _Versions) -> str:
    """Brings the genuine version of one object back, or hides what is none: which of `BroughtBack` it is."""
    if name != CONFIG and not NAMED.fullmatch(name):
        if not versions.there:
            return "kept"
        s3.delete_object(Bucket=bucket, Key=key)  # a marker in front of it
        return "hidden"
    if versions.there and len(versions.ids) == 1:
        return "kept"
    for version in reversed(versions.ids):
        body = _body(s3, bucket, key, version)
        if name == CONFIG or hashlib.sha256(body).hexdigest() == name.rpartition("/")[2]:
            if versions.there and body == _body(s3, bucket, key, versions.ids[0]):
                return "kept"
            s3.put_object(Bucket=bucket, Key=key, Body=body)
            return "brought_back"
    return "kept"


def _body(s3: "S3Client", bucket: str, key: str, version: str) -> bytes:
    return s3.get_object(Bucket=bucket, Key=key, VersionId=version)["Body"].read()


# --- what an endpoint answers

UNSET = frozenset(
    {
        "NoSuchBucketPolicy",
        "NoSuchLifecycleConfiguration",
        "NoSuchPublicAccessBlockConfiguration",
        "ObjectLockConfigurationNotFoundError",
    }
)
UNKNOWN = frozenset({"NotImplemented", "MethodNotAllowed", "UnknownAction", "InvalidAction", "UnsupportedOperation"})

OWN_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to the bucket owner's at this endpoint"
REMEDIES = {
    "InvalidAccessKeyId": OWN_CREDENTIALS,
    "SignatureDoesNotMatch": OWN_CREDENTIALS,
    "InvalidToken": f"{OWN_CREDENTIALS}, and AWS_SESSION_TOKEN only for temporary ones",
    "ExpiredToken": "log in again, and set the new credentials",
    "AccessDenied": f"{OWN_CREDENTIALS}; if they are, the bucket is another owner's: name your own in the ledger",
    "BucketAlreadyExists": "it is another owner's: name another bucket in the ledger",
    "AuthorizationHeaderMalformed": "write the endpoint's region into the ledger",
    "PermanentRedirect": "write the bucket's own region and endpoint into the ledger",
    "InvalidBucketState": "here a bucket can only be locked when it is made: name a new one in the ledger",
    "MalformedPolicy": "name principals as this endpoint does: by ARN, or its users' names",
}


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _unsupported(error: ClientError) -> bool:
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return _code(error) in UNKNOWN or status in (405, 501)


def _said(error: ClientError) -> str:
    """The endpoint's words, and the next step."""
    told = error.response.get("Error", {}).get("Message", "no reason given").rstrip(".")
    remedy = REMEDIES.get(_code(error), "see what the endpoint's own log says")
    return f"{error.operation_name}: {_code(error)}: {told}. Next step: {remedy}"

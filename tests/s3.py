"""A real S3 server for tests: the Versity S3 Gateway over a folder, on loopback, with versions, locks and users.
`with server(folder) as s3:` starts one process, and ends it by its id; engine/build.py builds it on demand."""

import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine import build, setup
from host.bucket import Credentials
from settings.backup import BucketTarget

START_SECONDS = 20.0
STOP_SECONDS = 10.0
ANSWER_SECONDS = 30.0


@dataclass(frozen=True)
class Server:
    """A running server. `access` and `secret` are of the owner of all buckets. `authority`: who vouches for its TLS."""

    program: Path
    endpoint: str
    access: str
    secret: str
    authority: Path | None = None

    @property
    def variables(self) -> dict[str, str]:
        """The owner's credentials, as commands take them."""
        return {"AWS_ACCESS_KEY_ID": self.access, "AWS_SECRET_ACCESS_KEY": self.secret}

    @property
    def owner(self) -> Credentials:
        return Credentials(self.access, self.secret)

    def target(self, bucket: str = "backups", prefix: str = "", lock: str | None = None) -> BucketTarget:
        """A bucket of the server as the ledger has it."""
        return BucketTarget(endpoint=self.endpoint, bucket=bucket, prefix=prefix, lock=lock)

    def user(self, name: str) -> Credentials:
        """A new user, who may do nothing until a bucket's policy names it: the server has no policies of users."""
        made = Credentials(name, secrets.token_hex(16))
        admin = ["--access", self.access, "--secret", self.secret, "--endpoint-url", self.endpoint]
        new = ["--access", made.access, "--secret", made.secret, "--role", "user"]
        done = subprocess.run(
            [str(self.program), "admin", *admin, "create-user", *new],
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return made


@contextmanager
def server(folder: Path, *, tls: bool = False, again: Server | None = None) -> Iterator[Server]:
    """A server that keeps everything below `folder`, where a second one may find it. RuntimeError with its output where
    it does not start. `again`: one that ended, which it is once more."""
    program = build.tool("versitygw", build.default_cache(), setup.say)
    objects, versions, users = (folder / name for name in ("objects", "versions", "users"))
    for place in (objects, versions, users):
        place.mkdir(parents=True, exist_ok=True)
    port = int(again.endpoint.rpartition(":")[2]) if again else _free_port()
    certificate, key = _certificate(folder) if tls else (None, None)
    shown = ["--cert", str(certificate), "--key", str(key)] if tls else []
    endpoint = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
    made = again or Server(program, endpoint, "owner", secrets.token_hex(16), certificate)
    log = folder / f"log-{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(str(program), "--port", f"127.0.0.1:{port}", "--iam-dir", str(users), *shown),
                *("posix", "--versioning-dir", str(versions), str(objects)),
            ],
            env={"ROOT_ACCESS_KEY": made.access, "ROOT_SECRET_KEY": made.secret},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            _answers(port, process, log)
            yield made
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that vouches for itself, and its key."""
    certificate, key = folder / "server.crt", folder / "server.key"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*made, *files], check=True, capture_output=True, timeout=ANSWER_SECONDS)
    return certificate, key


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"the S3 server did not start:\n{log.read_text(errors='replace')[-2000:]}")

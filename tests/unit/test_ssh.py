"""How an `ssh://` host is reached: what the user's ssh configuration says, the pinned host key, root through one door,
and the script that prepares a server."""

import shlex
import subprocess
from pathlib import Path

import pytest

from cli import bootstrap, onhost
from settings import ssh
from settings.errors import SettingsError

CONFIG = """\
Host box
  HostName 192.0.2.7
  Port 2222
  User deploy
  IdentityFile {folder}/key
  UserKnownHostsFile {folder}/known_hosts
  GlobalKnownHostsFile none
Host hidden
  ProxyJump bastion
Host strange
  UserKnownHostsFile {folder}/known_hosts
  GlobalKnownHostsFile none
"""


@pytest.fixture
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a key, known hosts and an `ssh` that reads its configuration from there."""
    (tmp_path / "config").write_text(CONFIG.format(folder=tmp_path))
    (tmp_path / "key").write_text("the private key\n")
    (tmp_path / "known_hosts").write_text(
        "[192.0.2.7]:2222 ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAAAgQC7\n"
        "[192.0.2.7]:2222 ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEqQ\n"
        "@revoked [192.0.2.7]:2222 ecdsa-sha2-nistp256 AAAAE2VjZHNh\n"
        "192.0.2.7 ecdsa-sha2-nistp256 AAAAE2VjZHNhAnotherMachine\n"
    )
    real = subprocess.run(["which", "ssh"], capture_output=True, text=True, check=True).stdout.strip()
    (tmp_path / "ssh").write_text(f'#!/bin/sh\nexec {real} -F {tmp_path}/config "$@"\n')
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path


def test_a_host_is_reached_as_the_users_configuration_says_and_its_key_is_pinned(configured: Path) -> None:
    assert ssh.target("ssh://box") == ssh.Target(
        host="192.0.2.7",
        port=2222,
        user="deploy",
        host_key="ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEqQ",
        keys=(configured / "key",),
    )
    assert ssh.target("ssh://me@box").user == "me"


def test_hashed_known_hosts_are_found(configured: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", configured / "known_hosts"], capture_output=True, check=False)
    assert "192.0.2.7" not in (configured / "known_hosts").read_text().replace("@revoked [192.0.2.7]", "")
    assert ssh.target("ssh://box").host_key.startswith("ssh-ed25519 ")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ssh://strange", r"host key is not in .*known_hosts \(as strange\).*ssh ssh://strange"),
        ("ssh://hidden", "proxyjump bastion"),
    ],
)
def test_a_host_that_host_commands_cannot_reach_safely_is_refused(configured: Path, url: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        ssh.target(url)


def test_an_engine_whose_host_does_not_answer_says_what_ssh_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ssh").write_text("#!/bin/sh\necho 'Host key verification failed.' >&2\nexit 255\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(OSError, match="verification failed"), ssh.engine_socket("ssh://box"):
        pass


# --- root on the host


@pytest.fixture
def door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A door that leads to no other user, with its log beside it; `sudo`, `id` and `logger` are played by scripts."""
    for name, text in {
        "sudo": '[ "$1" = -n ] && shift; [ "$1" = -l ] && exit 0; SUDO_USER=me exec "$@"',
        "id": '[ "$1" = -u ] && echo 1000 || echo me',
        "logger": f'shift 4; echo "$*" >> {tmp_path}/log',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    opened = bootstrap.DOOR.replace("PATH=/usr", f"PATH={tmp_path}:/usr", 1).replace("/run/", f"{tmp_path}/")
    (tmp_path / "door").write_text(opened.replace('[ "$(id -u)" = 0 ]', "true"))
    (tmp_path / "door").chmod(0o755)
    monkeypatch.setattr(ssh, "DOOR", str(tmp_path / "door"))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("LEAK", "seen")
    return tmp_path


def through(line: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)


AWKWARD = "printf '%s|' \"$A\" 'it''s' \"${LEAK-clean}\"; cat <<'UNIT'\n$A `id` \\n\nUNIT\n"


def test_a_script_goes_through_the_door_to_the_letter_without_the_environment(door: Path) -> None:
    ran = through(ssh.as_root(AWKWARD, {"A": "a 'b' $c"}))
    assert ran.stdout == "a 'b' $c|its|clean|$A `id` \\n\n"
    assert ran.returncode == 0


def test_the_first_error_stops_the_script_and_its_code_comes_back(door: Path) -> None:
    ran = through(ssh.as_root("echo before\n(exit 7)\necho after\n"))
    assert (ran.stdout, ran.returncode) == ("before\n", 7)


def test_the_log_names_caller_and_hash_before_and_the_code_after(door: Path) -> None:
    through(ssh.as_root("exit 3"))
    sum_ = subprocess.run(["sha256sum"], input="exit 3", capture_output=True, text=True, check=True).stdout.split()[0]
    assert (door / "log").read_text().splitlines() == [
        f"-- run sha256={sum_} bytes=6 caller=me",
        f"-- end sha256={sum_} code=3",
    ]
    assert not list(door.glob("bulkhead-root.*"))


def test_without_a_log_nothing_runs(door: Path) -> None:
    (door / "logger").write_text("#!/bin/sh\nexit 1\n")
    ran = through(ssh.as_root(f"touch {door}/happened"))
    assert ran.returncode != 0
    assert not (door / "happened").exists()


def test_a_deployer_without_the_door_is_told_how_to_get_it(door: Path) -> None:
    (door / "sudo").write_text("#!/bin/sh\necho 'sudo: a password is required' >&2\nexit 1\n")
    ran = through(ssh.as_root("true"))
    assert ran.returncode == 1
    assert "make bootstrap HOST=" in ran.stderr


def test_a_script_gets_its_input_with_it(door: Path) -> None:
    data = bytes(range(256)) * 300
    text = onhost.with_stdin(f"cat > {shlex.quote(str(door / 'got'))}\nexit 4", data)
    ran = subprocess.run(onhost.shell(1000, door=True), input=text.encode(), capture_output=True, check=False)
    assert ran.returncode == 4, ran.stderr
    assert (door / "got").read_bytes() == data


def test_on_this_machine_root_needs_no_door() -> None:
    ran = subprocess.run(onhost.shell(0, door=False), input=b"echo $((1+1)); cat", capture_output=True, check=False)
    assert ran.stdout == b"2\n"


def test_a_script_may_be_longer_than_an_argument() -> None:
    text = onhost.with_stdin("wc -c", bytes(10_000_000))
    ran = subprocess.run(onhost.shell(0, door=False), input=text.encode(), capture_output=True, check=False)
    assert ran.stdout == b"10000000\n", ran.stderr[-500:]


# --- bootstrap


def test_a_key_is_the_users_own_unless_another_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="ssh-keygen"):
        bootstrap.public_key(None, tmp_path)
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "id_rsa.pub").write_text("ssh-rsa AAAA me@home\n")
    assert bootstrap.public_key(None, tmp_path) == "ssh-rsa AAAA me@home"
    (tmp_path / "secret").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n")
    with pytest.raises(SettingsError, match=r"ends in \.pub"):
        bootstrap.public_key(tmp_path / "secret", tmp_path)


@pytest.mark.parametrize(("url", "user"), [("root@box", "deploy"), ("ssh://", "deploy"), ("ssh://box", "de ploy;id")])
def test_an_address_or_a_user_that_is_none_is_refused(url: str, user: str) -> None:
    with pytest.raises(SettingsError, match="make bootstrap"):
        bootstrap.checked(url, user)


def test_the_servers_script_is_complete_and_every_shell_text_in_it_parses() -> None:
    script = bootstrap.script("deploy", "ssh-ed25519 AAAA it's me")
    assert not [word for word in script.split() if word.startswith("@") and word.endswith("@")]
    for text in (script, bootstrap.DOOR):
        parsed = subprocess.run(["sh", "-n"], input=text, capture_output=True, text=True, check=False)
        assert (parsed.returncode, parsed.stderr) == (0, "")
    assert 'deploy ALL=(root:root) NOPASSWD: /usr/local/sbin/bulkhead-root ""\n' in script
    assert bootstrap.as_user("ssh://root@box:2222", "deploy") == "ssh://deploy@box:2222"

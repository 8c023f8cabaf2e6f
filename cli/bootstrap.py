"""`bootstrap`: makes a bare Debian server one that Bulkhead deploys to, as a user who is not root.
One script, run as root over ssh; safe to run again, and each line that it prints is something that it did or found."""

import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from settings import ssh
from settings.errors import SettingsError

SECONDS = 900  # packages over a slow line
DEPLOYER = "deploy"
KEY_FILES = ("id_ed25519.pub", "id_ecdsa.pub", "id_rsa.pub")  # in the order in which OpenSSH looks for them
SUDOERS = "/etc/sudoers.d/bulkhead"

DOOR = """\
#!/bin/sh
# Bulkhead's one way to root on this machine: runs the shell script on standard input, and logs who and what it was.
# Installed by `make bootstrap`. The journal has it: journalctl -t bulkhead-root
set -eu
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PATH
umask 022
[ "$(id -u)" = 0 ] || { echo "bulkhead-root: call it with sudo" >&2; exit 1; }
script=$(mktemp /run/bulkhead-root.XXXXXXXX)
trap 'rm -f "$script"' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
cat >"$script"
sum=$(sha256sum "$script")
sum=${sum%% *}
# Without a line in the log nothing runs.
logger -t bulkhead-root -p auth.notice -- "run sha256=$sum bytes=$(wc -c <"$script") caller=${SUDO_USER:-root}"
code=0
env -i PATH="$PATH" HOME=/root LANG=C.UTF-8 sh -eu "$script" </dev/null || code=$?
logger -t bulkhead-root -p auth.notice -- "end sha256=$sum code=$code"
exit "$code"
"""

ALLOWED = """\
# Bulkhead's deploy user may become root through this one command, without arguments. Installed by `make bootstrap`.
{user} ALL=(root:root) NOPASSWD: {door} ""
"""

# Services go on while the engine restarts.
ENGINE = '{\n  "live-restore": true\n}\n'

SCRIPT = """\
set -eu
umask 022
say() { printf '%s\\n' "$*"; }

put() { # file, mode: writes standard input, atomically, if it is something else
  new=$(mktemp "$1.XXXXXXXX")
  cat >"$new"
  chmod "$2" "$new"
  if cmp -s "$new" "$1" && [ "$(stat -c %a "$1")" = "$2" ]; then
    rm -f "$new"
    say "$1: as it should be"
  else
    mv -f "$new" "$1"
    say "$1: written"
  fi
}

# Before the engine is installed, so that it starts with them.
changed=
mkdir -p /etc/docker
if [ -e /etc/docker/daemon.json ]; then
  grep -q '"live-restore": *true' /etc/docker/daemon.json ||
    say '/etc/docker/daemon.json: yours, left alone; "live-restore": true is advised (make doctor)'
else
  put /etc/docker/daemon.json 644 <<'FILE'
@ENGINE@FILE
  changed=yes
fi

missing=
while read -r program package; do
  command -v "$program" >/dev/null || missing="$missing $package"
done <<'PROGRAMS'
dockerd docker.io
nft nftables
restic restic
python3 python3
sudo sudo
logger bsdutils
PROGRAMS
if [ -n "$missing" ]; then
  command -v apt-get >/dev/null || { echo "no apt-get here. Install by hand:$missing" >&2; exit 1; }
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  # shellcheck disable=SC2086
  apt-get install -qq -y --no-install-recommends $missing >/dev/null
  say "packages: installed$missing"
else
  say "packages: all there"
fi
# From Debian 13 on the client is a package of its own.
command -v docker >/dev/null || apt-get install -qq -y --no-install-recommends docker-cli >/dev/null

if [ -d /run/systemd/system ]; then
  systemctl is-enabled --quiet docker || { systemctl enable --quiet docker; say "docker: enabled"; }
  # A restart would stop what runs on it.
  if [ -n "$changed" ] && systemctl is-active --quiet docker; then
    systemctl reload docker
    say "docker: reloaded, for its settings"
  fi
  systemctl is-active --quiet docker || { systemctl start docker; say "docker: started"; }
  version=$(docker version --format '{{.Server.Version}}')
  say "docker: $version"
fi

if id -u @USER@ >/dev/null 2>&1; then
  say "user @USER@: there"
else
  # No password: keys only.
  useradd --create-home --shell /bin/bash --password '*' @USER@
  say "user @USER@: made"
fi
if id -nG @USER@ | grep -qw docker; then
  say "group docker: has @USER@"
else
  usermod -aG docker @USER@
  say "group docker: @USER@ added"
fi
keys=$(getent passwd @USER@ | cut -d: -f6)/.ssh/authorized_keys
# As the user: root follows no link that somebody else has put there.
as_user() { runuser -u @USER@ -- "$@"; }
as_user mkdir -p -m 700 "${keys%/*}"
if as_user grep -qsxF -- @KEY@ "$keys"; then
  say "$keys: has the key"
else
  printf '%s\\n' @KEY@ | as_user sh -c 'umask 077; cat >>"$1"' sh "$keys"
  say "$keys: key added"
fi

put @DOOR_PATH@ 755 <<'FILE'
@DOOR@FILE
# A file there that sudo cannot read takes sudo from everybody: it is checked before it is moved.
draft=$(mktemp /run/bulkhead-sudoers.XXXXXXXX)
cat >"$draft" <<'FILE'
@ALLOWED@FILE
visudo -cqf "$draft" || { rm -f "$draft"; echo "@SUDOERS@: not valid, so not installed" >&2; exit 1; }
put @SUDOERS@ 440 <"$draft"
rm -f "$draft"
visudo -cq || { rm -f @SUDOERS@; echo "@SUDOERS@: in conflict with the other rules, so removed" >&2; exit 1; }
"""


def bootstrap(url: str, user: str, key: str, console: Console) -> int:
    """Prepares the server at `url` (`ssh://root@server[:port]`, or a user with sudo for everything) for `user`.

    Prints what was done and what was there. Exit code 0, or 1 with what the server said.
    """
    console.print(f"{url}: preparing it for {user} (a first time takes some minutes)", highlight=False)
    with subprocess.Popen(
        ssh.command(url, 'if [ "$(id -u)" = 0 ]; then exec sh -eu; else exec sudo -n sh -eu; fi'),
        stdin=subprocess.PIPE,
        text=True,
    ) as run:
        try:
            run.communicate(script(user, key), timeout=SECONDS)
        except subprocess.TimeoutExpired:
            run.kill()
            console.print(f"{url}: not done within {SECONDS} s. Next step: the same command again", style="red")
            return 1
    if run.returncode:
        console.print(
            f"{url}: stopped with code {run.returncode}, see above. Next step: see that this works: ssh {url} id",
            style="red",
            highlight=False,
        )
        return 1
    console.print(f"Done. Next step: bulkhead:host: {as_user(url, user)} in Pulumi.host.yaml", highlight=False)
    return 0


def script(user: str, key: str) -> str:
    """What runs on the server."""
    texts: Mapping[str, str] = {
        "@ENGINE@": ENGINE,
        "@DOOR@": DOOR,
        "@ALLOWED@": ALLOWED.format(user=user, door=ssh.DOOR),
        "@DOOR_PATH@": ssh.DOOR,
        "@SUDOERS@": SUDOERS,
        "@USER@": shlex.quote(user),
        "@KEY@": shlex.quote(key),
    }
    text = SCRIPT
    for mark, written in texts.items():
        text = text.replace(mark, written)
    return text


def public_key(chosen: Path | None, home: Path) -> str:
    """The deployer's public key, one line: of the file that was chosen, else the user's own. SettingsError if none."""
    files = [chosen] if chosen else [home / ".ssh" / name for name in KEY_FILES]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        problem = "there is no public key" if chosen is None else "there is no such file"
        remedy = "Make one with ssh-keygen -t ed25519, or name its file: make bootstrap HOST=… KEY=~/.ssh/other.pub"
        raise SettingsError(file=str(files[0]), key="KEY", problem=problem, remedy=remedy)
    text = file.read_text().strip()
    if "PRIVATE KEY" in text or len(text.splitlines()) != 1 or len(text.split()) < 2:
        remedy = "Name the file that ends in .pub."
        raise SettingsError(file=str(file), key="KEY", problem="not one public key", remedy=remedy)
    return text


def checked(url: str, user: str) -> None:
    """SettingsError unless `url` is an ssh:// address with a host, and `user` a name that Debian takes."""
    if not ssh.is_remote(url) or not url.removeprefix("ssh://").rpartition("@")[2]:
        raise SettingsError(
            file="make bootstrap",
            key="HOST",
            value=url,
            problem="not the address of a server",
            remedy="Write HOST=ssh://root@server, or with its port: HOST=ssh://root@server:2222",
        )
    first, rest = user[:1], user[1:].replace("-", "").replace("_", "")
    if not (first.isascii() and first.islower() and (not rest or (rest.isascii() and rest.isalnum()))):
        raise SettingsError(
            file="make bootstrap",
            key="DEPLOYER",
            value=user,
            problem="not the name of a user",
            remedy="Write lower case letters, digits, - and _ only.",
        )


def as_user(url: str, user: str) -> str:
    """The same server for another user."""
    return f"ssh://{user}@{url.removeprefix('ssh://').rpartition('@')[2]}"

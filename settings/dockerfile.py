"""What a Dockerfile makes the engine itself fetch: past the slice and the firewall of the environment it is built for.
Read to refuse, not to build: what may be such a line counts as one."""

import re
from collections.abc import Iterator, Mapping
from ipaddress import ip_address

FRONTENDS = re.compile(r"(?:docker\.io/)?docker/dockerfile(?::[\w.-]+)?(?:@sha256:[0-9a-f]{64})?")
"""Docker's own; another may take a file for anything (docs.docker.com, "Custom Dockerfile syntax")."""

_DIRECTIVE = re.compile(
    r"^\s*(?:#|//)\s*syntax\s*=\s*(\S+)|\"syntax\"\s*:\s*\"([^\"]*)\"", re.IGNORECASE | re.MULTILINE
)
_ADD = re.compile(r"^\s*(?:ONBUILD\s+)?ADD\s(.*)$", re.IGNORECASE | re.MULTILINE)
_FROM = re.compile(r"^\s*FROM\s+(?:--\S+\s+)*(\S+)|(?:^|[\s,])(?:--from=|from=)([^\s,]+)", re.IGNORECASE | re.MULTILINE)
_ARGUMENT = re.compile(r"^\s*ARG\s+(\w+)=[\"']?([^\s\"']*)", re.IGNORECASE | re.MULTILINE)
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")
_REMOTE = re.compile(r"://|^git@|\.git(?:[#?]|$)|^(?:github|gitlab)\.com/|\$")
_HEREDOC = re.compile(r"<<-?(\S+)")
_PLAIN_WORD = re.compile(r"([\"']?)\w+\1")


def fetches(text: str, arguments: Mapping[str, str]) -> Iterator[str]:
    """What the engine would fetch for this Dockerfile beside images by name, each in a few words for a message.

    `ADD` of an address, of a Git repository or of what a variable holds; an image of a registry that is named by its
    address; and what cannot be told: another frontend, a heredoc whose end is not a plain word, an image whose name
    is in no ARG. `arguments`: the build's own values of ARGs.
    """
    text = text.lstrip("\ufeff").replace("\r\n", "\n")
    known = {**dict(_ARGUMENT.findall(text)), **arguments}
    found: dict[str, None] = {}
    for directive in _DIRECTIVE.finditer(text):
        frontend = directive[1] or directive[2] or ""
        if not FRONTENDS.fullmatch(frontend):
            found[f"syntax={frontend}"] = None
    for word in _HEREDOC.findall(text):
        if not _PLAIN_WORD.fullmatch(word):
            found[f"a heredoc <<{word}"] = None
    for view in _views(text):
        for line in _ADD.findall(view):
            for source in re.split(r"[\s\"',\[\]]+", line):
                if not source.startswith("--") and _REMOTE.search(source):
                    found[f"ADD {source}"] = None
        for names in _FROM.findall(view):
            image = _VARIABLE.sub(lambda one: known.get(one[1] or one[2], one[0]), names[0] or names[1])
            if _by_address(image) or "$" in image.partition("/")[0].partition(":")[0]:
                found[f"FROM {image}"] = None
    yield from found


def _views(text: str) -> Iterator[str]:
    """The text as it may be read: lines as they are, and joined at either of the two characters that may join them.

    Which one does says a directive, and within a heredoc neither does. Comments between joined lines vanish.
    """
    yield text
    for escape in ("\\", "`"):
        yield re.sub(rf"{re.escape(escape)}[ \t]*\n(?:[ \t]*(?:#.*)?\n)*", "", text)


def _by_address(image: str) -> bool:
    """Whether an image's registry is this machine, or an address: `10.81.0.3:5000/x`."""
    registry, _, rest = image.partition("/")
    host = registry.rpartition(":")[0] if ":" in registry and not registry.startswith("[") else registry
    if not rest:
        return False
    try:
        ip_address(host.strip("[]"))
    except ValueError:
        return host == "localhost"
    return True

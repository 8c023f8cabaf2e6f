"""What a Dockerfile makes the engine itself fetch: past the slice and the firewall of the environment it is built for.
Read to refuse, not to build: what may be such a line counts as one. Rules of reading are BuildKit's (its parser)."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

FRONTENDS = re.compile(r"(?:docker\.io/)?docker/dockerfile(?::[\w.-]+)?(?:@sha256:[0-9a-f]{64})?")
"""Docker's own; another may take a file for anything (docs.docker.com, "Custom Dockerfile syntax")."""

PLATFORM = tuple(f"{of}{part}" for of in ("TARGET", "BUILD") for part in ("PLATFORM", "OS", "ARCH", "VARIANT"))
"""ARGs that BuildKit itself gives a value: `linux/amd64` and parts of it."""

IMAGE_ID = re.compile(r"(?:sha256:)?[0-9a-f]+", re.IGNORECASE)
"""What the engine may take for an image's id, or the beginning of one (`docker run 4f3a`), since it has such an image
here: a name of a registry that looks like one (`cafe`) gets a tag."""

_DIRECTIVE = re.compile(r"^\s*(?:#|//)\s*syntax\s*=\s*(\S+)", re.IGNORECASE | re.MULTILINE)
_ESCAPE = re.compile(r"^\s*#\s*escape\s*=\s*`", re.IGNORECASE | re.MULTILINE)
_COMMENT = re.compile(r"^[^\S\x1c-\x1f]*#.*\n?", re.MULTILINE)  # what is space to Go; to Python a little more is
_INSTRUCTION = re.compile(r"(?:ONBUILD\s+)*(\w+)\s+(.*)", re.IGNORECASE | re.ASCII)
_WORD = re.compile(r"[^\t\v\f\r ]+")
_OPTION = re.compile(r"--(?:[^\s\"'\\]|\\.|\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*')*(?=\s|$)\s*", re.ASCII)
_QUOTING = re.compile(r"\\(.)|[\"']")
_FROM = re.compile(r"--from=(.*)", re.IGNORECASE)
_MOUNTED = re.compile(r"[=,\"]\s*from=([^,\"]*)", re.IGNORECASE)
_STAGE = re.compile(r"\s+AS\s+([a-z][\w.-]*)\s*$", re.IGNORECASE | re.ASCII)
_ARGUMENT = re.compile(r"(\w+)=(?:\"([^\"\\]*)\"(?!\S)|'([^'\\]*)'(?!\S)|(\S*))", re.ASCII)
_SET = re.compile(r"(\w+)(?:=|\s)", re.ASCII)
_ODDLY_SET = re.compile(r"^[^\s=]*[\"'\\$]|[\"'\\$][\w}\"'\\]*=")
_VARIABLE = re.compile(r"\$(?:([^\W\d]\w*)|\{([^\W\d]\w*)\})")
_FILES = ("run", "add", "copy")
_LOCAL = re.compile(r"(?!(?:github|gitlab)\.com/|git@)[\w./*?+@,=~-]+")
_HEREDOC = re.compile(r"(?:^|\s)\d*<<-?([^\s<]\S*)")
_PLAIN_WORD = re.compile(r"([\"']?)\w+\1")
_NAME = re.compile(r"[\w./:@-]+", re.ASCII)
_NUMBER = re.compile(r"(?:.*\.)?(?:\d+|0x[0-9a-f]*)\.?", re.IGNORECASE | re.ASCII)


class _Instruction(NamedTuple):
    """One line, joined. `options`: without quotes and escapes; `rest`: what follows them, as written."""

    keyword: str
    options: tuple[str, ...]
    rest: str


def fetches(text: str, arguments: Mapping[str, str]) -> Iterator[str]:
    """What the engine would fetch for this Dockerfile beside images by name, each in a few words for a message.

    `ADD` of what is no plain path: an address, a Git repository, what a variable holds; an image of a registry that is
    named by its address; and what cannot be told: another frontend, a heredoc whose end is not a plain word, an image
    whose name is in no ARG. `arguments`: the build's own values of ARGs.
    """
    found: dict[str, None] = {}
    bases: dict[str, None] = {}
    text = _unified(text)
    if (text.partition("\n")[2] if text.startswith("#!") else text).lstrip().startswith("{"):
        found["a Dockerfile in JSON"] = None  # only another frontend can read it
    for frontend in _DIRECTIVE.findall(text):
        if not FRONTENDS.fullmatch(frontend):
            found[f"syntax={frontend}"] = None
    for view in _views(text):
        known = _known(view, arguments)
        for one in view:
            for word in _HEREDOC.findall(one.rest) if one.keyword in _FILES else ():
                if not _PLAIN_WORD.fullmatch(word):
                    found[f"a heredoc <<{word}"] = None
            if one.keyword in (*_FILES, "from"):
                found |= {f"an option {option}": None for option in _unclear(one)}
            for source in _sources(one.rest) if one.keyword == "add" else ():
                if not all(_LOCAL.fullmatch(value) for value in _values(source, known)):
                    found[f"ADD {source}"] = None
        bases |= {f"FROM {image}": None for image in _images(view, known, arguments) if _by_address(image)}
    yield from (found | bases)


def images(text: str, arguments: Mapping[str, str]) -> list[str]:
    """The images that a Dockerfile names, as `fetches` reads it; where a variable has no value it stays, as `$BASE`."""
    views = ((view, _known(view, arguments)) for view in _views(_unified(text)))
    return list(dict.fromkeys(image for view, known in views for image in _images(view, known, arguments)))


def _unified(text: str) -> str:
    return text.lstrip("\ufeff").replace("\r\n", "\n")


def _images(view: list[_Instruction], known: Mapping[str, list[str]], arguments: Mapping[str, str]) -> Iterator[str]:
    """The images that `FROM`, `--from=` and mounts name, with every value that an ARG in them may have, without stages
    of the same file. `known`: the values of all ARGs; to a FROM only those before the first count."""
    first = next((place for place, one in enumerate(view) if one.keyword == "from"), len(view))
    shared = _known(view[:first], arguments)
    # In a heredoc may stand what only looks like a stage. Only BuildKit knows heredocs, and it takes no ids.
    heredoc = any(_HEREDOC.search(one.rest) for one in view)
    stages, perhaps = {"", "scratch"}, set[str]()

    def named(name: str, known: Mapping[str, list[str]]) -> Iterator[str]:
        for value in _values(name, known):
            if value.lower() not in stages and not (value.lower() in perhaps and IMAGE_ID.fullmatch(value)):
                yield value

    for one in view:
        if one.keyword == "from":
            for name in _WORD.findall(one.rest)[:1]:
                yield from named(name, shared)
            if stage := _STAGE.search(one.rest):
                (perhaps if heredoc else stages).add(stage[1].lower())
        for option in one.options if one.keyword in _FILES else ():
            for name in (_MOUNTED if option.startswith("--mount") else _FROM).findall(option):
                yield from (value for value in named(name, known) if not value.isdigit())


def _views(text: str) -> Iterator[list[_Instruction]]:
    """The file as it may be read: its lines joined where engines before and after BuildKit 0.13 join them.

    To these an escaped escape character joins nothing. Comments and empty lines between joined lines vanish. Within a
    heredoc nothing is joined, but its last line is a plain word, so that the line after it begins anew here too.
    """
    escapes = ("\\", "`") if _ESCAPE.search(text) else ("\\",)
    text = _COMMENT.sub("", text)
    for escape in escapes:
        sign = re.escape(escape)
        for before in ("", f"(?<!{sign})"):
            joined = re.sub(rf"{before}{sign}[ \t]*\n(?:[^\S\n\x1c-\x1f]*\n)*", "", text)
            lines = (_INSTRUCTION.match(line.lstrip()) for line in joined.split("\n"))
            yield [_instruction(line[1], line[2]) for line in lines if line]


def _instruction(keyword: str, rest: str) -> _Instruction:
    options = []
    while option := _OPTION.match(rest):
        options.append(_QUOTING.sub(r"\1", option[0].strip()))
        rest = rest[option.end() :]
    return _Instruction(keyword.lower(), tuple(options), rest)


def _unclear(one: _Instruction) -> list[str]:
    """Options of which BuildKit may see another end: with letters that it reads by the byte, without a value (which
    some versions take from the next word), with a quote that nothing ends."""
    odd = [option for option in one.options if not option.isascii() or option in ("--from", "--mount")]
    return odd + (_WORD.findall(one.rest)[:1] if one.rest.startswith("--") else [])


def _sources(rest: str) -> list[str]:
    """What an ADD takes: all but its last word. Heredocs of plain words are the file's own text."""
    try:
        words = json.loads(rest) if rest.startswith("[") else _WORD.findall(rest)
    except (ValueError, RecursionError):
        return [rest]
    return [
        str(word)
        for word in words[:-1]
        # An escape character that is left over joins in another view.
        if word not in ("\\", "`") and not ((end := _HEREDOC.fullmatch(str(word))) and _PLAIN_WORD.fullmatch(end[1]))
    ]


def _known(view: list[_Instruction], arguments: Mapping[str, str]) -> dict[str, list[str]]:
    """The values that each ARG may have: the build's own, or else every one that a line gives it. ENV comes before it,
    so what has a line of that is not known."""
    found = {name: ["linux"] for name in PLATFORM}
    for one in view:
        for name, *values in _ARGUMENT.findall(one.rest) if one.keyword == "arg" else ():
            found.setdefault(name, []).append("".join(values))
    found |= {name: [value] for name, value in arguments.items()}
    written = [one.rest for one in view if one.keyword == "env"]
    if any(_ODDLY_SET.search(rest) for rest in written):
        return {}
    hidden = {name for rest in written for name in _SET.findall(rest)}
    return {name: values for name, values in found.items() if name not in hidden}


def _values(word: str, known: Mapping[str, list[str]]) -> Iterator[str]:
    """What a word may be once its variables have their values; variables that are not known stay."""
    name = next((name for one in _VARIABLE.findall(word) if (name := "".join(one)) in known), None)
    if name is None:
        yield word
        return
    others = {other: values for other, values in known.items() if other != name}
    parts = re.split(rf"\${name}\b|\${{{name}}}", word)
    for value in known[name]:
        yield from _values(value.join(parts), others)


def _by_address(image: str) -> bool:
    """Whether an image's registry is this machine, or an address: `10.81.0.3:5000/x`. What is no plain name may be."""
    if not _NAME.fullmatch(image):
        return True
    registry, _, rest = image.partition("/")
    host = registry.partition(":")[0].lower()
    # A name that ends in a number is an address, however it is written: 10.81.3, 0x0a510003.
    return bool(rest) and (host == "localhost" or host.endswith(".localhost") or bool(_NUMBER.fullmatch(host)))

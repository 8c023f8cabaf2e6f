"""The agent's command line: `python3 host.pyz <verb> [options]`, in a checkout `python -m host <verb>`.
A verb is a module of this package with `add_arguments(parser)` and `run(args) -> int`, loaded when it is asked for."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from host.machine import Undecided

VERBS = {
    "verify": "compare what is declared with the engine, the cgroups and the firewall",
    "prove": "try every way across a boundary; each must fail",
    "keep": "keep OOM scores and disk ceilings as declared",
    "backup": "run the backups that are due, or list what there is",
    "restore": "bring a backup back, checked; or drill: the same into a volume that is thrown away",
    "watch": "run verify, keep and backup at their periods, where no systemd does",
}


def main(arguments: Sequence[str]) -> int:
    """Exit code of the verb: 0 all is well, 1 it found something, 2 it could not decide."""
    parser = argparse.ArgumentParser(prog="host.pyz", description="Bulkhead's agent on a Docker host.")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    parsers = {name: verbs.add_parser(name, help=text, description=text) for name, text in VERBS.items()}
    asked = next((word for word in arguments if not word.startswith("-")), "")
    if asked not in VERBS:
        parser.parse_args(arguments)  # says what is wrong, and exits
    try:
        verb = import_module(f"host.{asked}")
    except ModuleNotFoundError as error:
        if error.name != f"host.{asked}":
            raise
        print(f"This agent has no {asked} yet. Next step: deploy a newer one: make up ENV=host", file=sys.stderr)
        return 2
    verb.add_arguments(parsers[asked])
    try:
        return int(verb.run(parser.parse_args(arguments)))
    except Undecided as error:
        print(f"undecided: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

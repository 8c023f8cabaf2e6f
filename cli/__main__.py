"""`python -m cli`: the commands; an error that a user can act on is printed without a traceback.
The commands themselves are in app.py."""

import sys

from rich.console import Console

from cli.app import app
from cli.pulumi import PulumiError
from host.machine import Undecided
from host.restic import BackupError
from settings.errors import SettingsError


def main() -> int:
    try:
        app()
    except (SettingsError, PulumiError, BackupError, Undecided) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Bulkhead: builds the stack that is selected. `host` realises the ledger; every other stack is an environment."""

import pulumi

from settings.errors import SettingsError
from stacks import dev, environment, host, prod

STACKS = {"host": host.build, "prod": prod.build, "dev": dev.build}

try:
    STACKS.get(pulumi.get_stack(), environment.build)()
except SettingsError as error:
    raise pulumi.RunError(str(error)) from None

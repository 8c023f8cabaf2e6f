"""Bulkhead: builds the stack that is selected. `stacks/<name>.py` if there is one, else a plain environment."""

from importlib import import_module
from importlib.util import find_spec

import pulumi

from settings.errors import SettingsError

module = f"stacks.{pulumi.get_stack().replace('-', '_')}"
try:
    import_module(module if find_spec(module) else "stacks.environment").build()
except SettingsError as error:
    raise pulumi.RunError(str(error)) from None

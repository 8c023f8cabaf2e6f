"""What each stack consists of: `host` first, then one module for each environment that is more than compose files.

`stacks/<name>.py` builds stack `<name>` (dashes as underscores); one without a module is a plain `environment`.
"""

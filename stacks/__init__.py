"""What each stack consists of: `host` first, then one module for each environment that has more than compose files.

A stack without a module of its own here is built by `stacks.environment` from its settings alone.
"""

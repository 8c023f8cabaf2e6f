"""Reusable Pulumi components, one per file: what an isolated environment on a Docker host is made of.

Each is a `ComponentResource` with typed arguments, usable from any Pulumi program; `docs/components.md` shows how.
"""

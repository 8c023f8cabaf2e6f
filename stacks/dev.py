"""The dev stack: what its compose files say. Resources that Compose cannot express are added here, in Python."""

from stacks import environment


def build() -> None:
    """Environment `dev` and nothing else yet; `environment.build()` returns it to build on."""
    environment.build()

"""How the suite is shared out among processes (`-n`): there is one Docker engine, so one process deploys to it."""

from typing import Any

import hypothesis
import pytest
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

# These machines are noisy: how long one example takes says nothing.
hypothesis.settings.register_profile("bulkhead", deadline=None)
hypothesis.settings.load_profile("bulkhead")

E2E = "tests/e2e/"
APART = ("test_corpus.py", "test_bucket.py", "test_firewall.py")
"""End-to-end modules that deploy nothing."""


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]  # xdist is not typed
    """All that deploys goes to one process, in its order; what does not, module by module, to whichever is free.

    By marker (`--dist=loadgroup`) it cannot be said: xdist 3.8 writes groups where pytest 9 does not look for them.
    """

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0]
        return E2E if module.startswith(E2E) and not module.endswith(APART) else module


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One process begins with what deploys, which takes longest. Beside it: what asks the same engine, before that is
    restarted; the virtual server, before clients are measured; all the rest."""

    def rank(item: pytest.Item) -> int:
        if item.get_closest_marker("e2e"):
            return int(item.path.name in APART)
        return 2 if item.get_closest_marker("vm") else 3

    items.sort(key=rank)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    """What shares the tests out."""
    return Scheduling(config, log)

"""Where the state of this user's deployments is. Standard library only: the command line needs it before all else."""

from collections.abc import Mapping
from pathlib import Path


def state_folder(base: Mapping[str, str], home: Path) -> Path:
    """Where the state of this user's deployments is kept, as the XDG Base Directory Specification says."""
    return Path(base.get("XDG_STATE_HOME") or home / ".local" / "state") / "bulkhead"

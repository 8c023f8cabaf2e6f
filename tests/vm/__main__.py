"""Makes the disk that the virtual server is booted from, where the cache does not have it: `python -m tests.vm`.
Before the tests, since it builds images on the engine that others are then busy with. 10 minutes; else a second."""

import sys
import tempfile
from pathlib import Path

from engine import setup
from tests.vm.conftest import disk, written

if __name__ == "__main__":
    try:
        with tempfile.TemporaryDirectory() as folder:
            disk(written(Path(folder) / "project"), setup.say)
    except setup.SetupError as error:
        sys.exit(str(error))

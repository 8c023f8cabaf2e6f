"""What the environment tells the API and the worker; passwords come from files, as secrets do."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """Read once at start. Passwords stay out of `repr`, so that no log shows them."""

    environment: str
    version: str
    log_level: str
    db_host: str
    db_password: str = field(repr=False)
    cache_host: str
    cache_password: str = field(repr=False)

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """Raises KeyError for a missing variable and OSError for an unreadable password file."""
        return cls(
            environment=environment.get("SHOP_ENVIRONMENT", "local"),
            version=environment.get("SHOP_VERSION", "unknown"),
            log_level=environment.get("SHOP_LOG_LEVEL", "info").upper(),
            db_host=environment.get("DB_HOST", "db"),
            db_password=_secret(environment["DB_PASSWORD_FILE"]),
            cache_host=environment.get("CACHE_HOST", "cache"),
            cache_password=_secret(environment["CACHE_PASSWORD_FILE"]),
        )


def _secret(path: str) -> str:
    return Path(path).read_text().rstrip("\n")

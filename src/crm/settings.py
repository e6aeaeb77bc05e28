"""Settings from the environment, and secrets that are generated if none are set."""

import os
import secrets
import stat
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from respcache.core.errors import ConfigurationError
from respcache.ops.configuration import Setting
from respcache.testing.servers import write_private

MIN_SECRET = 32
MIN_DISTINCT = 10
SECRETS = ("jwt_secret", "respcache_key", "metrics_token")
KNOWN_WORDS = ("changeme", "change-me", "secret", "password", "default", "development")
"""Words in the secrets of tutorials."""


class Settings(BaseSettings):
    """The environment of the CRM: each field is a variable, in upper case.

    There is one field per variable, so there are more than 15.
    """

    model_config = SettingsConfigDict(env_ignore_empty=True, extra="ignore")

    environment: Literal["development", "production"] = "development"
    host: str = "127.0.0.1"
    port: int = Field(4001, ge=1, le=65535)
    data_dir: Path = Path(".data")
    database_url: SecretStr | None = None
    redis_cache_url: SecretStr | None = None
    redis_url: SecretStr | None = None
    jwt_secret: SecretStr | None = None
    respcache_key: SecretStr | None = None
    respcache_enabled: bool = True
    respcache_audit_share: float = Field(0.001, ge=0, le=1)
    respcache_near_bytes: int = Field(64 * 1024 * 1024, ge=0)
    metrics_token: SecretStr | None = None
    metrics_tenants: int = Field(0, ge=0, le=100)
    token_hours: float = Field(12, gt=0, le=24 * 365)
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("database_url")
    @classmethod
    def _use_asyncpg(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        scheme, separator, rest = value.get_secret_value().partition("://")
        if not separator or scheme not in ("postgres", "postgresql", "postgresql+asyncpg"):
            raise ValueError("must have the form postgresql://user:password@host:port/database")
        return SecretStr(f"postgresql+asyncpg://{rest}")

    @model_validator(mode="after")
    def _refuse_weak_secrets(self) -> "Settings":
        for name in SECRETS:
            value: SecretStr | None = getattr(self, name)
            if value is None:
                if self.environment == "production" and name != "metrics_token":
                    raise ValueError(
                        f"{name.upper()} must be set in production: python -c 'import secrets; "
                        f"print(secrets.token_hex(32))'"
                    )
            elif problem := _weakness(
                value.get_secret_value(), strict=self.environment == "production"
            ):
                raise ValueError(f"{name.upper()} {problem}")
        return self

    @property
    def without_cache(self) -> bool:
        """Whether ``REDIS_CACHE_URL=none``: the system has no cache at all."""
        return (
            self.redis_cache_url is not None and self.redis_cache_url.get_secret_value() == "none"
        )

    def with_secrets(self) -> "Settings":
        """Return settings with missing secrets from the data folder, see ``stored_secret``."""
        missing = [name for name in ("jwt_secret", "respcache_key") if getattr(self, name) is None]
        given: dict[str, Any] = {
            name: SecretStr(stored_secret(self.data_dir, name.upper())) for name in missing
        }
        return self.model_copy(update=given)


def public_settings(settings: Settings) -> list[Setting]:
    """Return the settings for operators: addresses without passwords, secrets as (not) set."""
    found = []
    for name in Settings.model_fields:
        value, variable = getattr(settings, name), name.upper()
        given = "argument" if name in settings.model_fields_set else "default"
        source = variable if os.environ.get(variable) else given
        if name in SECRETS:
            value = "not set" if value is None else "set"
        elif isinstance(value, SecretStr):
            value = _address(value.get_secret_value())
        text = "not set" if value is None else str(value)
        found.append(Setting(name=variable, value=text, source=source))
    return found


def _address(url: str) -> str:
    """Return an address without user and password."""
    parts = urlsplit(url)
    port = "" if parts.port is None else f":{parts.port}"
    return f"{parts.scheme}://{parts.hostname or ''}{port}{parts.path}" if parts.scheme else url


def stored_secret(folder: Path, name: str) -> str:
    """Return a secret from the data folder; generate it (mode 0600) if there is none.

    Raises ``ConfigurationError`` if other users can read it, or if it is too short.
    """
    path = folder / "secrets" / name
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(path, secrets.token_hex(32))
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigurationError(
            f"{path} can be read by other users: chmod 600 it, or delete it to generate a new one"
        )
    value = path.read_text().strip()
    if len(value) < MIN_SECRET:
        raise ConfigurationError(
            f"{path} has less than {MIN_SECRET} characters: delete it to generate a new one"
        )
    return value


def _weakness(secret: str, *, strict: bool) -> str | None:
    """Return what is wrong with a secret, or None. ``strict`` also rejects hand-written ones."""
    if len(secret) < MIN_SECRET:
        return f"must be at least {MIN_SECRET} random characters"
    if strict and (
        len(set(secret)) < MIN_DISTINCT or any(word in secret.lower() for word in KNOWN_WORDS)
    ):
        return "looks like a default: use random characters"
    return None

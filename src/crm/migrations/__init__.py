"""The revisions of the database schema. ``upgrade`` brings a database to the newest one."""

from pathlib import Path

from alembic import command
from alembic.config import Config


def configuration(database_url: str) -> Config:
    """Return alembic's configuration for a database, without a file.

    The address, with its password, is an attribute, so that no message contains it.
    """
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.set_main_option("path_separator", "os")
    config.attributes["database_url"] = database_url
    return config


def upgrade(database_url: str) -> None:
    """Upgrade a database to the newest revision. Do not call it from a running event loop."""
    command.upgrade(configuration(database_url), "head")

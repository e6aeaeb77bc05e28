"""The database's schema, step by step. ``upgrade`` brings any database to the newest step."""

from pathlib import Path

from alembic import command
from alembic.config import Config


def configuration(database_url: str) -> Config:
    """Return alembic's configuration for a database, without a file and without the password in any
    text."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.set_main_option("path_separator", "os")
    config.attributes["database_url"] = database_url
    return config


def upgrade(database_url: str) -> None:
    """Bring a database to the newest step. Not to be called from a running event loop."""
    command.upgrade(configuration(database_url), "head")

"""The command ``respcache``. ``app.py`` lists its commands; each imports what it needs when it
runs."""

import sys


def main() -> None:
    """Run the command that the arguments name, and exit with an ``outcome.Status``."""
    try:
        from respcache.ops.cli.app import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "respcache":
            raise
        print(
            f"respcache: {error.name} is not installed: pip install 'respcache[cli]'",
            file=sys.stderr,
        )
        sys.exit(2)
    app()

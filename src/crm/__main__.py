"""Entry point of ``python -m crm``."""

import sys

try:
    from crm.cli.commands import main

    sys.exit(main())
except KeyboardInterrupt:  # Ctrl-C while the modules were being imported
    sys.exit("crm: stopped")

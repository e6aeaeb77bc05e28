"""``python -m crm``."""

import sys

try:
    from crm.cli.commands import main

    sys.exit(main())
except KeyboardInterrupt:  # while it was still importing
    sys.exit("crm: stopped")

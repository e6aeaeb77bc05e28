"""``python -m crm``."""

import sys

try:
    from crm.commands import main

    sys.exit(main())
except KeyboardInterrupt:  # while it was still importing
    sys.exit("crm: stopped")

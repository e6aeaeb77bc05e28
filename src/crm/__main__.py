"""``python -m crm``."""

import sys

from crm.commands import main

sys.exit(main())

"""`python -m convert …` is the command `parammap …`."""

import sys

from .cli import main

sys.exit(main())

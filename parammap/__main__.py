"""`python -m parammap` is the command `parammap`."""

import sys

from parammap.cli.main import main

sys.exit(main())

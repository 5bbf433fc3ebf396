"""`python -m taco` is the command `taco`."""

import sys

from taco.entrypoints.cli.main import main

sys.exit(main())

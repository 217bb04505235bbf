"""`python -m attnstats`: the command line, for launchers that take a module."""

import sys

from attnstats.cli.main import main

sys.exit(main())

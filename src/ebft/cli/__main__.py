"""`python -m ebft.cli`, the form in which launchers start the command."""

import sys

from ebft.cli import main

sys.exit(main())

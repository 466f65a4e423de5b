"""`python -m ebft`, the same as the `ebft` command."""

import sys

from ebft.cli import main

sys.exit(main())

"""``python -m tcg_flatpolicy``."""

import sys

from tcg_flatpolicy.cli import main

sys.exit(main())

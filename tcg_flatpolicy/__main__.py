"""``python -m tcg_flatpolicy``."""

import sys

from tcg_flatpolicy.app.cli import main

sys.exit(main())

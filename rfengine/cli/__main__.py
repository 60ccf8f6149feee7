"""`python -m rfengine.cli`."""

import sys

from rfengine.cli import main

sys.exit(main())

"""`python -m vla.distill`, as `accelerate launch -m vla.distill` runs it."""

import sys

from vla.distill import main

sys.exit(main())

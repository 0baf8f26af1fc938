"""`python -m fot_jax` is `fot`."""

import sys

from fot_jax.cli import main

sys.exit(main())

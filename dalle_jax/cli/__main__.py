"""`python -m dalle_jax.cli` is the `dalle-jax` command."""

import sys

from dalle_jax.cli.main import main

sys.exit(main())

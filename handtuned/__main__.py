"""`python -m handtuned` is the `handtuned` command."""

import sys

from .cli import main

sys.exit(main())

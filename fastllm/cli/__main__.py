"""`python -m fastllm.cli`."""

import sys

from . import main

sys.exit(main())

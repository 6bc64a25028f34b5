"""`python -m benchmarks.dividend`."""

import sys

from benchmarks.dividend import main

sys.exit(main())

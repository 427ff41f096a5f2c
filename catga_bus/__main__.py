"""`python -m catga_bus` is `catga`."""

import sys

from catga_bus.cli import main

if __name__ == "__main__":
    sys.exit(main())

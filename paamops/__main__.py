"""`python -m paamops`."""

import sys

from paamops.cli import main

if __name__ == "__main__":
    sys.exit(main())

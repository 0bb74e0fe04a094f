"""`python -m ctutils`: see `ctutils.cli`."""

import sys

from ctutils.cli import main

if __name__ == "__main__":
    sys.exit(main())

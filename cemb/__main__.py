"""``python -m cemb``: the command line of `cemb.cli`."""

import sys

from cemb.cli import main

if __name__ == "__main__":
    sys.exit(main())

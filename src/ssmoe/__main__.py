"""`python -m ssmoe` is the command line."""

import sys

from ssmoe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

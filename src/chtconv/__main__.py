"""``python -m chtconv``: the command line."""

import sys

from chtconv.cli import main

if __name__ == "__main__":
    sys.exit(main())

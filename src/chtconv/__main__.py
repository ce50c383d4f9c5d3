"""``python -m chtconv``: the command line."""

import sys

from chtconv.cli import main

sys.exit(main())

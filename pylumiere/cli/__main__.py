"""`python -m pylumiere.cli`."""

import sys

from pylumiere.cli import main

if __name__ == "__main__":
    sys.exit(main())

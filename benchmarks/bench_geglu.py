"""`pylumiere bench ops --op geglu` as a script."""

import sys

from pylumiere.bench.ops import main

if __name__ == "__main__":
    sys.exit(main("geglu"))

"""`pylumiere bench ops --op temporal_attention` as a script."""

import sys

from pylumiere.bench.ops import main

if __name__ == "__main__":
    sys.exit(main("temporal_attention"))

"""`pylumiere bench ops --op layer_norm` as a script."""

import sys

from pylumiere.bench.ops import main

if __name__ == "__main__":
    sys.exit(main("layer_norm"))

"""`pylumiere bench ops --op groupnorm_silu` as a script."""

import sys

from pylumiere.bench.ops import main

if __name__ == "__main__":
    sys.exit(main("groupnorm_silu"))

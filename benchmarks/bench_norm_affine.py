"""`pylumiere bench ops --op norm_affine` as a script."""

import sys

from pylumiere.bench.ops import main

if __name__ == "__main__":
    sys.exit(main("norm_affine"))

"""`pylumiere bench ops --op factorized_conv` as a script."""

import sys

from pylumiere.bench.ops import main

if __name__ == "__main__":
    sys.exit(main("factorized_conv"))

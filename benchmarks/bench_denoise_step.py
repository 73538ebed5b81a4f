"""`pylumiere bench ops --op denoise_step` as a script."""

import sys

from pylumiere.bench.ops import main

if __name__ == "__main__":
    sys.exit(main("denoise_step"))

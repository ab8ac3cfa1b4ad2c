"""``python -m moe_offload``."""

import sys

from moe_offload.cli import main

if __name__ == "__main__":
    sys.exit(main())

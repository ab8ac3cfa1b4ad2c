"""``python -m moe_offload``."""

from moe_offload.cli import entry

if __name__ == "__main__":
    entry()

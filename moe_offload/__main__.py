"""``moe-offload`` and ``python -m moe_offload``: what Ctrl-C ends quietly from the first moment on."""

from __future__ import annotations

import os
import signal


def entry() -> None:
    """Run the command line and end the process; see cli.entry."""
    hears = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not so under nohup
    if hears:
        signal.signal(signal.SIGINT, lambda signum, frame: os._exit(130))
    from moe_offload import cli

    if hears:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.entry()


if __name__ == "__main__":
    entry()

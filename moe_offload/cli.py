"""The `moe-offload` command: arguments, exit codes, and what an error looks like.

torch and transformers are imported by the commands that run a model, never by ``--help``, an error
in the arguments, or ``inspect``.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from importlib import import_module
from types import FrameType
from typing import Any

from moe_offload.cli_parser import build_parser
from moe_offload.errors import BudgetError, CheckpointError, ConfigError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


def entry() -> None:
    """Run the command line and end the process.

    After Ctrl-C it leaves without unloading torch and transformers, which takes a second: the command
    has closed its files and joined its threads by then.
    """
    _mend_streams()
    code = main()
    if code == EXIT_INTERRUPTED:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    # An idle OpenMP worker that spins takes its core from the expert threads; torch reads this once.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # torch makes a folder for compiled graphs when it is imported; nothing here compiles one.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir())
    args = build_parser().parse_args(argv)
    try:
        if getattr(args, "download", False):
            if args.model is None:
                raise ConfigError("--download: which model? give its name, --model org/name")
            import_module("moe_offload.storage.download").fetch(args.model)
        with exit_at_once_on_interrupt():
            command = import_module(f"moe_offload.cli_{args.command.replace('-', '_')}")
        code = int(command.run(args))
        sys.stdout.flush()
        return code
    except (ConfigError, CheckpointError, BudgetError) as error:
        print(f"moe-offload: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader went away
        _drop_stdout()
        return EXIT_BROKEN_PIPE
    except OSError as error:  # a full disk, a folder that may not be written, a device that fails
        _drop_stdout()
        what = str(error) if error.filename is None else f"{error.filename}: {error.strerror}"
        print(f"moe-offload: error: {what}", file=sys.stderr)
        return EXIT_USER_ERROR


def _mend_streams() -> None:
    """Let a command run where a stream was closed before it began (`>&-`), or cannot show a character."""
    for name, raw in (("stdout", _Answer), ("stderr", _Notes)):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and not stream.isatty():
            buffer = io.BufferedWriter(raw(stream.fileno(), "w", closefd=False))
            lines = stream.line_buffering
            setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, line_buffering=lines))
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  for as long as the process lives
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _Answer(io.FileIO):
    """Standard output, which says so when it cannot be written to; the system names open files by nothing."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OSError(error.errno, error.strerror, "standard output") from error


class _Notes(io.FileIO):
    """Standard error, where it can be written to: a log on a full disk must not cost the answer."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError:
            return len(data)


def _drop_stdout() -> None:
    """Point stdout to where nothing is read, or the flush at exit would complain of what it still holds."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def exit_at_once_on_interrupt() -> Iterator[None]:
    """While libraries are imported, let Ctrl-C end the process: nothing is open yet to be closed.

    A KeyboardInterrupt in the middle of a C extension's import surfaces as some other error, or as none.
    """

    def leave(signum: int, frame: FrameType | None) -> None:
        os._exit(EXIT_INTERRUPTED)

    previous = signal.getsignal(signal.SIGINT)
    may_set = threading.current_thread() is threading.main_thread()
    if previous is not signal.default_int_handler or not may_set:
        yield  # ignored under nohup; a caller's own; or nothing that this thread may set
        return
    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)

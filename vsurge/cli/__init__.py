"""The command `vsurge`. A command's module, and jax with it, is imported after the arguments are read."""

from __future__ import annotations

import glob
import importlib
import io
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .parser import build_parser

# What the library raises for things that the user can mend, and what the operating system does.
EXPECTED = (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError, OverflowError)
INTERRUPTED, BROKEN_PIPE = 130, 141  # as a shell reports them


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; its exit code.

    Args:
        argv: the arguments; None for those of the process.

    Raises:
        SystemExit: the arguments are wrong (code 2), or --help or --version were asked for.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no emoji shows a question mark
    # transformers warns of a missing torch, which is not needed here
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    quiet_libtpu()
    with log_to_stderr(debug=args.debug):
        try:
            importlib.import_module(f".{args.command}", __name__).run(args)
            sys.stdout.flush()
        except BrokenPipeError:
            # the reader has left; Python's own flush at exit must not fail on it again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return BROKEN_PIPE
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return INTERRUPTED
        except EXPECTED as error:
            if args.debug:
                raise
            message = " ".join(str(error).split()) or type(error).__name__
            print(f"vsurge: error: {message}", file=sys.stderr)
            return 1
    return 0


def quiet_libtpu() -> None:
    """Keeps libtpu, installed for its compiler, from complaining on a machine without a TPU."""
    if not (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")):
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v6e-1")  # any that it knows
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


class OneLine(logging.Formatter):
    """Leaves tracebacks out."""

    def formatException(self, ei: object) -> str:  # noqa: ARG002, N802
        return ""


@contextmanager
def log_to_stderr(*, debug: bool) -> Iterator[None]:
    """Shows the library's warnings, or with `debug` all that it logs, for the time of a command."""
    logger = logging.getLogger("vsurge")
    handler = logging.StreamHandler()
    form = "%(levelname)s %(name)s: %(message)s" if debug else "vsurge: %(message)s"
    handler.setFormatter(logging.Formatter(form) if debug else OneLine(form))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)

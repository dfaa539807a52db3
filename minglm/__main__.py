"""The entry point of `python -m minglm VERB ...`, also installed as `minglm`."""

import os
import sys
from collections.abc import Sequence

from minglm.common.signals import Stopped, stoppable


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status; Ctrl-C or SIGTERM, also during the imports, is one line."""
    open_standard_streams()
    with stoppable() as received:
        try:
            from minglm.cli.main import main as run_command_line

            return run_command_line(sys.argv[1:] if words is None else words)
        except KeyboardInterrupt as error:
            return _stopped(error.status if isinstance(error, Stopped) else 130)
        except Exception:
            if received:  # a module of C whose import was interrupted says something else
                return _stopped(128 + received[0])
            raise


def _stopped(status: int) -> int:
    from minglm.common.mistakes import may_speak

    if may_speak():
        print("minglm: interrupted", file=sys.stderr)
    return status


def open_standard_streams() -> None:
    """Open what the shell has closed, and write UTF-8 where the locale has only ASCII.

    With descriptor 2 closed the next file that is opened would become standard error, and libraries would
    write their messages into it. In the locale C Python itself writes UTF-8, unless it is told not to.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
        elif getattr(stream, "encoding", None) in ("ascii", "ANSI_X3.4-1968", "US-ASCII"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())

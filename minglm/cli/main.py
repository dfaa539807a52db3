"""Find the verb that was asked for, run it, and turn a user's mistake into one line (no section in the paper).

Exit status: 0, or 2 after a mistake, a full disk or a file that cannot be used, or 128 + N after a signal N
(130 after Ctrl-C).
"""

import errno
import importlib
import os
import shlex
import sys
from collections.abc import Sequence

from minglm.cli.arguments import Parser
from minglm.cli.registry import VERBS, overview
from minglm.common.mistakes import may_speak, one_line, shown

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_MEMORY = ("can't allocate memory", "out of memory")
"""What PyTorch says, in a RuntimeError, where Python would raise MemoryError."""


def main(words: Sequence[str]) -> int:
    """Run the verb that `words` begin with, and return the exit status."""
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0
    if words[0] not in VERBS:
        return _fail(f"no verb {shown(words[0], quoted=True)}; the verbs are {', '.join(VERBS)}")
    try:
        return run_verb(words[0], list(words[1:])) or 0
    except ValueError as error:
        return _fail(str(error))
    except BrokenPipeError:  # the reader of the output, `head` for instance, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno in DISK_FULL:
            return _fail(
                "the disk is full; free space and give the same command again, nothing is lost"
            )
        reason = error.strerror or str(error) or type(error).__name__
        return _fail(reason if error.filename is None else f"{error.filename}: {reason}")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or any(text in str(error) for text in NO_MEMORY):
            return _fail("not enough memory; use a smaller model, batch or number of answers")
        if not may_speak():  # another rank failed first, and this one lost it
            return 1
        raise


def run_verb(name: str, words: list[str]) -> int | None:
    """Parse the words of one verb and call its `main`; returns its exit status, None for 0.

    Words that the verb does not know are overrides of its config, where it has one, and a mistake elsewhere.
    """
    module = importlib.import_module(VERBS[name].module)
    parser = Parser(prog=f"python -m minglm {name}", description=module.main.__doc__)
    module.add_arguments(parser)
    config_comes_first = parser.get_default("config_comes_first")
    asks_for_help = {"-h", "--help"} & set(words)
    if asks_for_help and config_comes_first and not words[0].startswith("-"):
        parser.print_help()
        from minglm.config import load_config

        load_config(words[0], ["--help"])  # prints every field with its meaning, and exits
    args, unknown = parser.parse_known_args(words)
    if unknown and not hasattr(args, "overrides"):
        parser.error(f"unknown words: {' '.join(unknown)}")
    args.overrides = unknown
    args.command = shlex.join(["python", "-m", "minglm", name, *words])
    return module.main(args)


def _fail(message: str) -> int:
    if may_speak():
        print(f"minglm: {one_line(message)}", file=sys.stderr)
    return 2

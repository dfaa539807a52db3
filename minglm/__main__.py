"""The entry point of `python -m minglm VERB ...`, also installed as `minglm`."""

import sys
from collections.abc import Sequence


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status; Ctrl-C, also during the imports, is one line and status 130."""
    try:
        from minglm.cli.main import main as run_command_line

        return run_command_line(sys.argv[1:] if words is None else words)
    except KeyboardInterrupt:
        print("minglm: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

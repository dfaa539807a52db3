"""The verb `view`: show a run in a browser, live while it trains (no section in the paper)."""

import argparse
from pathlib import Path

from minglm.cli.arguments import file, folder, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `view`."""
    parser.add_argument("run", type=folder, help="folder of a run, finished or under way")
    parser.add_argument(
        "--html",
        type=file,
        metavar="FILE",
        help="write the page into one file, with the last samples of each stage, and serve nothing",
    )
    parser.add_argument("--port", type=whole(0, 65535), default=8200, help="0 takes a free one")


def main(args: argparse.Namespace) -> None:
    """Show a run in a browser: curves, load of the experts, samples token by token, and where each token was routed."""
    from minglm.common.files import atomic_path
    from minglm.report.run_view import RunView, static_page

    view = RunView(args.run)
    if args.html is not None:
        with atomic_path(Path(args.html)) as temporary:
            Path(temporary).write_text(static_page(view), encoding="utf-8")
        print(args.html)
        return
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"the live page needs {error.name}: pip install 'minglm[serve]', or give --html FILE"
        ) from None
    from minglm.serve.listener import serve
    from minglm.serve.view import create_view_app

    serve(create_view_app(view), port=args.port, ready=lambda url: print(url, flush=True))

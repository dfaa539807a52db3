"""The verb `serve`: answer over HTTP as OpenAI's API does (no section in the paper)."""

import argparse
import gc
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from minglm.cli.arguments import add_drafts, folder, whole

if TYPE_CHECKING:  # imported late, as `main` does
    from torch import Tensor

KEY_VARIABLE = "MINGLM_API_KEY"
"""Holds the key that clients need."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `serve`."""
    parser.add_argument(
        "model",
        type=folder,
        help="folder of a run, or of a Hugging Face checkpoint with its tokenizer.json",
    )
    parser.add_argument(
        "--stage", help="serve the model as this stage left it (default: the last complete one)"
    )
    parser.add_argument("--name", help="what clients call the model (default: the folder's name)")
    parser.add_argument(
        "--dialect",
        help="glm-4.5, glm-4.6 or glm-4.7 (default: that of the checkpoint's chat template)",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine only)"
    )
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that clients may call the server by, such as that of a proxy before it"
        " (may be repeated; this machine's names are allowed, and the address of --host)",
    )
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a page's origin that may use the server from a browser, such as https://chat.example.com"
        " (may be repeated; default: only the server's own chat page)",
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"refuse clients without this key (default: ${KEY_VARIABLE}, which does not show in"
        " the list of processes; neither: everyone may ask)",
    )
    parser.add_argument("--port", type=whole(0, 65535), default=8000, help="0 takes a free one")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--max-batch", type=whole(1, 4096), default=64, help="answers at once")
    parser.add_argument(
        "--max-queue",
        type=whole(0),
        default=256,
        help="answers that may wait; more are refused with status 429",
    )
    parser.add_argument(
        "--cache-tokens",
        type=whole(1, 10**12),
        help="bound on the key/value cache, in tokens (default: none)",
    )
    parser.add_argument(
        "--weights-from",
        type=folder,
        metavar="FOLDER",
        help="read new weights from checkpoints in this folder when asked to: the server answers for a run with"
        " --rollout_engine",
    )
    parser.add_argument(
        "--accept-weights",
        action="store_true",
        help="take new weights inside requests: the server answers for a run with --rollout_engine and"
        " --rollout_weights tensors",
    )
    add_drafts(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="load the model, print what would be served, start nothing",
    )


def main(args: argparse.Namespace) -> None:
    """Answer over HTTP as OpenAI's API does: chat, completions, tools, a chat page, health and metrics."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"the server needs {error.name}: pip install 'minglm[serve]'") from None
    from minglm.chat.template import dialect_of
    from minglm.inference import Engine
    from minglm.model.glm import GLM
    from minglm.recipe.load import load_served
    from minglm.serve.access import Access
    from minglm.serve.app import create_app
    from minglm.serve.listener import serve
    from minglm.serve.requests import ServedModel

    key = os.environ.get(KEY_VARIABLE) if args.api_key is None else args.api_key
    access = Access(args.host, args.allowed_host, args.allow_origin, key)
    if args.dialect is not None:
        dialect_of(args.dialect)
    loaded = load_served(args.model, args.stage, args.device)
    engine = Engine(
        loaded.model,
        loaded.tokenizer,
        max_batch=args.max_batch,
        cache_tokens=args.cache_tokens,
        draft_tokens=args.draft_tokens,
    )
    # A bounded cache also bounds the length of one conversation.
    limit = engine.limit
    if args.cache_tokens is not None:
        limit = min(limit, engine.blocks.max_tokens or 0)
        if limit < 2:
            raise ValueError(
                f"--cache-tokens {args.cache_tokens}: at least {engine.blocks.block_size}, one block"
            )
    name = args.name or Path(args.model).resolve().name
    dialect = args.dialect or loaded.dialect
    served = ServedModel(
        loaded.tokenizer,
        name,
        limit,
        dialect,
        bare_tools=not loaded.from_hf,
        max_choices=args.max_batch,
        environments=loaded.environments,
    )
    about = f"{name}, template {dialect}, up to {limit} tokens"
    if args.dry_run:
        print(about)
        return

    def on_start(url: str) -> None:
        print(f"{about}\nchat page {url}\nAPI {url}/v1", flush=True)

    if access.beyond_this_machine and key is None:
        print(
            f"minglm serve: everyone who reaches {args.host} may use this server; set a key with"
            f" {KEY_VARIABLE} or --api-key",
            file=sys.stderr,
        )
    # All that is loaded stays. A collection that looked at it would hold every thread up, for a fifth of a second.
    gc.collect()
    gc.freeze()

    def load_weights(folder: str) -> None:
        allowed = Path(args.weights_from).resolve()
        if not Path(folder).resolve().is_relative_to(allowed):
            raise ValueError(f"{folder} is not in {allowed}, from where this server reads weights")
        engine.update_weights(GLM.from_pretrained(folder).state_dict())

    def take_weights(tensors: "Mapping[str, Tensor]") -> None:
        engine.update_weights(tensors, partial=True)

    app = create_app(
        engine,
        served,
        access,
        max_open_requests=args.max_batch + args.max_queue,
        load_weights=load_weights if args.weights_from else None,
        take_weights=take_weights if args.accept_weights else None,
    )
    serve(app, args.host, args.port, on_start)

"""The command line: `python -m minglm VERB ...`, also installed as `minglm`. Every verb has --help.

    run CONFIG      the whole pipeline, or a part of it, ending with a report card
    data CONFIG     build, inspect and verify the token shards of a config
    plan CONFIG     parameters, memory, compute and time of a config on a number of GPUs
    eval RUN        score a run's last stage, or another, on the held-out tasks
    chat RUN        talk to it
    serve RUN       an OpenAI-compatible server with a chat page
    import CONFIG FOLDER    make a released checkpoint the base of a run
    export RUN FOLDER       write a run as a released checkpoint, for transformers, vLLM and SGLang
    bench generate, bench train  tokens a second beside transformers, as a record and a figure
    bench kernels, bench compile  operations in all forms; what GPU kernels need of an H100, without one
    figures PATH    redraw figures from their stored logs

RUN may be a released checkpoint too: a folder with config.json, safetensors and tokenizer.json.
Words after CONFIG such as `--model.hidden_size 64` override any field of the config.
"""

import argparse
import errno
import json
import os
import shlex
import sys
from pathlib import Path

from minglm.recipe.load import load_run, load_served

VERBS = {}


def verb(function):
    """Register a function `verb(words)` under its name, without a trailing underscore."""
    VERBS[function.__name__.rstrip("_")] = function
    return function


def parser(name, description):
    """An argument parser for one verb."""
    return argparse.ArgumentParser(prog=f"python -m minglm {name}", description=description)


@verb
def run(words):
    """The whole paper in one command: every stage of CONFIG, then the report card."""
    more = " The same command continues a run that was stopped. With CONFIG, --help lists every field of it."
    p = parser("run", run.__doc__ + more)
    p.add_argument("config", help="a config file, such as configs/toy.py (or FILE:FUNCTION)")
    p.add_argument("--out", help="folder of the run (default: runs/NAME)")
    p.add_argument(
        "--only", metavar="STAGE", help="run this stage only; the stage before must be complete"
    )
    p.add_argument("--until", metavar="STAGE", help="stop after this stage")
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved config and the stages, start nothing",
    )
    from minglm.config import load_config
    from minglm.config.run import to_dict

    if {"-h", "--help"} & set(words) and not words[0].startswith("-"):
        p.print_help()
        load_config(words[0], ["--help"])  # prints every field with its meaning, and ends
    args, overrides = p.parse_known_args(words)
    from minglm.common.device import measured_flops, pick_device, pick_dtype
    from minglm.plan.counts import count_parameters
    from minglm.recipe.run import RecipeRunner
    from minglm.recipe.stages import plan_stages, table
    from minglm.report import card

    config = load_config(args.config, overrides)
    stages = plan_stages(config)
    device = pick_device(config.device)
    speed = measured_flops(device, pick_dtype(config.dtype, device))
    print(table(config, stages, speed), flush=True)
    if args.dry_run:
        print(json.dumps(to_dict(config), indent=1))
        print(f"body: {count_parameters(config.model)['body']:,} parameters")
        return
    for option, name in (("--only", args.only), ("--until", args.until)):
        if name is not None and name not in [stage.name for stage in stages]:
            raise ValueError(
                f"{option} {name}: no such stage; the stages are {', '.join(s.name for s in stages)}"
            )
    out = Path(args.out or f"runs/{config.name}")
    program = ["python", "-m", "minglm"]
    try:
        complete = RecipeRunner(config, out).execute(args.only, args.until)
    except KeyboardInterrupt:
        again = shlex.join([*program, "run", *words])
        print(f"\nstopped; everything up to here is saved. Continue with: {again}", file=sys.stderr)
        sys.exit(130)
    print(card.write(out))
    rest = shlex.join([*program, "run", args.config, "--out", str(out), *overrides])
    print(
        f"talk to it: {shlex.join([*program, 'chat', str(out)])}"
        if complete
        else f"continue with: {rest}"
    )


@verb
def data(words):
    """Build, inspect and verify the token shards of a config."""
    from minglm.cli import data

    data.command(parser("data", data.command.__doc__), words)


@verb
def chat(words):
    """Talk to a run in the terminal."""
    p = parser("chat", chat.__doc__)
    p.add_argument("run", help="folder of a run, or of a released checkpoint")
    p.add_argument(
        "--stage", help="use the model as this stage left it (default: the last complete one)"
    )
    p.add_argument("--temperature", type=float, default=0.6)
    p.add_argument("--top-p", type=float, default=0.95)
    p.add_argument("--max-new-tokens", type=int, default=200)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(words)
    from minglm.serve import terminal

    if not (args.temperature >= 0 and 0 < args.top_p <= 1 and args.max_new_tokens > 0):
        raise ValueError(
            "--temperature is at least 0, --top-p above 0 and at most 1, --max-new-tokens at least 1"
        )
    model, tokenizer, dialect, stage, _ = load_served(args.run, args.stage)
    print(f"stage {stage}")
    settings = terminal.ChatSettings(
        temperature=args.temperature,
        top_p=args.top_p,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        dialect=dialect,
    )
    terminal.chat(model, tokenizer, settings)


@verb
def serve(words):
    """Answer over HTTP as OpenAI's API does: chat, completions, tools, a chat page, health and metrics."""
    p = parser("serve", serve.__doc__)
    p.add_argument(
        "model", help="folder of a run, or of a Hugging Face checkpoint with its tokenizer.json"
    )
    p.add_argument(
        "--stage", help="serve the model as this stage left it (default: the last complete one)"
    )
    p.add_argument("--name", help="what clients call the model (default: the folder's name)")
    p.add_argument(
        "--dialect",
        help="glm-4.5, glm-4.6 or glm-4.7 (default: that of the checkpoint's chat template)",
    )
    p.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine only)"
    )
    p.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    p.add_argument("--device", default="auto")
    p.add_argument("--max-batch", type=int, default=64, help="answers at once")
    p.add_argument(
        "--max-queue",
        type=int,
        default=256,
        help="answers that may wait; more are refused with status 429",
    )
    p.add_argument(
        "--cache-tokens", type=int, help="bound on the key/value cache, in tokens (default: none)"
    )
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="load the model and say what would be served, then end",
    )
    args = p.parse_args(words)
    if args.max_batch < 1 or args.max_queue < 0 or (args.cache_tokens or 1) < 1:
        raise ValueError("--max-batch and --cache-tokens are at least 1, --max-queue at least 0")
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"the server needs {error.name}: pip install 'minglm[serve]'") from None
    from minglm.chat.template import dialect_of
    from minglm.common.device import pick_device
    from minglm.inference import Engine
    from minglm.serve.app import create_app
    from minglm.serve.app import serve as listen
    from minglm.serve.requests import ServedModel

    if args.dialect is not None:
        dialect_of(args.dialect)
    model, tokenizer, dialect, _, from_hf = load_served(args.model, args.stage)
    engine = Engine(
        model.to(pick_device(args.device)),
        tokenizer,
        max_batch=args.max_batch,
        cache_tokens=args.cache_tokens,
    )
    name, dialect = args.name or Path(args.model).resolve().name, args.dialect or dialect
    limit = engine.limit
    if args.cache_tokens is not None:
        limit = min(limit, engine.blocks.limit * engine.blocks.size)
        if limit < 2:
            raise ValueError(
                f"--cache-tokens {args.cache_tokens}: at least {engine.blocks.size}, one block"
            )
    served = ServedModel(
        tokenizer, name, limit, dialect, bare_tools=not from_hf, max_choices=args.max_batch
    )
    about = f"{name}, template {dialect}, up to {limit} tokens"
    if args.dry_run:
        print(about)
        return
    app = create_app(engine, served, max_open_requests=args.max_batch + args.max_queue)
    listen(
        app,
        args.host,
        args.port,
        lambda url: print(f"{about}\nchat page {url}\nAPI {url}/v1", flush=True),
    )


@verb
def eval_(words):
    """Score a run on the held-out tasks: avg@k and pass@k with 95% intervals, thinking on and off."""
    p = parser("eval", eval_.__doc__)
    p.add_argument("run", help="folder of a run, or of a released checkpoint")
    p.add_argument("--stage", help="the stage to score (default: the last complete one)")
    p.add_argument("--problems", type=int, help="problems per task (default: the config's)")
    p.add_argument("--samples", type=int, help="answers k per problem (default: the config's)")
    p.add_argument("--task", action="append", help="score only this task; may be repeated")
    p.add_argument("--json", action="store_true", help="print records as JSON lines")
    args = p.parse_args(words)
    import dataclasses

    from minglm.envs import ENVIRONMENTS
    from minglm.eval import tasks
    from minglm.inference import Engine
    from minglm.inference.client import EngineGenerator

    model, tokenizer, config, stage, _ = load_run(args.run, args.stage)
    changes = {
        k: v for k, v in (("problems", args.problems), ("samples", args.samples)) if v is not None
    }
    for option, value in changes.items():
        if value < 1:
            raise ValueError(f"--{option} {value}: must be at least 1")
    settings = dataclasses.replace(config.evaluation, **changes)
    names = args.task or list(ENVIRONMENTS)
    for name in names:
        if name not in ENVIRONMENTS:
            raise ValueError(
                f"--task {name}: no such task; the tasks are {', '.join(ENVIRONMENTS)}"
            )
    for name in names:
        for thinking in (True, False):
            record, _ = tasks.tasks(
                EngineGenerator(Engine(model, tokenizer)),
                tokenizer,
                ENVIRONMENTS[name],
                settings,
                thinking,
                config.seed,
            )
            if args.json:
                print(json.dumps({"stage": stage, **record}), flush=True)
            else:
                mode = "thinking" if thinking else "direct"
                print(
                    f"{name:13} {mode:9} avg@{record['k']} {record['avg']:.3f} ({record['low']:.3f} to "
                    f"{record['high']:.3f})  pass@{record['k']} {record['pass_k']:.3f}",
                    flush=True,
                )


@verb
def plan(words):
    """What a config needs: parameters, memory per GPU by term, compute, traffic, time and cost."""
    p = parser("plan", plan.__doc__)
    p.add_argument("config", help="a config file, such as configs/glm45_355b.py")
    p.add_argument("--gpus", type=int, default=1, help="number of GPUs")
    p.add_argument("--gpu-memory-gib", type=float, default=80.0)
    p.add_argument("--json", action="store_true", help="print the plan as JSON")
    args, overrides = p.parse_known_args(words)
    from minglm.config import load_config
    from minglm.plan import memory as planner

    config = load_config(args.config, overrides)
    found = planner.plan(config, args.gpus, args.gpu_memory_gib)
    print(json.dumps(found, indent=1) if args.json else planner.render(found))


@verb
def import_(words):
    """Make a released checkpoint the base of a run: its weights are those after mid-training, and `run` goes on."""
    p = parser("import", import_.__doc__)
    p.add_argument("config", help="a config file of the same model, such as configs/air_106b.py")
    p.add_argument("folder", help="folder with config.json and safetensors")
    p.add_argument("--out", required=True, help="folder of the new run")
    args, overrides = p.parse_known_args(words)
    from minglm.config import load_config
    from minglm.recipe import convert

    stage = convert.import_checkpoint(load_config(args.config, overrides), args.folder, args.out)
    again = shlex.join(
        ["python", "-m", "minglm", "run", args.config, "--out", args.out, *overrides]
    )
    print(f"{args.folder} is stage {stage} of {args.out}; go on with: {again}")


@verb
def export(words):
    """Write a run as a released checkpoint; or a released checkpoint again, in another dtype."""
    p = parser("export", export.__doc__)
    p.add_argument("run", help="folder of a run, or of a released checkpoint")
    p.add_argument("folder", help="a new folder")
    p.add_argument(
        "--stage", help="the model as this stage left it (default: the last complete one)"
    )
    p.add_argument(
        "--dtype", help="float32, bfloat16, float16 or fp8 (blocks of float8); default: as it came"
    )
    p.add_argument("--shard-gigabytes", type=float, default=5.0, help="size of a file")
    args = p.parse_args(words)
    from minglm.recipe import convert

    if not args.shard_gigabytes > 0:
        raise ValueError(f"--shard-gigabytes {args.shard_gigabytes}: must be positive")
    stage = convert.export_checkpoint(
        args.run, args.folder, args.stage, args.dtype, args.shard_gigabytes
    )
    print(f"{args.folder} holds {args.run}, stage {stage}")


@verb
def bench(words):
    """Speed beside baselines: `generate`, `train`, `kernels` (its own options); `compile`: kernels for an H100."""
    if words[:1] == ["kernels"]:
        from minglm.bench.kernels import command

        return command(parser("bench kernels", command.__doc__), words[1:])
    p = parser("bench", bench.__doc__)
    p.add_argument("what", choices=["generate", "train", "kernels", "compile"])
    p.add_argument("config", nargs="?", default="configs/toy.py")
    p.add_argument(
        "--batches", type=int, nargs="+", default=[1, 8, 64, 256], help="answers at once"
    )
    p.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    p.add_argument("--tokens", type=int, default=48, help="tokens of each answer")
    p.add_argument("--train-tokens", type=int, default=2048, help="tokens of a training batch")
    p.add_argument("--repeats", type=int, default=3, help="turns of each side; the best counts")
    p.add_argument("--out", default="figures", help="folder of the record and the figure")
    args, overrides = p.parse_known_args(words)
    if min(args.prompt, args.tokens, args.train_tokens, args.repeats, *args.batches) < 1:
        raise ValueError(
            "--batches, --prompt, --tokens, --train-tokens and --repeats must be at least 1"
        )
    from minglm.bench import generate as benches
    from minglm.config import load_config

    for path in benches.run(args.what, load_config(args.config, overrides), args):
        print(path)


@verb
def figures(words):
    """Redraw figures from their stored logs: run folders, figures/NN_name.json of a lesson, or a config's stages."""
    p = parser("figures", figures.__doc__)
    p.add_argument("paths", nargs="*", help="default: everything under figures/")
    args = p.parse_args(words)
    from minglm.report import card

    stored = sorted({log.parent for log in Path("figures").glob("*/seed*.jsonl")})
    paths = args.paths or [
        *sorted(Path("figures").glob("*_*.json")),
        *stored,
        Path("configs/toy.py"),
    ]
    for path in card.redraw(paths):
        print(path)


def main(words=None):
    """Entry point: returns the exit status; a user's mistake is one line on stderr and status 2."""
    words = sys.argv[1:] if words is None else words
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if words[0] not in VERBS:
        print(f"minglm: no verb {words[0]!r}; the verbs are {', '.join(VERBS)}", file=sys.stderr)
        return 2
    try:
        VERBS[words[0]](words[1:])
    except ValueError as error:
        print(f"minglm: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads the output, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            why = "the disk is full; free space and give the same command again, nothing is lost"
        elif error.filename is not None:
            why = f"{error.filename}: {error.strerror}"
        else:
            raise
        print(f"minglm: {why}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What every lesson does around its experiment: text to read, a short training run, the log and the figure.

    python lessons/02_attention.py              run it, write figures/02_attention.json, draw figures/02_attention.png
    python lessons/02_attention.py --redraw     draw again from the stored log
    python lessons/02_attention.py --smoke      a few steps in a temporary folder, under five seconds
    python lessons/02_attention.py --seeds 5    more seeds

The log holds everything that is plotted, and with it the sizes, the model's config and their hash, the seeds, the
versions and the CPU-seconds; `draw` sees nothing else. Lessons use one thread: their models are so small that a second
one would only wait, and the CPU-seconds of the log mean the same everywhere. No counterpart in the paper.
"""

import argparse
import dataclasses
import hashlib
import inspect
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from minglm.common.files import write_json
from minglm.common.threads import use_threads
from minglm.common.version import versions
from minglm.config import BalanceConfig, ModelConfig, OptimizerConfig
from minglm.data import mixture
from minglm.data.sources import corpus
from minglm.data.tokenizer import Tokenizer
from minglm.optim.muon import Muon
from minglm.optim.schedule import learning_rate
from minglm.report import drawing
from minglm.train.loop import Phase, step

FIGURES = Path(__file__).parent.parent / "figures"
NANO = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    num_nextn_predict_layers=0,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    rope_theta=10_000.0,
    intermediate_size=192,
    moe_intermediate_size=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=512,
    initializer_range=0.06,
)
"""The model of most lessons, 0.2 M parameters: 25 k tokens a second in training on one core."""


def library(megabytes, vocabulary, heldout=0.1):
    """Python's standard library, up to so many megabytes, and a tokenizer trained on it.

    Returns ({"code": arrays} to train on, the same held out, the tokenizer).
    """
    documents = list(corpus.python_library(heldout, megabytes))
    tokenizer = Tokenizer.train([d.text for d in documents if not d.heldout], vocabulary)
    parts = [[d for d in documents if d.heldout == out] for out in (False, True)]
    return *(mixture.tokenize(part, tokenizer) for part in parts), tokenizer


def stream(shards, length, seed=0):
    """Rows of `length` tokens cut from these shards, in equal shares."""
    return mixture.Mixture(shards, dict.fromkeys(shards, 1.0), length, seed=seed)


def pretrain(model, rows, length, tokens, batch, peak_lr, watch=None, **settings):
    """Train on `tokens` tokens in batches of `batch`, with Muon, a warm-up over a tenth, and a cosine to a tenth.

    rows: a stream, its rows of `length` tokens. settings: other fields of `Phase`; mtp_weight and bias_rate are numbers
    or functions of the tokens seen, 0 unless given. watch(seen, metrics) is called after each step. Returns the metrics
    of every step.
    """
    config = OptimizerConfig(peak_lr=peak_lr, warmup_tokens=tokens // 10)
    schedules = {name: settings.pop(name, 0.0) for name in ("mtp_weight", "bias_rate")}
    schedules = {
        name: value if callable(value) else lambda seen, v=value: v
        for name, value in schedules.items()
    }
    schedules["learning_rate"] = lambda seen: learning_rate(seen + batch, config, tokens + batch)
    settings = {"balance_weight": BalanceConfig().sequence_loss_weight} | settings
    phase = Phase(
        "lesson",
        tokens,
        0,
        length,
        batch_tokens=lambda seen: batch,
        optimizer=config,
        **schedules,
        **settings,
    )
    optimizer, history = Muon(model, config), []
    for seen in range(0, tokens, batch):
        history.append(step(model, optimizer, rows.next(batch // length), phase, seen))
        if watch is not None:
            watch(seen + batch, history[-1])
    return history


def peak_bytes(function: Callable[..., object], *values: object) -> int:
    """Return the most bytes that PyTorch had allocated at one time on the CPU during a call, beyond those before it."""
    from torch.profiler import profile

    with profile(profile_memory=True) as recorded:
        function(*values)
    results = recorded.profiler.kineto_results  # pyright: ignore[reportOptionalMemberAccess] # set by `profile`
    held = 0
    highest = 0
    for event in results.events():  # pyright: ignore[reportOptionalMemberAccess] # the same
        if event.name() == "[memory]":
            held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue] # torch's stub lacks it
            highest = max(highest, held)
    return highest


def curve(axis, x, values, name, shade, at=(6, 0), style="-", **more):
    """Draw the mean of `values` (seeds, points) as a line and their range as a band, and write its name at the end.

    at: offset of the name in points. more: of the name, for example ha="right".
    """
    values = np.asarray(values)
    axis.fill_between(x, values.min(0), values.max(0), color=shade, alpha=0.18, linewidth=0)
    axis.plot(x, values.mean(0), style, color=shade, linewidth=1.6, markersize=3.5)
    axis.annotate(
        name,
        (x[-1], values.mean(0)[-1]),
        at,
        textcoords="offset points",
        color=shade,
        va="center",
        **more,
    )


def bars(axis, names, values, shades):
    """Draw a bar for each row of `values` (names, seeds), at its mean, with a tick for each seed."""
    for at, (row, shade) in enumerate(zip(values, shades, strict=True)):
        axis.bar(at, np.mean(row), color=shade, alpha=0.7, width=0.55)
        axis.plot([at] * len(row), row, "_", color=drawing.INK, markersize=12)
    axis.set_xticks(range(len(names)), names)


def panel(axis, heading, x, y, **more):
    """Heading and axis labels of one panel, and other settings of the axis."""
    drawing.title(axis, heading)
    axis.set(xlabel=x, ylabel=y, **more)


def run(name, experiment, draw, verdicts, shown, sizes, smoke, model=None, seeds=3, argv=None):
    """The command line of a lesson.

    name: of the script, its log and its figure. experiment(sizes, seeds) returns what the log holds, of which
    `full_scale` {text: number} is printed; draw(log) a figure; verdicts(log) {claim: whether the log supports it}.
    shown: functions and classes of minglm whose source is printed. sizes, smoke: numbers of the experiment, in full and
    for a test. model: ModelConfig, if there is one.
    """
    parser = argparse.ArgumentParser(description=f"Lesson {name.replace('_', ' ')}.")
    parser.add_argument(
        "--smoke", action="store_true", help="a few steps in a temporary folder, under 5 seconds"
    )
    parser.add_argument(
        "--seeds", type=int, default=seeds, help="how often the experiment is repeated"
    )
    parser.add_argument(
        "--redraw", action="store_true", help="only draw the figure again from the stored log"
    )
    words = parser.parse_args([] if argv is None and "ipykernel" in sys.modules else argv)
    if words.seeds < 1:
        parser.error(f"--seeds {words.seeds}: must be at least 1")
    if words.redraw and (words.smoke or not (FIGURES / f"{name}.json").exists()):
        parser.error(
            f"--redraw: no stored log {FIGURES / name}.json to draw from; run the lesson without it"
        )
    use_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if words.smoke else FIGURES
        if not words.redraw:
            print(*map(inspect.getsource, shown), sep="\n")
            began = time.process_time()
            sizes, count = (smoke, 1) if words.smoke else (sizes, words.seeds)
            asked = {
                "sizes": sizes,
                "model": model and dataclasses.asdict(model),
                "seeds": list(range(count)),
            }
            key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
            log = {
                "lesson": name,
                "config_hash": key,
                "versions": versions(),
                **asked,
                **experiment(sizes, count),
            }
            write_json(
                folder / f"{name}.json",
                log | {"cpu_seconds": round(time.process_time() - began, 1)},
            )
        log = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        print(
            *[
                f"{text}: {value}"
                for text, value in (verdicts(log) | log.get("full_scale", {})).items()
            ],
            sep="\n",
        )
        print(
            f"{log['cpu_seconds']} CPU-seconds; {drawing.save(draw(log), folder / f'{name}.png')}"
        )

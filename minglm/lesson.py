"""Do what every lesson does around its experiment: print source, train for a while, keep the log, draw the figure.

    python lessons/02_attention.py              run it, write figures/02_attention.json, draw figures/02_attention.png
    python lessons/02_attention.py --redraw     draw again from the stored log
    python lessons/02_attention.py --smoke      a few steps in a temporary folder, under five seconds
    python lessons/02_attention.py --seeds 5    more seeds

The log holds everything that is plotted: the results of the experiment, its sizes, the model's config and the hash of
both, the seeds, the versions and the CPU-seconds. `draw` sees nothing else. Lessons use one thread: their models are so
small that a second thread would only wait, and CPU-seconds mean the same on every machine. No counterpart in the paper.
"""

import argparse
import dataclasses
import hashlib
import inspect
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minglm.common.files import write_json
from minglm.common.threads import use_threads
from minglm.common.version import versions
from minglm.config import BalanceConfig, ModelConfig, OptimizerConfig
from minglm.data import mixture, tokenization
from minglm.data.sources import corpus
from minglm.data.tokenizer import Tokenizer
from minglm.model.glm import GLM
from minglm.optim.muon import Muon
from minglm.optim.schedule import learning_rate
from minglm.report import drawing
from minglm.train.loop import Phase, StepMetrics, Stream, step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


class Library(NamedTuple):
    """Text to train on, in tokens."""

    train: dict[str, Any]
    """{"code": token arrays}."""
    heldout: dict[str, Any]
    """{"code": token arrays} of other files."""
    tokenizer: Tokenizer
    """Trained on the text of `train`."""


def library(megabytes: float, vocabulary: int, heldout: float = 0.1) -> Library:
    """Tokenize Python's standard library.

    megabytes: bound on the text. vocabulary: ids of the tokenizer. heldout: share of the files that is held out.
    """
    documents = list(corpus.python_library(heldout, megabytes))
    trained = [document for document in documents if not document.heldout]
    others = [document for document in documents if document.heldout]
    tokenizer = Tokenizer.train([document.text for document in trained], vocabulary)
    return Library(
        tokenization.tokenize(trained, tokenizer),
        tokenization.tokenize(others, tokenizer),
        tokenizer,
    )


def stream(shards: Mapping[str, Any], length: int, seed: int = 0) -> mixture.Mixture:
    """Return rows of `length` tokens cut from these shards, each source with the same share."""
    return mixture.Mixture(shards, dict.fromkeys(shards, 1.0), length, seed=seed)


def pretrain(
    model: GLM,
    rows: Stream,
    length: int,
    tokens: int,
    batch: int,
    peak_lr: float,
    watch: Callable[[int, StepMetrics], None] | None = None,
    **settings: Any,
) -> list[StepMetrics]:
    """Train on `tokens` tokens with Muon, a warm-up over a tenth, and a cosine to a tenth; return every step's metrics.

    rows: a stream whose rows have `length` tokens. batch: tokens of a step. watch(tokens seen, metrics): called after
    each step. settings: other fields of `Phase`; mtp_weight and bias_rate are numbers or functions of the tokens seen,
    and 0 unless given.
    """
    config = OptimizerConfig(peak_lr=peak_lr, warmup_tokens=tokens // 10)
    schedules = {}
    for name in ("mtp_weight", "bias_rate"):
        value = settings.pop(name, 0.0)
        schedules[name] = value if callable(value) else lambda seen, value=value: value
    settings.setdefault("balance_weight", BalanceConfig().sequence_loss_weight)
    phase = Phase(
        name="lesson",
        tokens=tokens,
        start=0,
        sequence_length=length,
        # One step later than the schedule, so that the first step has a rate above zero.
        learning_rate=lambda seen: learning_rate(seen + batch, config, tokens + batch),
        batch_tokens=lambda seen: batch,
        optimizer=config,
        **schedules,
        **settings,
    )
    optimizer = Muon(model, config)
    history = []
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


def curve(
    axis: Any,
    x: Sequence[float],
    values: Any,
    name: str,
    shade: str,
    at: tuple[float, float] = (6, 0),
    style: str = "-",
    **text_options: Any,
) -> None:
    """Draw the mean of `values` (seeds, points) as a line and their range as a band, and write its name at the end.

    at: offset of the name in points. text_options: of the name, for example ha="right".
    """
    values = np.asarray(values)
    mean = values.mean(0)
    axis.fill_between(x, values.min(0), values.max(0), color=shade, alpha=0.18, linewidth=0)
    axis.plot(x, mean, style, color=shade, linewidth=1.6, markersize=3.5)
    axis.annotate(
        name,
        (x[-1], mean[-1]),
        at,
        textcoords="offset points",
        color=shade,
        va="center",
        **text_options,
    )


def bars(axis: Any, names: Sequence[str], values: Sequence[Any], shades: Sequence[str]) -> None:
    """Draw a bar for each row of `values` (names, seeds), at its mean, with a tick for each seed."""
    for position, (row, shade) in enumerate(zip(values, shades, strict=True)):
        axis.bar(position, np.mean(row), color=shade, alpha=0.7, width=0.55)
        axis.plot([position] * len(row), row, "_", color=drawing.INK, markersize=12)
    axis.set_xticks(range(len(names)), names)


def panel(axis: Any, heading: str, x: str, y: str, **settings: Any) -> None:
    """Write the heading and the axis labels of one panel, and set other properties of the axis."""
    drawing.title(axis, heading)
    axis.set(xlabel=x, ylabel=y, **settings)


@dataclass(frozen=True)
class Lesson:
    """A lesson's experiment, and how its log is read. `main` is its command line."""

    name: str
    """Name of the script, of its log and of its figure."""
    experiment: Callable[[dict[str, Any], int], dict[str, Any]]
    """(sizes, number of seeds) -> what the log holds; its `full_scale` {text: number} is printed."""
    draw: Callable[[dict[str, Any]], "Figure"]
    """Draw the figure of a log."""
    verdicts: Callable[[dict[str, Any]], dict[str, Any]]
    """Read a log: {claim: whether the log supports it}."""
    shown: Sequence[Any]
    """Functions and classes of minglm whose source is printed."""
    sizes: dict[str, Any]
    """Numbers of the experiment."""
    smoke: dict[str, Any]
    """The same for a test of a few seconds."""
    model: ModelConfig | None = None
    """The experiment's model, for the log."""
    seeds: int = 3
    """How often the experiment is repeated."""

    def main(self, argv: Sequence[str] | None = None) -> None:
        """Run the experiment, or only redraw its figure, and print what it shows. argv: default, the command line's."""
        words = self.options(argv)
        use_threads(1)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) if words.smoke else FIGURES
            stored = folder / f"{self.name}.json"
            if not words.redraw:
                for source in self.shown:
                    print(inspect.getsource(source))
                write_json(stored, self.log(words.smoke, words.seeds))
            log = json.loads(stored.read_text(encoding="utf-8"))
            for text, value in (self.verdicts(log) | log.get("full_scale", {})).items():
                print(f"{text}: {value}")
            figure = drawing.save(self.draw(log), stored.with_suffix(".png"))
            print(f"{log['cpu_seconds']} CPU-seconds; {figure}")

    def options(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Read the command line; argparse ends the program with one line for a mistake."""
        parser = argparse.ArgumentParser(description=f"Lesson {self.name.replace('_', ' ')}.")
        parser.add_argument(
            "--smoke",
            action="store_true",
            help="a few steps in a temporary folder, under 5 seconds",
        )
        parser.add_argument(
            "--seeds", type=int, default=self.seeds, help="how often the experiment is repeated"
        )
        parser.add_argument(
            "--redraw", action="store_true", help="only draw the figure again from the stored log"
        )
        if argv is None and "ipykernel" in sys.modules:  # in a notebook, whose words are not ours
            argv = []
        words = parser.parse_args(argv)
        if words.seeds < 1:
            parser.error(f"--seeds {words.seeds}: must be at least 1")
        stored = FIGURES / f"{self.name}.json"
        if words.redraw and (words.smoke or not stored.exists()):
            parser.error(
                f"--redraw: no stored log {stored} to draw from; run the lesson without it"
            )
        return words

    def log(self, smoke: bool, seeds: int) -> dict[str, Any]:
        """Run the experiment, and return all that the figure and the verdicts need."""
        began = time.process_time()
        sizes = self.smoke if smoke else self.sizes
        count = 1 if smoke else seeds
        asked = {
            "sizes": sizes,
            "model": dataclasses.asdict(self.model) if self.model else None,
            "seeds": list(range(count)),
        }
        key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
        log = {"lesson": self.name, "config_hash": key, "versions": versions(), **asked}
        log |= self.experiment(sizes, count)
        return log | {"cpu_seconds": round(time.process_time() - began, 1)}

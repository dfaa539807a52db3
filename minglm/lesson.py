"""Do what every lesson does around its experiment: print source, train for a while, keep the log, draw the figure.

    python lessons/02_attention.py              run it, write figures/02_attention.json, draw figures/02_attention.png
    python lessons/02_attention.py --redraw     draw again from the stored log
    python lessons/02_attention.py --smoke      a few steps in a temporary folder, under five seconds
    python lessons/02_attention.py --seeds 5    more seeds

The log holds everything that is plotted: the results of the experiment, its sizes, the model's config and the hash of
both, the seeds, the versions and the CPU-seconds. `draw` sees nothing else. Lessons use one thread: their models are so
small that a second thread would only wait, and CPU-seconds mean the same on every machine. No counterpart in the paper.

The lessons on reinforcement learning share a task (`Sums`), a cold start (`cold_start`) and a policy (`Policy`).
"""

import argparse
import copy
import dataclasses
import hashlib
import inspect
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minglm.chat.messages import Message
from minglm.common.files import write_json
from minglm.common.threads import use_threads
from minglm.common.version import versions
from minglm.config import BalanceConfig, ModelConfig, OptimizerConfig, RLConfig
from minglm.config.posttraining import EvaluationConfig, Split
from minglm.config.training import Packing
from minglm.data import mixture, tokenization
from minglm.data.dialogues import examples
from minglm.data.sources import corpus
from minglm.data.tokenizer import Tokenizer
from minglm.envs.base import Environment, Score, SingleTurn, Task, assistant, user, verdict
from minglm.eval import tasks as evaluation
from minglm.inference import Engine
from minglm.inference.client import EngineGenerator
from minglm.model.glm import GLM
from minglm.optim.muon import Muon
from minglm.optim.schedule import learning_rate
from minglm.report import drawing
from minglm.report.records import RLRecord
from minglm.rl.episode import Player, SamplingSettings, Trajectory
from minglm.rl.loop import Synchronous, draw_groups, reinforce_step
from minglm.rl.schedule import TaskSchedule
from minglm.rl.trainer import PolicyTrainer
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


BYTES = Tokenizer.train([], 292)
"""The tokenizer of the lessons on reinforcement learning: 256 bytes and the special tokens, so a digit is a token."""
REASONER = dataclasses.replace(NANO, vocab_size=BYTES.vocab_size, max_position_embeddings=128)
"""Their model, 0.16 M parameters."""
MODULUS = 5
SOURCE = "sums"
"""Name of the conversations in the mixture, which decides their order."""


class Sums(SingleTurn):
    """Deals sums of digits from 0 to 4 modulo 5. The thought repeats each term beside the sum so far.

        3+4+1+2=      thought: 421320      answer, the last three sums so far: 230

    levels: additions of a sum; a level that is named twice comes twice as often. told: how many of the last sums so far
    are the answer. One is guessed in one of five tries, three in one of 125.
    """

    name = "sums"
    group = "reasoning"
    difficulties = tuple(range(1, 17))

    def __init__(self, levels: Sequence[int], told: int) -> None:
        self.default_difficulties = tuple(levels)
        self.told = told
        self.chance = MODULUS**-told

    def draw(self, rng: random.Random, difficulty: int) -> tuple[list[Message], str]:
        """Return one random sum as (messages, the last sums so far as text)."""
        terms = [rng.randrange(MODULUS) for _ in range(difficulty + 1)]
        sums = np.cumsum(terms) % MODULUS
        question = "+".join(map(str, terms)) + "="
        return [user(question)], "".join(map(str, sums[-self.told :]))

    def oracle(self, task: Task, conversation: Sequence[Message], rng: random.Random) -> Message:
        """Return the answer, with every term and the sum after it as reasoning."""
        first, *others = map(int, task.messages[-1]["content"].rstrip("=").split("+"))
        total = first
        thought = ""
        for term in others:
            total = (total + term) % MODULUS
            thought += f"{term}{total}"
        return assistant(task.label, thought)

    def judge(self, task: Task, message: Message) -> Score:
        """Return 1 if the stripped answer is the label."""
        return verdict(message["content"].strip() == task.label)


def cold_start(
    model: GLM,
    environment: Environment,
    tokens: int,
    peak_lr: float,
    seed: int,
    direct: float = 0.0,
    tokenizer: Tokenizer = BYTES,
    mtp_weight: float = 0.0,
) -> None:
    """Fine-tune on the oracle's conversations, about `tokens` tokens of them, each shown once.

    direct: share of the conversations whose thought holds nothing but the answer, which is right all the same.
    mtp_weight: weight of the loss of the model's MTP layer; 0: there is none, or it learns nothing.
    """
    rng = random.Random(seed)
    conversations = []
    count = 0
    index = 0
    while count < tokens:
        task = environment.task(index, seed)
        index += 1
        conversation = environment.demonstrate(task)
        if rng.random() < direct:
            conversation[-1] = assistant(task.label, task.label)
        conversations.append(conversation)
        count += sum(len(example.tokens_S) for example in examples(tokenizer, conversation))
    imitate(model, conversations, tokens, peak_lr, seed, tokenizer, mtp_weight)


def imitate(
    model: GLM,
    conversations: Iterable[Sequence[Message]],
    tokens: int,
    peak_lr: float,
    seed: int,
    tokenizer: Tokenizer = BYTES,
    mtp_weight: float = 0.0,
    batch: int = 2048,
) -> None:
    """Fine-tune on conversations, `tokens` tokens of them; they come again where they have fewer.

    mtp_weight: as in `cold_start`. batch: tokens of a step, rounded down to whole rows.
    """
    found = [example for messages in conversations for example in examples(tokenizer, messages)]
    length = model.config.max_position_embeddings
    rows = mixture.Mixture(
        {SOURCE: [example.tokens_S for example in found]},
        {SOURCE: 1.0},
        length,
        Packing.BEST_FIT,
        seed,
        {SOURCE: [example.mask_S for example in found]},
        tokenizer.pad,
    )
    batch = max(1, batch // length) * length
    pretrain(model, rows, length, tokens, batch, peak_lr, bias_rate=0.01, mtp_weight=mtp_weight)
    model.eval()


class Policy:
    """A model in reinforcement learning: an engine that answers for it, and a trainer that learns from the answers.

    start: the model, which is copied. config: settings of the stage. seed: decides tasks and draws. tokenizer: that of the
    model. engine_options: of the `Engine`.
    """

    def __init__(
        self,
        start: GLM,
        config: RLConfig,
        seed: int,
        tokenizer: Tokenizer = BYTES,
        **engine_options: Any,
    ) -> None:
        model = copy.deepcopy(start)
        reference = copy.deepcopy(start) if config.loss.beta else None
        options = OptimizerConfig()
        self.config = config
        self.seed = seed
        self.tokenizer = tokenizer
        self.trainer = PolicyTrainer(
            model, Muon(model, options), config, options, tokenizer.pad, reference=reference
        )
        self.generator = EngineGenerator(Engine(model, tokenizer, **engine_options))

    def player(self, cap: int | None = None) -> Player:
        """Return the model's side of the episodes. cap: tokens of an answer; None: those of the config."""
        settings = SamplingSettings(cap or self.config.max_new_tokens, self.config.temperature)
        return Player(self.generator, self.tokenizer, settings)

    def schedule(self, environment: Environment) -> TaskSchedule:
        """Return the schedule that deals the tasks of one environment."""
        name = environment.name
        return TaskSchedule({name: environment}, (name,), self.config.prompts, self.seed)

    def rollout(self, environment: Environment) -> list[list[Trajectory]]:
        """Answer the next step's tasks, and learn nothing."""
        step = self.trainer.state.step
        return draw_groups(self.trainer, self.player(), self.schedule(environment), step).groups

    def step(self, environment: Environment, cap: int | None = None) -> RLRecord:
        """Answer the next step's tasks, and learn."""
        schedule = self.schedule(environment)
        rollouts = Synchronous(self.trainer, self.player(cap), schedule)
        return reinforce_step(self.trainer, rollouts, schedule, environment.name)

    def score(
        self, environment: Environment, problems: int, samples: int = 1, split: Split = Split.TEST
    ) -> dict[str, Any]:
        """Answer held-out problems at temperature 1. Return the fields of an `EvaluationRecord`."""
        return self.evaluate(environment, problems, samples, split).record

    def evaluate(
        self, environment: Environment, problems: int, samples: int = 1, split: Split = Split.TEST
    ) -> evaluation.Evaluation:
        """Answer held-out problems at temperature 1. Return the record, and the answers themselves."""
        config = EvaluationConfig(
            max_new_tokens=self.config.max_new_tokens,
            problems=problems,
            samples=samples,
            split=split,
            temperature=1.0,
            top_p=1.0,
        )
        return evaluation.tasks(self.generator, self.tokenizer, environment, config)


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


def arms(
    axis: Any, x: Sequence[float], values: Mapping[str, Any], shades: Mapping[str, str]
) -> None:
    """Draw the arms of an experiment: each seed as a thin line, the mean as a thick one, and the names apart.

    values: {arm: (seeds, points)}, on an axis whose y-limits are set. shades: {arm: colour}.
    """
    low, high = axis.get_ylim()
    ends = [float(np.mean(values[arm], 0)[-1]) for arm in values]
    places = drawing.spread(ends, 0.065 * (high - low))
    for (arm, rows), place in zip(values.items(), places, strict=True):
        for row in rows:
            axis.plot(x, row, color=shades[arm], linewidth=0.6, alpha=0.5)
        curve(axis, x, rows, "", shades[arm])
        axis.annotate(
            arm,
            (1, place),
            (5, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            color=shades[arm],
            va="center",
            fontsize=8,
        )
    axis.set_xlim(x[0], x[-1])


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

"""The configuration of a run: one tree of dataclasses, from the model's shape to the last reinforcement step.

A config is a Python file (see `configs/`) with a function that returns a `Run`. The ladder from `nano` to the 355B
model is made of the same fields with other numbers. The model's shape, `ModelConfig`, has a
file of its own, `minglm.config.model`. `check` refuses impossible values before anything starts.

Paper: Table 1 (shapes), sections 2.2 to 2.4 (stages and hyper-parameters), 3.1 to 3.4 (post-training).
"""

import dataclasses
import hashlib
import json
import math
import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

from minglm.config.model import MLA_FIELDS, ModelConfig
from minglm.config.overrides import override


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes tokens (paper 2.2, 2.3)."""

    tokenizer: str = ""
    """Path of a tokenizer.json to use, a released GLM one for instance; empty: train one on the corpus."""
    corpus_megabytes: float = 12.0
    """Upper bound on the text read from each built-in source."""
    files: tuple[str, ...] = ()
    """Your own data: text and code files, .jsonl, .jsonl.zst, .parquet, folders of these, hf:NAME, git:CHECKOUT."""
    stream_megabytes: float = 0.0
    """Upper bound on the text read from each data set by name; 0: all of it."""
    fim_rate: float = 0.5
    """Share of source files rewritten for fill-in-the-middle. The paper applies it to all code but gives no rate."""
    fim_characters: int = 0
    """Length of the spans rewritten for fill-in-the-middle, so that one fits into a row; 0: whole files."""
    heldout: float = 0.02
    """Share of documents kept for validation, chosen by a hash of the document's name."""
    decontaminate: int = 13
    """Words of the runs by which training documents are searched for test tasks and held-out text; 0: no search."""
    near_duplicates: float = 0.0
    """Jaccard similarity of five-word runs from which the worse of two documents goes, 0.7 for instance; 0: off."""
    semantic_duplicates: float = 0.0
    """Cosine of embeddings from which the worse of two documents goes (SemDedup), 0.95 for instance; 0: off."""
    quality: str = "rubric"
    """Score by rules (rubric), by a classifier they taught (learned), or by one taught by a .jsonl of text, label."""
    web_labels: str = ""
    """A .jsonl of text, label (1: a page that teaches code), to find such pages among those without a code tag."""
    lowest_share: float = 0.1
    """Share of prose and of each language of code that is dropped, by quality."""
    top_share: float = 0.1
    """Share that is repeated."""
    top_epochs: float = 3.0
    """How often it comes. The paper lets its best pages come more than 3.2 times."""
    educational: float = 0.0
    """Share of educational content from which mathematics and science come twice; 0: off."""
    synthetic_documents: int = 2000
    """Documents drawn from each procedural generator (mathematics, science, questions, long ledgers)."""
    trajectories: int = 2000
    """Solved tasks drawn from each environment for mid-training (sources reasoning and agent)."""


@dataclass(frozen=True)
class StageConfig:
    """One stage of pre- or mid-training (paper Figure 3)."""

    teaches: str
    """What the stage is for, in a few words."""
    tokens: int
    """Tokens trained on in this stage."""
    sequence_length: int
    """Positions S of a training sequence."""
    mixture: dict[str, float]
    """Relative weight, in tokens, of each source of the corpus."""
    packing: str = "truncate"
    """truncate: concatenate and cut at random (pre-training); best_fit: whole documents (mid-training)."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies: 10,000 at first, 1,000,000 from the first long stage on."""


@dataclass(frozen=True)
class StagesConfig:
    """The five stages of the paper, in order (Figure 3; 15 : 7 : 0.5 : 0.5 : 0.1 trillion tokens)."""

    general: StageConfig = StageConfig("general text", 15 * 10**12, 4096, {"prose": 1.0, "code": 1.0})
    code_reasoning: StageConfig = StageConfig("code and reasoning", 7 * 10**12, 4096, {"code": 1.0, "math": 1.0})
    repository: StageConfig = StageConfig(
        "code across files", 5 * 10**11, 32768, {"repository": 1.0}, "best_fit", 1_000_000.0
    )
    reasoning: StageConfig = StageConfig(
        "synthetic reasoning", 5 * 10**11, 32768, {"reasoning": 1.0}, "best_fit", 1_000_000.0
    )
    long_agent: StageConfig = StageConfig(
        "long context, agents", 10**11, 131072, {"long": 1.0, "agent": 1.0}, "best_fit", 1_000_000.0
    )

    def items(self):
        """(name, StageConfig) pairs in training order."""
        return [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)]

    @property
    def total_tokens(self):
        """Tokens of all stages together."""
        return sum(stage.tokens for _, stage in self.items())


@dataclass(frozen=True)
class OptimizerConfig:
    """Muon, its companion AdamW, and the schedule (paper 2.4). Every schedule is a function of tokens seen."""

    peak_lr: float = 2.5e-4
    """Learning rate after the warm-up. Muon's update is scaled to AdamW's RMS, so both share it."""
    final_lr_ratio: float = 0.1
    """Last learning rate as a share of the peak; the cosine reaches it at the end of mid-training."""
    schedule: str = "cosine"
    """cosine: the paper's; wsd: constant, then linear over the last fifth of the tokens, which the paper rejects."""
    warmup_tokens: int = 200 * 10**9
    """Tokens of linear warm-up. The paper gives no value."""
    batch_tokens_start: int = 16 * 10**6
    """Tokens per step at the beginning."""
    batch_tokens_end: int = 64 * 10**6
    """Tokens per step after the ramp."""
    batch_ramp_tokens: int = 500 * 10**9
    """Tokens over which the batch grows linearly."""
    microbatch_tokens: int = 32768
    """Most tokens in one forward pass on one device; larger batches are accumulated."""
    muon_momentum: float = 0.95
    """Momentum of Muon (Nesterov)."""
    newton_schulz_steps: int = 5
    """Iterations of the orthogonalisation."""
    update_rms: float = 0.2
    """RMS of a Muon update before the learning rate; 0 turns the rule off."""
    muon_output_head: bool = False
    """Whether Muon also trains the output head. The paper does not say; others leave it to AdamW."""
    polynomial: str = "jordan"
    """Newton-Schulz's coefficients: jordan (the paper's), or polar_express, which settle at one."""
    muon_head_dim: int = 0
    """Rows of a head, model.head_dim, to orthogonalise the heads of q, k and v one by one; 0: whole projections."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices and the embedding; biases and norms have none."""
    adam_beta1: float = 0.9
    """AdamW's first decay, for embeddings, output head, norms and biases."""
    adam_beta2: float = 0.95
    """AdamW's second decay."""
    clip_norm: float = 1.0
    """Bound on the global gradient norm; 0 turns it off."""
    spike_factor: float = 0.0
    """A gradient norm of so many times the median of the last 50 is a spike, left out like NaN; 0: only NaN is."""
    rollback_after: int = 0
    """Steps left out in a row after which the last good checkpoint comes back, its batches skipped; 0: never."""


@dataclass(frozen=True)
class BalanceConfig:
    """Expert balance and multi-token prediction over training (paper 2.4)."""

    bias_rate: float = 0.001
    """Step of the router's selection bias, once per optimizer step, during the first stage; 0 afterwards."""
    sequence_loss_weight: float = 1e-4
    """Weight of the sequence-level balance loss."""
    mtp_weight: float = 0.3
    """Weight of the MTP loss during the first stage."""
    mtp_weight_late: float = 0.1
    """Weight of the MTP loss afterwards."""


@dataclass(frozen=True)
class SFTConfig:
    """One supervised fine-tuning phase (paper 3.1)."""

    samples: int = 1_000_000
    """Conversations at most: per environment in a cold start, in all in the unified phase."""
    epochs: float = 1.0
    """Passes over them."""
    batch_tokens: int = 1_000_000
    """Tokens per optimizer step."""
    sequence_length: int = 131072
    """Positions of a packed row."""
    peak_lr: float = 2e-5
    """Learning rate after a warm-up over the first 5% of tokens; then cosine to a tenth."""


@dataclass(frozen=True)
class RLConfig:
    """One reinforcement phase: GRPO without the KL term (paper 3.2, 3.3, 3.4)."""

    environments: tuple[str, ...] = ()
    """Environments the tasks come from, in turn."""
    steps: int = 1000
    """Rollouts."""
    prompts: int = 64
    """Prompts P per step."""
    samples: int = 16
    """Samples G per prompt."""
    max_new_tokens: int = 65536
    """Bound on the tokens of one assistant turn. The paper trains at the full length from the start."""
    max_turns: int = 1
    """Bound on the assistant turns of an episode."""
    temperature: float = 1.0
    """Sampling temperature; the loss divides the logits by the same number."""
    peak_lr: float = 1e-6
    """Learning rate, constant after five steps of warm-up."""
    clip_low: float = 0.2
    """The probability ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.28
    """And above at 1 + clip_high."""
    aggregation: str = "token"
    """Mean of the loss over all tokens (token), over samples (sequence), or over a constant (constant)."""
    normalize_std: bool = True
    """Divide advantages by the group's standard deviation (GRPO); the agentic objective does not."""
    fault_penalty: float = 0.0
    """Taken off the reward of an answer that mixes languages, loops or breaks the format (paper 3.4, pathology RL)."""
    updates_per_rollout: int = 1
    """Optimizer steps that share one batch of rollouts."""


@dataclass(frozen=True)
class ExpertConfig:
    """One expert of stage one (paper 3.1): cold-start SFT, then RL on its own tasks."""

    environments: tuple[str, ...]
    """Environments whose solutions the cold start shows, and which the unified model learns from this expert."""
    sft: SFTConfig = SFTConfig()
    """The cold start: a small set with long chains of thought."""
    rl: RLConfig = RLConfig()
    """The reinforcement phase."""
    terse_share: float = 0.0
    """Share of the cold start whose reasoning stops after its first step, so that RL has to find that steps pay."""
    distilled: float = 1.0
    """How many tokens of its answers the unified model sees, relative to the other experts."""


@dataclass(frozen=True)
class PostTrainingConfig:
    """Experts, unified model, general RL (paper 3.1 to 3.4)."""

    reasoning: ExpertConfig = ExpertConfig(("arithmetic", "code"), rl=RLConfig(("arithmetic",)))
    agent: ExpertConfig = ExpertConfig(("retail",), rl=RLConfig(("retail",), max_turns=8, normalize_std=False))
    chat: ExpertConfig = ExpertConfig(("instructions",), rl=RLConfig(("instructions",)))
    unified: SFTConfig = SFTConfig()
    """Overall SFT, from the base, on rejection-sampled answers of the experts."""
    prompts_per_environment: int = 100_000
    """Prompts that an expert answers for it where conversations are shortest; others get fewer, for as many tokens."""
    responses_per_prompt: int = 4
    """Answers per prompt, of which the right ones are kept (paper 3.1)."""
    thinking_share: float = 0.5
    """Share of the unified data that keeps its reasoning; the rest answers directly."""
    provoked_samples: int = 0
    """Answers of the oracle to provoking prompts in the unified data; 0 where the data bring faults of their own."""
    spoilt_share: float = 0.5
    """Share of those with a fault put in, the bad habit that pathology RL is to cure."""
    general_rl: RLConfig = RLConfig(("arithmetic", "retail", "instructions"), max_turns=8)
    """RL on a mix of all tasks."""
    pathology_rl: RLConfig = RLConfig(("provocation", "arithmetic", "retail", "instructions"), fault_penalty=1.0)
    """RL on prompts chosen because they provoke language mixing, repetition and broken format."""

    def experts(self):
        """(name, ExpertConfig) pairs."""
        return [(name, getattr(self, name)) for name in ("reasoning", "agent", "chat")]


@dataclass(frozen=True)
class EvaluationConfig:
    """How a checkpoint is scored (paper 4; sampler of the public evaluation harness)."""

    problems: int = 198
    """Held-out problems per environment."""
    samples: int = 8
    """Answers k per problem, for avg@k and pass@k."""
    temperature: float = 0.6
    """Sampling temperature."""
    top_p: float = 0.95
    """Nucleus of the sampler."""
    max_new_tokens: int = 81920
    """Bound on the tokens of one assistant turn."""
    heldout_tokens: int = 1_000_000
    """Held-out tokens per source for bits per byte."""
    every_tokens: int = 0
    """Tokens of pre-training between measurements of bits per byte; 0: only at the end of a stage."""
    needles: int = 0
    """Rows of the needle test by length and depth, after a stage with longer rows; with bits by position. 0: none."""


@dataclass(frozen=True)
class Run:
    """Everything that decides a run's result."""

    name: str
    """Name of the run, and of its folder under runs/ unless --out is given."""
    model: ModelConfig
    stages: StagesConfig = StagesConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    balance: BalanceConfig = BalanceConfig()
    posttraining: PostTrainingConfig = PostTrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: int = 0
    """Seed of every random draw."""
    device: str = "auto"
    """auto: the GPU where there is one; else cpu or cuda."""
    dtype: str = "float32"
    """Precision of the matrix products: float32, or bfloat16 where the device has it. Weights stay float32."""
    rollouts: str = "model"
    """Experts while answers are sampled for RL and distillation: the model's own, or float8 in blocks (paper 3.5)."""
    kernels: str = "auto"
    """Form of the kernels: torch, triton, or auto (triton on a GPU, torch on a CPU)."""
    recompute: bool = False
    """Keep only the input of each layer, and compute the layer again in the backward pass: less memory, same result."""
    compile: bool = False
    """torch.compile of each decoder layer; worth its minutes on a GPU, in long runs."""
    threads: int = 0
    """CPU threads, which share the rows of each batch; 0: the cores of this machine divided by the ranks on it."""
    checkpoint_seconds: float = 60.0
    """Seconds of training between checkpoints inside a stage."""
    watch: str = ""
    """tensorboard or wandb: the log's numbers go there too (`pip install 'minglm[log]'`); empty: nowhere else."""

    def hash(self):
        """Twelve hex digits of the config: equal exactly when two runs ask for the same result.

        Where and how comfortably a run is computed does not count: COMFORT.
        """
        values = to_dict(self)
        for name in COMFORT:
            del values[name]
        values["data"] = older(values["data"])
        for section, names in LATER.items():
            kind = type(getattr(self, section))
            for name in names:
                if values[section][name] == getattr(kind, name):
                    del values[section][name]
        for name in MLA_FIELDS:  # at 0 they say nothing: runs from before they existed keep their hash
            if not values["model"][name]:
                del values["model"][name]
        if self.rollouts == Run.rollouts:
            del values["rollouts"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


COMFORT = ("device", "kernels", "recompute", "compile", "threads", "checkpoint_seconds", "watch")
LATER = {
    "optimizer": ("polynomial", "muon_head_dim", "schedule", "spike_factor", "rollback_after"),
    "evaluation": ("every_tokens", "needles"),
}  # fields that change nothing at their defaults: runs from before they existed keep their hash
CLEANING = ("decontaminate", "stream_megabytes", "near_duplicates", "semantic_duplicates", "quality")
CLEANING += ("web_labels", "lowest_share", "top_share", "top_epochs", "educational")


def older(data):
    """The values of a DataConfig without CLEANING at its defaults: what a run from before those fields was made of."""
    return {name: v for name, v in data.items() if name not in CLEANING or v != getattr(DataConfig, name)}


def to_dict(config):
    """A config as nested plain dictionaries, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(values, kind=Run):
    """The inverse of `to_dict`, from parsed JSON. Raises ValueError for a field that does not exist."""
    types, found = get_type_hints(kind), {}
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"{kind.__name__} has no field {name!r}; was this config written by another version?")
        if dataclasses.is_dataclass(types[name]):
            value = from_dict(value, types[name])
        found[name] = tuple(value) if isinstance(value, list) else value
    return kind(**found)


# Fields that end a run with a division by zero, or an endless one, when they are 0; and shares that stay in [0, 1].
POSITIVE = {"prompts", "problems", "max_new_tokens", "max_turns", "updates_per_rollout", "responses_per_prompt"}
POSITIVE |= {"samples", "batch_tokens", "microbatch_tokens", "top_p", "corpus_megabytes"}
SHARES = {"muon_momentum", "adam_beta1", "adam_beta2", "final_lr_ratio", "clip_low", "top_p", "heldout", "fim_rate"}
CHOICES = {"kernels": ("auto", "torch", "triton"), "dtype": ("float32", "bfloat16"), "rollouts": ("model", "float8")}
SHARES |= {"thinking_share", "terse_share", "near_duplicates", "semantic_duplicates", "educational"}


def _check_numbers(config, where=""):
    """Every number is finite and not negative; those in POSITIVE are not 0, those in SHARES at most 1."""
    for f in dataclasses.fields(config):
        name, value = where + f.name, getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            _check_numbers(value, name + ".")
        elif isinstance(value, int | float):
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} = {value}: must be a finite number, not negative")
            if value == 0 and f.name in POSITIVE:
                raise ValueError(f"{name} = {value}: must be positive")
            if value > 1 and f.name in SHARES:
                raise ValueError(f"{name} = {value}: must lie between 0 and 1")


def _check_stages(stages):
    previous = 0
    for name, stage in stages.items():
        where = f"stages.{name}"
        if stage.packing not in ("truncate", "best_fit"):
            raise ValueError(f"{where}.packing = {stage.packing!r}: must be truncate or best_fit")
        if stage.sequence_length < 2:
            raise ValueError(f"{where}.sequence_length = {stage.sequence_length}: must be at least 2")
        if stage.sequence_length < previous:
            raise ValueError(
                f"{where}.sequence_length = {stage.sequence_length}: shorter than the stage before ({previous})"
            )
        if not all(0 <= w < math.inf for w in stage.mixture.values()) or sum(stage.mixture.values()) <= 0:
            raise ValueError(f"{where}.mixture = {stage.mixture}: needs at least one source with a positive weight")
        previous = stage.sequence_length
    return previous


def _check_phases(post, longest):
    phases = {name: getattr(post, name) for name in ("unified", "general_rl", "pathology_rl")}
    for name, expert in post.experts():
        phases |= {f"{name}.sft": expert.sft, f"{name}.rl": expert.rl}
    for name, phase in phases.items():
        where = f"posttraining.{name}"
        if isinstance(phase, SFTConfig):
            if not 2 <= phase.sequence_length <= longest:
                raise ValueError(
                    f"{where}.sequence_length = {phase.sequence_length}: "
                    f"must lie between 2 and model.max_position_embeddings = {longest}"
                )
            continue
        if phase.aggregation not in ("token", "sequence", "constant"):
            raise ValueError(f"{where}.aggregation = {phase.aggregation!r}: must be token, sequence or constant")
        if phase.samples < 2:
            raise ValueError(f"{where}.samples = {phase.samples}: a group of one has no advantage; use 2 or more")
        if phase.temperature <= 0:
            raise ValueError(f"{where}.temperature = {phase.temperature}: must be positive to explore")


def check(run):
    """Raise ValueError, one line naming field, value and remedy, for a run that cannot work. Returns the run."""
    run.model.check()
    _check_numbers(run)
    longest = _check_stages(run.stages)
    if longest > run.model.max_position_embeddings:
        raise ValueError(
            f"model.max_position_embeddings = {run.model.max_position_embeddings}: "
            f"the longest stage has sequence_length = {longest}"
        )
    last = run.stages.items()[-1][1].rope_theta
    if run.model.rope_theta != last:
        raise ValueError(f"model.rope_theta = {run.model.rope_theta}: the last stage trains with rope_theta = {last}")
    _check_phases(run.posttraining, run.model.max_position_embeddings)
    if 0 < run.data.decontaminate < 8:
        raise ValueError(
            f"data.decontaminate = {run.data.decontaminate}: runs of fewer than 8 words stand in innocent text too; "
            "use 8 to 13, or 0 for no search"
        )
    if run.data.lowest_share + run.data.top_share > 1:
        raise ValueError(
            f"data.lowest_share = {run.data.lowest_share} and data.top_share = {run.data.top_share}: "
            "must sum to at most 1"
        )
    if run.data.quality not in ("rubric", "learned") and not Path(run.data.quality).is_file():
        raise ValueError(f"data.quality = {run.data.quality!r}: must be rubric, learned or a .jsonl file of marks")
    opt = run.optimizer
    if not 0 < opt.batch_tokens_start <= opt.batch_tokens_end:
        raise ValueError(
            f"optimizer.batch_tokens_start = {opt.batch_tokens_start}: "
            f"must be positive and at most batch_tokens_end = {opt.batch_tokens_end}"
        )
    for name, known in (("polynomial", ("jordan", "polar_express")), ("schedule", ("cosine", "wsd"))):
        if getattr(opt, name) not in known:
            raise ValueError(f"optimizer.{name} = {getattr(opt, name)!r}: must be {' or '.join(known)}")
    if opt.muon_head_dim not in (0, run.model.head_dim) or (opt.muon_head_dim and run.model.kv_lora_rank):
        raise ValueError(
            f"optimizer.muon_head_dim = {opt.muon_head_dim}: must be 0, or model.head_dim = {run.model.head_dim} "
            "of a model without latent attention"
        )
    if 0 < opt.spike_factor <= 1:
        raise ValueError(f"optimizer.spike_factor = {opt.spike_factor}: must be above 1, or 0 to leave out only NaN")
    for name, known in CHOICES.items():
        if (value := getattr(run, name)) not in known:
            raise ValueError(f"{name} = {value!r}: must be {', '.join(known[:-1])} or {known[-1]}")
    if run.watch not in ("", "tensorboard", "wandb"):
        raise ValueError(f"watch = {run.watch!r}: must be tensorboard or wandb, or empty")
    return run


def load_config(path, overrides=()):
    """Read a config file and apply overrides.

    path: `configs/toy.py`, or `configs/glm45_355b.py:glm46` for another function of the file.
    overrides: command-line words such as ["--model.hidden_size", "64"].
    Returns a checked `Run`. Raises ValueError, in one line, for a missing file, an unknown field or a bad value.
    """
    file, _, variant = str(path).partition(":")
    if not Path(file).is_file():
        raise ValueError(f"no config file at {file}; the ladder is in configs/, for example configs/toy.py")
    variant = variant or Path(file).stem
    functions = runpy.run_path(file)
    if not callable(functions.get(variant)):
        raise ValueError(
            f"{file} has no function {variant}(); a config is a function that returns a minglm.config.run.Run"
        )
    run = functions[variant]()
    return check(override(run, overrides) if overrides else run)

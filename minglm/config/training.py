"""Options of pre- and mid-training: stages, optimizer, expert balance (paper 2.1 to 2.4, Figure 3)."""

import dataclasses
from dataclasses import dataclass
from enum import StrEnum

from minglm.common.mistakes import shown
from minglm.config.options import LARGEST, option, positive, share


class Packing(StrEnum):
    """How documents are packed into training sequences."""

    TRUNCATE = "truncate"
    """Concatenate documents and cut every S tokens (pre-training)."""
    BEST_FIT = "best_fit"
    """Keep documents whole and fit several into one sequence (mid-training)."""


class Schedule(StrEnum):
    """Shape of the learning rate after the warm-up."""

    COSINE = "cosine"
    """Cosine down to final_lr_ratio at the end of mid-training: the paper's choice."""
    WSD = "wsd"
    """Warmup-stable-decay: constant, then linear over the last fifth of the tokens. The paper rejects it."""


class Polynomial(StrEnum):
    """Coefficients of the Newton-Schulz iteration in Muon."""

    JORDAN = "jordan"
    """One fixed polynomial, by Keller Jordan: the paper's choice."""
    POLAR_EXPRESS = "polar_express"
    """One polynomial for each iteration, which bring all singular values closer to 1."""


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
    """Relative weight, in tokens, of each source: prose, code, math, science, qa, long, copies,
    digit_copies, repository, tasks:ENVIRONMENT (solved tasks), user:NAME (your own files)."""
    packing: Packing = Packing.TRUNCATE
    """truncate: concatenate and cut (pre-training); best_fit: keep documents whole (mid-training)."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies: 10,000 at first, 1,000,000 from the first long stage on."""

    def check(self, name: str) -> None:
        """Raise ValueError, in one line, for a stage that cannot be trained. name: dotted, for the message."""
        if self.sequence_length < 2:
            raise ValueError(f"{name}.sequence_length = {self.sequence_length}: must be at least 2")
        for source, weight in self.mixture.items():
            if not 0 <= weight <= LARGEST:
                raise ValueError(
                    f"{name}.mixture.{shown(source)} = {shown(weight)}: "
                    "must be a finite number, not negative; 0 leaves the source out"
                )
        if sum(self.mixture.values()) <= 0:
            raise ValueError(
                f"{name}.mixture = {shown(self.mixture)}: needs at least one source with a positive weight"
            )


@dataclass(frozen=True)
class StagesConfig:
    """The five stages of the paper, in order (Figure 3; 15 : 7 : 0.5 : 0.5 : 0.1 trillion tokens)."""

    general: StageConfig = StageConfig(
        teaches="general text",
        tokens=15 * 10**12,
        sequence_length=4096,
        mixture={"prose": 1.0, "code": 1.0},
    )
    code_reasoning: StageConfig = StageConfig(
        teaches="code and reasoning",
        tokens=7 * 10**12,
        sequence_length=4096,
        mixture={"code": 1.0, "math": 1.0},
    )
    repository: StageConfig = StageConfig(
        teaches="code across files",
        tokens=5 * 10**11,
        sequence_length=32768,
        mixture={"repository": 1.0},
        packing=Packing.BEST_FIT,
        rope_theta=1_000_000.0,
    )
    reasoning: StageConfig = StageConfig(
        teaches="synthetic reasoning",
        tokens=5 * 10**11,
        sequence_length=32768,
        mixture={"math": 1.0, "science": 1.0, "tasks:arithmetic": 1.0, "tasks:code": 1.0},
        packing=Packing.BEST_FIT,
        rope_theta=1_000_000.0,
    )
    long_agent: StageConfig = StageConfig(
        teaches="long context, agents",
        tokens=10**11,
        sequence_length=131072,
        mixture={"long": 1.0, "tasks:retail": 1.0},
        packing=Packing.BEST_FIT,
        rope_theta=1_000_000.0,
    )

    def items(self) -> list[tuple[str, StageConfig]]:
        """Return (name, StageConfig) pairs in training order."""
        return [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]

    @property
    def total_tokens(self) -> int:
        """Return the tokens of all stages together."""
        return sum(stage.tokens for _, stage in self.items())

    @property
    def longest(self) -> int:
        """Return the longest sequence of all stages, that of the last one."""
        return max(stage.sequence_length for _, stage in self.items())

    def check(self) -> None:
        """Raise ValueError, in one line, for a stage that cannot be trained or that is shorter than the one before."""
        previous = 0
        for name, stage in self.items():
            stage.check(f"stages.{name}")
            if stage.sequence_length < previous:
                raise ValueError(
                    f"stages.{name}.sequence_length = {stage.sequence_length}: "
                    f"shorter than the stage before ({previous})"
                )
            previous = stage.sequence_length


@dataclass(frozen=True)
class OptimizerConfig:
    """Muon, its companion AdamW, and the schedule (paper 2.4).

    Every schedule is a function of the tokens seen.
    """

    peak_lr: float = 2.5e-4
    """Learning rate after the warm-up. Muon's update is scaled to the RMS of AdamW's, so both share it."""
    final_lr_ratio: float = share(0.1)
    """Last learning rate as a share of the peak; the cosine reaches it at the end of mid-training."""
    schedule: Schedule = Schedule.COSINE
    """cosine: the paper's; wsd: constant, then linear over the last fifth of the tokens, which the paper rejects."""
    warmup_tokens: int = 200 * 10**9
    """Tokens of linear warm-up. The paper gives no value."""
    batch_tokens_start: int = positive(16 * 10**6, maximum=2**32)
    """Tokens per optimizer step at the beginning."""
    batch_tokens_end: int = positive(64 * 10**6, maximum=2**32)
    """Tokens per optimizer step after the ramp."""
    batch_ramp_tokens: int = 500 * 10**9
    """Tokens over which the batch grows linearly."""
    microbatch_tokens: int = positive(32768, maximum=2**32)
    """Most tokens in one forward pass on one device; gradients of larger batches are accumulated."""
    muon_momentum: float = share(0.95)
    """Momentum of Muon (Nesterov)."""
    newton_schulz_steps: int = option(5, maximum=100)
    """Iterations of the orthogonalisation."""
    update_rms: float = 0.2
    """RMS of a Muon update before the learning rate; 0 turns the rule off."""
    muon_output_head: bool = False
    """Train the output head with Muon too. The paper does not say; others leave it to AdamW."""
    polynomial: Polynomial = Polynomial.JORDAN
    """Coefficients of Newton-Schulz: jordan (the paper's), or polar_express, which converge to 1."""
    muon_head_dim: int = 0
    """Rows of a head, model.head_dim, to orthogonalise the heads of q, k and v one by one; 0: whole projections."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and the embedding; biases and norms have none."""
    adam_beta1: float = share(0.9)
    """AdamW's first decay, for embeddings, output head, norms and biases."""
    adam_beta2: float = share(0.95)
    """AdamW's second decay."""
    clip_norm: float = 1.0
    """Bound on the global gradient norm; 0 turns clipping off."""
    spike_factor: float = 0.0
    """Skip a step whose gradient norm exceeds this many times the median of the last 50; 0: skip only NaN and infinity."""
    rollback_after: int = option(0, maximum=10**6)
    """Steps skipped in a row after which the run returns to the last good checkpoint and skips its batches; 0: never."""

    def check(self) -> None:
        """Raise ValueError, in one line, where fields do not fit together."""
        if self.batch_tokens_start > self.batch_tokens_end:
            raise ValueError(
                f"optimizer.batch_tokens_start = {self.batch_tokens_start}: "
                f"must be at most batch_tokens_end = {self.batch_tokens_end}"
            )
        if 0 < self.spike_factor <= 1:
            raise ValueError(
                f"optimizer.spike_factor = {self.spike_factor}: must be above 1, or 0 to skip only NaN and infinity"
            )


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

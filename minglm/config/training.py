"""Pre- and mid-training: stages, optimizer, expert balance (paper 2.1 to 2.4, Figure 3)."""

import dataclasses
from dataclasses import dataclass


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

    general: StageConfig = StageConfig(
        "general text", 15 * 10**12, 4096, {"prose": 1.0, "code": 1.0}
    )
    code_reasoning: StageConfig = StageConfig(
        "code and reasoning", 7 * 10**12, 4096, {"code": 1.0, "math": 1.0}
    )
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

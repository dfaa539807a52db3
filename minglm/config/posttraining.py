"""Post-training: supervised fine-tuning, reinforcement learning, experts, evaluation (paper 3.1 to 3.4, 4)."""

from dataclasses import dataclass


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
    agent: ExpertConfig = ExpertConfig(
        ("retail",), rl=RLConfig(("retail",), max_turns=8, normalize_std=False)
    )
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
    pathology_rl: RLConfig = RLConfig(
        ("provocation", "arithmetic", "retail", "instructions"), fault_penalty=1.0
    )
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

"""Options of post-training: fine-tuning, reinforcement learning, experts, evaluation (paper 3.1 to 3.4, 4)."""

from dataclasses import dataclass
from enum import StrEnum

from minglm.config.options import option, positive, share

MOST_PROBLEMS = 100_000
MOST_SAMPLES = 10_000


class Aggregation(StrEnum):
    """What the policy-gradient loss of a batch is averaged over."""

    TOKEN = "token"
    """All trained tokens of the batch."""
    SEQUENCE = "sequence"
    """The tokens of a sample first, then the samples."""
    CONSTANT = "constant"
    """A constant, the largest number of tokens that a sample may have."""


def check_answer(name: str, max_new_tokens: int, longest: int) -> None:
    """Refuse answers longer than the model's text. name: dotted, of the section; longest: positions of the model."""
    if max_new_tokens > longest:
        raise ValueError(
            f"{name}.max_new_tokens = {max_new_tokens}: "
            f"must be at most model.max_position_embeddings = {longest}"
        )


@dataclass(frozen=True)
class SFTConfig:
    """One supervised fine-tuning phase (paper 3.1)."""

    samples: int = positive(1_000_000)
    """Most conversations: per environment in a cold start, in all in the unified phase."""
    epochs: float = option(1.0, maximum=10**6)
    """Passes over the conversations."""
    batch_tokens: int = positive(1_000_000)
    """Tokens per optimizer step."""
    sequence_length: int = 131072
    """Positions of a packed row."""
    peak_lr: float = 2e-5
    """Learning rate after a warm-up over the first 5% of the tokens; then a cosine to a tenth of it."""

    def check(self, name: str, longest: int) -> None:
        """Raise ValueError, in one line, for rows longer than the model's. name: dotted, for the message."""
        if not 2 <= self.sequence_length <= longest:
            raise ValueError(
                f"{name}.sequence_length = {self.sequence_length}: "
                f"must lie between 2 and model.max_position_embeddings = {longest}"
            )


@dataclass(frozen=True)
class RLConfig:
    """One reinforcement learning phase: GRPO without the KL term (paper 3.2, 3.3, 3.4)."""

    environments: tuple[str, ...] = ()
    """Environments the tasks are drawn from, round-robin; repeat a name to weight it."""
    steps: int = 1000
    """Batches of rollouts."""
    prompts: int = positive(64, maximum=10**6)
    """Prompts P per step."""
    samples: int = positive(16, maximum=MOST_SAMPLES)
    """Samples G per prompt."""
    max_new_tokens: int = positive(65536)
    """Most tokens of one assistant turn. The paper trains at the full length from the start."""
    max_turns: int = positive(1)
    """Most assistant turns of an episode."""
    temperature: float = positive(1.0)
    """Sampling temperature; the loss divides the logits by the same number."""
    peak_lr: float = 1e-6
    """Learning rate, constant after five steps of warm-up."""
    clip_low: float = share(0.2)
    """The probability ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.28
    """The probability ratio is clipped above at 1 + clip_high."""
    aggregation: Aggregation = Aggregation.TOKEN
    """Average the loss over all tokens (token), over samples (sequence), or divide by a constant (constant)."""
    normalize_std: bool = True
    """Divide advantages by the group's standard deviation (GRPO); the agentic objective does not."""
    fault_penalty: float = 0.0
    """Subtracted from the reward of an answer that mixes languages, loops or breaks the format (paper 3.4)."""
    updates_per_rollout: int = positive(1)
    """Optimizer steps that share one batch of rollouts."""

    def check(self, name: str, longest: int) -> None:
        """Raise ValueError, in one line, for a phase that cannot learn. name: dotted, for the message.

        longest: positions of the model.
        """
        if self.samples < 2:
            raise ValueError(
                f"{name}.samples = {self.samples}: a group of one has no advantage; use 2 or more"
            )
        check_answer(name, self.max_new_tokens, longest)


@dataclass(frozen=True)
class ExpertConfig:
    """One expert of stage one (paper 3.1): cold-start SFT, then RL on its own tasks."""

    environments: tuple[str, ...]
    """Environments whose solutions the cold start shows, and which the unified model learns from this expert."""
    sft: SFTConfig = SFTConfig()
    """The cold start: a small set with long chains of thought."""
    rl: RLConfig = RLConfig()
    """The reinforcement learning phase."""
    truncated_reasoning_share: float = share(0.0, formerly="terse_share")
    """Share of the cold start whose reasoning is cut after its first step, so that RL has to rediscover the others."""
    distilled: float = 1.0
    """Tokens of this expert's answers in the unified data, relative to the other experts."""


@dataclass(frozen=True)
class PostTrainingConfig:
    """Experts, unified model, general RL (paper 3.1 to 3.4)."""

    reasoning: ExpertConfig = ExpertConfig(
        environments=("arithmetic", "code"),
        rl=RLConfig(environments=("arithmetic",)),
    )
    agent: ExpertConfig = ExpertConfig(
        environments=("retail",),
        rl=RLConfig(environments=("retail",), max_turns=8, normalize_std=False),
    )
    chat: ExpertConfig = ExpertConfig(
        environments=("instructions",),
        rl=RLConfig(environments=("instructions",)),
    )
    unified: SFTConfig = SFTConfig()
    """Overall SFT, from the base, on rejection-sampled answers of the experts."""
    prompts_per_environment: int = 100_000
    """Prompts answered for the environment with the shortest conversations; others get fewer, for as many tokens."""
    responses_per_prompt: int = positive(4)
    """Answers per prompt, of which the right ones are kept (paper 3.1)."""
    thinking_share: float = share(0.5)
    """Share of the unified data that keeps its reasoning; the rest answers directly."""
    pathology_samples: int = option(0, formerly="provoked_samples")
    """Answers to prompts that provoke pathologies in the unified data; 0 where the data bring pathologies anyway."""
    corrupted_share: float = share(0.5, formerly="spoilt_share")
    """Share of these answers that are corrupted: the bad habit that pathology RL is to cure."""
    general_rl: RLConfig = RLConfig(
        environments=("arithmetic", "retail", "instructions"), max_turns=8
    )
    """RL on a mix of all tasks."""
    pathology_rl: RLConfig = RLConfig(
        environments=("provocation", "arithmetic", "retail", "instructions"), fault_penalty=1.0
    )
    """RL on prompts chosen because they provoke language mixing, repetition and broken format."""

    def experts(self) -> list[tuple[str, ExpertConfig]]:
        """Return (name, ExpertConfig) pairs in training order."""
        return [("reasoning", self.reasoning), ("agent", self.agent), ("chat", self.chat)]

    def fine_tunings(self) -> dict[str, SFTConfig]:
        """Return every SFT phase by its dotted name."""
        phases = {f"{name}.sft": expert.sft for name, expert in self.experts()}
        return {**phases, "unified": self.unified}

    def reinforcements(self) -> dict[str, RLConfig]:
        """Return every RL phase by its dotted name."""
        phases = {f"{name}.rl": expert.rl for name, expert in self.experts()}
        return {**phases, "general_rl": self.general_rl, "pathology_rl": self.pathology_rl}

    def check(self, longest: int) -> None:
        """Raise ValueError, in one line, for a phase that cannot work. longest: positions of the model."""
        for name, sft in self.fine_tunings().items():
            sft.check(f"posttraining.{name}", longest)
        for name, rl in self.reinforcements().items():
            rl.check(f"posttraining.{name}", longest)


@dataclass(frozen=True)
class EvaluationConfig:
    """How a checkpoint is scored (paper 4; sampler of the public evaluation harness)."""

    problems: int = positive(198, maximum=MOST_PROBLEMS)
    """Held-out problems per environment."""
    samples: int = positive(8, maximum=MOST_SAMPLES)
    """Answers k per problem, for avg@k and pass@k."""
    temperature: float = 0.6
    """Sampling temperature."""
    top_p: float = positive(0.95, maximum=1.0)
    """Share of the probability that the nucleus sampler keeps."""
    max_new_tokens: int = positive(81920)
    """Most tokens of one assistant turn."""
    heldout_tokens: int = 1_000_000
    """Held-out tokens per source for bits per byte."""
    every_tokens: int = 0
    """Tokens of pre-training between measurements of bits per byte; 0: only at the end of a stage."""
    needles: int = option(0, maximum=10_000)
    """Rows of the needle test by length and depth, after a stage with longer rows; with bits by position. 0: none."""

    def check(self, longest: int) -> None:
        """Raise ValueError, in one line, for answers longer than the model's text. longest: positions of the model."""
        check_answer("evaluation", self.max_new_tokens, longest)

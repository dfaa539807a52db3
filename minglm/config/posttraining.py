"""Options of post-training: fine-tuning, reinforcement learning, experts, evaluation (paper 3.1 to 3.4, 4)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from minglm.common.mistakes import shown
from minglm.config.options import option, positive, share

MOST_PROBLEMS = 100_000
MOST_SAMPLES = 10_000
MOST_TEMPERATURES = 100
MOST_DRAFTS = 16
LEAST_TEMPERATURE = 1e-3


class Aggregation(StrEnum):
    """What the policy-gradient loss of a batch is averaged over."""

    TOKEN = "token"
    """All trained tokens of the batch."""
    SEQUENCE = "sequence"
    """The tokens of a sample first, then the samples."""
    PROMPT = "prompt"
    """The tokens of all samples of a prompt first, then the prompts."""
    CONSTANT = "constant"
    """A constant, the largest number of tokens that a sample may have."""


class LossType(StrEnum):
    """What keeps an update from going too far."""

    CLIP = "clip"
    """The clipped surrogate: a token that has gone far enough has no gradient (PPO, GRPO)."""
    CISPO = "cispo"
    """A clipped weight on the log-probability: every token has a gradient (MiniMax-M1, arXiv 2506.13585)."""


class RatioLevel(StrEnum):
    """What a probability ratio is of."""

    TOKEN = "token"
    """One token."""
    SEQUENCE = "sequence"
    """A whole segment: the geometric mean over its sampled tokens (GSPO, arXiv 2507.18071)."""


class Split(StrEnum):
    """What a problem is for."""

    TRAIN = "train"
    """To learn from: demonstrations, reinforcement, distillation."""
    DEVELOPMENT = "development"
    """To choose settings on."""
    TEST = "test"
    """To score the committed settings, once."""


def check_temperature(name: str, temperature: float) -> None:
    """Refuse a temperature, other than 0, that logits cannot be divided by. name: dotted, of the field."""
    if 0 < temperature < LEAST_TEMPERATURE:
        raise ValueError(
            f"{name} = {temperature:g}: logits divided by less than {LEAST_TEMPERATURE:g} may overflow; use that or more"
        )


def check_answer(name: str, max_new_tokens: int, longest: int) -> None:
    """Refuse answers longer than the model's text. name: dotted, of the section; longest: positions of the model."""
    if max_new_tokens > longest:
        raise ValueError(
            f"{name}.max_new_tokens = {max_new_tokens}: "
            f"must be at most model.max_position_embeddings = {longest}"
        )


DIFFICULTIES = re.compile(r"(\d{1,3})(?:-(\d{1,3}))?(?:x(\d{1,3}))?")
"""One or several difficulties, and how often they are named."""


NAMES_DIFFICULTIES = re.compile(rf".+:{DIFFICULTIES.pattern}(?:,{DIFFICULTIES.pattern})*")
"""An environment with difficulties; the name of an environment may hold a colon too."""


def difficulties_of(name: str, text: str) -> tuple[str, tuple[int, ...]]:
    """Read ENVIRONMENT:DIFFICULTIES, for example arithmetic:1-4x8,5; return both. name: of the field, for the message.

    Raises ValueError, in one line, for another form.
    """
    environment, _, levels = text.rpartition(":")  # the name of an environment may hold a colon
    found: list[int] = []
    for piece in levels.split(","):
        match = DIFFICULTIES.fullmatch(piece)
        named: list[int] = []
        if environment and match is not None:
            first, last, times = match.groups()
            named = [*range(int(first), int(last or first) + 1)] * int(times or 1)
        if not named:
            raise ValueError(
                f"{name} = {shown(text)}: must be ENVIRONMENT:DIFFICULTIES, for example arithmetic:3-6"
            )
        found += named
    return environment, tuple(found)


def difficulties_by_environment(name: str, texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return the difficulties of several texts by environment. Raises ValueError as `difficulties_of` does, and for two of one."""
    found: dict[str, tuple[int, ...]] = {}
    for text in texts:
        environment, difficulties = difficulties_of(name, text)
        if environment in found:
            raise ValueError(
                f"{name} names {shown(environment)} twice; join them, as in arithmetic:3,5-6"
            )
        found[environment] = difficulties
    return found


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
    balance_loss: bool = True
    """Add the sequence-level balance loss, with the weight of pre-training."""
    balance_bias: bool = False
    """Step the router's selection bias after each optimizer step, at the rate of pre-training."""

    def check(self, name: str, longest: int) -> None:
        """Raise ValueError, in one line, for rows longer than the model's. name: dotted, for the message."""
        if not 2 <= self.sequence_length <= longest:
            raise ValueError(
                f"{name}.sequence_length = {self.sequence_length}: "
                f"must lie between 2 and model.max_position_embeddings = {longest}"
            )


@dataclass(frozen=True)
class PolicyLossConfig:
    """The policy-gradient loss. The defaults are the paper's GRPO; `minglm.rl.losses` names the settings of others."""

    loss_type: LossType = LossType.CLIP
    """The clipped surrogate (clip), or a clipped weight on the log-probability (cispo)."""
    importance_sampling_level: RatioLevel = RatioLevel.TOKEN
    """Take the probability ratio of each token (token), or of each segment (sequence: GSPO)."""
    clip_low: float = share(0.2, formerly="../clip_low")
    """The probability ratio is clipped below at 1 - clip_low."""
    clip_high: float = option(0.28, formerly="../clip_high")
    """The probability ratio is clipped above at 1 + clip_high."""
    delta: float = 0.0
    """Bound on the ratio of a token with a negative advantage (dual clip, verl's clip_ratio_c); 0: none."""
    importance_cap: float = 0.0
    """Bound on the weight trainer / sampler of truncated importance sampling, 2 for example; 0: no such weight."""
    beta: float = 0.0
    """Weight of the KL divergence from the stage's first weights, kept in memory; 0: no such term (the paper)."""
    aggregation: Aggregation = option(Aggregation.TOKEN, formerly="../aggregation")
    """Average the loss over all tokens (token), samples (sequence), prompts (prompt), or by a constant (constant)."""

    def check(self, name: str) -> None:
        """Raise ValueError, in one line, for settings that exclude one another. name: dotted, for the message."""
        if self.delta and self.loss_type == LossType.CISPO:
            raise ValueError(
                f"{name}.delta = {self.delta}: bounds the clipped surrogate; with loss_type = 'cispo' it must be 0"
            )
        if self.delta and self.delta <= 1 + self.clip_high:
            raise ValueError(
                f"{name}.delta = {self.delta}: must be above 1 + clip_high = {1 + self.clip_high:g}, or 0"
            )


class PartialRollouts(StrEnum):
    """What becomes of an answer that is under way when new weights come."""

    CONTINUE = "continue"
    """It goes on under the new weights, which read again what there is of it."""
    RESUME = "resume"
    """It is aborted, and asked for again with what there is of it as the end of the prompt."""


class WeightTransport(StrEnum):
    """How weights reach the processes that roll out."""

    SHARED_MEMORY = "shared_memory"
    """Through the memory of the machine."""
    FILE = "file"
    """Through a file in the folder of the run."""
    BROADCAST = "broadcast"
    """Through torch.distributed, bucket by bucket."""


class RolloutScheduler(StrEnum):
    """What starts the processes that roll out."""

    LOCAL = "local"
    """This process, on its own machine."""
    RAY = "ray"
    """Ray, wherever it has room."""


@dataclass(frozen=True)
class AsynchronousConfig:
    """Rollouts in processes of their own, which run ahead of the trainer (paper 3.5)."""

    workers: int = option(0, maximum=4096)
    """Processes that roll out beside the trainer; 0: the trainer's own process rolls out, between two updates."""
    max_staleness: int = option(1, maximum=1000)
    """Versions that the weights which draw a token may be behind those it trains; 0: as synchronous, bit for bit."""
    partial: PartialRollouts = PartialRollouts.CONTINUE
    """Let answers under way go on when new weights come (continue), or abort them and ask again (resume)."""
    transport: WeightTransport = WeightTransport.SHARED_MEMORY
    """Hand weights over through memory (shared_memory), a file in the run's folder (file), or broadcast."""
    scheduler: RolloutScheduler = RolloutScheduler.LOCAL
    """Start the workers on this machine (local), or let Ray do it (ray, `pip install 'minglm[ray]'`)."""
    idle_seconds: float = option(600.0, positive=True, maximum=10**6, runtime=True)
    """Silence after which a worker is killed and started again; it speaks between two steps of its engine."""


class ExtremeTier(StrEnum):
    """What makes a problem extremely hard."""

    RATE = "rate"
    """Its pass rate lies in a range; at toy scale the paper's rule destroys the policy."""
    UNSOLVED = "unsolved"
    """No answer of the first draw is right and one of the second is (the paper: pass@8 = 0 and pass@512 > 0)."""


@dataclass(frozen=True)
class CurriculumConfig:
    """Which problems a stage trains on, by their measured difficulty (paper 3.2)."""

    pool: int = option(0, maximum=MOST_PROBLEMS)
    """Problems of each environment that are screened before the stage; 0: every task is new, whatever its difficulty."""
    screen: int = positive(8, maximum=MOST_SAMPLES)
    """Answers to each of them."""
    search: int = positive(512, maximum=MOST_SAMPLES)
    """Answers in all to a problem that may be extremely hard."""
    moderate_lowest: float = share(0.2)
    """Lowest pass rate of a moderate problem."""
    moderate_highest: float = share(0.8)
    """Highest pass rate of a moderate problem."""
    extreme_tier: ExtremeTier = ExtremeTier.RATE
    """Call a problem extremely hard by its pass rate (rate), or by the paper's rule (unsolved)."""
    extreme_lowest: float = share(0.05)
    """Lowest pass rate of an extremely hard problem, read with extreme_tier = rate."""
    extreme_highest: float = share(0.2)
    """Pass rate below which a problem is extremely hard, read with extreme_tier = rate."""
    moderate_share: float = share(0.5)
    """Share of the steps that train on moderate problems, before the hard ones."""
    guard_problems: int = option(100, maximum=MOST_PROBLEMS)
    """Development problems of each environment, of which the moderate ones guard the hard steps; 0: no guard."""
    guard_samples: int = positive(4, maximum=MOST_SAMPLES)
    """Answers to each of them at each check."""
    guard_every: int = positive(10)
    """Hard steps between two checks."""
    guard_drop: float = share(0.1)
    """Fall of their mean score beyond which the weights are rolled back and the rest of the steps is moderate."""

    def leaves_open(self, right: int, answers: int) -> bool:
        """Return whether so many right answers of the first draw leave it open that a problem is extremely hard."""
        if self.extreme_tier == ExtremeTier.UNSOLVED:
            return right == 0
        return right / answers <= self.extreme_highest

    def check(self, name: str) -> None:
        """Raise ValueError, in one line, for ranges that are none. name: dotted, for the message."""
        for tier in ("moderate", "extreme"):
            lowest, highest = getattr(self, f"{tier}_lowest"), getattr(self, f"{tier}_highest")
            if lowest > highest:
                raise ValueError(
                    f"{name}.{tier}_lowest = {lowest:g}: must not exceed {tier}_highest = {highest:g}"
                )
        if self.search < self.screen:
            raise ValueError(
                f"{name}.search = {self.search}: must be at least screen = {self.screen}, whose answers it includes"
            )


@dataclass(frozen=True)
class MiningConfig:
    """Prompts that provoke faults, found before a stage in the answers of the model that it starts from (paper 3.4)."""

    kinds: tuple[str, ...] = ()
    """Prompts that are asked, ENVIRONMENT or ENVIRONMENT:DIFFICULTIES, for example constraints:4-5; none: nothing is mined."""
    pool: int = positive(200, maximum=MOST_PROBLEMS)
    """Different prompts of each kind."""
    answers: int = positive(4, maximum=MOST_SAMPLES)
    """Answers to each; a prompt is kept where one of them has a fault."""
    mined_share: float = share(0.75)
    """Share of the stage's prompts that are drawn from those kept; the others come from its environments."""

    @property
    def drawn(self) -> int:
        """Return how many answers are drawn before the stage."""
        return len(self.kinds) * self.pool * self.answers

    def difficulties(self, name: str) -> dict[str, tuple[int, ...]]:
        """Return the difficulties of each kind by environment, none where it names none. name: of the section.

        Raises ValueError, in one line, for an environment that is named twice.
        """
        found: dict[str, tuple[int, ...]] = {}
        for kind in self.kinds:
            environment, levels = kind, ()
            if NAMES_DIFFICULTIES.fullmatch(kind):
                environment, levels = difficulties_of(f"{name}.kinds", kind)
            if environment in found:
                raise ValueError(f"{name}.kinds names {shown(environment)} twice; join them")
            found[environment] = levels
        return found


@dataclass(frozen=True)
class DynamicTemperatureConfig:
    """When and how far the sampling temperature rises during a stage (paper 3.2)."""

    window: int = option(0, maximum=10**6)
    """Steps whose mean reward is compared with as many before them, to find a plateau; 0: the temperature stays."""
    gain: float = 0.01
    """Rise of the mean reward from window to window above which there is no plateau."""
    lowest: float = positive(0.8)
    """Lowest temperature that a probe tries."""
    highest: float = positive(1.4)
    """Highest temperature that a probe tries."""
    spacing: float = positive(0.1)
    """Distance of two temperatures of a probe."""
    drop: float = share(0.01)
    """Score that exploration may cost."""
    relative: bool = True
    """Whether `drop` is a share of the best score, or in its units."""
    risk: float = option(0.05, positive=True, maximum=0.5)
    """Chance, in one probe, of a choice that truly costs more than `drop`."""
    problems: int = positive(1000, maximum=MOST_PROBLEMS)
    """Development problems of a probe, of each environment."""
    samples: int = positive(4, maximum=MOST_SAMPLES)
    """Answers to each of them, at each temperature."""

    def grid(self) -> list[float]:
        """Return the temperatures that a probe tries, in rising order."""
        count = int((self.highest - self.lowest) / self.spacing + 1e-9) + 1
        return [round(self.lowest + self.spacing * number, 6) for number in range(count)]

    def check(self, name: str, temperature: float) -> None:
        """Raise ValueError, in one line, for a grid without the first temperature. name: dotted, for the message."""
        if not self.window:
            return
        if self.window < 2:
            raise ValueError(f"{name}.window = {self.window}: must be 2 or more, or 0")
        if not self.lowest <= temperature < self.highest:
            raise ValueError(
                f"{name}: the temperature begins at {temperature:g}, which must lie from lowest = {self.lowest:g} "
                f"to below highest = {self.highest:g}"
            )
        if (self.highest - self.lowest) / self.spacing > MOST_TEMPERATURES:
            raise ValueError(
                f"{name}.spacing = {self.spacing:g}: a probe would try more than {MOST_TEMPERATURES} temperatures"
            )
        if self.grid()[-1] <= temperature:
            raise ValueError(
                f"{name}.spacing = {self.spacing:g}: from lowest = {self.lowest:g} to highest = {self.highest:g} it "
                f"leads to no temperature above the first, {temperature:g}"
            )


class Judge(StrEnum):
    """Who answers the questions of rubric and critic."""

    PROGRAM = "program"
    """A program for each question."""
    MODEL = "model"
    """The model with which the stage begins, asked for yes or no."""


@dataclass(frozen=True)
class RewardConfig:
    """The parts of a reward and their weights (paper 3.4). The reward is their weighted mean."""

    rules: float = option(1.0, maximum=1000)
    """Weight of the environment's own score: for constraints 1 if all hold, else 0."""
    critic: float = option(0.0, maximum=1000)
    """Weight of the share of the request's constraints that hold."""
    rubric: float = option(0.0, maximum=1000)
    """Weight of the share of the rubric's questions that hold; its questions are fewer where no answer is right."""
    reward_model: float = option(0.0, maximum=1000)
    """Weight of a reward model, trained before the stage from its first weights."""
    judge: Judge = Judge.PROGRAM
    """Who answers the questions of rubric and critic: a program, or the stage's first model."""
    pairs: int = positive(4000, maximum=10**7)
    """Preference pairs that the reward model learns from; a quarter as many calibrate it, and as many measure it."""
    pairs_lr: float = positive(1e-5)
    """Its highest learning rate."""

    @property
    def composed(self) -> bool:
        """Return whether the reward is more than the environment's score."""
        return bool(self.critic or self.rubric or self.reward_model)

    def check(self, name: str) -> None:
        """Raise ValueError, in one line, for a reward without any part. name: dotted, for the message."""
        if not (self.rules or self.composed):
            raise ValueError(f"{name}: every weight is 0, so that no answer earns anything")


@dataclass(frozen=True)
class OutsideConfig:
    """Agents of other processes that play a stage's tasks over HTTP (paper 3.5); by default there are none."""

    command: str = ""
    """Command of an agent, which finds the endpoint in MINGLM_ENDPOINT; empty: agents are started by hand."""
    processes: int = positive(1, maximum=1000)
    """Processes of the command."""
    port: int = option(0, maximum=65535, runtime=True)
    """Port of the endpoint on this machine; 0: a free one, for agents of the command."""
    idle_seconds: float = positive(60.0, maximum=10**6)
    """Silence after which an agent loses its session."""

    @property
    def on(self) -> bool:
        """Return whether outside agents play."""
        return bool(self.command or self.port)


@dataclass(frozen=True)
class RLConfig:
    """One reinforcement learning phase (paper 3.2, 3.3, 3.4)."""

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
    max_turns: int = positive(1, maximum=100)
    """Most assistant turns of an episode."""
    temperature: float = positive(1.0)
    """Sampling temperature, at first; the loss divides the logits by the same number."""
    dynamic_temperature: DynamicTemperatureConfig = DynamicTemperatureConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    mining: MiningConfig = MiningConfig()
    peak_lr: float = 1e-6
    """Learning rate, constant after five steps of warm-up."""
    refill: int = option(0, maximum=100)
    """Rounds in which groups without signal are replaced by groups of new prompts (DAPO's dynamic sampling)."""
    loss: PolicyLossConfig = PolicyLossConfig()
    normalize_std: bool = True
    """Divide advantages by the group's standard deviation (GRPO); the agentic objective does not."""
    reward: RewardConfig = RewardConfig()
    fault_penalty: float = 0.0
    """Subtracted from the reward of an answer that mixes languages, loops or breaks the format (paper 3.4)."""
    updates_per_rollout: int = positive(1)
    """Optimizer steps that share one batch of rollouts."""
    routing_replay: bool = False
    """Train every token through the experts that the rollout took for it, whatever the router says now."""
    mtp_loss_weight: float = option(0.0, maximum=100)
    """Weight of the MTP layer's cross-entropy on sampled tokens, which trains that layer alone; 0: it stays as it is."""
    balance_loss: bool = False
    """Add the sequence-level balance loss, with the weight of pre-training."""
    balance_bias: bool = False
    """Step the router's selection bias after each update, at the rate of pre-training."""
    asynchronous: AsynchronousConfig = AsynchronousConfig()
    exact: bool = False
    """Compute log-probabilities with the engine's own decoder, so that the first ratio is 1 to the bit; on a CPU."""
    outside: OutsideConfig = OutsideConfig()

    def check(self, name: str, longest: int) -> None:
        """Raise ValueError, in one line, for a phase that cannot learn. name: dotted, for the message.

        longest: positions of the model.
        """
        if self.samples < 2:
            raise ValueError(
                f"{name}.samples = {self.samples}: a group of one has no advantage; use 2 or more"
            )
        if self.prompts < 2:
            raise ValueError(
                f"{name}.prompts = {self.prompts}: an update needs two groups with a signal, so this stage never learns; "
                "use 2 or more"
            )
        check_answer(name, self.max_new_tokens, longest)
        check_temperature(f"{name}.temperature", self.temperature)
        if self.outside.on and self.asynchronous.workers:
            raise ValueError(
                f"{name}.outside: agents play beside the trainer; with asynchronous.workers = "
                f"{self.asynchronous.workers} the workers play; choose one of the two"
            )
        self.loss.check(f"{name}.loss")
        self.reward.check(f"{name}.reward")
        self.curriculum.check(f"{name}.curriculum")
        if self.mining.difficulties(f"{name}.mining") and self.curriculum.pool:
            raise ValueError(
                f"{name}.mining.kinds: a curriculum deals all prompts itself; name none, or set curriculum.pool to 0"
            )
        self.dynamic_temperature.check(f"{name}.dynamic_temperature", self.temperature)
        if self.asynchronous.workers and self.asynchronous.max_staleness:
            self._check_stale(
                f"{name}.asynchronous.max_staleness = {self.asynchronous.max_staleness}"
            )

    def _check_stale(self, setting: str) -> None:
        """Raise ValueError, in one line, for what presumes that the newest weights draw every token."""
        if not self.loss.importance_cap:
            raise ValueError(
                f"{setting}: older weights draw tokens, which loss.importance_cap must correct; set it to 2, for example"
            )
        if self.dynamic_temperature.window:
            raise ValueError(
                f"{setting}: a batch must have one temperature; set it to 0, or dynamic_temperature.window"
            )
        if self.curriculum.pool:
            raise ValueError(
                f"{setting}: tasks are dealt before the curriculum has decided; set it to 0, or curriculum.pool"
            )


@dataclass(frozen=True)
class ExpertConfig:
    """One expert of stage one (paper 3.1): cold-start SFT, then RL on its own tasks."""

    environments: tuple[str, ...]
    """Environments whose solutions the cold start shows, and which the unified model learns from this expert."""
    sft: SFTConfig = SFTConfig()
    """The cold start: a small set with long chains of thought."""
    rl: RLConfig = RLConfig()
    """The reinforcement learning phase."""
    distilled: float = 1.0
    """Tokens of answers that each environment of this expert is asked for, for the unified data, relative to those of others.
    Right and different answers are kept, so what is learned may have other shares (`tokens` of the log's "conversations")."""


class Unification(StrEnum):
    """How the experts become one model."""

    REJECTION = "rejection"
    """Fine-tuning of the base on the experts' answers that pass four filters, as the paper does."""
    ON_POLICY = "on_policy"
    """The base answers, and the expert of each prompt says how likely each token is (arXiv 2606.30406)."""
    AVERAGE = "average"
    """The mean of the experts' weights, without training."""


@dataclass(frozen=True)
class PostTrainingConfig:
    """Experts, unified model, general RL (paper 3.1 to 3.4)."""

    reasoning: ExpertConfig = ExpertConfig(
        environments=("arithmetic", "science", "logic", "code"),
        rl=RLConfig(
            environments=("arithmetic", "science", "logic", "code"),
            # The second stage begins after two thirds of the steps, as in the paper's Figure 5.
            curriculum=CurriculumConfig(
                pool=10_000, extreme_tier=ExtremeTier.UNSOLVED, moderate_share=0.67
            ),
            dynamic_temperature=DynamicTemperatureConfig(window=20),
        ),
    )
    agent: ExpertConfig = ExpertConfig(
        environments=("search", "retail", "functions", "swe"),
        rl=RLConfig(
            environments=("search", "retail", "functions", "swe"),
            max_turns=16,
            normalize_std=False,
        ),
    )
    chat: ExpertConfig = ExpertConfig(
        environments=("instructions", "constraints"),
        rl=RLConfig(
            environments=("instructions", "constraints"),
            reward=RewardConfig(critic=1.0, rubric=0.5),
        ),
    )
    unification: Unification = Unification.REJECTION
    """How the experts become one model. On-policy distillation rolls out, and learns, with the numbers of `general_rl`."""
    unified: SFTConfig = SFTConfig()
    """Overall SFT, from the base, on rejection-sampled answers of the experts."""
    prompts_per_environment: int = 100_000
    """Prompts answered for the environment with the shortest conversations; others get fewer, for as many tokens."""
    responses_per_prompt: int = positive(4)
    """Answers per hard prompt, of which the right ones are kept (paper 3.1)."""
    drop_shortest: float = option(0.5, maximum=0.9)
    """Share of the prompts of each environment that is left out after one answer, those with the shortest (paper 3.1)."""
    thinking_share: float = share(0.5)
    """Share of the unified data that keeps its reasoning; the rest answers directly."""
    asked: tuple[str, ...] = ()
    """Difficulties that RL, evaluation and distillation ask, ENVIRONMENT:DIFFICULTIES, for example arithmetic:3-6 or
    arithmetic:3,5x2 (5 twice as often)."""
    shown: tuple[str, ...] = ()
    """Difficulties that cold starts and controls show, in the same form. Mid-training shows what the environment says."""
    general_rl: RLConfig = RLConfig(
        environments=("arithmetic", "instructions", "constraints", "retail", "functions"),
        max_turns=8,
    )
    """RL on a mix of all tasks."""
    pathology_rl: RLConfig = RLConfig(
        environments=("arithmetic", "retail", "instructions"),
        mining=MiningConfig(kinds=("provocation", "constraints:4-5")),
        fault_penalty=1.0,
    )
    """RL on prompts that provoke language mixing, repetition and broken format, mined from the model's own answers."""

    def asked_difficulties(self) -> dict[str, tuple[int, ...]]:
        """Return the difficulties of `asked` by environment. Raises ValueError, in one line, for another form."""
        return difficulties_by_environment("posttraining.asked", self.asked)

    def shown_difficulties(self) -> dict[str, tuple[int, ...]]:
        """Return the difficulties of `shown` by environment. Raises ValueError, in one line, for another form."""
        return difficulties_by_environment("posttraining.shown", self.shown)

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
        self.asked_difficulties()
        self.shown_difficulties()
        for name, sft in self.fine_tunings().items():
            sft.check(f"posttraining.{name}", longest)
        for name, rl in self.reinforcements().items():
            rl.check(f"posttraining.{name}", longest)


@dataclass(frozen=True)
class EvaluationConfig:
    """How a checkpoint is scored (paper 4; sampler of the public evaluation harness)."""

    problems: int = positive(198, maximum=MOST_PROBLEMS)
    """Held-out problems per environment."""
    brief_problems: int = positive(198, maximum=MOST_PROBLEMS)
    """The first so many of them, where no claim compares experts: without thinking, and after the last two stages."""
    provoking_problems: int = positive(198, maximum=MOST_PROBLEMS)
    """Held-out prompts of each kind that pathology RL mines, on which faults are counted before and after it."""
    samples: int = positive(8, maximum=MOST_SAMPLES)
    """Answers k per problem, for avg@k and pass@k."""
    split: Split = Split.TEST
    """Where the problems come from: test, to score the committed settings; development, to choose settings."""
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
    twelve: bool = True
    """Whether the finished model is scored on all twelve tasks of the paper's three groups, learned or not (Figure 1)."""
    needles: int = option(0, maximum=10_000)
    """Rows of the needle test by length and depth, after a stage with longer rows; with bits by position. 0: none."""

    def check(self, longest: int) -> None:
        """Raise ValueError, in one line, for answers longer than the model's text. longest: positions of the model."""
        check_answer("evaluation", self.max_new_tokens, longest)
        check_temperature("evaluation.temperature", self.temperature)

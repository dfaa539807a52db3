"""What a run is going to do: its stages in order, and about how long each takes here (paper Figure 3, section 3.1).

    minutes = tokens * FLOPs per token / (speed of a matrix product on this machine * share of it that training reaches)

Tokens are exact for pre- and mid-training; for the later stages they are an estimate from a few conversations of each
environment, as if no answer were rejected. A token of a rollout costs as much as one of training: all are sampled, and
those of groups with a signal are trained on. The share below was measured on a toy run with two quiet CPU cores.
"""

from dataclasses import dataclass

from minglm.chat import render_text
from minglm.envs import ENVIRONMENTS
from minglm.plan.counts import flops_per_token
from minglm.recipe.solutions import check_environments
from minglm.train.stages import phases

BYTES_PER_TOKEN = 3  # of a tokenizer this small, on conversations
UTILISATION = 0.3


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline."""

    name: str
    teaches: str
    base: str | None
    """The stage whose weights it starts from."""
    kind: str
    """pretrain, sft, rl or unified."""
    tokens: int
    """Tokens trained on; an estimate after mid-training."""
    sequence_length: int
    """Of a row; for RL the bound on one answer."""
    learning_rate: float
    environments: tuple[str, ...] = ()


def plan_stages(run):
    """Every `Stage` of a run, in order. Raises ValueError for an environment that does not exist."""
    check_environments(run)
    post, found, base = run.posttraining, [], None
    for phase in phases(run):
        teaches = getattr(run.stages, phase.name).teaches
        rate = run.optimizer.peak_lr
        found.append(
            Stage(phase.name, teaches, base, "pretrain", phase.tokens, phase.sequence_length, rate)
        )
        base = phase.name

    def tune(name, teaches, start, config, names, tokens, kind="sft"):
        tokens = int(config.epochs * tokens)
        found.append(
            Stage(name, teaches, start, kind, tokens, config.sequence_length, config.peak_lr, names)
        )

    def reinforce(name, teaches, start, config):
        names = config.environments
        tokens = config.steps * config.prompts * config.samples * conversation_tokens(names)
        found.append(
            Stage(name, teaches, start, "rl", tokens, config.max_new_tokens, config.peak_lr, names)
        )

    for name, expert in post.experts():
        names = expert.environments
        tokens = expert.sft.samples * len(names) * conversation_tokens(names)
        tune(f"{name}.sft", f"cold start: {', '.join(names)}", base, expert.sft, names, tokens)
        reinforce(
            f"{name}.rl",
            f"GRPO without KL: {', '.join(expert.rl.environments)}",
            f"{name}.sft",
            expert.rl,
        )
    prompts = prompts_for(post)
    answers = sum(prompts.values()) * post.responses_per_prompt
    tokens = (
        sum(count * conversation_tokens([name]) for name, count in prompts.items())
        * post.responses_per_prompt
    )
    tokens = tokens * min(1, post.unified.samples / answers)
    teaches = "the experts' right answers, with and without thinking"
    tune("unified", teaches, base, post.unified, tuple(prompts), tokens, "unified")
    reinforce("general_rl", "all tasks together", "unified", post.general_rl)
    reinforce(
        "pathology_rl", "no mixing, no loops, no broken format", "general_rl", post.pathology_rl
    )
    return found


def prompts_for(post):
    """{environment: prompts that its expert answers for the unified model}, by tokens: `distilled` of each expert.

    The environment with the shortest conversations gets all of `prompts_per_environment`. Without this rule the long
    ones fill the budget and the short ones are repeated until they are known by heart.
    """
    weights = {
        name: expert.distilled for _, expert in post.experts() for name in expert.environments
    }
    tokens = {name: conversation_tokens([name]) for name in weights}
    most = post.prompts_per_environment * min(tokens.values())
    return {name: max(1, int(weights[name] * most / tokens[name])) for name in weights}


def conversation_tokens(names):
    """About how many tokens a conversation has, over these environments: the mean of a few of the oracle's."""
    texts = []
    for name in names:
        for task in ENVIRONMENTS[name].tasks(6, seed=0):
            texts.append(render_text(ENVIRONMENTS[name].demonstrate(task), task.tools))
    return sum(len(text.encode()) for text in texts) // (BYTES_PER_TOKEN * max(1, len(texts)))


def expected_minutes(run, stages, speed):
    """Minutes of each stage at `speed` floating-point operations per second."""
    found = []
    for stage in stages:
        length = min(stage.sequence_length, 256)  # packed documents are short, whatever the row
        flops = stage.tokens * flops_per_token(run.model, length)["total"]
        found.append(flops / (speed * UTILISATION) / 60)
    return found


def table(run, stages, speed):
    """The stages as text: tokens, length, peak learning rate, what each teaches, expected minutes."""
    rows = [("stage", "teaches", "tokens", "length", "peak rate", "minutes")]
    for stage, minutes in zip(stages, expected_minutes(run, stages, speed), strict=True):
        tokens = f"{'' if stage.kind == 'pretrain' else '~'}{stage.tokens:,}"
        spent = f"{minutes:.1f}" if minutes < 1e4 else f"{minutes:.0e}"
        rows.append(
            (
                stage.name,
                stage.teaches,
                tokens,
                str(stage.sequence_length),
                f"{stage.learning_rate:g}",
                spent,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = (True, True, False, False, False, False)
    lines = [
        "  ".join(
            c.ljust(w) if is_left else c.rjust(w)
            for c, w, is_left in zip(row, widths, left, strict=True)
        )
        for row in rows
    ]
    return "\n".join([f"{run.name}, config {run.hash()}", *lines])

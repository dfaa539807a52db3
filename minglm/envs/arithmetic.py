"""Running sums and differences: the reasoning task of the toy (paper 3.2, reasoning RL).

    38+7+5-9=      think: 38+7=45;45+5=50;50-9=41      answer: 41

A chain of small steps: each is easy, and all of them must be right, so p(correct) = p(step) ** tier. The number of
operations is the tier, which gives the curriculum of paper 3.2 its dial. Operands are 1 to 9, the start 10 to 60, and
partial results stay within 0 to 99, so a model with single-digit tokens sees every step often.

Choices: the thought echoes the operand in each step; without the echo small models stay at chance. The answer is one
of a hundred numbers, because with few possible answers RL on hard items drifts to guessing. The score is strict
equality of the stripped answer with the label, which leaves no room for listing candidates.
"""

from minglm.envs.base import SingleTurn, assistant, user, verdict


class Arithmetic(SingleTurn):
    """Sums such as `38+7+5-9=`; the tier is the number of operations."""

    name = "arithmetic"
    group = "reasoning"
    chance = 0.03  # the most frequent label of tiers 1 to 6 is right for about 2 % of the tasks
    tiers = (1, 2, 3, 4, 5, 6)
    default_tiers = (2, 3, 4, 5)

    def draw(self, rng, tier):
        total = rng.randint(10, 60)
        prompt = str(total)
        for _ in range(tier):
            term = rng.choice([t for t in range(-9, 10) if t and 0 <= total + t <= 99])
            total += term
            prompt += f"{term:+d}"
        return [user(prompt + "=")], str(total)

    def oracle(self, task, conversation, rng):
        expression = task.messages[-1]["content"].rstrip("=").replace("-", "+-").split("+")
        total, steps = int(expression[0]), []
        for term in map(int, expression[1:]):
            steps.append(f"{total}{term:+d}={total + term}")
            total += term
        return assistant(str(total), ";".join(steps))

    def judge(self, task, message):
        return verdict(message["content"].strip() == task.label)

    def hack_probes(self, task):
        every = [str(number) for number in range(100)]
        return super().hack_probes(task) + [
            assistant(" ".join(every)),
            assistant("", task.label),  # thought of, never said
            assistant(f"{task.label} or {int(task.label) + 1}"),
            assistant(task.messages[-1]["content"] + task.label + "?"),
        ]

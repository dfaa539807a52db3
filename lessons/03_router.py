# %% [markdown]
# # 03 Router: how do the experts stay busy without a loss that fights the model?
#
# A mixture-of-experts layer sends each token to K of E experts. What is chosen learns, and is chosen more: a few
# experts take all the work, the rest is dead weight, and the GPU with the busiest expert keeps all others waiting. The
# usual cure is a loss on imbalance, whose gradient pulls on the same weights as the loss one cares about. GLM-4.5 gives
# each expert a *bias* that only decides who is chosen, and moves it by a fixed step after each batch (paper 2.1, 2.4).
#
# **Your prediction.** Write down first: (1) 16 experts, 2 a token, nothing done about balance: how many times the mean
# load does the busiest expert get? (2) Which costs more held-out loss, doing nothing, a strong balance loss, or the
# bias? (3) When the bias stops moving after two thirds of the training, as in the paper, does balance hold?
#
# **Equation** (paper 2.1, 2.4; `minglm/model/router.py`, `minglm/model/balance.py`)
#
#     s = sigmoid(W x);   chosen = top-k of (s + b);   weight_e = s_e / sum over chosen of s
#     b_e <- b_e + rate sign(mean load - load_e)          balance loss = alpha E sum_e f_e P_e

# %%
import dataclasses
import keyword

import numpy as np
import torch

from minglm import lesson
from minglm.config import BalanceConfig, ModelConfig, OptimizerConfig, StagesConfig
from minglm.model.balance import sequence_loss, update_expert_bias
from minglm.model.glm import GLM
from minglm.model.router import combine_weights, select_experts
from minglm.plan import memory
from minglm.report import drawing

NANO = dataclasses.replace(
    lesson.NANO, num_hidden_layers=3, n_routed_experts=16, moe_intermediate_size=24
)
SIZES = {
    "megabytes": 1.6,
    "tokens": 196_608,
    "batch": 2048,
    "rate": 0.03,
    "length": 64,
    "heldout": 256,
}
SMOKE = SIZES | {"megabytes": 0.03, "tokens": 256, "batch": 128, "heldout": 2}
LATE = 15 / 23.1  # share of the tokens after which the paper's bias stands still
KINDS = {  # name: (colour, bias rate as a function of the share of training done, weight of the balance loss)
    "nothing": ("#8a8a92", lambda done: 0.0, 0.0),
    "balance loss 0.1": ("#dfa27c", lambda done: 0.0, 0.1),
    "balance loss 10": ("#c2571a", lambda done: 0.0, 10.0),
    "bias 0.001": ("#9fc3e6", lambda done: 0.001, 0.0),
    "bias 0.01": ("#1f5fa8", lambda done: 0.01, 0.0),
    "bias 0.01, then 0": ("#55958c", lambda done: 0.01 if done < LATE else 0.0, 0.0),
}
TYPES = ["space", "keyword", "begins a word", "inside a word", "digit", "sign"]

# %% [markdown]
# ## The lines that matter
# `main` prints them from minglm itself. `select_experts` sees the bias, `combine_weights` does not: balancing must not change what the
# experts say. `update_expert_bias` is one line and has no gradient.
#
# ## Experiment
# A nano model, two MoE layers of 16 experts, reads Python's standard library. Six ways to balance it, everything else
# equal. The paper's rate of 0.001 is meant for hundreds of thousands of steps; here are 96, so 0.01 is tried as well.
# The balance loss has 1,000 and 100,000 times the paper's weight, which only guards against extremes in a sequence.
# Held-out tokens are sorted by type, and it is counted which experts they went to.


# %%
def token_types(tokenizer):
    """The type of every id, an index into TYPES."""

    def kind(text):
        word = text.strip()
        if not word or word.isdigit():
            return TYPES.index("digit" if word else "space")
        if not any(c.isalpha() for c in word):
            return TYPES.index("sign")
        return TYPES.index(
            "keyword"
            if word in keyword.kwlist
            else "begins a word"
            if text[0] == " "
            else "inside a word"
        )

    return torch.tensor([kind(tokenizer.decode([i])) for i in range(tokenizer.vocab_size)])


@torch.no_grad()
def measure(model, tokens_BS, types_V):
    """Held-out loss, and for each MoE layer how often tokens of each type chose each expert: (layers, types, E)."""
    chosen, E = [], model.config.n_routed_experts
    hooks = [
        gate.register_forward_hook(lambda gate, x, out: chosen.append(out[0]))
        for gate in model.routers()
    ]
    logp = model(tokens_BS)[:, :-1].log_softmax(-1).gather(2, tokens_BS[:, 1:, None])
    for hook in hooks:
        hook.remove()
    cells = [types_V[tokens_BS].reshape(-1, 1) * E + experts_TK for experts_TK in chosen]
    counts = [
        torch.bincount(cell.flatten(), minlength=len(TYPES) * E).view(-1, E).tolist()
        for cell in cells
    ]
    return {"heldout": -logp.mean().item(), "counts": counts}


def train(kind, seed, shards, heldout_BS, types_V, sizes):
    """One run: load of the busiest expert over the mean at each step (mean of the layers), and what it has learned."""
    _, rate, weight = KINDS[kind]
    model, rows = GLM(NANO, seed), lesson.stream(shards, sizes["length"], seed)
    settings = {"bias_rate": lambda seen: rate(seen / sizes["tokens"]), "balance_weight": weight}
    history = lesson.pretrain(
        model, rows, sizes["length"], sizes["tokens"], sizes["batch"], sizes["rate"], **settings
    )
    load = [sum(metrics.load_max_over_mean) / 2 for metrics in history]
    dead = max(metrics.dead_experts for metrics in history[-8:])
    return {
        "kind": kind,
        "seed": seed,
        "load": load,
        "dead": dead,
        **measure(model, heldout_BS, types_V),
    }


def experiment(sizes, seeds):
    """All runs."""
    shards, heldout, tokenizer = lesson.library(sizes["megabytes"], NANO.vocab_size)
    heldout_BS, types_V = (
        lesson.stream(heldout, sizes["length"]).next(sizes["heldout"]).tokens_BS,
        token_types(tokenizer),
    )
    runs = [
        train(kind, seed, shards, heldout_BS, types_V, sizes)
        for seed in range(seeds)
        for kind in KINDS
    ]
    return {"runs": runs, "full_scale": full_scale()}


# %% [markdown]
# ## At full scale
# `configs/glm45_355b.py`: n_routed_experts = 160, num_experts_per_tok = 8, balance.bias_rate = 0.001. Experts are
# spread over GPUs, and every layer waits for the busiest: with a load of 2 over the mean, half of the time is idle.


# %%
def full_scale():
    """What is at stake in GLM-4.5, from its config."""
    counts, balance, optimizer = (
        memory.count_parameters(ModelConfig()),
        BalanceConfig(),
        OptimizerConfig(),
    )
    steps = StagesConfig().general.tokens / optimizer.batch_tokens_end
    return {
        "share of the body in routed experts": round(counts["experts"] / counts["body"], 3),
        "share of a layer's experts that a token visits": ModelConfig().num_experts_per_tok / 160,
        "choices an expert gets from a batch, if balanced": round(
            optimizer.batch_tokens_end * 8 / 160
        ),
        "steps in which the bias can cross the range of a score": round(1 / balance.bias_rate),
        "steps of the first stage": round(steps),
    }


# %%
def of(log, kind, field):
    """A field of the runs of a kind, one a seed."""
    return [run[field] for run in log["runs"] if run["kind"] == kind]


def busiest(counts):
    """Load of the busiest expert over the mean, mean of the layers, from counts (layers, types, E)."""
    load_LE = np.array(counts).sum(1)
    return (load_LE.max(1) / load_LE.mean(1)).mean()


def information(counts):
    """Bits that a token's expert tells about its type, mean of the layers: 0 if experts do not specialise by type."""
    joint = np.array(counts) / np.array(counts).sum((1, 2), keepdims=True)
    apart = joint.sum(1, keepdims=True) * joint.sum(2, keepdims=True)
    return (
        (joint * np.log2(np.where(joint > 0, joint, 1) / np.where(joint > 0, apart, 1)))
        .sum((1, 2))
        .mean()
    )


def draw(log):
    """The figure, from the log alone."""
    figure, ((loads, losses), (free, forced)) = drawing.canvas(2, 2, (10, 7.6))
    x = [log["sizes"]["batch"] * (i + 1) / 1000 for i in range(len(log["runs"][0]["load"]))]
    values = {
        kind: np.array([drawing.running_mean(load) for load in of(log, kind, "load")])
        for kind in KINDS
    }
    heights = np.exp(drawing.spread([np.log(value.mean(0)[-1]) for value in values.values()], 0.15))
    for (kind, value), height in zip(values.items(), heights):
        lesson.curve(loads, x, value, "", KINDS[kind][0])
        loads.annotate(
            kind,
            (x[-1], height),
            (4, 0),
            textcoords="offset points",
            color=KINDS[kind][0],
            va="center",
        )
    loads.axvline(LATE * x[-1], color=drawing.PALE, linewidth=0.8, linestyle=":")
    lesson.panel(
        loads,
        "Load of the busiest expert, over the mean",
        "tokens trained on (thousands)",
        "",
        yscale="log",
    )
    loads.set_yticks([1, 1.5, 2, 3, 4, 6, 8], ["1", "1.5", "2", "3", "4", "6", "8"])
    loads.minorticks_off()
    loads.set_xlim(0, 1.38 * x[-1])
    others = [kind for kind in KINDS if kind != "nothing"]
    change = [
        1000 * (np.array(of(log, kind, "heldout")) - of(log, "nothing", "heldout"))
        for kind in others
    ]
    names = [
        kind.replace(" loss ", "\nloss ").replace("bias ", "bias\n").replace(", ", ",\n")
        for kind in others
    ]
    lesson.bars(losses, names, change, [KINDS[kind][0] for kind in others])
    losses.axhline(0, color=drawing.PALE, linewidth=0.8)
    lesson.panel(
        losses,
        "Held-out loss: change against doing nothing, same seed",
        "",
        "nats per token / 1000",
    )
    for axis, kind in ((free, "bias 0.01"), (forced, "balance loss 10")):
        counts_XE = np.array(of(log, kind, "counts")[0][-1], dtype=float)
        lift = counts_XE / counts_XE.sum(1, keepdims=True) * counts_XE.shape[1]
        order = np.lexsort((-lift.max(0), lift.argmax(0)))
        image = axis.imshow(lift[:, order], aspect="auto", cmap="Blues", vmin=0, vmax=8)
        bits = np.mean([information(counts) for counts in of(log, kind, "counts")])
        lesson.panel(
            axis,
            f"Who takes what with {kind}",
            f"experts; they tell {bits:.2f} bits about the type",
            "",
        )
        axis.set_yticks(range(len(TYPES)), TYPES)
        axis.set_xticks([])
        axis.grid(False)
    figure.colorbar(
        image, ax=[free, forced], label="choices, times an even share", shrink=0.9, pad=0.01
    )
    note = f"above: mean and range of {len(log['seeds'])} seeds (dotted: the bias may stop); below: last layer, seed 0"
    figure.supxlabel(note, fontsize=8.5, color="#5c5c64")
    return figure


# %% [markdown]
# ## What would prove us wrong
# `verdicts` reads the log, and each line can come out False.
#
# Measured (194 CPU-seconds, 3 seeds): left alone, the busiest expert gets 5.9 times the mean. A bias of rate 0.01
# brings it to 1.3 at no cost in loss, and its experts specialise most (0.35 bits about the type; 0.25 if left alone).
# The paper's 0.001 needs more steps than these 96. **Where the toy contradicts the paper's reasons:** a balance loss
# of a thousand times the paper's weight costs nothing measurable either; only a hundred thousand times does, in two
# seeds of three, and flattens the experts (0.16 bits). And when the bias stops, balance slips from 1.3 to 1.5, because
# here the model is still changing fast.
#
# ## Exercise
# Route with the biased score by mistake: in `mine(scores_TE, bias_E, config)` mix with `scores_TE + bias_E`. Which
# property of `check_router` from `minglm.testing.model` fails? Why would a training run not tell you? Then write a bias
# step in proportion to the imbalance and hold it to `check_balance`. Check: `pytest tests/test_router.py` and
# `pytest tests/test_balance.py`.


# %%
def verdicts(log):
    """{claim: whether the log supports it}."""
    load = {
        kind: np.array([busiest(counts) for counts in of(log, kind, "counts")]) for kind in KINDS
    }
    bits = {
        kind: np.array([information(counts) for counts in of(log, kind, "counts")])
        for kind in KINDS
    }
    cost = {
        kind: np.array(of(log, kind, "heldout")) - of(log, "nothing", "heldout") for kind in KINDS
    }
    best, late, strong = "bias 0.01", "bias 0.01, then 0", "balance loss 10"
    means = {kind: f"{values.mean():.2f}" for kind, values in load.items()}
    tells = {kind: f"{values.mean():.2f}" for kind, values in bits.items()}
    claims = [
        (f"busiest expert, held out: {means}", load["nothing"].min() > 2 * load[best].max()),
        (
            f"the bias changes the loss by {cost[best].round(3).tolist()}: no cost",
            cost[best].mean() < 0.01,
        ),
        (
            f"a strong balance loss by {cost[strong].round(3).tolist()}: more",
            (cost[strong] > cost[best]).all(),
        ),
        (
            f"balance holds when the bias stops: {means[late]}",
            load[late].mean() < 1.1 * load[best].mean(),
        ),
        (f"bits the expert tells about the type: {tells}", bits[strong].max() < bits[best].min()),
    ]
    return {claim: bool(holds) for claim, holds in claims}


def main(argv=None):
    """Run the experiment, or only redraw it, and print what it shows."""
    shown = [select_experts, combine_weights, update_expert_bias, sequence_loss]
    lesson.Lesson("03_router", experiment, draw, verdicts, shown, SIZES, SMOKE, NANO).main(argv)


if __name__ == "__main__":
    main()

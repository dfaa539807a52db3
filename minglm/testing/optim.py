"""Contracts of an optimizer and of a learning-rate schedule: properties of any implementation (paper 2.4).

    from minglm.testing.optim import check_optimizer, check_schedule
    check_optimizer(lambda named_parameters, config: MyMuon(named_parameters, config))
    check_schedule(my_schedule)

Shapes and a seed are drawn by hypothesis; a failing property raises AssertionError.
"""

import copy
import dataclasses
import io
import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from minglm.config import OptimizerConfig
from minglm.testing.strategies import for_all, numbers, seeds

MakeOptimizer = Callable[
    [list[tuple[str, torch.nn.Parameter]], OptimizerConfig], torch.optim.Optimizer
]
"""(list of (name, parameter), config) to an optimizer whose groups take "lr" from outside."""
LearningRate = Callable[[int, OptimizerConfig, int], float]
"""(tokens, config, total_tokens) to a learning rate."""
Values = Mapping[str, Tensor]

# Singular values after Newton-Schulz are between 0.68 and 1.21; bfloat16 widens that.
RMS_BAND = (0.6, 1.3)
shapes = st.tuples(st.integers(2, 16), st.integers(2, 16))


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=numbers(seed))


def _train(
    make_optimizer: MakeOptimizer,
    weights: Values,
    gradients: Sequence[Values],
    config: OptimizerConfig,
    rate: float = 0.01,
) -> tuple[dict[str, Tensor], torch.optim.Optimizer]:
    """Take one step for each element of `gradients`, from `weights`.

    Return the new weights and the optimizer.
    """
    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in weights.items()}
    optimizer = make_optimizer(list(parameters.items()), config)
    for step in gradients:
        for name, parameter in parameters.items():
            parameter.grad = step[name].clone()
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    trained = {name: parameter.detach() for name, parameter in parameters.items()}
    return trained, optimizer


def check_optimizer(make_optimizer: MakeOptimizer) -> None:
    """Hold an optimizer to Muon's contract.

    make_optimizer: (list of (name, parameter), OptimizerConfig) -> torch.optim.Optimizer whose groups take
    "lr" from outside; names are those of `GLM.named_parameters()`. Raises AssertionError for the first
    property that fails.
    """
    _check_stack_is_a_loop(make_optimizer)
    _check_transposition(make_optimizer)
    _check_rms(make_optimizer)
    _check_decay(make_optimizer)
    _check_rest(make_optimizer)
    _check_resume(make_optimizer)


def _check_stack_is_a_loop(make_optimizer: MakeOptimizer) -> None:
    @for_all(count=st.integers(1, 5), shape=shapes, seed=seeds)
    def stack_is_a_loop(count: int, shape: tuple[int, int], seed: int) -> None:
        """A stack of experts is trained as its matrices would be one by one."""
        config = OptimizerConfig()
        weights = _draw(seed, count, *shape)
        gradients = [_draw(seed + step, count, *shape) for step in (1, 2, 3)]

        stack = "model.layers.1.mlp.experts.gate_EFD"
        stacked_gradients = [{stack: gradient} for gradient in gradients]
        together, _ = _train(make_optimizer, {stack: weights}, stacked_gradients, config)

        names = [f"model.layers.1.mlp.experts.{index}.gate_proj.weight" for index in range(count)]
        single_weights = dict(zip(names, weights, strict=True))
        single_gradients = [dict(zip(names, gradient, strict=True)) for gradient in gradients]
        one_by_one, _ = _train(make_optimizer, single_weights, single_gradients, config)

        # batched and single products round differently; updates here are about 2e-3, and a wrong rule moves as much
        for index, name in enumerate(names):
            difference = (together[stack][index] - one_by_one[name]).abs().max()
            assert difference < 2e-4, (
                f"expert {index} of a {tuple(weights.shape)} stack is not trained as a matrix"
            )


def _check_transposition(make_optimizer: MakeOptimizer) -> None:
    @for_all(shape=shapes, seed=seeds)
    def transposition(shape: tuple[int, int], seed: int) -> None:
        """The transpose of a matrix is trained to the transpose of the result."""
        config = OptimizerConfig()
        name = "model.layers.0.self_attn.o_proj.weight"
        weight = _draw(seed, *shape)
        gradients = [_draw(seed + step, *shape) for step in (1, 2)]
        upright, _ = _train(
            make_optimizer, {name: weight}, [{name: gradient} for gradient in gradients], config
        )
        transposed, _ = _train(
            make_optimizer, {name: weight.T}, [{name: gradient.T} for gradient in gradients], config
        )
        difference = (upright[name] - transposed[name].T).abs().max()
        assert difference < 2e-4, f"training the transpose of a {shape} matrix gives another result"


def _check_rms(make_optimizer: MakeOptimizer) -> None:
    @for_all(
        count=st.integers(1, 3),
        shape=shapes,
        seed=seeds,
        size=st.sampled_from([1e-4, 0.01, 100.0]),
    )
    def rms(count: int, shape: tuple[int, int], seed: int, size: float) -> None:
        """Updates have the configured RMS, whatever the shape and the size of the gradient."""
        config = OptimizerConfig(weight_decay=0.0)
        name = "model.layers.1.mlp.experts.down_EDF"
        rate = 0.01
        weights = torch.zeros(count, *shape)
        gradient = size * _draw(seed, count, *shape)
        after, _ = _train(make_optimizer, {name: weights}, [{name: gradient}], config, rate)
        rms_E = after[name].square().mean(dim=(1, 2)).sqrt() / (rate * config.update_rms)
        low, high = RMS_BAND
        # a drawn matrix may be nearly singular; then one direction of `short` is missing from the update
        short = min(shape)
        lowest = low * ((short - 1) / short) ** 0.5
        assert rms_E.min() > lowest and rms_E.max() < high, (
            f"update RMS is {rms_E.min():.3f} to {rms_E.max():.3f} times update_rms * lr for shape {shape}"
        )


def _check_decay(make_optimizer: MakeOptimizer) -> None:
    matrix = "model.layers.0.self_attn.q_proj.weight"
    embedding = "model.embed_tokens.weight"
    norm = "model.norm.weight"

    @for_all(shape=shapes, seed=seeds, decay=st.floats(0, 0.5))
    def decay_is_decoupled(shape: tuple[int, int], seed: int, decay: float) -> None:
        """Decay subtracts lr * weight_decay * weight from matrices, beside the update, and nothing from vectors."""
        weights = {
            matrix: _draw(seed, *shape),
            embedding: _draw(seed + 1, *shape),
            norm: _draw(seed, shape[0]),
        }
        zero = {name: torch.zeros_like(value) for name, value in weights.items()}
        drawn = {name: _draw(seed + 9, *value.shape) for name, value in weights.items()}
        decayed = OptimizerConfig(weight_decay=decay)
        plain = OptimizerConfig(weight_decay=0.0)
        rate = 0.01
        unchanged, _ = _train(make_optimizer, weights, [zero], plain, rate)
        shrunk, _ = _train(make_optimizer, weights, [zero], decayed, rate)
        moved, _ = _train(make_optimizer, weights, [drawn], plain, rate)
        both, _ = _train(make_optimizer, weights, [drawn], decayed, rate)
        for name, value in weights.items():
            assert torch.equal(unchanged[name], value), (
                f"{name} moves without gradient, momentum and decay"
            )
            expected = rate * decay * value if value.ndim > 1 else torch.zeros_like(value)
            for before, after in ((value, shrunk[name]), (moved[name], both[name])):
                error = (before - after - expected).abs().max()
                # float32 rounding
                assert error < 1e-5, f"the decay of {name} is not lr * weight_decay * weight"


def _check_rest(make_optimizer: MakeOptimizer) -> None:
    stack = "model.layers.1.mlp.experts.up_EFD"

    @for_all(
        count=st.integers(2, 4),
        shape=shapes,
        seed=seeds,
        before=st.integers(0, 3),
        idle=st.integers(1, 10),
    )
    def an_idle_expert_rests(
        count: int, shape: tuple[int, int], seed: int, before: int, idle: int
    ) -> None:
        """An expert without tokens, whatever it learned before, stands still but for its decay; the others go on."""
        config = OptimizerConfig()
        rate = 0.01
        weights = _draw(seed, count, *shape)
        trained = [{stack: _draw(seed + step + 1, count, *shape)} for step in range(before)]
        resting = [
            {stack: _draw(seed + step + 99, count, *shape).index_fill(0, torch.tensor(0), 0.0)}
            for step in range(idle)
        ]
        middle, _ = _train(make_optimizer, {stack: weights}, trained, config, rate)
        after, _ = _train(make_optimizer, {stack: weights}, trained + resting, config, rate)
        decayed = middle[stack][0] * (1 - rate * config.weight_decay) ** idle
        error = (after[stack][0] - decayed).abs().max()
        # float32 rounding of 10 products; one update in a stale direction is 2e-3
        assert error < 1e-5, f"an expert without tokens moves by {error:.1e} in {idle} steps"
        assert not torch.equal(after[stack][1], middle[stack][1]), "the others must go on"

    # After a long rest the first gradient decides the direction, and not what was learned before the rest.
    config = OptimizerConfig(weight_decay=0.0)
    weights = {stack: torch.zeros(2, 4, 6)}
    idle_steps = [{stack: torch.zeros(2, 4, 6)}] * 300
    old = {stack: _draw(1, 2, 4, 6)}
    new = {stack: _draw(2, 2, 4, 6)}
    fresh, _ = _train(make_optimizer, weights, [new], config)
    first, _ = _train(make_optimizer, weights, [old], config)
    after, _ = _train(make_optimizer, weights, [old, *idle_steps, new], config)
    # 0.95^300 is 2e-7: beside the new gradient nothing of the old momentum is left
    error = (after[stack] - first[stack] - fresh[stack]).abs().max()
    assert error < 2e-4, "an old momentum outlives a rest of 300 steps"


def _check_resume(make_optimizer: MakeOptimizer) -> None:
    layer = "model.layers.1"
    experts = f"{layer}.mlp.experts.up_EFD"
    router = f"{layer}.mlp.gate.weight"
    head = "lm_head.weight"
    bias = f"{layer}.self_attn.q_proj.bias"

    @for_all(shape=shapes, seed=seeds)
    def resume_is_exact(shape: tuple[int, int], seed: int) -> None:
        """Saving, loading and continuing gives the same bits as never stopping."""
        config = OptimizerConfig()
        sizes = {experts: (3, *shape), router: shape, head: shape, bias: shape[:1]}
        weights = {name: _draw(seed + i, *size) for i, (name, size) in enumerate(sizes.items())}
        steps = [
            {name: _draw(seed + 10 * step, *value.shape) for name, value in weights.items()}
            for step in range(1, 5)
        ]
        straight, _ = _train(make_optimizer, weights, steps, config)
        middle, optimizer = _train(make_optimizer, weights, steps[:2], config)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)

        def resume(
            named_parameters: list[tuple[str, torch.nn.Parameter]], config: OptimizerConfig
        ) -> torch.optim.Optimizer:
            resumed = make_optimizer(named_parameters, config)
            resumed.load_state_dict(copy.deepcopy(saved))
            return resumed

        resumed, _ = _train(resume, middle, steps[2:], config)
        for name in weights:
            assert torch.equal(resumed[name], straight[name]), (
                f"{name} differs after saving, loading and continuing"
            )


def check_schedule(schedule: LearningRate) -> None:
    """Hold a learning-rate schedule to its contract.

    schedule: (tokens, OptimizerConfig, total_tokens) -> learning rate. Raises AssertionError for a rate that
    depends on how the tokens were divided into steps, jumps, or misses zero, the peak or the final rate.
    """

    @for_all(
        total=st.integers(10_000, 10**12),
        warmup_share=st.floats(0.05, 0.5),
        peak=st.floats(1e-5, 1.0),
        final_ratio=st.floats(0.0, 1.0),
        split=st.integers(2, 9),
    )
    def function_of_tokens(
        total: int, warmup_share: float, peak: float, final_ratio: float, split: int
    ) -> None:
        """The rate depends on the tokens alone, and has the shape of `_check_shape`."""
        config = dataclasses.replace(
            OptimizerConfig(),
            warmup_tokens=int(warmup_share * total),
            peak_lr=peak,
            final_lr_ratio=final_ratio,
        )
        coarse = [total * i // 20 for i in range(21)]
        fine = [total * i // (20 * split) for i in range(20 * split + 1)]
        rates = {tokens: schedule(tokens, config, total) for tokens in coarse}
        for tokens in fine:
            rate = schedule(tokens, config, total)
            assert rates.get(tokens, rate) == rate, (
                f"at {tokens} tokens the rate depends on the batch size so far"
            )
        _check_shape(lambda tokens: schedule(tokens, config, total), config, total)


def _check_shape(rate: Callable[[int], float], config: OptimizerConfig, total: int) -> None:
    """Check one rise to the peak and one fall to the final rate, without jumps."""
    peak = config.peak_lr
    warmup = config.warmup_tokens
    final = peak * config.final_lr_ratio
    close = 1e-6 * peak  # float rounding
    assert abs(rate(0)) < close, "the warm-up does not begin at zero"
    assert abs(rate(warmup) - peak) < close, "the peak is not reached at the end of the warm-up"
    assert abs(rate(total) - final) < close, "the final rate is not reached at the last token"
    assert abs(rate(2 * total) - final) < close, "the rate changes after the last token"
    values = [rate(total * i // 1000) for i in range(1001)]
    turn = warmup * 1000 // total
    for i, (before, after) in enumerate(itertools.pairwise(values)):
        # the steepest ramp drawn, a warm-up over 5% of the tokens, rises by 2% of the peak in a thousandth
        assert abs(after - before) < 0.05 * peak, f"the rate jumps near {i / 10:.1f}% of the tokens"
        if i == turn:
            continue
        change = after - before if i < turn else before - after
        assert change > -close, "not one rise and one fall"

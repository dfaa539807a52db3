"""Contracts of an optimizer and of a learning-rate schedule: the properties of paper 2.4 for any implementation.

    from minglm.testing.optim import check_optimizer, check_schedule
    check_optimizer(lambda named_parameters, config: MyMuon(named_parameters, config))
    check_schedule(my_schedule)

Shapes and a seed are drawn by hypothesis; a failing property raises AssertionError.
"""

import copy
import dataclasses
import io
import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from minglm.config import OptimizerConfig
from minglm.testing.strategies import contract, seeds

RMS_BAND = (
    0.6,
    1.3,
)  # singular values after Newton-Schulz lie in 0.68 to 1.21; bfloat16 widens that
shapes = st.tuples(st.integers(2, 16), st.integers(2, 16))


def _draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _train(make_optimizer, weights, gradients, config, rate=0.01):
    """One step per element of `gradients`, [{name: tensor}], from `weights`. Returns the new weights, the optimizer."""
    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in weights.items()}
    optimizer = make_optimizer(list(parameters.items()), config)
    for step in gradients:
        for name, parameter in parameters.items():
            parameter.grad = step[name].clone()
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}, optimizer


def check_optimizer(make_optimizer):
    """Hold an optimizer to Muon's contract.

    make_optimizer: (list of (name, parameter), OptimizerConfig) -> torch.optim.Optimizer whose groups take "lr" from
    outside; names are those of `GLM.named_parameters()`. Raises AssertionError for the first property that fails.
    """
    _check_stack_is_a_loop(make_optimizer)
    _check_transposition(make_optimizer)
    _check_rms(make_optimizer)
    _check_decay(make_optimizer)
    _check_resume(make_optimizer)


def _check_stack_is_a_loop(make_optimizer):
    @contract
    @given(st.integers(1, 5), shapes, seeds)
    def holds(count, shape, seed):
        weights = _draw(seed, count, *shape)
        gradients = [_draw(seed + step, count, *shape) for step in (1, 2, 3)]
        stack = "model.layers.1.mlp.experts.gate_EFD"
        together, _ = _train(
            make_optimizer, {stack: weights}, [{stack: g} for g in gradients], OptimizerConfig()
        )
        names = [f"model.layers.1.mlp.experts.{index}.gate_proj.weight" for index in range(count)]
        one_by_one, _ = _train(
            make_optimizer,
            dict(zip(names, weights)),
            [dict(zip(names, g)) for g in gradients],
            OptimizerConfig(),
        )
        # batched and single products round differently; updates here are about 2e-3, and a wrong rule moves as much
        for index, name in enumerate(names):
            difference = (together[stack][index] - one_by_one[name]).abs().max()
            assert difference < 2e-4, (
                f"expert {index} of a {tuple(weights.shape)} stack is not trained as a matrix"
            )

    holds()


def _check_transposition(make_optimizer):
    @contract
    @given(shapes, seeds)
    def holds(shape, seed):
        name = "model.layers.0.self_attn.o_proj.weight"
        weight, gradients = _draw(seed, *shape), [_draw(seed + step, *shape) for step in (1, 2)]
        upright, _ = _train(
            make_optimizer, {name: weight}, [{name: g} for g in gradients], OptimizerConfig()
        )
        lying, _ = _train(
            make_optimizer, {name: weight.T}, [{name: g.T} for g in gradients], OptimizerConfig()
        )
        difference = (upright[name] - lying[name].T).abs().max()
        assert difference < 2e-4, f"training the transpose of a {shape} matrix gives another result"

    holds()


def _check_rms(make_optimizer):
    @contract
    @given(st.integers(1, 3), shapes, seeds, st.sampled_from([1e-4, 0.01, 100.0]))
    def holds(count, shape, seed, size):
        config = OptimizerConfig(weight_decay=0.0)
        name, rate = "model.layers.1.mlp.experts.down_EDF", 0.01
        weights, gradient = torch.zeros(count, *shape), size * _draw(seed, count, *shape)
        after, _ = _train(make_optimizer, {name: weights}, [{name: gradient}], config, rate)
        rms_E = after[name].square().mean(dim=(1, 2)).sqrt() / (rate * config.update_rms)
        low, high = RMS_BAND
        worst = f"update RMS is {rms_E.min():.3f} to {rms_E.max():.3f} times update_rms * lr for shape {shape}"
        # a drawn matrix may be nearly singular; then one direction of `short` is missing from the update
        short = min(shape)
        assert rms_E.min() > low * ((short - 1) / short) ** 0.5 and rms_E.max() < high, worst

    holds()


def _check_decay(make_optimizer):
    names = (
        "model.layers.0.self_attn.q_proj.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
    )

    @contract
    @given(shapes, seeds, st.floats(0, 0.5))
    def holds(shape, seed, decay):
        weights = {name: _draw(seed + i, *shape) for i, name in enumerate(names)}
        weights[names[2]] = _draw(seed, shape[0])
        nothing = {name: torch.zeros_like(value) for name, value in weights.items()}
        something = {name: _draw(seed + 9, *value.shape) for name, value in weights.items()}
        config, without = OptimizerConfig(weight_decay=decay), OptimizerConfig(weight_decay=0.0)
        rate = 0.01
        still, _ = _train(make_optimizer, weights, [nothing], without, rate)
        shrunk, _ = _train(make_optimizer, weights, [nothing], config, rate)
        moved, _ = _train(make_optimizer, weights, [something], without, rate)
        both, _ = _train(make_optimizer, weights, [something], config, rate)
        for name, value in weights.items():
            assert torch.equal(still[name], value), (
                f"{name} moves without gradient, momentum and decay"
            )
            expected = rate * decay * value if value.ndim > 1 else torch.zeros_like(value)
            for before, after in ((value, shrunk[name]), (moved[name], both[name])):
                error = (before - after - expected).abs().max()
                assert error < 1e-5, (
                    f"the decay of {name} is not lr * weight_decay * weight"
                )  # float32 rounding

    holds()


def _check_resume(make_optimizer):
    layer = "model.layers.1"
    names = (
        f"{layer}.mlp.experts.up_EFD",
        f"{layer}.mlp.gate.weight",
        "lm_head.weight",
        f"{layer}.q_proj.bias",
    )

    @contract
    @given(shapes, seeds)
    def holds(shape, seed):
        config = OptimizerConfig()
        sizes = [(3, *shape), shape, shape, shape[:1]]
        weights = {name: _draw(seed + i, *size) for i, (name, size) in enumerate(zip(names, sizes))}
        steps = [
            {name: _draw(seed + 10 * k, *value.shape) for name, value in weights.items()}
            for k in range(1, 5)
        ]
        straight, _ = _train(make_optimizer, weights, steps, config)
        middle, optimizer = _train(make_optimizer, weights, steps[:2], config)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)

        def resume(named_parameters, config):
            resumed = make_optimizer(named_parameters, config)
            resumed.load_state_dict(copy.deepcopy(saved))
            return resumed

        rest, _ = _train(resume, middle, steps[2:], config)
        for name in names:
            assert torch.equal(rest[name], straight[name]), (
                f"{name} differs after saving, loading and continuing"
            )

    holds()


def check_schedule(schedule):
    """Hold a learning-rate schedule to its contract.

    schedule: (tokens, OptimizerConfig, total_tokens) -> learning rate. Raises AssertionError for a rate that depends on
    how the tokens were divided into steps, jumps, or misses zero, the peak or the final rate.
    """

    @contract
    @given(
        st.integers(10_000, 10**12),
        st.floats(0.05, 0.5),
        st.floats(1e-5, 1.0),
        st.floats(0.0, 1.0),
        st.integers(2, 9),
    )
    def holds(total, warmup_share, peak, final_ratio, split):
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

    holds()


def _check_shape(rate, config, total):
    peak, warmup = config.peak_lr, config.warmup_tokens
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
        rising = i < turn
        assert i == turn or (after - before) * (1 if rising else -1) > -close, (
            "not one rise and one fall"
        )

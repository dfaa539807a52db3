"""Schedules: the paper's values at the paper's boundaries, and independence of the batch."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.config import BalanceConfig, OptimizerConfig, StagesConfig
from minglm.optim import schedule
from minglm.testing.optim import check_schedule

PAPER = OptimizerConfig()
STAGES = StagesConfig()
BALANCE = BalanceConfig()
BILLION, TRILLION = 10**9, 10**12


def test_cosine_and_wsd_keep_the_contract():
    """Both learning rates pass the contract that any schedule can be held to."""
    check_schedule(schedule.learning_rate)
    check_schedule(schedule.learning_rate_wsd)


def test_contract_refuses_a_schedule_in_steps():
    """A schedule that counts its own calls depends on the batch size, and the contract notices."""

    class InSteps:
        calls = 0

        def __call__(self, tokens, config, total_tokens):
            self.calls += 1
            return schedule.learning_rate(
                total_tokens * (self.calls % 1000) / 1000, config, total_tokens
            )

    with pytest.raises(AssertionError, match="batch size"):
        check_schedule(InSteps())


def test_contract_refuses_a_jump_and_a_missing_end():
    """No warm-up, and a cosine that stops short, are noticed too."""
    with pytest.raises(AssertionError):
        check_schedule(lambda tokens, config, total: config.peak_lr)
    with pytest.raises(AssertionError):
        check_schedule(
            lambda tokens, config, total: schedule.learning_rate(tokens, config, 1.1 * total)
        )


def test_paper_values():
    """The default configs give the numbers printed in section 2.4 where the paper says so."""
    total = STAGES.total_tokens
    assert total == 23_100 * BILLION
    assert schedule.learning_rate(0, PAPER, total) == 0
    assert schedule.learning_rate(PAPER.warmup_tokens, PAPER, total) == pytest.approx(2.5e-4)
    assert schedule.learning_rate(total, PAPER, total) == pytest.approx(2.5e-5)
    assert schedule.batch_tokens(0, PAPER) == 16_000_000
    assert schedule.batch_tokens(250 * BILLION, PAPER) == 40_000_000
    assert schedule.batch_tokens(500 * BILLION, PAPER) == 64_000_000
    assert schedule.batch_tokens(total, PAPER) == 64_000_000
    for tokens, rate, weight in (
        (0, 0.001, 0.3),
        (15 * TRILLION - 1, 0.001, 0.3),
        (15 * TRILLION, 0.0, 0.1),
    ):
        assert schedule.bias_rate(tokens, BALANCE, STAGES) == rate
        assert schedule.mtp_weight(tokens, BALANCE, STAGES) == weight
    bases = [stage.rope_theta for _, stage in STAGES.items()]
    assert bases == [10_000, 10_000, 1_000_000, 1_000_000, 1_000_000]


def test_rates_on_the_way():
    """A cosine and a straight line, at points where their values are known."""
    config = OptimizerConfig(warmup_tokens=100, peak_lr=1.0, final_lr_ratio=0.2)
    cosine = {0: 0, 25: 0.25, 100: 1, 600: 0.6, 1100: 0.2, 1200: 0.2}
    cosine[433] = 0.2 + 0.8 * (1 + math.cos(math.pi * 0.333)) / 2
    straight = {0: 0, 50: 0.5, 100: 1, 880: 1, 990: 0.6, 1100: 0.2, 1200: 0.2}
    for tokens, rate in cosine.items():
        assert schedule.learning_rate(tokens, config, 1100) == pytest.approx(rate)
    for tokens, rate in straight.items():
        assert schedule.learning_rate_wsd(tokens, config, 1100) == pytest.approx(rate)
    # a decay that would begin within the warm-up begins at its end
    assert schedule.learning_rate_wsd(600, config, 1100, decay_share=1.0) == pytest.approx(0.6)


@given(st.integers(0, 10**12), st.integers(1, 10**8), st.integers(0, 10**8), st.integers(0, 10**12))
def test_batch_grows_steadily_between_its_ends(tokens, start, growth, ramp):
    """The batch never shrinks, never leaves its range, and grows by less than a token per 'growth / ramp' tokens."""
    config = OptimizerConfig(
        batch_tokens_start=start, batch_tokens_end=start + growth, batch_ramp_tokens=ramp
    )
    now = schedule.batch_tokens(tokens, config)
    later = schedule.batch_tokens(tokens + 1000, config)
    assert start <= now <= later <= start + growth
    assert later - now <= 1000 * growth / max(ramp, 1) + 1 or ramp == 0  # and one for rounding
    assert schedule.batch_tokens(ramp, config) == start + growth


def test_warmup_longer_than_training_is_refused():
    """One line names the field, its value and the limit."""
    with pytest.raises(
        ValueError, match=r"optimizer\.warmup_tokens = 100: must be less than the 100 tokens"
    ):
        schedule.learning_rate(0, OptimizerConfig(warmup_tokens=100), 100)

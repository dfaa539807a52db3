"""The gap between trainer and engine: its numbers are their definitions."""

import pytest
import torch

from minglm.rl.gap import Gap, measure_gap
from minglm.testing.rl import check_gap


def test_the_gap_is_its_definition():
    """Mean, percentile, worst and KL of any differences, none included."""
    check_gap(measure_gap)


def signed(log_ratios_T):
    """Forget the absolute value, so that differences cancel."""
    good = measure_gap(log_ratios_T)
    return good._replace(mean=float(log_ratios_T.double().mean()) if len(log_ratios_T) else 0.0)


def reversed_kl(log_ratios_T):
    """Estimate KL(pi, mu) in place of KL(mu, pi)."""
    return measure_gap(log_ratios_T)._replace(kl=measure_gap(-log_ratios_T).kl)


def interpolated(log_ratios_T):
    """Take a percentile between two tokens."""
    good = measure_gap(log_ratios_T)
    if not len(log_ratios_T):
        return good
    return good._replace(p99=float(torch.quantile(log_ratios_T.double().abs(), 0.99)))


def median(log_ratios_T):
    """Take the middle of the differences for their tail."""
    good = measure_gap(log_ratios_T)
    middle = float(log_ratios_T.double().abs().median()) if len(log_ratios_T) else 0.0
    return Gap(good.mean, middle, good.worst, good.kl)


@pytest.mark.parametrize("broken", [signed, reversed_kl, interpolated, median])
def test_the_check_finds_faults(broken):
    """Each broken twin fails."""
    with pytest.raises(AssertionError):
        check_gap(broken)

"""Polynomials of Newton-Schulz: Keller Jordan's coefficients, and those of Polar Express (paper 2.4).

    s <- a s + b s^3 + c s^5,  (a, b, c) = (3.4445, -4.7750, 2.0315) in every step

The coefficients trade exactness for speed: the slope a at zero is as large as it can be while large values stay
bounded, so the iteration never settles at one. After the paper's N = 5 steps every singular value that was at least
`SMALLEST` of the Frobenius norm lies inside `BAND`; a smaller one has been multiplied by up to a^5 = 485. (BAND comes
from evaluating the scalar map on a fine grid; tests/optim/test_muon.py repeats that.) `polar_express` gives coefficients
that differ from step to step and do settle at one.
"""

import functools

import torch

Coefficients = tuple[float, float, float]
"""(a, b, c) of one step."""

COEFFICIENTS: Coefficients = (3.4445, -4.7750, 2.0315)
SMALLEST = 0.002
BAND = (0.68, 1.21)


@functools.cache
def polar_express(
    steps: int = 5, smallest: float = 1e-3, steepest: float = 0.024, margin: float = 1.01
) -> tuple[Coefficients, ...]:
    """Return (a, b, c) of each step that bring singular values from [smallest, 1] nearest to one in `steps` steps.

    Each polynomial minimizes the largest distance from one on the interval that the step before it has left (Amsel and
    others, arXiv 2505.16932). Two precautions for low precision, as there: no polynomial serves an interval that
    begins below `steepest` of its end, so that no large value is pressed to almost nothing on the way, and each expects
    values `margin` times larger than computed.
    """
    low = smallest
    high = 1.0
    coefficients = []
    for _ in range(steps):
        a, b, c = _nearest_to_one(max(low, steepest * high), high)
        at_low = a * low + b * low**3 + c * low**5
        # Centre the output interval on 1.
        scale = 2 / (at_low + a * high + b * high**3 + c * high**5)
        low = scale * at_low
        high = 2 - low
        coefficients.append((scale * a / margin, scale * b / margin**3, scale * c / margin**5))
    return tuple(coefficients)


def _nearest_to_one(low: float, high: float) -> Coefficients:
    """Return (a, b, c) with the least largest |a s + b s^3 + c s^5 - 1| for s in [low, high], by Remez's algorithm.

    At the solution the error has the same size and alternating signs at four points: both ends, and the two places
    inside where the polynomial's derivative is zero.
    """
    if low > high - 1e-4:  # in the limit: value 1, first and second derivative 0
        middle = (low + high) / 2
        return 1.875 / middle, -1.25 / middle**3, 0.375 / middle**5
    inner = low + (high - low) * torch.tensor([0.25, 0.75], dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    a = b = c = 0.0
    for _ in range(30):
        # Solve a s + b s^3 + c s^5 + sign * error = 1 at the four points.
        points = torch.cat([torch.tensor([low]), inner, torch.tensor([high])])
        system = torch.stack([points, points**3, points**5, signs], 1)
        a, b, c, _ = torch.linalg.solve(system, torch.ones(4, dtype=torch.float64)).tolist()
        # Move the inner points to where the derivative a + 3 b s^2 + 5 c s^4 is zero.
        root = (9 * b * b - 20 * a * c) ** 0.5
        squares = [(-3 * b - root) / (10 * c), (-3 * b + root) / (10 * c)]
        inner = torch.tensor(squares, dtype=torch.float64).sqrt()
    return a, b, c

"""The order of a pipeline's passes, what waits, and what is kept: simulated, and by the published formulas; its stages."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.config import Layout, ModelConfig
from minglm.plan.pipeline import (
    divide_layers,
    end_cost,
    first_layers,
    imbalance,
    kept,
    layer_costs,
    order,
    waiting,
    whole_rounds,
)


@st.composite
def pipelines(draw):
    """Draw a layout and micro-batches that fill it."""
    layout = Layout(draw(st.integers(1, 6)), 1, 1, 1, 1, draw(st.integers(1, 4)))
    if layout.pp == 1:
        layout = layout._replace(interleave=1)
    return layout, whole_rounds(layout, draw(st.integers(1, 20)))


@given(pipelines())
def test_every_pass_is_made_once_and_forward_before_backward(drawn):
    """Each rank computes each micro-batch through each of its stages: once forward, later once backward."""
    layout, microbatches = drawn
    for rank, passes in enumerate(order(layout, microbatches)):
        assert len(passes) == len(set(passes)) == 2 * layout.interleave * microbatches
        assert {one.stage % layout.pp for one in passes} == {rank}
        for one in passes:
            if one.is_forward:
                assert passes.index(one) < passes.index(one._replace(is_forward=False))


@given(pipelines())
def test_what_waits_and_what_is_kept_are_the_published_formulas(drawn):
    """(pp - 1) / v micro-batches of waiting; one micro-batch of all layers kept, or (v + 1) / v less 1 / (pp v)."""
    layout, microbatches = drawn
    pp, v = layout.pp, layout.interleave
    assert waiting(layout, microbatches) == pytest.approx((pp - 1) / v)
    full = 1.0 if v == 1 else (v + 1) / v - 1 / (pp * v)
    assert kept(layout, microbatches) == pytest.approx(min(full, microbatches / pp))


def test_micro_batches_that_are_missing():
    """A pipeline is filled; interleaved stages take as many micro-batches as ranks at a time."""
    assert [whole_rounds(Layout(4, 1, 1, 1, 1), n) for n in (1, 4, 5)] == [4, 4, 5]
    assert [whole_rounds(Layout(4, 1, 1, 1, 1, 2), n) for n in (1, 4, 5)] == [4, 4, 8]


@st.composite
def divided_models(draw):
    """Draw a model with few layers, some dense, a head from negligible to dominant, and a number of stages."""
    layers = draw(st.integers(1, 9))
    model = replace(
        ModelConfig(),
        num_hidden_layers=layers,
        first_k_dense_replace=draw(st.integers(0, layers)),
        intermediate_size=draw(st.sampled_from([256, 12_288, 100_000])),
        vocab_size=draw(st.sampled_from([512, 151_552, 2_000_000])),
        num_nextn_predict_layers=draw(st.integers(0, 1)),
    )
    return model, draw(st.integers(1, layers))


def busiest(model, bounds):
    """Return the costs of the stages whose first layers these are, sorted, the largest first."""
    costs = layer_costs(model)
    ends = [*bounds[1:], len(costs)]
    of_stages = [sum(costs[a:b]) for a, b in zip(bounds, ends, strict=True)]
    of_stages[-1] += end_cost(model)
    return max(of_stages), max(of_stages[:-1], default=0)


@given(divided_models())
def test_no_other_division_has_a_lighter_busiest_stage(drawn):
    """Of all divisions of the layers, none is better; every layer is in one stage, and no stage is empty."""
    model, stages = drawn
    division = divide_layers(model, stages)
    assert [layer for own in division for layer in own] == list(range(model.num_hidden_layers))
    assert len(division) == stages and all(division)
    others = itertools.combinations(range(1, model.num_hidden_layers), stages - 1)
    best = min(busiest(model, (0, *bounds))[0] for bounds in others)
    assert busiest(model, [own.start for own in division])[0] == best


def test_the_ends_of_glm45_are_shared():
    """The last stage has layers less, for the head and the MTP layer; equal numbers would leave it 17 to 45% behind."""
    glm45 = ModelConfig()
    sizes = [len(own) for own in divide_layers(glm45, 4)]
    assert sizes == [25, 24, 24, 19]
    for layout, bound in (((4, 1), 1.02), ((4, 2), 1.02), ((8, 1), 1.06)):
        assert 1 <= imbalance(glm45, Layout(layout[0], 1, 1, 1, 1, layout[1])) < bound
    assert (
        imbalance(glm45, Layout(1, 1, 8, 8, 1)) == first_layers(glm45, Layout(1, 1, 8, 8, 1)) == 1
    )
    assert first_layers(glm45, Layout(4, 1, 1, 1, 1)) == pytest.approx(25 / 23)

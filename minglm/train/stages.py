"""Make the five stages of pre- and mid-training phases under one schedule (paper 2.2 to 2.4, Figure 3).

The stages differ in data, sequence length, packing and rotary base. Learning rate, batch size, bias rate and
MTP weight are functions of the tokens seen since training began (`minglm.optim.schedule`), whatever the
stage.
"""

from functools import partial

from minglm.config import RunConfig, Schedule
from minglm.optim import schedule
from minglm.train.loop import Phase

LEARNING_RATES = {
    Schedule.COSINE: schedule.learning_rate,
    Schedule.WSD: schedule.learning_rate_wsd,
}


def phases(run: RunConfig) -> list[Phase]:
    """Return the `Phase` of every stage that has tokens, in order."""
    learning_rate = partial(
        LEARNING_RATES[run.optimizer.schedule],
        config=run.optimizer,
        total_tokens=run.stages.total_tokens,
    )
    batch_tokens = partial(schedule.batch_tokens, config=run.optimizer)
    mtp_weight = partial(schedule.mtp_weight, balance=run.balance, stages=run.stages)
    bias_rate = partial(schedule.bias_rate, balance=run.balance, stages=run.stages)

    result = []
    start = 0  # tokens of the stages before
    for name, stage in run.stages.items():
        if stage.tokens:
            phase = Phase(
                name=name,
                tokens=stage.tokens,
                start=start,
                sequence_length=stage.sequence_length,
                learning_rate=learning_rate,
                batch_tokens=batch_tokens,
                mtp_weight=mtp_weight,
                bias_rate=bias_rate,
                balance_weight=run.balance.sequence_loss_weight,
                optimizer=run.optimizer,
            )
            result.append(phase)
        start += stage.tokens
    return result

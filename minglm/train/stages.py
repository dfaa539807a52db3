"""Pre- and mid-training as five phases under one schedule (paper 2.2 to 2.4, Figure 3).

The stages differ in data, sequence length, packing and rotary base. Learning rate, batch size, bias rate and MTP weight
are functions of the tokens seen since the very beginning (`minglm.optim.schedule`), whatever the stage.
"""

from functools import partial

from minglm.optim import schedule
from minglm.train.loop import Phase


def phases(run):
    """The `Phase` of every stage that has tokens, in order."""
    found, start, total = [], 0, run.stages.total_tokens
    rate = {"cosine": schedule.learning_rate, "wsd": schedule.learning_rate_wsd}[
        run.optimizer.schedule
    ]
    for name, stage in run.stages.items():
        if stage.tokens:
            found.append(
                Phase(
                    name,
                    stage.tokens,
                    start,
                    stage.sequence_length,
                    partial(rate, config=run.optimizer, total_tokens=total),
                    partial(schedule.batch_tokens, config=run.optimizer),
                    partial(schedule.mtp_weight, balance=run.balance, stages=run.stages),
                    partial(schedule.bias_rate, balance=run.balance, stages=run.stages),
                    run.balance.sequence_loss_weight,
                    run.optimizer.microbatch_tokens,
                    run.optimizer.clip_norm,
                    run.optimizer.spike_factor,
                    run.optimizer.rollback_after,
                )
            )
        start += stage.tokens
    return found

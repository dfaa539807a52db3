"""Generate: `Engine(model, tokenizer).generate(requests)` is the one entry for chat, evaluation and RL."""

from minglm.inference.engine import Engine
from minglm.inference.request import Completion, Event, FinishReason, Request

__all__ = ["Completion", "Engine", "Event", "FinishReason", "Request"]

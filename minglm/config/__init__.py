"""The configuration of a run: frozen dataclasses, loaded from a Python file and overridden by name.

run = load_config("configs/toy.py", ["--seed", "1"])
"""

from minglm.config.data import DataConfig
from minglm.config.model import ModelConfig
from minglm.config.posttraining import (
    EvaluationConfig,
    ExpertConfig,
    PostTrainingConfig,
    RLConfig,
    SFTConfig,
)
from minglm.config.run import RunConfig, load_config
from minglm.config.training import BalanceConfig, OptimizerConfig, StageConfig, StagesConfig

__all__ = [
    "BalanceConfig",
    "DataConfig",
    "EvaluationConfig",
    "ExpertConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PostTrainingConfig",
    "RLConfig",
    "RunConfig",
    "SFTConfig",
    "StageConfig",
    "StagesConfig",
    "load_config",
]

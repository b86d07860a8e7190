"""Train a PyTorch model inside a byte budget: keep, recompute or compress each activation."""

from graphplan.codecs import CODECS
from graphplan.device import Device
from graphplan.errors import (
    BackwardError,
    BudgetError,
    CaptureError,
    GraphplanError,
    InfeasibleBudget,
    PlanFormatError,
    PlanMismatch,
    PromiseBroken,
    StepFailed,
    UnsupportedModel,
    UnsupportedOptimizer,
)
from graphplan.measure import Measurement, measure
from graphplan.noise import Noise, estimate_noise
from graphplan.pareto import pareto
from graphplan.plan import Decision, Plan
from graphplan.planned import PlannedModule, apply, optimize
from graphplan.step import TrainStep, train_step
from graphplan.verify import Report, verify

__version__ = "0.1.0"

__all__ = [
    "CODECS",
    "BackwardError",
    "BudgetError",
    "CaptureError",
    "Decision",
    "Device",
    "GraphplanError",
    "InfeasibleBudget",
    "Measurement",
    "Noise",
    "Plan",
    "PlanFormatError",
    "PlanMismatch",
    "PlannedModule",
    "PromiseBroken",
    "Report",
    "StepFailed",
    "TrainStep",
    "UnsupportedModel",
    "UnsupportedOptimizer",
    "apply",
    "estimate_noise",
    "measure",
    "optimize",
    "pareto",
    "train_step",
    "verify",
]

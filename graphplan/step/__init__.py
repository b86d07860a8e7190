"""Whole-step planning: forward, loss, backward and update as one program."""

from graphplan.step.train import TrainStep, apply_step, train_step

__all__ = ["TrainStep", "apply_step", "train_step"]

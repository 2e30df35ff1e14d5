"""Floor 7: training with exact resume."""

from headwise.train.evaluate import EvalResult, evaluate
from headwise.train.loop import TrainResult, resume, train, train_or_resume
from headwise.train.settings import TrainSettings

__all__ = ["EvalResult", "TrainResult", "TrainSettings", "evaluate", "resume", "train", "train_or_resume"]

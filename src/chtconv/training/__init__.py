"""Training runs: their configuration, loop and folder."""

from chtconv.training.config import Config
from chtconv.training.evaluate import TrainingDiverged
from chtconv.training.loop import OutOfTime, train
from chtconv.training.recipes import RECIPES, recipe
from chtconv.training.run_folder import RunFolder

__all__ = ["RECIPES", "Config", "OutOfTime", "RunFolder", "TrainingDiverged", "recipe", "train"]

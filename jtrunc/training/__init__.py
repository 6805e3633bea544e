"""Training: one train step, chunks of steps on the device, seeds, checkpoints, metrics and plots."""

from jtrunc.training.checkpoint import CheckpointError as CheckpointError
from jtrunc.training.configuration import ConfigurationError as ConfigurationError
from jtrunc.training.evaluate import Evaluation as Evaluation
from jtrunc.training.evaluate import evaluate as evaluate
from jtrunc.training.loop import train as train
from jtrunc.training.metrics import read_metrics as read_metrics
from jtrunc.training.processes import start_processes as start_processes
from jtrunc.training.runner import NonFiniteError as NonFiniteError
from jtrunc.training.runner import TrainingInterrupted as TrainingInterrupted
from jtrunc.training.runner import TrainResult as TrainResult
from jtrunc.training.seeds import seed_key as seed_key
from jtrunc.training.step import StepMetrics as StepMetrics
from jtrunc.training.step import TrainState as TrainState
from jtrunc.training.step import init_state as init_state
from jtrunc.training.step import train_step as train_step

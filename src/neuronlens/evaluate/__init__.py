"""What interventions do to a model: its answers, and its last hidden states."""

from neuronlens.evaluate.deviation import Deviation, hidden_state_deviation
from neuronlens.evaluate.evaluation import Answered, AskedQuestion, Evaluation
from neuronlens.evaluate.folder import AnswerRecord, Manifest
from neuronlens.evaluate.generation import BEAMS, GREEDY, Generation
from neuronlens.evaluate.resampling import RESAMPLES, Estimated
from neuronlens.evaluate.response import ResponseLoss, ResponseToken, response_loss
from neuronlens.evaluate.run import evaluate

__all__ = [
    "BEAMS",
    "GREEDY",
    "RESAMPLES",
    "AnswerRecord",
    "Answered",
    "AskedQuestion",
    "Deviation",
    "Estimated",
    "Evaluation",
    "Generation",
    "Manifest",
    "ResponseLoss",
    "ResponseToken",
    "evaluate",
    "hidden_state_deviation",
    "response_loss",
]

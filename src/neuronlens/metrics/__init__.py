"""How good answers are: the official metrics of the data sets, and judges."""

from neuronlens.metrics.distance import ANLS, anls, levenshtein
from neuronlens.metrics.judge import ChatJudge, Verdict
from neuronlens.metrics.lingo import LingoJudge
from neuronlens.metrics.metric import Measures, Metric
from neuronlens.metrics.normalise import normalised
from neuronlens.metrics.options import OptionLetter, option_letter
from neuronlens.metrics.vqa import VQAAccuracy, vqa_accuracy
from neuronlens.metrics.words import ExactMatch, Mentions, exact_match, mentions

__all__ = [
    "ANLS",
    "ChatJudge",
    "ExactMatch",
    "LingoJudge",
    "Measures",
    "Mentions",
    "Metric",
    "OptionLetter",
    "VQAAccuracy",
    "Verdict",
    "anls",
    "exact_match",
    "levenshtein",
    "mentions",
    "normalised",
    "option_letter",
    "vqa_accuracy",
]

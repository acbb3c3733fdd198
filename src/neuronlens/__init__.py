"""What does each neuron of a vision-language model do, and can we believe it?

The pipeline, in order: `adapt` a model, `read_samples`, `look` at one neuron or `scan` them
all into an `Atlas`, classify with `NeuronClassifier`, re-record `exemplars`,
`explain_neurons`, and `report`. Every stage takes the products of earlier ones, and every
product can be saved.
"""

from importlib import import_module as _import_module
from types import ModuleType as _ModuleType

from neuronlens.activations import Routed
from neuronlens.adapters import ModelAdapter, adapt, register
from neuronlens.atlas import Atlas
from neuronlens.classify import Classification, NeuronClassifier
from neuronlens.concepts import ConceptCount, count_concepts
from neuronlens.domains import DomainNeurons, dape, domain_neurons
from neuronlens.embeddings import image_embeddings, principal_components
from neuronlens.errors import NeuronLensError
from neuronlens.evaluate import (
    BEAMS,
    GREEDY,
    Evaluation,
    Generation,
    ResponseLoss,
    evaluate,
    hidden_state_deviation,
    response_loss,
)
from neuronlens.exemplars import Exemplar, exemplars, look
from neuronlens.explain import (
    ChatExplainer,
    DissectionExplainer,
    Explainer,
    ExplanationJob,
)
from neuronlens.explanation import Explanation, Failure
from neuronlens.intervene import (
    Intervention,
    amplify,
    by_sample,
    deactivate,
    random_control,
    set_to,
)
from neuronlens.lens import LogitLens
from neuronlens.neurons import NeuronId, NeuronSite
from neuronlens.questions import PROMPTS, Prompt, Question, read_questions
from neuronlens.recorder import ActivationRecorder, Sink, record
from neuronlens.report import Control, report
from neuronlens.samples import Annotation, Sample, annotate, encode, read_samples
from neuronlens.scan import ScanSize, scan, scan_size
from neuronlens.score import Score
from neuronlens.segment import AnnotationSegmenter, Segmenter
from neuronlens.simulate import (
    ChatSimulator,
    ExpectedValueSimulator,
    MaskSimulator,
    Simulation,
    SimulationJob,
    Simulator,
    WordSimulator,
)
from neuronlens.study import Study, estimate_study, explain_neurons
from neuronlens.tokens import Role, TokenMap

__all__ = [
    "BEAMS",
    "GREEDY",
    "PROMPTS",
    "ActivationRecorder",
    "Annotation",
    "AnnotationSegmenter",
    "Atlas",
    "ChatExplainer",
    "ChatSimulator",
    "Classification",
    "ConceptCount",
    "Control",
    "DissectionExplainer",
    "DomainNeurons",
    "Evaluation",
    "Exemplar",
    "ExpectedValueSimulator",
    "Explainer",
    "Explanation",
    "ExplanationJob",
    "Failure",
    "Generation",
    "Intervention",
    "LogitLens",
    "MaskSimulator",
    "ModelAdapter",
    "NeuronClassifier",
    "NeuronId",
    "NeuronLensError",
    "NeuronSite",
    "Prompt",
    "Question",
    "ResponseLoss",
    "Role",
    "Routed",
    "Sample",
    "ScanSize",
    "Score",
    "Segmenter",
    "Simulation",
    "SimulationJob",
    "Simulator",
    "Sink",
    "Study",
    "TokenMap",
    "WordSimulator",
    "adapt",
    "amplify",
    "annotate",
    "by_sample",
    "count_concepts",
    "dape",
    "deactivate",
    "domain_neurons",
    "encode",
    "estimate_study",
    "evaluate",
    "exemplars",
    "explain_neurons",
    "hidden_state_deviation",
    "image_embeddings",
    "look",
    "principal_components",
    "random_control",
    "read_questions",
    "read_samples",
    "record",
    "register",
    "report",
    "response_loss",
    "scan",
    "scan_size",
    "set_to",
]

_NAMESPACES = ("adapters", "chat", "figures", "metrics", "segment", "testbed", "testing")


def __getattr__(name: str) -> _ModuleType:
    if name in _NAMESPACES:
        return _import_module(f"neuronlens.{name}")
    raise AttributeError(f"module 'neuronlens' has no attribute {name!r}")

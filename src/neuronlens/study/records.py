"""What a study records of each neuron, of each sample, and of itself."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel

from neuronlens.atlas import SampleRecord
from neuronlens.classify import Category
from neuronlens.explanation import Explanation
from neuronlens.neurons import NeuronId
from neuronlens.score import Score
from neuronlens.show import Html, table


class TokenRecord(BaseModel, defer_build=True):
    """A neuron on one of its exemplars: true and simulated activations, token by token.

    Attributes:
        position: Of the sample in the scan; its tokens are in `Study.samples`.
        rank: Among the neuron's top samples; None for a random one.
        use: What the exemplar served for.
        true: act_fn outputs.
        simulated: Predicted activations, None where nothing was predicted; empty for
            exemplars that served to explain.
    """

    position: int
    rank: int | None
    use: Literal["explain", "held_out"]
    true: list[float]
    simulated: list[float | None]


class Candidate(BaseModel, defer_build=True):
    """One of several explanations of a neuron.

    Attributes:
        explanation: What it says.
        score: On the validation exemplars, which are neither explained from nor held out; None
            if it could not be simulated or its score is undefined.
    """

    explanation: Explanation
    score: float | None


class Said(BaseModel, defer_build=True):
    """What was said of one neuron: an explanation, or why there is none."""

    neuron: str
    explanation: Explanation | None
    failure: str | None = None
    passing: bool = False
    asked: str | None = None
    candidates: list[Candidate] = []


class Traces(BaseModel, defer_build=True):
    """A neuron's activations on its exemplars."""

    neuron: str
    exemplars: list[TokenRecord]


class NeuronRecord(BaseModel, defer_build=True):
    """Everything a study found out about one neuron.

    Attributes:
        neuron: As `NeuronId.parse` reads it.
        stream: The token axis its activations run along.
        category: What it was classified as.
        probability: (p_v, p_t, p_m, p_u) by category.
        maximum: Its largest activation over the scan.
        explanation: None if it could not be explained.
        score: On the held-out exemplars; None if it could not be simulated.
        null: Scores, on the same exemplars, of other neurons' explanations.
        null_failures: How many more were drawn for the null and could not be simulated.
        failure: Why there is no explanation or no score.
        passing: Whether that may be gone in a moment: the next call tries this neuron again.
        asked: Keys of the requests behind explanation and simulation, in the study's replies.
            Those behind the null and the candidates' scores are not noted.
        candidates: All explanations it was chosen from, by score on the validation ranks; empty
            if there was one only.
    """

    neuron: str
    stream: str
    category: Category
    probability: dict[Category, float]
    maximum: float
    explanation: Explanation | None
    score: Score | None
    null: list[float]
    null_failures: int = 0
    failure: str | None
    passing: bool = False
    asked: list[str] = []
    candidates: list[Candidate] = []

    @property
    def id(self) -> NeuronId:
        """The neuron."""
        return NeuronId.parse(self.neuron)

    @property
    def all_asked(self) -> list[str]:
        """Keys of all requests a study keeps of it: those of `asked`, and of its candidates."""
        candidates = [each.explanation.asked for each in self.candidates]
        return list(dict.fromkeys([*self.asked, *(key for key in candidates if key is not None)]))

    @property
    def null_mean(self) -> float | None:
        """Mean score of other neurons' explanations; None without any."""
        return sum(self.null) / len(self.null) if self.null else None

    def _repr_html_(self) -> Html:
        shown = [
            ("category", self.category),
            ("probability", ", ".join(f"{c} {p:.2f}" for c, p in self.probability.items())),
            (
                "explanation",
                self.explanation.sentence if self.explanation else f"none: {self.failure}",
            ),
        ]
        if self.score is not None:
            shown.append(
                ("score beside its null", f"{shown_score(self.score)} / {shown_null(self)}")
            )
            for name, side in (("visual", self.score.visual), ("text", self.score.text)):
                if side is not None:
                    shown.append((f"r on {name} tokens", side.undefined or as_text(side.r)))
        return table(["neuron", self.neuron], shown)


class SampleTokens(BaseModel, defer_build=True):
    """The tokens of a sample on one stream, as the records' activations count them.

    Attributes:
        position: Of the sample in the scan.
        stream: The token axis.
        sample: What was shown to the model.
        role: `Role` of each token.
        image: Number of the image that a visual token sees; -1 elsewhere.
        box: What a token sees, in pixels of the image; None where that is no single region.
        pieces: The text of each token, where the stream has text.
    """

    position: int
    stream: str
    sample: SampleRecord
    role: list[int]
    image: list[int]
    box: list[list[float] | None]
    pieces: list[str] | None


class StudyManifest(BaseModel, defer_build=True):
    """What a study was made of and with.

    Attributes:
        model: Fingerprint of the model.
        model_name: Where it was loaded from.
        readings: Of the scan and the classification.
        data: Fingerprint of the scanned samples.
        neurons: Which neurons, in the order asked for; how many are recorded may be fewer.
        explainer: Class of the explainer.
        simulators: Class of the simulator of each modality.
        settings: What the explainer's and simulators' answers depend on.
        loaded: By modality, the name of what a simulator by default loaded once it was needed.
        sampling: How the explaining exemplars were chosen.
        explain: Ranks explained from.
        held_out: Ranks scored on.
        validate_ranks: Ranks by which one of several explanations is chosen.
        best_of: How many explanations of each neuron one is chosen from.
        null_draws: Other neurons' explanations per neuron.
        seed: Of all draws.
    """

    model: str
    model_name: str
    data: str = ""
    neurons: list[str] = []
    readings: dict[str, Any]
    explainer: str
    simulators: dict[str, str]
    settings: dict[str, dict[str, Any]] = {}
    loaded: dict[str, str] = {}
    sampling: str
    explain: tuple[int, ...]
    held_out: tuple[int, ...]
    validate_ranks: tuple[int, ...] = ()
    best_of: int = 1
    null_draws: int
    seed: int


def as_text(value: float | None) -> str:
    """A number of a table; a dash for none."""
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def shown_score(score: Score) -> str:
    """A score with its interval over samples."""
    if score.interval is None:
        return as_text(score.value)
    low, high = score.interval
    return f"{as_text(score.value)} ({low:.2f} to {high:.2f})"


def shown_null(record: NeuronRecord) -> str:
    """A neuron's mean null; says so if none was drawn, and if some could not be simulated."""
    failed, drawn = record.null_failures, record.null_failures + len(record.null)
    if not drawn:
        return "no null was drawn"
    said = as_text(record.null_mean)
    return f"{said} ({failed} of {drawn} draws failed)" if failed else said

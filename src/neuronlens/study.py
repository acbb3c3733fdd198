"""Explain, simulate, score: what chosen neurons find, and whether that can be believed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError

from neuronlens.adapters import ModelAdapter
from neuronlens.atlas import Atlas, SampleRecord, new_folder
from neuronlens.classify import CATEGORIES, Category, Classification, NeuronClassifier
from neuronlens.errors import AtlasError, DataError, MissingExtraError, UnknownNameError
from neuronlens.exemplars import (
    EXPLAIN_RANKS,
    HELD_OUT_RANKS,
    Exemplar,
    NeuronExemplars,
    exemplars,
)
from neuronlens.explain import DissectionExplainer, Explainer, ExplanationJob
from neuronlens.explanation import Explanation, Failure
from neuronlens.neurons import NeuronId
from neuronlens.samples import Sample
from neuronlens.score import ModalityScore, Score, Summary, modality_score, summarise
from neuronlens.segment import AnnotationSegmenter
from neuronlens.show import Html, table
from neuronlens.simulate import MaskSimulator, SimulationJob, Simulator, WordSimulator

if TYPE_CHECKING:
    import pandas as pd

NULL_DRAWS: Final = 5

Model = TypeVar("Model", bound=BaseModel)


class TokenRecord(BaseModel):
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


class NeuronRecord(BaseModel):
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
        failure: Why there is no explanation or no score.
        exemplars: Activations on each exemplar.
    """

    neuron: str
    stream: str
    category: Category
    probability: dict[Category, float]
    maximum: float
    explanation: Explanation | None
    score: Score | None
    null: list[float]
    failure: str | None
    exemplars: list[TokenRecord]

    @property
    def id(self) -> NeuronId:
        """The neuron."""
        return NeuronId.parse(self.neuron)

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
                ("score beside its null", f"{_text(self.score.value)} / {_text(self.null_mean)}")
            )
            for name, side in (("visual", self.score.visual), ("text", self.score.text)):
                if side is not None:
                    shown.append((f"r on {name} tokens", side.undefined or _text(side.r)))
        return table(["neuron", self.neuron], shown)


class SampleTokens(BaseModel):
    """The tokens of a sample on one stream, as the records' activations count them."""

    sample: SampleRecord
    stream: str
    role: list[int]
    image: list[int]
    box: list[list[float] | None]
    pieces: list[str] | None


class StudyManifest(BaseModel):
    """What a study was made of and with.

    Attributes:
        model: Fingerprint of the model.
        model_name: Where it was loaded from.
        readings: Of the scan and the classification.
        explainer: Class of the explainer.
        sampling: How the explaining exemplars were chosen.
        null_draws: Other neurons' explanations per neuron.
        seed: Of all draws.
    """

    model: str
    model_name: str
    readings: dict[str, Any]
    explainer: str
    sampling: str
    null_draws: int
    seed: int


class Study(Mapping[NeuronId, NeuronRecord]):
    """Explanations and scores of neurons, each score beside its null.

    Attributes:
        manifest: What it was made with.
        records: By neuron.
        samples: The tokens of every exemplar, by (position, stream).
    """

    def __init__(
        self,
        manifest: StudyManifest,
        records: Iterable[NeuronRecord],
        samples: Iterable[SampleTokens],
    ) -> None:
        self.manifest = manifest
        self.records = {record.id: record for record in records}
        self.samples = {(each.sample.position, each.stream): each for each in samples}

    def __getitem__(self, neuron: NeuronId) -> NeuronRecord:
        if neuron not in self.records:
            raise UnknownNameError("neuron in this study", neuron, self.records)
        return self.records[neuron]

    def __iter__(self) -> Iterator[NeuronId]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def summary(self) -> dict[Category, Summary]:
        """Mean score of each category."""
        return {
            category: summarise(
                [
                    record.score
                    for record in self.records.values()
                    if record.category == category and record.score is not None
                ]
            )
            for category in CATEGORIES
            if any(record.category == category for record in self.records.values())
        }

    def failures(self) -> dict[str, int]:
        """How many neurons could not be explained or simulated, by reason."""
        return dict(Counter(r.failure for r in self.records.values() if r.failure is not None))

    def null(self) -> dict[Category, float]:
        """Mean null score of each category, over neurons that have one."""
        means: dict[Category, list[float]] = {}
        for record in self.records.values():
            if record.null_mean is not None:
                means.setdefault(record.category, []).append(record.null_mean)
        return {category: float(np.mean(values)) for category, values in means.items()}

    def agreeing(self, r: float = 0.5) -> list[NeuronId]:
        """Neurons whose held-out correlation is at least `r` on every modality that counts."""
        found = []
        for neuron, record in self.records.items():
            score = record.score or Score()
            sides = [side for side in (score.visual, score.text) if side is not None]
            if sides and all(side.r is not None and side.r >= r for side in sides):
                found.append(neuron)
        return found

    def table(self) -> pd.DataFrame:
        """One row per neuron: category, explanation, score beside its null.

        Raises:
            MissingExtraError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise MissingExtraError("pandas", "table", "A data frame") from None
        return pd.DataFrame([_row(record) for record in self.records.values()])

    def save(self, out: str | Path) -> None:
        """Write the study to a new folder.

        Raises:
            OutputError: If the folder exists and is not empty, or cannot be written.
        """
        with new_folder(out) as folder:
            _write_lines(folder / "records.jsonl", self.records.values())
            _write_lines(folder / "samples.jsonl", self.samples.values())
            text = self.manifest.model_dump_json(indent=1) + "\n"
            (folder / "manifest.json").write_text(text, encoding="utf-8")

    @classmethod
    def open(cls, path: str | Path) -> Study:
        """Read a study from its folder.

        Raises:
            DataError: If the folder is no whole study.
        """
        path = Path(path)
        try:
            manifest = StudyManifest.model_validate_json(
                (path / "manifest.json").read_text("utf-8")
            )
            records = _read_lines(path / "records.jsonl", NeuronRecord)
            samples = _read_lines(path / "samples.jsonl", SampleTokens)
        except (OSError, ValidationError) as error:
            raise DataError(f"{path} is no whole study: {error}") from error
        return cls(manifest, records, samples)

    def _repr_html_(self) -> Html:
        rows = []
        for record in sorted(self.records.values(), key=_falling):
            row = _row(record)
            rows.append(
                [
                    row["neuron"],
                    row["category"],
                    row["explanation"] or row["failure"],
                    *(_text(row[name]) for name in ("score", "null", "r_visual", "r_text")),
                ]
            )
        means, nulls = self.summary(), self.null()
        said = "; ".join(
            f"{category}: mean score {_text(each.mean)} (null {_text(nulls.get(category))}, "
            f"{each.neurons} neurons, {each.constant_predictions} constant predictions as 0, "
            f"{each.undefined} undefined)"
            for category, each in means.items()
        )
        head = ["neuron", "category", "explanation", "score", "null", "r visual", "r text"]
        return table(head, rows[:30], f"{len(rows)} neurons. {said}")


def _falling(record: NeuronRecord) -> float:
    """Sorts the best score first, what has none last."""
    value = None if record.score is None else record.score.value
    return 2.0 if value is None else -value


def _row(record: NeuronRecord) -> dict[str, Any]:
    score = record.score or Score()
    return {
        "neuron": record.neuron,
        "category": record.category,
        "explanation": record.explanation.sentence if record.explanation else None,
        "score": score.value,
        "null": record.null_mean,
        "score_per_sample": score.per_sample,
        "r_visual": score.visual.r if score.visual else None,
        "r_text": score.text.r if score.text else None,
        "failure": record.failure,
    }


def _text(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def _write_lines(path: Path, models: Iterable[BaseModel]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(model.model_dump_json() + "\n" for model in models)


def _read_lines(path: Path, kind: type[Model]) -> list[Model]:
    with path.open(encoding="utf-8") as file:
        return [kind.model_validate_json(line) for line in file]


def explain_neurons(
    adapter: ModelAdapter,
    atlas: Atlas,
    neurons: Iterable[NeuronId],
    *,
    explainer: Explainer | None = None,
    visual_simulator: Simulator | None = None,
    text_simulator: Simulator | None = None,
    kinds: Classification | None = None,
    out: str | Path | None = None,
    sampling: Literal["top", "random"] = "top",
    explain: Sequence[int] = EXPLAIN_RANKS,
    held_out: Sequence[int] = HELD_OUT_RANKS,
    samples: Sequence[Sample] | None = None,
    null_draws: int = NULL_DRAWS,
    seed: int = 0,
    batch_size: int = 8,
) -> Study:
    """Explain neurons, simulate them from the explanation alone, and score the simulation.

    A neuron's category decides what counts: visual tokens, text tokens, or (for multi-modal
    and unknown neurons) the mean of both. Beside each score stands its null: the explanations
    of other neurons of the same category, scored on the same exemplars.

    Args:
        adapter: Of the scanned model.
        atlas: The scan.
        neurons: Which neurons.
        explainer: Says what they find; by default the concept from the samples' annotations
            that fits best.
        visual_simulator: Predicts visual tokens; by default from the annotations' masks.
        text_simulator: Predicts text tokens; by default where the explanation's words stand.
        kinds: The classification; by default with P1's constants.
        out: Folder to write the study to; None keeps it in memory.
        sampling: Explain from top samples, or from random ones.
        explain: Ranks to explain from.
        held_out: Ranks to score on.
        samples: The scanned samples, if the atlas cannot find them again.
        null_draws: How many other neurons' explanations to score for the null.
        seed: Of all draws.
        batch_size: Samples per forward.

    Source: P1, sections 3.3 and 4.5.

    Raises:
        AtlasError: If atlas, classification and model do not belong together.
        OutputError: If `out` holds something, or cannot be written.
    """
    kinds = kinds or NeuronClassifier().classify(atlas)
    if kinds.model != atlas.manifest.model.fingerprint:
        raise AtlasError(
            "The classification is of another model than the atlas. Classify this atlas: "
            "kinds = NeuronClassifier(...).classify(atlas)."
        )
    explainer = explainer or DissectionExplainer()
    simulators = {
        "visual": visual_simulator or MaskSimulator(AnnotationSegmenter()),
        "text": text_simulator or WordSimulator(),
    }
    found = exemplars(
        adapter,
        atlas,
        neurons,
        explain=explain,
        held_out=held_out,
        sampling=sampling,
        samples=samples,
        seed=seed,
        batch_size=batch_size,
    )
    category = {neuron: kinds.of(neuron) for neuron in found}
    said = dict(
        zip(
            found,
            explainer.explain(
                [
                    ExplanationJob(neuron, category[neuron], each.explain)
                    for neuron, each in found.items()
                ]
            ),
            strict=True,
        )
    )
    explained = {n: e for n, e in said.items() if isinstance(e, Explanation)}
    nulls = _null_explanations(explained, category, null_draws, seed)
    trials = [(n, e) for n, e in explained.items()] + [(n, e) for n in nulls for e in nulls[n]]
    results = _score_all([(found[n], category[n], e) for n, e in trials], simulators)
    own: dict[NeuronId, _Result] = dict(zip(explained, results, strict=False))
    of_null: dict[NeuronId, list[float]] = {neuron: [] for neuron in found}
    for (neuron, _), (score, _) in zip(
        trials[len(explained) :], results[len(explained) :], strict=True
    ):
        if isinstance(score, Score) and score.value is not None:
            of_null[neuron].append(score.value)

    records = []
    for neuron, each in found.items():
        answer = said[neuron]
        score, simulated = own[neuron] if isinstance(answer, Explanation) else (answer, [])
        records.append(
            NeuronRecord(
                neuron=str(neuron),
                stream=adapter.site(neuron.site).stream,
                category=category[neuron],
                probability=kinds.probability(neuron),
                maximum=each.maximum,
                explanation=explained.get(neuron),
                score=score if isinstance(score, Score) else None,
                null=of_null[neuron],
                failure=score.reason if isinstance(score, Failure) else None,
                exemplars=[
                    *(_token_record(e, "explain", None) for e in each.explain),
                    *(
                        _token_record(e, "held_out", simulated[i] if simulated else None)
                        for i, e in enumerate(each.held_out)
                    ),
                ],
            )
        )
    manifest = StudyManifest(
        model=atlas.manifest.model.fingerprint,
        model_name=atlas.manifest.model.name,
        readings=kinds.readings,
        explainer=type(explainer).__name__,
        sampling=sampling,
        null_draws=null_draws,
        seed=seed,
    )
    study = Study(manifest, records, _sample_tokens(adapter, atlas, found.values()))
    if out is not None:
        study.save(out)
    return study


def _null_explanations(
    explained: Mapping[NeuronId, Explanation],
    category: Mapping[NeuronId, Category],
    draws: int,
    seed: int,
) -> dict[NeuronId, list[Explanation]]:
    """For each neuron, explanations of other neurons of its category."""
    drawn = {}
    for number, neuron in enumerate(explained):
        others = [n for n in explained if n != neuron and category[n] == category[neuron]]
        rng = np.random.default_rng([seed, 1, number])
        chosen = rng.permutation(len(others))[:draws]
        drawn[neuron] = [explained[others[i]] for i in chosen]
    return drawn


_Result = tuple[Score | Failure, list[np.ndarray]]


def _score_all(
    trials: Sequence[tuple[NeuronExemplars, Category, Explanation]],
    simulators: Mapping[str, Simulator],
) -> list[_Result]:
    """Simulate and score every trial; each simulator gets all its jobs in one call."""
    answers: dict[tuple[int, str], list[Any]] = {}
    for modality, simulator in simulators.items():
        mine = [i for i, (_, category, _) in enumerate(trials) if modality in _counting(category)]
        jobs = [
            SimulationJob(trials[i][2], e.sample, e.tokens)
            for i in mine
            for e in trials[i][0].held_out
        ]
        replies = iter(simulator.simulate(jobs))
        for i in mine:
            answers[i, modality] = [next(replies) for _ in trials[i][0].held_out]
    return [
        _score_one(found.held_out, {m: answers[i, m] for m in _counting(category)})
        for i, (found, category, _) in enumerate(trials)
    ]


def _counting(category: Category) -> tuple[str, ...]:
    return ("visual", "text") if category in ("multimodal", "unknown") else (category,)


def _score_one(held_out: Sequence[Exemplar], answers: Mapping[str, Sequence[Any]]) -> _Result:
    if not held_out:
        return Failure("no held-out exemplar"), []
    for modality, replies in answers.items():
        for reply in replies:
            if isinstance(reply, Failure):
                return Failure(f"{modality} simulation: {reply.reason}"), []
    simulated = [np.full(len(each.tokens), np.nan) for each in held_out]
    sides: dict[str, ModalityScore] = {}
    for modality, replies in answers.items():
        pairs = []
        for each, reply, whole in zip(held_out, replies, simulated, strict=True):
            at = each.visual if modality == "visual" else each.text
            whole[at] = reply.values[at]
            pairs.append((each.activation[at], reply.values[at]))
        sides[modality] = modality_score(pairs)
    return Score(**sides), simulated


def _token_record(
    exemplar: Exemplar, use: Literal["explain", "held_out"], simulated: np.ndarray | None
) -> TokenRecord:
    if exemplar.position is None:
        raise ValueError("Only exemplars of a scan can be recorded.")
    return TokenRecord(
        position=exemplar.position,
        rank=exemplar.rank,
        use=use,
        true=[float(f"{value:.5g}") for value in exemplar.activation],
        simulated=[] if simulated is None else _without_nan(simulated),
    )


def _without_nan(values: np.ndarray) -> list[float | None]:
    return [None if math.isnan(value) else float(f"{value:.5g}") for value in values]


def _sample_tokens(
    adapter: ModelAdapter, atlas: Atlas, found: Iterable[NeuronExemplars]
) -> list[SampleTokens]:
    tokens: dict[tuple[int, str], SampleTokens] = {}
    for each in found:
        stream = adapter.site(each.neuron.site).stream
        for exemplar in (*each.explain, *each.held_out):
            if exemplar.position is None or (exemplar.position, stream) in tokens:
                continue
            tokens[exemplar.position, stream] = SampleTokens(
                sample=atlas.samples[exemplar.position],
                stream=stream,
                role=exemplar.tokens.role.tolist(),
                image=exemplar.tokens.image.tolist(),
                box=[
                    None if math.isnan(box[0]) else [round(edge, 2) for edge in box]
                    for box in exemplar.tokens.box.tolist()
                ],
                pieces=None if exemplar.tokens.pieces is None else list(exemplar.tokens.pieces),
            )
    return list(tokens.values())

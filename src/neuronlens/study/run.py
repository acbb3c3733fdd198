"""Explain, simulate, score: what chosen neurons find, and whether that can be believed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import numpy as np

from neuronlens.adapters import ModelAdapter
from neuronlens.atlas import Atlas, require_free
from neuronlens.classify import Category, Classification, NeuronClassifier
from neuronlens.errors import AtlasError
from neuronlens.exemplars import (
    EXPLAIN_RANKS,
    HELD_OUT_RANKS,
    Exemplar,
    NeuronExemplars,
    exemplars,
)
from neuronlens.explain import DissectionExplainer, Explainer, ExplanationJob, modalities
from neuronlens.explanation import Explanation, Failure
from neuronlens.neurons import NeuronId
from neuronlens.samples import Sample
from neuronlens.score import ModalityScore, Score, modality_score
from neuronlens.segment import AnnotationSegmenter
from neuronlens.simulate import MaskSimulator, SimulationJob, Simulator, WordSimulator
from neuronlens.study.records import (
    NeuronRecord,
    SampleTokens,
    Study,
    StudyManifest,
    TokenRecord,
)

NULL_DRAWS: Final = 5

Reply = TypeVar("Reply")


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

    Source: P1, sections 3.3 and 4.6.

    Raises:
        AtlasError: If atlas, classification and model do not belong together.
        OutputError: If `out` holds something, or cannot be written.
    """
    if out is not None:
        require_free(out)
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
    questions = [
        ExplanationJob(neuron, category[neuron], each.explain) for neuron, each in found.items()
    ]
    answers = _one_each(explainer, explainer.explain(questions), questions)
    said = dict(zip(found, answers, strict=True))
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
        simulators={name: type(each).__name__ for name, each in simulators.items()},
        sampling=sampling,
        explain=tuple(explain),
        held_out=tuple(held_out),
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
    counts = [modalities(category, found.held_out) for found, category, _ in trials]
    answers: dict[tuple[int, str], list[Any]] = {}
    for modality, simulator in simulators.items():
        mine = [i for i, names in enumerate(counts) if modality in names]
        jobs = [
            SimulationJob(trials[i][2], e.sample, e.tokens)
            for i in mine
            for e in trials[i][0].held_out
        ]
        replies = iter(_one_each(simulator, simulator.simulate(jobs), jobs))
        for i in mine:
            answers[i, modality] = [next(replies) for _ in trials[i][0].held_out]
    return [
        _score_one(found.held_out, {modality: answers[i, modality] for modality in counts[i]})
        for i, (found, _, _) in enumerate(trials)
    ]


def _one_each(who: object, replies: list[Reply], jobs: Sequence[object]) -> list[Reply]:
    if len(replies) != len(jobs):
        raise ValueError(
            f"{type(who).__name__} gave {len(replies)} replies to {len(jobs)} jobs. It must give "
            "one for each, in their order; a Failure for what it could not do."
        )
    return replies


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

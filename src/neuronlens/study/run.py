"""Explain, simulate, score: what chosen neurons find, and whether that can be believed."""

from __future__ import annotations

import threading
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

import numpy as np
from tqdm.auto import tqdm

from neuronlens.adapters import ModelAdapter
from neuronlens.atlas import Atlas
from neuronlens.classify import Category, Classification, NeuronClassifier
from neuronlens.errors import AtlasError
from neuronlens.exemplars import (
    EXPLAIN_RANKS,
    HELD_OUT_RANKS,
    VALIDATE_RANKS,
    Exemplar,
    ExemplarSet,
    NeuronExemplars,
    exemplars,
)
from neuronlens.exemplars.choose import Choice
from neuronlens.explain import (
    DissectionExplainer,
    Explainer,
    ExplanationJob,
    Modality,
    modalities,
)
from neuronlens.explanation import Explanation, Failure
from neuronlens.neurons import NeuronId
from neuronlens.samples import Sample
from neuronlens.score import Score
from neuronlens.simulate import Simulator
from neuronlens.study.components import Replies, Simulators, described, named, require
from neuronlens.study.each import one_each
from neuronlens.study.journal import Journal, journal
from neuronlens.study.records import (
    Candidate,
    NeuronRecord,
    Said,
    SampleTokens,
    StudyManifest,
    TokenRecord,
)
from neuronlens.study.study import Study
from neuronlens.study.trials import Outcome, Trial, cancel, run_trials

NULL_DRAWS: Final = 5

RESAMPLES: Final = 1000
"""Draws of held-out samples for a score's interval."""


def explain_neurons(
    adapter: ModelAdapter,
    atlas: Atlas,
    neurons: Iterable[NeuronId | str] | None = None,
    *,
    explainer: Explainer | None = None,
    visual_simulator: Simulator | None = None,
    text_simulator: Simulator | None = None,
    kinds: Classification | None = None,
    out: str | Path | None = None,
    sampling: Literal["top", "random"] = "top",
    explain: Sequence[int] = EXPLAIN_RANKS,
    held_out: Sequence[int] = HELD_OUT_RANKS,
    validate: Sequence[int] = VALIDATE_RANKS,
    best_of: int = 1,
    samples: Sequence[Sample] | None = None,
    null_draws: int = NULL_DRAWS,
    seed: int = 0,
    batch_size: int = 8,
    chunk: int = 256,
    retry_failed: bool = False,
    progress: bool = False,
) -> Study:
    """Explain neurons, simulate them from the explanation alone, and score the simulation.

    A neuron's category decides what counts: visual tokens, text tokens, or (for multi-modal
    and unknown neurons) the mean of both. Beside each score stands its null: the explanations
    of other neurons of the same category, scored on the same exemplars.

    With `out`, everything is written as soon as it is known. A run that was stopped or killed
    goes on when it is called again with the same arguments; a finished one is opened.

    Args:
        adapter: Of the scanned model.
        atlas: The scan.
        neurons: Which neurons, or how they are written; by default up to 800 of each category
            that says what to look at, with a probability of at least 0.8, drawn with `seed`
            (P1, section 4.6).
        explainer: Says what they find; by default the concept from the samples' annotations
            that fits best.
        visual_simulator: Predicts visual tokens. By default, after an explainer that asks a
            chat model, from Grounding DINO and SAM 2, else from the annotations' masks.
        text_simulator: Predicts text tokens. By default, after an explainer that asks a chat
            model, by asking that model, else where the explanation's words stand.
        kinds: The classification; by default with P1's constants.
        out: Folder of the study; None keeps it in memory.
        sampling: Explain from top samples, or from random ones.
        explain: Ranks to explain from.
        held_out: Ranks to score on.
        validate: Ranks by which the best of several explanations is chosen.
        best_of: How many explanations of each neuron one is chosen from.
        samples: The scanned samples, if the atlas cannot find them again.
        null_draws: How many other neurons' explanations to score for the null. Each costs as
            many simulations as the score itself.
        seed: Of all draws.
        batch_size: Samples per forward.
        chunk: Neurons that are simulated together, and then written.
        retry_failed: Whether neurons that failed in an earlier run are tried again. Their new
            explanations may serve as nulls from then on; nulls that are written stay.
        progress: Whether to show bars, with the cost so far.

    Source: P1, sections 3.3 and 4.6. Choosing the best of several explanations is ours.

    Raises:
        AtlasError: If atlas, classification and model do not belong together.
        OutputError: If `out` holds something else, or a study with other settings, or cannot be
            written; what is done is written.
        ValueError: If a count is too small, a rank has two uses, or there is no such sampling.
        ChatError: If a chat model cannot be asked at all; what is done is written.
        BudgetError: If a chat model's budget is used up; what is done is written.
    """
    if best_of < 1 or null_draws < 0 or chunk < 1 or batch_size < 1:
        raise ValueError(
            f"best_of={best_of}, null_draws={null_draws}, chunk={chunk}, batch_size={batch_size} "
            "were given; they must be at least 1, 0, 1 and 1."
        )
    explainer = explainer or DissectionExplainer()
    require("explainer", explainer, "explain", "nl.ChatExplainer(chat)")
    require("visual_simulator", visual_simulator, "simulate", "nl.MaskSimulator(segmenter)")
    require("text_simulator", text_simulator, "simulate", "nl.ChatSimulator(chat)")
    contrast = int(getattr(explainer, "contrast", 0))
    # What a recording refuses is refused before a folder says that it was asked for.
    Choice(explain, held_out, validate if best_of > 1 else (), contrast, sampling, seed)
    kinds = kinds or NeuronClassifier().classify(atlas)
    if kinds.model != atlas.manifest.model.fingerprint:
        raise AtlasError(
            "The classification is of another model than the atlas. Classify this atlas: "
            "kinds = NeuronClassifier(...).classify(atlas)."
        )
    chosen = named(kinds.pick(seed=seed) if neurons is None else neurons)
    folder = None if out is None else Path(out)
    simulators = Simulators(explainer, visual_simulator, text_simulator, folder)
    manifest = StudyManifest(
        model=atlas.manifest.model.fingerprint,
        model_name=atlas.manifest.model.name,
        data=atlas.manifest.data,
        neurons=[str(neuron) for neuron in chosen],
        readings=kinds.readings,
        explainer=type(explainer).__name__,
        simulators=simulators.names,
        settings={"explainer": described(explainer), **simulators.settings},
        sampling=sampling,
        explain=tuple(explain),
        held_out=tuple(held_out),
        validate_ranks=tuple(validate) if best_of > 1 else (),
        best_of=best_of,
        null_draws=null_draws,
        seed=seed,
    )
    with journal(folder, manifest, retry=retry_failed) as kept:
        replies = Replies([explainer, *simulators.given], folder)
        left = [neuron for neuron in chosen if neuron not in kept.records]
        if left:
            kept.loaded(simulators.prepare(m for n in left for m in modalities(kinds.of(n), ())))
            found = exemplars(
                adapter,
                atlas,
                chosen,
                only=None if len(left) == len(chosen) else left,
                explain=explain,
                held_out=held_out,
                validate=validate if best_of > 1 else (),
                contrast=contrast,
                sampling=sampling,
                samples=samples,
                seed=seed,
                batch_size=batch_size,
                progress=progress,
            )
            # What counts for an unknown neuron is known only now.
            kept.loaded(
                simulators.prepare(
                    m for n in left for m in modalities(kinds.of(n), found[n].held_out)
                )
            )
            run = _Run(
                adapter,
                atlas,
                kinds,
                explainer,
                simulators,
                manifest,
                kept,
                found,
                replies,
                chunk,
                progress,
            )
            try:
                run.explain_all(left)
                run.score_all(left)
            except BaseException:
                cancel([explainer, *simulators.given])
                raise
        return Study.of(kept.manifest, kept, replies.store)


class _Run:
    """The parts of one call of `explain_neurons`."""

    def __init__(
        self,
        adapter: ModelAdapter,
        atlas: Atlas,
        kinds: Classification,
        explainer: Explainer,
        simulators: Simulators,
        manifest: StudyManifest,
        kept: Journal,
        found: ExemplarSet,
        replies: Replies,
        chunk: int,
        progress: bool,
    ) -> None:
        self.adapter = adapter
        self.atlas = atlas
        self.kinds = kinds
        self.explainer = explainer
        self.simulators = simulators
        self.manifest = manifest
        self.kept = kept
        self.found = found
        self.replies = replies
        self.chunk = chunk
        self.progress = progress
        self._worked: set[Modality] = set()
        for record in kept.records.values():
            self._note(record.score)

    def explain_all(self, neurons: Sequence[NeuronId]) -> None:
        """Say what each neuron finds that nothing was said of yet."""
        waiting = [neuron for neuron in neurons if neuron not in self.kept.said]
        with self._bar("explained", len(waiting)) as bar, self._watched(bar):
            for some in _parts(waiting, self.chunk):
                jobs = [
                    ExplanationJob(
                        n, self.kinds.of(n), self.found[n].explain, self.found[n].contrast, draw
                    )
                    for n in some
                    for draw in range(self.manifest.best_of)
                ]
                worked = any(each.explanation is not None for each in self.kept.said.values())
                answers = iter(
                    one_each(self.explainer, self.explainer.explain, jobs, has_worked=worked)
                )
                drawn = {n: [next(answers) for _ in range(self.manifest.best_of)] for n in some}
                self.kept.say(self._chosen(drawn))
                self._advance(bar, len(some))

    def _chosen(self, drawn: Mapping[NeuronId, Sequence[Explanation | Failure]]) -> list[Said]:
        """Each neuron's best explanation by its score on the validation exemplars."""
        different = {neuron: _different(answers) for neuron, answers in drawn.items()}
        trials = [
            (neuron, Trial(each, self.kinds.of(neuron), self.found[neuron].validate))
            for neuron, several in different.items()
            if len(several) > 1
            for each in several
        ]
        outcomes = iter(self._tried([trial for _, trial in trials]))
        said = []
        for neuron, several in different.items():
            if not several:
                lost = next(answer for answer in drawn[neuron] if isinstance(answer, Failure))
                said.append(
                    Said(
                        neuron=str(neuron),
                        explanation=None,
                        failure=lost.reason,
                        passing=lost.passing,
                        asked=lost.asked,
                    )
                )
                continue
            candidates = [
                Candidate(explanation=each, score=_value(next(outcomes)))
                for each in (several if len(several) > 1 else [])
            ]
            # Of equals, max takes the first: what was said at temperature 0.
            best = max(candidates, key=_ranking).explanation if candidates else several[0]
            said.append(Said(neuron=str(neuron), explanation=best, candidates=candidates))
        return said

    def score_all(self, neurons: Sequence[NeuronId]) -> None:
        """Simulate and score each neuron, beside its null, and write it down."""
        said = {n: s.explanation for n, s in self.kept.said.items() if s.explanation is not None}
        by_category: dict[Category, list[NeuronId]] = {}
        for name in self.manifest.neurons:
            neuron = NeuronId.parse(name)
            if neuron in said:
                by_category.setdefault(self.kinds.of(neuron), []).append(neuron)
        for several in by_category.values():
            # By name: the null does not depend on the order in which neurons were given.
            several.sort(key=str)
        with self._bar("scored", len(neurons)) as bar, self._watched(bar):
            for some in _parts(neurons, self.chunk):
                trials, of_null = [], []
                explained = [neuron for neuron in some if neuron in said]
                for neuron in explained:
                    trials.append(self._trial(neuron, said[neuron], RESAMPLES))
                    others = self._others(neuron, by_category[self.kinds.of(neuron)])
                    of_null += [(neuron, said[other]) for other in others]
                trials += [self._trial(neuron, other) for neuron, other in of_null]
                outcomes = self._tried(trials)
                own = dict(zip(explained, outcomes, strict=False))
                nulls: dict[NeuronId, list[Outcome]] = {neuron: [] for neuron in explained}
                for (neuron, _), outcome in zip(of_null, outcomes[len(explained) :], strict=True):
                    nulls[neuron].append(outcome)
                for neuron in some:
                    self._write(neuron, own.get(neuron), nulls.get(neuron, []))
                self._advance(bar, len(some))

    def _trial(self, neuron: NeuronId, explanation: Explanation, resamples: int = 0) -> Trial:
        return Trial(explanation, self.kinds.of(neuron), self.found[neuron].held_out, resamples)

    def _tried(self, trials: Sequence[Trial]) -> list[Outcome]:
        outcomes = run_trials(
            trials,
            self.simulators.by_modality,
            self.manifest.seed,
            have_worked=self._worked,
        )
        for outcome in outcomes:
            self._note(outcome.score)
        return outcomes

    def _note(self, score: Score | Failure | None) -> None:
        """Remember which simulators have answered."""
        if isinstance(score, Score):
            sides: dict[Modality, object] = {"visual": score.visual, "text": score.text}
            self._worked.update(name for name, side in sides.items() if side is not None)

    def _others(self, neuron: NeuronId, same: Sequence[NeuronId]) -> list[NeuronId]:
        """Other neurons of the category, whose explanations make a neuron's null."""
        if not self.manifest.null_draws:
            return []
        own = bisect_left(same, str(neuron), key=str)
        rng = np.random.default_rng([self.manifest.seed, 1, zlib.crc32(str(neuron).encode())])
        drawn = rng.permutation(len(same) - 1)[: self.manifest.null_draws].tolist()
        return [same[i if i < own else i + 1] for i in drawn]

    def _write(self, neuron: NeuronId, outcome: Outcome | None, null: Sequence[Outcome]) -> None:
        said, found = self.kept.said[neuron], self.found[neuron]
        score = outcome.score if outcome is not None else None
        explained = said.asked if said.explanation is None else said.explanation.asked
        asked = [explained, *(outcome.asked if outcome is not None else ())]
        record = NeuronRecord(
            neuron=str(neuron),
            stream=self.adapter.site(neuron.site).stream,
            category=self.kinds.of(neuron),
            probability=self.kinds.probability(neuron),
            maximum=found.maximum,
            explanation=said.explanation,
            score=score if isinstance(score, Score) else None,
            null=[value for value in map(_value, null) if value is not None],
            null_failures=sum(isinstance(each.score, Failure) for each in null),
            failure=score.reason if isinstance(score, Failure) else said.failure,
            passing=score.passing if isinstance(score, Failure) else said.passing,
            asked=[key for key in asked if key is not None],
            candidates=said.candidates,
        )
        self.replies.keep(record.all_asked)
        simulated = outcome.simulated if outcome is not None else ()
        traces = [
            *(_token_record(e, "explain", None) for e in found.explain),
            *(
                _token_record(e, "held_out", simulated[i] if len(simulated) else None)
                for i, e in enumerate(found.held_out)
            ),
        ]
        self.kept.finish(record, traces, self._sample_tokens(found, record.stream))

    def _sample_tokens(self, found: NeuronExemplars, stream: str) -> list[SampleTokens]:
        """The tokens of a neuron's samples that are not written yet."""
        return [
            SampleTokens(
                position=each.position,
                stream=stream,
                sample=self.atlas.samples[each.position],
                role=each.tokens.role.tolist(),
                image=each.tokens.image.tolist(),
                box=[
                    None if box[0] != box[0] else [round(edge, 2) for edge in box]
                    for box in each.tokens.box.tolist()
                ],
                pieces=None if each.tokens.pieces is None else list(each.tokens.pieces),
            )
            for each in (*found.explain, *found.held_out)
            if each.position is not None and (each.position, stream) not in self.kept.places
        ]

    @contextmanager
    def _watched(self, bar: tqdm[None]) -> Iterator[None]:
        """Show the cost so far every few seconds: a chunk may take long."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(3):
                bar.set_postfix_str(self.replies.spent())

        if not (self.progress and self.replies.spent()):
            yield
            return
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _bar(self, what: str, total: int) -> tqdm[None]:
        return tqdm(total=total, desc=what, unit="neuron", disable=not self.progress)

    def _advance(self, bar: tqdm[None], neurons: int) -> None:
        spent = self.replies.spent()
        if spent:
            bar.set_postfix_str(spent)
        bar.update(neurons)


def _parts(neurons: Sequence[NeuronId], count: int) -> Iterator[Sequence[NeuronId]]:
    return (neurons[i : i + count] for i in range(0, len(neurons), count))


def _different(answers: Sequence[Explanation | Failure]) -> list[Explanation]:
    """Explanations that say different things, in their order."""
    seen: dict[tuple[object, ...], Explanation] = {}
    for each in answers:
        if isinstance(each, Explanation):
            seen.setdefault((each.sentence, each.phrases, each.words, each.predicts), each)
    return list(seen.values())


def _ranking(candidate: Candidate) -> float:
    return -2.0 if candidate.score is None else candidate.score


def _value(outcome: Outcome) -> float | None:
    return outcome.score.value if isinstance(outcome.score, Score) else None


def _token_record(
    exemplar: Exemplar, use: Literal["explain", "held_out"], simulated: np.ndarray | None
) -> TokenRecord:
    if exemplar.position is None:
        raise ValueError("Only exemplars of a scan can be recorded.")
    return TokenRecord(
        position=exemplar.position,
        rank=exemplar.rank,
        use=use,
        true=[float(f"{value:.5g}") for value in exemplar.activation.tolist()],
        simulated=[]
        if simulated is None
        else [None if value != value else float(f"{value:.5g}") for value in simulated.tolist()],
    )

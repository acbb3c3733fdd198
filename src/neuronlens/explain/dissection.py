"""Naming, without an LLM, the known concept that predicts a neuron best."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from neuronlens.classify import Category
from neuronlens.exemplars import Exemplar
from neuronlens.explain.explainer import ExplanationJob, Modality, modalities
from neuronlens.explanation import Explanation, Failure
from neuronlens.score import correlation
from neuronlens.segment import AnnotationSegmenter, Segmenter

Prediction = Float[np.ndarray, " token"]
_Predictions = dict[tuple[int, int, str, str], Prediction]


@dataclass(frozen=True)
class Match:
    """How well one concept predicts a neuron.

    Attributes:
        concept: Its name.
        r: Pearson correlation; of a multi-modal neuron, the mean of both modalities.
        visual: On visual tokens, with the covered share of each token; NaN if undefined.
        text: On text tokens, with the concept's words; NaN if undefined.
        predicts: Whether the token before the words fits better than the words.
    """

    concept: str
    r: float
    visual: float
    text: float
    predicts: bool


class DissectionExplainer:
    """Names, without an LLM, the known concept whose prediction correlates best.

    A concept predicts the covered share of each visual token and the occurrences of its
    words. Language neurons often fire on the token *before* a word, since they write it;
    both places are tried.

    Concepts are what the exemplars' annotations name; for text neurons, which need no mask,
    every word that is said as well.

    Attributes:
        segmenter: Finds concepts in images; by default the samples' annotations.
        words: By concept, the words that stand for it, if not its name. Only these concepts
            are then tried.
    """

    name = "dissection"

    def __init__(
        self,
        segmenter: Segmenter | None = None,
        words: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.segmenter = segmenter or AnnotationSegmenter()
        self.words = None if words is None else {k: tuple(v) for k, v in words.items()}

    @property
    def settings(self) -> dict[str, object]:
        """What its explanations depend on, for a study's manifest."""
        name = getattr(self.segmenter, "name", type(self.segmenter).__name__)
        return {"segmenter": name, "words": self.words}

    def explain(self, jobs: Sequence[ExplanationJob]) -> list[Explanation | Failure]:
        """Explain each neuron by its best concept; draw 1 is the second best, and so on."""
        # Many neurons share samples; their token maps live as long as the jobs do.
        known: _Predictions = {}
        return [self._one(job, known) for job in jobs]

    def matches(
        self,
        exemplars: Sequence[Exemplar],
        category: Category,
        concepts: Sequence[str] | None = None,
    ) -> list[Match]:
        """Every concept's fit on these exemplars, best first; undefined fits are left out.

        Args:
            exemplars: Of one neuron.
            category: Which modalities count: visual, text, or (for all others) both.
            concepts: Which to try; by default all known ones.
        """
        return self._matches(exemplars, category, concepts, {})

    def _matches(
        self,
        exemplars: Sequence[Exemplar],
        category: Category,
        concepts: Sequence[str] | None,
        known: _Predictions,
    ) -> list[Match]:
        names = concepts if concepts is not None else self._concepts(exemplars, category)
        counts = modalities(category, exemplars)
        found = []
        for concept in names:
            visual = text = float("nan")
            predicts = False
            if "visual" in counts:
                visual = self._visual(exemplars, concept, known)
            if "text" in counts:
                text, predicts = self._text(exemplars, concept, known)
            sides = [r for r, name in ((visual, "visual"), (text, "text")) if name in counts]
            r = sum(sides) / len(sides) if sides else float("nan")
            if not math.isnan(r):
                found.append(Match(concept, r, visual, text, predicts))
        return sorted(found, key=lambda match: (-match.r, match.predicts, match.concept))

    def _one(self, job: ExplanationJob, known: _Predictions) -> Explanation | Failure:
        if not job.exemplars:
            return Failure("no exemplar to explain from")
        found = self._matches(job.exemplars, job.category, None, known)
        counts = modalities(job.category, job.exemplars)
        if not found and "visual" in counts and not any(e.regions.any() for e in job.exemplars):
            return Failure("its visual tokens see no single region, so no mask can be compared")
        if not found:
            return Failure("no known concept fits the exemplars (are they annotated?)")
        if job.draw >= len(found):
            return Failure(f"no more than {len(found)} known concepts fit the exemplars")
        best = found[job.draw]
        return Explanation(
            sentence=_sentence(best, counts),
            phrases=(best.concept,) if "visual" in counts else (),
            words=self._words(best.concept) if "text" in counts else (),
            predicts=best.predicts,
            ties=tuple(
                m.concept
                for m in found
                if m is not best
                and math.isclose(m.r, best.r, rel_tol=1e-9)
                and m.predicts == best.predicts
            ),
            explainer=self.name,
        )

    def _concepts(self, exemplars: Sequence[Exemplar], category: Category) -> list[str]:
        if self.words is not None:
            return sorted(self.words)
        names = frozenset().union(*(each.sample.concepts() for each in exemplars))
        if category == "text":
            names |= frozenset().union(*(_words_said(each) for each in exemplars))
        return sorted(names)

    def _words(self, concept: str) -> tuple[str, ...]:
        return (concept,) if self.words is None else self.words[concept]

    def _visual(self, exemplars: Sequence[Exemplar], concept: str, known: _Predictions) -> float:
        return _pooled(
            [each.activation[each.visual] for each in exemplars],
            [self._covered(each, concept, known)[each.visual] for each in exemplars],
        )

    def _covered(self, exemplar: Exemplar, concept: str, known: _Predictions) -> Prediction:
        key = (id(exemplar.sample), id(exemplar.tokens), concept, "visual")
        if key not in known:
            images = np.unique(exemplar.tokens.image.numpy()[exemplar.visual])
            masks = {
                int(i): self.segmenter.segment(exemplar.sample, int(i), [concept])[0]
                for i in images
            }
            # Most concepts are in few images; all that are not in this one cover it alike.
            is_here = any(mask.any() for mask in masks.values())
            alike = key if is_here else (*key[:2], "", "nothing")
            if alike not in known:
                known[alike] = exemplar.tokens.coverage(masks).numpy()
            known[key] = known[alike]
        return known[key]

    def _text(
        self, exemplars: Sequence[Exemplar], concept: str, known: _Predictions
    ) -> tuple[float, bool]:
        if any(each.tokens.pieces is None for each in exemplars):
            return float("nan"), False
        true = [each.activation[each.text] for each in exemplars]
        on, before = (
            _pooled(
                true,
                [self._spelled(each, concept, shift, known)[each.text] for each in exemplars],
            )
            for shift in (0, -1)
        )
        predicts = not math.isnan(before) and (math.isnan(on) or before > on)
        return (before if predicts else on), predicts

    def _spelled(
        self, exemplar: Exemplar, concept: str, shift: int, known: _Predictions
    ) -> Prediction:
        key = (id(exemplar.sample), id(exemplar.tokens), concept, str(shift))
        if key not in known:
            known[key] = exemplar.tokens.words(self._words(concept), shift).numpy()
        return known[key]


def _words_said(exemplar: Exemplar) -> set[str]:
    if exemplar.tokens.pieces is None:
        return set()
    marked = zip(exemplar.tokens.pieces, exemplar.text, strict=True)
    said = "".join(piece if counts else "\n" for piece, counts in marked)
    return set(re.findall(r"\w+", said.lower()))


def _pooled(
    true: Sequence[Float[np.ndarray, " token"]], predicted: Sequence[Float[np.ndarray, " token"]]
) -> float:
    return correlation(np.concatenate(true), np.concatenate(predicted))[0]


def _sentence(match: Match, counts: Sequence[Modality]) -> str:
    seen = f"parts of the image that are “{match.concept}”"
    read = (
        f"the place right before the word “{match.concept}”"
        if match.predicts
        else f"the word “{match.concept}”"
    )
    said = {"visual": seen, "text": read}
    return ", and ".join(said[each] for each in counts)

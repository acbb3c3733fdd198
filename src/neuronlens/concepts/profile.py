"""What every known concept predicts on the tokens of a neuron's top samples."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from neuronlens.exemplars import Exemplar
from neuronlens.explain import Modality
from neuronlens.segment import Segmenter
from neuronlens.tokens import TokenMap

Place = Literal["on", "before"]
"""Where on text a neuron fires: on a concept's words, or on the token before them."""

FEWEST: Final = 0.1
"""A concept is tried if at least this share of the top samples shows or says it."""


@dataclass(frozen=True)
class Element:
    """One way in which one concept can predict a neuron.

    Attributes:
        concept: Its name.
        visual: Whether it predicts visual tokens, by the covered share of each.
        text: Where it predicts text tokens; None if it predicts none.
    """

    concept: str
    visual: bool = False
    text: Place | None = None


@dataclass(frozen=True, eq=False)
class Side:
    """The tokens of one modality over all top samples, one sample after the other.

    Attributes:
        level: How active the neuron is, on the 0..10 scale.
        predicted: By element, from 0 to 1; 0 for an element that does not predict this side.
        start: Where each sample begins, and at last the number of tokens.
        centre: Where each token lies in its sample, as a share of the extent of the image, or
            of the text; the last axis of a visual token tells images apart.
    """

    level: Float[np.ndarray, " token"]
    predicted: Float[np.ndarray, "element token"]
    start: Int[np.ndarray, " edge"]
    centre: Float[np.ndarray, "token axis"]

    def moved(
        self, sources: Sequence[Int[np.ndarray, " sample"]]
    ) -> list[Int[np.ndarray, " token"]]:
        """For each token, the one of another sample that lies where it does; -1 if there is none.

        Args:
            sources: By sample, which sample's tokens to take; several times over.
        """
        edges = self.start.tolist()
        spans = [slice(first, last) for first, last in pairwise(edges)]
        # Most images are cut into tokens alike: places are compared once for each two ways.
        ways: dict[bytes, int] = {}
        way = [ways.setdefault(self.centre[span].tobytes(), len(ways)) for span in spans]
        nearest: dict[tuple[int, int], Int[np.ndarray, " token"]] = {}
        found = []
        for source in sources:
            taken = np.full(len(self.level), -1)
            for sample, other in enumerate(source.tolist()):
                here, there = spans[sample], spans[other]
                if here.start == here.stop or there.start == there.stop:
                    continue
                pair = way[sample], way[other]
                if pair not in nearest:
                    apart = self.centre[here][:, None] - self.centre[there][None]
                    nearest[pair] = np.square(apart).sum(-1).argmin(1)
                taken[here] = there.start + nearest[pair]
            found.append(taken)
        return found


class Vocabulary:
    """The concepts that are tried, and where samples show and say them.

    What was found for a sample is kept: neurons share samples.

    Attributes:
        concepts: Their names; None for those that the samples know.
        segmenter: Finds them in images.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        concepts: Sequence[str] | None,
        words: Mapping[str, Sequence[str]],
    ) -> None:
        self.concepts = None if concepts is None else tuple(concepts)
        self.segmenter = segmenter
        self._words = words
        # Token maps are kept beside what was found, so that no other map gets their id.
        self._found: dict[tuple[int, str, str], tuple[TokenMap, Float[np.ndarray, " token"]]] = {}

    def profile(
        self, top: Sequence[Exemplar], contrast: Sequence[Exemplar], sides: Sequence[Modality]
    ) -> tuple[list[Element], list[Side]]:
        """Every element that can predict a neuron of these modalities, and what it predicts.

        Concepts are those of the top samples. What they predict is told on these, and then on
        the samples for contrast.

        Of elements that explain equally much the first is taken: those on both sides come
        before others, those on the words before those ahead of them.
        """
        names, exemplars = self.names(top, sides), [*top, *contrast]
        if "visual" in sides:
            for each in exemplars:
                self._segment(each, names)
        shown, said = (
            {name for name in names if side in sides and self._is_in(top, name, side)}
            for side in ("visual", "text")
        )
        visual = (True, False) if "visual" in sides else (False,)
        places: tuple[Place | None, ...] = ("on", "before", None) if "text" in sides else (None,)
        elements = [
            Element(name, seen, read)
            for seen in visual
            for read in places
            for name in names
            if (seen or read is not None)
            and (not seen or name in shown)
            and (read is None or name in said)
        ]
        return elements, [self._side(exemplars, elements, side) for side in sides]

    def names(self, exemplars: Sequence[Exemplar], sides: Sequence[Modality]) -> list[str]:
        """The concepts that are known on these samples."""
        if self.concepts is not None:
            return sorted(set(self.concepts))
        names = {name for each in exemplars for name in each.sample.concepts()}
        if tuple(sides) == ("text",):
            # Text needs no mask; every word is known.
            names |= _words_said(exemplars)
        return sorted(names)

    def _is_in(self, exemplars: Sequence[Exemplar], name: str, side: Modality) -> bool:
        """Whether enough of the samples show, or say, a concept."""
        if side == "visual":
            have = [self._covered(each, name)[each.regions].any() for each in exemplars]
        else:
            have = [self._spelled(each, name, "on")[readable(each)].any() for each in exemplars]
        return sum(map(bool, have)) >= FEWEST * len(exemplars)

    def _side(
        self, exemplars: Sequence[Exemplar], elements: Sequence[Element], side: Modality
    ) -> Side:
        levels, predictions, centres, start = [], [], [], [0]
        for each in exemplars:
            at = each.regions if side == "visual" else readable(each)
            count = int(at.sum())
            rows = np.zeros((len(elements), count), np.float32)
            for row, element in zip(rows, elements, strict=True):
                if side == "visual" and element.visual:
                    row[:] = self._covered(each, element.concept)[at]
                elif side == "text" and element.text is not None:
                    row[:] = self._spelled(each, element.concept, element.text)[at]
            levels.append(each.level[at].astype(float))
            predictions.append(rows)
            start.append(start[-1] + count)
            if side == "visual":
                centres.append(_centres(each.tokens, at))
            else:
                centres.append((np.arange(count)[:, None] + 0.5) / max(count, 1))
        return Side(
            np.concatenate(levels),
            np.concatenate(predictions, 1),
            np.array(start),
            np.concatenate(centres),
        )

    def _segment(self, exemplar: Exemplar, names: Sequence[str]) -> None:
        """Find concepts in the images of a sample, all in one question for each image."""
        tokens = exemplar.tokens
        new = [each for each in names if (id(tokens), each, "visual") not in self._found]
        if not new:
            return
        covered = np.zeros((len(new), len(tokens)), np.float32)
        for image in np.unique(tokens.image.numpy()[exemplar.regions]).tolist():
            masks = self.segmenter.segment(exemplar.sample, image, new)
            for row, mask in zip(covered, masks, strict=True):
                if mask.any():
                    # NaN on the tokens of other images and of none.
                    row += np.nan_to_num(tokens.coverage({image: mask}).numpy())
        for name, row in zip(new, covered, strict=True):
            self._found[id(tokens), name, "visual"] = tokens, row

    def _covered(self, exemplar: Exemplar, concept: str) -> Float[np.ndarray, " token"]:
        return self._found[id(exemplar.tokens), concept, "visual"][1]

    def _spelled(
        self, exemplar: Exemplar, concept: str, place: Place
    ) -> Float[np.ndarray, " token"]:
        tokens = exemplar.tokens
        if (id(tokens), concept, place) not in self._found:
            marks = np.zeros(len(tokens), np.float32)
            if tokens.pieces is not None:
                words = self._words.get(concept, (concept,))
                marks = np.nan_to_num(tokens.words(words, 0 if place == "on" else -1).numpy())
            self._found[id(tokens), concept, place] = tokens, marks
        return self._found[id(tokens), concept, place][1]


def readable(exemplar: Exemplar) -> Bool[np.ndarray, " token"]:
    """True at the text tokens that count and whose words are known."""
    if exemplar.tokens.pieces is None:
        return np.zeros(len(exemplar.tokens), np.bool_)
    return exemplar.text


def _centres(tokens: TokenMap, at: Bool[np.ndarray, " token"]) -> Float[np.ndarray, "token axis"]:
    box, image = tokens.box.numpy()[at].astype(float), tokens.image.numpy()[at]
    centre = np.stack([box[:, [0, 2]].mean(1), box[:, [1, 3]].mean(1)], 1)
    for number in np.unique(image):
        mine = image == number
        low, high = box[mine, :2].min(0), box[mine, 2:].max(0)
        centre[mine] = (centre[mine] - low) / np.maximum(high - low, 1e-9)
    # Another image is farther away than any place of the same one.
    return np.column_stack([centre, 2.0 * image])


def _words_said(exemplars: Sequence[Exemplar]) -> set[str]:
    said: Counter[str] = Counter()
    for each in exemplars:
        pieces = each.tokens.pieces
        if pieces is not None:
            marked = zip(pieces, each.text, strict=True)
            text = "".join(piece if counts else "\n" for piece, counts in marked)
            said.update(set(re.findall(r"\w+", text.lower())))
    return {word for word, count in said.items() if count >= FEWEST * len(exemplars)}

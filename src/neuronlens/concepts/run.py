"""How many known concepts each of some neurons needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

from tqdm.auto import tqdm

from neuronlens.adapters import ModelAdapter, require_adapter
from neuronlens.atlas import Atlas
from neuronlens.classify import Classification, NeuronClassifier
from neuronlens.concepts.count import ENOUGH, LEAST, MOST, Rule
from neuronlens.concepts.cover import SHUFFLES
from neuronlens.concepts.profile import Vocabulary
from neuronlens.concepts.result import ConceptCount
from neuronlens.errors import (
    AtlasError,
    DataError,
    RescanError,
    SampleError,
    UnknownNameError,
)
from neuronlens.exemplars import exemplars
from neuronlens.neurons import NeuronId
from neuronlens.samples import Sample, as_sample
from neuronlens.segment import AnnotationSegmenter, Segmenter


def count_concepts(
    adapter: ModelAdapter,
    atlas: Atlas,
    neurons: Iterable[NeuronId | str],
    *,
    kinds: Classification | None = None,
    n: int = 50,
    contrast: int = 10,
    samples: Sequence[Sample] | None = None,
    segmenter: Segmenter | None = None,
    concepts: Sequence[str] | None = None,
    words: Mapping[str, Sequence[str]] | None = None,
    least: float = LEAST,
    most: int = MOST,
    resamples: int = 200,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = False,
) -> dict[NeuronId, ConceptCount]:
    """Count the known concepts that neurons' top samples need: one, or several.

    A set of concepts predicts a neuron where any of them is: the largest covered share of a
    visual token, the words on text (or the token before them). It explains the squared
    correlation of that with the activations, all top samples pooled. Each concept has a price,
    `least`, or what the best concept adds in 5 % of the draws if concepts lie where *other*
    samples have them. The count is the size of the set that explains most after its price.

    So a concept does not count because it comes along (a red ring is also large), nor
    because it is in a few samples: it must predict what the others do not, and predict nothing
    where the neuron is quiet. One that is in less than a tenth of the samples is not tried. A
    concept on which the neuron fires less than about 40 % as strongly as on another does not
    count, since a union that predicts both alike then fits no better.

    Args:
        adapter: Of the scanned model.
        atlas: The scan.
        neurons: Which neurons, or how they are written.
        kinds: The classification, which decides what tokens count; by default with P1's
            constants.
        n: How many top samples; those on which the neuron does not fire are left out.
        contrast: How many samples on which the neuron is quiet are shown beside them (see
            `exemplars`). What is in all top samples may be elsewhere too, and only these say so.
        samples: The scanned samples in their order, if the atlas cannot find them again.
        segmenter: Finds concepts in images; by default the samples' annotations.
        concepts: Which to try. By default the keys of `words`; else all names in the top
            samples' annotations and, for text neurons, every word said.
        words: By concept, the words that stand for it, if not its name.
        least: Share of the variance that a further concept must add.
        most: The largest count.
        resamples: Draws of the top samples for the count's distribution; 0 for none.
        seed: Of resamples and shuffles.
        batch_size: Samples per forward.
        progress: Whether to show a bar.

    Returns:
        By neuron; `count` is None, with a `reason`, where it cannot be told.

    Source: P1, appendix B.4, looks at the top 50 samples by eye; how to count is ours.

    Raises:
        AdapterError: If what is given first is no adapter.
        AtlasError: If atlas, classification and model do not belong together, or the scanned
            samples were in memory and are not given.
        DataError: If images count and no sample names a concept, nor do `concepts`.
        RescanError: If the scan kept fewer than `n` samples of a neuron.
        SampleError: If none of the samples can be used.
        UnknownNameError: If a neuron is not in the atlas, or no scanned sample's annotations or
            text have any of `concepts` (where the segmenter reads annotations).
        ValueError: If a number makes no sense.
    """
    require_adapter(adapter)
    rule = Rule(least, most, resamples, seed)
    if n < ENOUGH:
        raise ValueError(
            f"n={n} samples say nothing about how many concepts: give {ENOUGH} or more."
        )
    if isinstance(concepts, str):
        raise TypeError(f"Several concepts are needed, such as [{concepts!r}].")
    if n > atlas.choices.n:
        raise RescanError(
            f"The top {n} samples are asked for, but the scan kept {atlas.choices.n}. Give "
            f"n={atlas.choices.n}, or scan again with scan(..., n={n})."
        )
    chosen = _parsed(neurons)
    atlas.check(adapter)
    kinds = kinds or NeuronClassifier().classify(atlas)
    if kinds.model != atlas.manifest.model.fingerprint:
        raise AtlasError(
            "The classification is of another model than the atlas. Classify this atlas: "
            "kinds = NeuronClassifier(...).classify(atlas)."
        )
    fires = dict.fromkeys(neuron for neuron in chosen if atlas.maximum(neuron) > 0)
    if concepts is None and words is not None:
        concepts = list(words)
    if concepts is None:
        _require_names(
            atlas, [x for x in fires if kinds.of(x) in ("visual", "multimodal")], samples, n
        )
    elif concepts and (segmenter is None or isinstance(segmenter, AnnotationSegmenter)):
        _require_known(
            atlas, {each: (words or {}).get(each, (each,)) for each in concepts}, samples
        )
    vocabulary = Vocabulary(segmenter or AnnotationSegmenter(), concepts, words or {})
    recorded = exemplars(
        adapter,
        atlas,
        fires,
        explain=range(1, n + 1),
        held_out=(),
        contrast=contrast,
        samples=samples,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    settings: dict[str, object] = {
        "n": n,
        "contrast": contrast,
        "segmenter": getattr(vocabulary.segmenter, "name", type(vocabulary.segmenter).__name__),
        "concepts": None if concepts is None else sorted(concepts),
        "words": None if words is None else {name: tuple(each) for name, each in words.items()},
        **asdict(rule),
        "shuffles": SHUFFLES,
        "readings": kinds.readings,
    }
    found = {}
    for neuron in tqdm(chosen, desc="counted", unit="neuron", disable=not progress):
        top, quiet = (
            (recorded[neuron].explain, recorded[neuron].contrast) if neuron in fires else ((), ())
        )
        found[neuron] = rule.count(neuron, kinds.of(neuron), top, quiet, vocabulary, settings)
    return found


def _require_names(
    atlas: Atlas, seeing: Sequence[NeuronId], samples: Sequence[Sample] | None, n: int
) -> None:
    """Refuse samples without annotations before anything is recorded."""
    if not seeing:
        return
    positions = {p for neuron in seeing for p in atlas.neuron(neuron).positions[:n].tolist()}
    for position in sorted(positions):
        try:
            sample = atlas.sample(position) if samples is None else samples[position]
        except (IndexError, SampleError):
            continue  # recording says what is wrong with it
        if as_sample(sample, position).concepts():
            return
    raise DataError(
        f"Images count for {seeing[0]}, and none of its top samples has an annotation that names "
        "anything. Add annotations (nl.annotate), or give a segmenter and what it is to look for: "
        'segmenter=..., concepts=["dog", "car"].'
    )


def _require_known(
    atlas: Atlas, concepts: Mapping[str, Sequence[str]], samples: Sequence[Sample] | None
) -> None:
    """Refuse concepts of which the scanned samples know none, before anything is recorded.

    Some of a long list may well be in no sample, so one that is known is enough.
    """
    known: set[str] = set()
    for position in sorted(atlas.samples):
        try:
            given = atlas.sample(position) if samples is None else samples[position]
            sample = as_sample(given, position)
        except (IndexError, SampleError):
            continue  # recording says what is wrong with it
        names = {name.lower() for name in sample.concepts()}
        text = f"{sample.prompt}\n{sample.response or ''}".lower()
        for concept, words in concepts.items():
            phrase = concept.lower().strip(" .")
            is_named = phrase in names or set(phrase.split()) <= names
            if is_named or any(word.lower().strip() in text for word in words):
                return
        known |= sample.concepts()
    raise UnknownNameError(
        "concept in annotations or text of the scanned samples",
        next(iter(concepts)),
        sorted(known),
    )


def _parsed(neurons: Iterable[NeuronId | str]) -> list[NeuronId]:
    if isinstance(neurons, (NeuronId, str)):
        raise TypeError(f"Several neurons are needed, such as [{str(neurons)!r}].")
    parsed = (NeuronId.parse(each) if isinstance(each, str) else each for each in neurons)
    return list(dict.fromkeys(parsed))

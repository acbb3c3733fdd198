"""All records of a study together: means beside their nulls, the table, the replies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from neuronlens.atlas import new_folder
from neuronlens.chat import Exchange, ReplyStore
from neuronlens.classify import CATEGORIES, Category
from neuronlens.errors import DataError, MissingExtraError, UnknownNameError
from neuronlens.lines import read_lines, write_lines, writing
from neuronlens.neurons import NeuronId
from neuronlens.score import Difference, Score, Summary, difference, summarise
from neuronlens.show import Html, table
from neuronlens.study.journal import (
    MANIFEST,
    RECORDS,
    REPLIES,
    SAID,
    SAMPLES,
    TRACES,
    Journal,
    Place,
    SampleFile,
    TraceFile,
    read_manifest,
)
from neuronlens.study.records import (
    NeuronRecord,
    Said,
    SampleTokens,
    StudyManifest,
    TokenRecord,
    Traces,
    as_text,
    shown_null,
    shown_score,
)

if TYPE_CHECKING:
    import pandas as pd


class Exchanges(list[Exchange]):
    """Questions and answers; they show themselves in a notebook, one after the other."""

    def _repr_html_(self) -> Html:
        return Html("<hr>".join(each._repr_html_() for each in self))


class Study(Mapping[NeuronId, NeuronRecord]):
    """Explanations and scores of neurons, each score beside its null.

    Attributes:
        manifest: What it was made with.
        records: By neuron.
        samples: The tokens of every exemplar, by (position, stream); read from their file when
            they are asked for, if the study lies in a folder.
        replies: What chat models were asked and answered; None if none was asked.
    """

    def __init__(
        self,
        manifest: StudyManifest,
        records: Iterable[NeuronRecord],
        samples: Mapping[Place, SampleTokens] | None = None,
        traces: Mapping[NeuronId, Sequence[TokenRecord]] | None = None,
        replies: ReplyStore | None = None,
    ) -> None:
        self.manifest = manifest
        by_neuron = {record.id: record for record in records}
        order = [NeuronId.parse(name) for name in manifest.neurons]
        planned = [neuron for neuron in order if neuron in by_neuron]
        self.records = {n: by_neuron[n] for n in dict.fromkeys([*planned, *by_neuron])}
        self.samples = samples or {}
        self.replies = replies
        self._traces = traces or {}

    @classmethod
    def of(cls, manifest: StudyManifest, kept: Journal, replies: ReplyStore | None) -> Study:
        """The study of a run that has ended."""
        if kept.folder is None:
            return cls(manifest, kept.records.values(), kept.samples, kept.traces, replies)
        samples, traces = SampleFile(kept.folder / SAMPLES), TraceFile(kept.folder / TRACES)
        return cls(manifest, kept.records.values(), samples, traces, replies)

    def __repr__(self) -> str:
        missing = len(self.manifest.neurons) - len(self)
        unfinished = f", {missing} not finished" if missing > 0 else ""
        return (
            f"Study({len(self)} neurons of {self.manifest.model_name}, "
            f"{self.manifest.explainer}{unfinished})"
        )

    def __getitem__(self, neuron: NeuronId | str) -> NeuronRecord:
        neuron = NeuronId.parse(neuron) if isinstance(neuron, str) else neuron
        if neuron not in self.records:
            raise UnknownNameError("neuron in this study", neuron, self.records)
        return self.records[neuron]

    def __iter__(self) -> Iterator[NeuronId]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def exemplars(self, neuron: NeuronId | str) -> list[TokenRecord]:
        """True and simulated activations of a neuron on its exemplars, token by token.

        Raises:
            UnknownNameError: If the study has no such neuron.
        """
        return list(self._traces.get(self[neuron].id, ()))

    def exchanges(self, neuron: NeuronId | str) -> Exchanges:
        """What a chat model was asked about a neuron, with images, and what it answered.

        The question for the explanation comes first, then those of the simulation.

        Raises:
            UnknownNameError: If the study has no such neuron.
        """
        replies = self.replies
        if replies is None:
            return Exchanges()
        return Exchanges(replies.exchange(key) for key in self[neuron].asked)

    def summary(self) -> dict[Category, Summary]:
        """Mean score of each category beside its null, with intervals over neurons."""
        means = {}
        for category in CATEGORIES:
            mine = [record for record in self.records.values() if record.category == category]
            scored = [(r.score, r.null) for r in mine if r.score is not None]
            if mine:
                means[category] = summarise(
                    [score for score, _ in scored],
                    [null for _, null in scored],
                    seed=self.manifest.seed,
                )
        return means

    def compare(self, other: Study) -> dict[Category, Difference]:
        """By category, how much better neurons score here than in another study.

        Only neurons with a score in both count, each against itself.

        Args:
            other: Of some of the same neurons, such as one made with `sampling="random"`.
        """
        found: dict[Category, Difference] = {}
        for category in CATEGORIES:
            both = [
                (record.score, other.records[neuron].score)
                for neuron, record in self.records.items()
                if record.category == category and neuron in other.records
            ]
            pairs = [(a, b) for a, b in both if a is not None and b is not None]
            if both:
                found[category] = difference(
                    [a for a, _ in pairs], [b for _, b in pairs], seed=self.manifest.seed
                )
        return found

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
        """One row per neuron: category, explanation, scores beside their null.

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
        with new_folder(out) as folder, writing(Path(out)):
            write_lines(folder / RECORDS, self.records.values())
            write_lines(folder / SAMPLES, self.samples.values())
            write_lines(
                folder / TRACES,
                (Traces(neuron=str(n), exemplars=self.exemplars(n)) for n in self.records),
            )
            write_lines(
                folder / SAID,
                (
                    Said(
                        neuron=r.neuron,
                        explanation=r.explanation,
                        failure=None if r.explanation else r.failure,
                        candidates=r.candidates,
                    )
                    for r in self.records.values()
                ),
            )
            if self.replies is not None:
                copy = ReplyStore(folder / REPLIES)
                self.replies.copy_to(copy, [k for r in self.records.values() for k in r.all_asked])
                copy.close()
            text = self.manifest.model_dump_json(indent=1) + "\n"
            (folder / MANIFEST).write_text(text, encoding="utf-8")

    @classmethod
    def open(cls, path: str | Path, *, partial: bool = False) -> Study:
        """Read a study from its folder.

        Args:
            path: The folder.
            partial: Whether it may be unfinished: of a run that goes on, or was stopped.

        Raises:
            DataError: If the folder is no whole study.
        """
        path = Path(path)
        manifest = read_manifest(path)
        # The records first: of what a running study adds meanwhile, they know nothing.
        records = read_lines(path / RECORDS, NeuronRecord, torn=partial)
        missing = len(manifest.neurons) - len({record.neuron for record in records})
        if missing > 0 and not partial:
            raise DataError(
                f"{path} is no whole study: {missing} of its {len(manifest.neurons)} neurons are "
                "not finished. Call explain_neurons with the same arguments to go on, or open it "
                "with partial=True."
            )
        try:
            traces = TraceFile(path / TRACES, torn=partial)
            samples = SampleFile(path / SAMPLES, torn=partial)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is no whole study: {error}") from error
        lost = [record.neuron for record in records if record.id not in traces]
        if lost:
            raise DataError(f"{path} is no whole study: {TRACES} lacks {lost[0]}.")
        there = (path / REPLIES).exists()
        replies = ReplyStore(path / REPLIES, read_only=True) if there else None
        return cls(manifest, records, samples, traces, replies)

    def _repr_html_(self) -> Html:
        rows = []
        for record in sorted(self.records.values(), key=_falling):
            score = record.score or Score()
            rows.append(
                [
                    record.neuron,
                    record.category,
                    record.explanation.sentence if record.explanation else record.failure,
                    shown_score(score),
                    shown_null(record) if record.score else "-",
                    *(as_text(side.r if side else None) for side in (score.visual, score.text)),
                ]
            )
        said = "; ".join(
            f"{category}: mean score {_with(each.mean, each.interval)} (null "
            f"{_with(each.null, each.null_interval)}, gap {_with(each.gap, each.gap_interval)}, "
            f"{each.neurons} neurons, {each.constant_predictions} constant predictions as 0, "
            f"{each.undefined} undefined)"
            for category, each in self.summary().items()
        )
        lost = sum(self.failures().values())
        said += f"; {lost} failed" if lost else ""
        missing = len(self.manifest.neurons) - len(self)
        said += f"; {missing} not finished" if missing > 0 else ""
        head = ["neuron", "category", "explanation", "score", "null", "r visual", "r text"]
        return table(head, rows[:30], f"{len(rows)} neurons. {said}")


def _with(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None or interval is None:
        return as_text(value)
    return f"{as_text(value)} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _falling(record: NeuronRecord) -> float:
    """Sorts the best score first, what has none last."""
    value = None if record.score is None else record.score.value
    return 2.0 if value is None else -value


def _row(record: NeuronRecord) -> dict[str, Any]:
    score = record.score or Score()
    visual, text = score.visual, score.text
    low, high = score.interval or (None, None)
    return {
        "neuron": record.neuron,
        "category": record.category,
        "explanation": record.explanation.sentence if record.explanation else None,
        "score": score.value,
        "score_low": low,
        "score_high": high,
        "null": record.null_mean,
        "score_per_sample": score.per_sample,
        "r_visual": visual.r if visual else None,
        "r_text": text.r if text else None,
        "spearman_visual": visual.spearman if visual else None,
        "spearman_text": text.spearman if text else None,
        "auroc_visual": visual.auroc if visual else None,
        "auroc_text": text.auroc if text else None,
        "iou": visual.iou if visual else None,
        "confidence": record.explanation.confidence if record.explanation else None,
        "failure": record.failure,
    }

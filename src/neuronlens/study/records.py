"""What a study found out: records of neurons, and all of them together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError

from neuronlens.atlas import SampleRecord, new_folder
from neuronlens.classify import CATEGORIES, Category
from neuronlens.errors import DataError, MissingExtraError, UnknownNameError
from neuronlens.explanation import Explanation
from neuronlens.neurons import NeuronId
from neuronlens.score import Score, Summary, summarise
from neuronlens.show import Html, table

if TYPE_CHECKING:
    import pandas as pd

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
        simulators: Class of the simulator of each modality.
        sampling: How the explaining exemplars were chosen.
        explain: Ranks explained from.
        held_out: Ranks scored on.
        null_draws: Other neurons' explanations per neuron.
        seed: Of all draws.
    """

    model: str
    model_name: str
    readings: dict[str, Any]
    explainer: str
    simulators: dict[str, str]
    sampling: str
    explain: tuple[int, ...]
    held_out: tuple[int, ...]
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

    def __repr__(self) -> str:
        return (
            f"Study({len(self)} neurons of {self.manifest.model_name}, {self.manifest.explainer})"
        )

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
        except (OSError, ValidationError, UnicodeDecodeError) as error:
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

"""What interventions do to a model's answers: numbers, paired differences, and what was said."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from pydantic import ValidationError

from neuronlens.atlas import Skipped
from neuronlens.errors import DataError, MissingExtraError, UnknownNameError
from neuronlens.evaluate.conditions import NONE
from neuronlens.evaluate.folder import (
    RESULT,
    AnswerRecord,
    Manifest,
    Record,
    ScoreRecord,
    put,
)
from neuronlens.evaluate.groups import By, Group, Groups
from neuronlens.evaluate.numbers import measure, require_measurable, score_key
from neuronlens.evaluate.resampling import Estimated, Measured
from neuronlens.lines import writing
from neuronlens.metrics import Metric
from neuronlens.questions import Question
from neuronlens.show import Html, escaped, table

if TYPE_CHECKING:
    import pandas as pd


class Answered(AnswerRecord):
    """An answer, and what the metric says of it.

    Attributes:
        numbers: By name; None if it could not be measured.
        failure: Why not.
    """

    numbers: dict[str, float] | None = None
    failure: str | None = None


class AskedQuestion(Record):
    """A question without its images.

    Attributes:
        images: A name for its set of images: questions with the same images share it.
    """

    id: str
    text: str
    references: tuple[str, ...] = ()
    options: dict[str, str] | None = None
    domain: str | None = None
    role: str = ""
    kind: str = ""
    images: str = ""


class EvaluationFile(Record):
    """An evaluation as it lies on disk."""

    manifest: Manifest
    metric: str
    metric_settings: dict[str, Any]
    resamples: int
    questions: list[AskedQuestion]
    skipped: list[Skipped]
    answers: list[Answered]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a model answers as it is and under interventions, and how good the answers are.

    A condition's mean is over all its questions, and over its members if it has several (random
    controls of several seeds). Conditions are compared question by question. Answers that could
    not be measured are in no mean; `failures` has them.

    Every interval is a percentile bootstrap at 95 %: images are drawn with replacement, with all
    questions on them, the same draws for every condition, and members by themselves. Images are
    the unit because several questions on one image are not independent; a question about several
    images is one unit with every other about the same ones.

    Attributes:
        manifest: What the answers were made of and with.
        metric: Its name; also that of the number compared by default.
        metric_settings: What its numbers depend on.
        questions: Those that were answered, without images.
        units: Number of the set of images each question is about.
        skipped: Questions that could not be put to the model, the same under every condition.
        answers: By condition, for each member, the answers in the order of the questions.
        resamples: How often intervals draw.
    """

    manifest: Manifest
    metric: str
    metric_settings: Mapping[str, object]
    questions: tuple[Question, ...]
    units: tuple[int, ...]
    skipped: tuple[Skipped, ...]
    answers: Mapping[str, tuple[tuple[Answered, ...], ...]]
    resamples: int
    _measured: dict[str, Measured] = field(default_factory=dict, repr=False)

    @property
    def conditions(self) -> tuple[str, ...]:
        """Their names, the untouched model first."""
        return tuple(self.answers)

    @cached_property
    def numbers(self) -> tuple[str, ...]:
        """Names of what the metric tells of each answer, its main number first."""
        names = {self.metric: None}
        for each in self._all():
            names |= dict.fromkeys(each.numbers or ())
        return tuple(names)

    @property
    def failures(self) -> list[Answered]:
        """Answers that could not be measured."""
        return [each for each in self._all() if each.numbers is None]

    def values(
        self, condition: str, number: str | None = None
    ) -> Float[np.ndarray, "member question"]:
        """A number of every answer of a condition; NaN where it could not be measured.

        Raises:
            UnknownNameError: If there is no such condition or number.
        """
        return self._of(number).values[self._known(condition)]

    def mean(
        self,
        condition: str,
        *,
        group: Group[Question] | None = None,
        by: By[Question] = "domain",
        number: str | None = None,
    ) -> Estimated:
        """How good a condition's answers are.

        Args:
            condition: Its name.
            group: Of questions: its name, or a function that is true for those in it.
            by: What a group's name is: the questions' domain or kind, or a function of them.
            number: Which of the metric's numbers; by default the main one.

        Raises:
            UnknownNameError: If there is no such condition, group or number.
        """
        rows = Groups(self.questions, by).rows(group)
        return self._of(number).mean(self._known(condition), rows)

    def compare(
        self,
        one: str,
        other: str = NONE,
        *,
        group: Group[Question] | None = None,
        versus: Group[Question] | None = None,
        by: By[Question] = "domain",
        number: str | None = None,
    ) -> Estimated:
        """How much better the answers of one condition are than those of another.

        Below 0 where `one` is worse. With `versus`, the difference of differences: how much
        larger it is in `group`. So, for an intervention that is said to concern red things,

        - `compare("red")` is the drop,
        - `compare("red", group="red")` the drop on questions about them,
        - `compare("red", group="red", versus="others")` how much larger that is than elsewhere,
        - `compare("red", "random", group="red", versus="others")` how much more so than under
          the control.

        Args:
            one: A condition.
            other: What is taken away from it.
            group: Of questions: its name, or a function that is true for those in it.
            versus: Another group; `"others"` for all that are not in `group`.
            by: What a group's name is: the questions' domain or kind, or a function of them.
            number: Which of the metric's numbers; by default the main one.

        Raises:
            UnknownNameError: If there is no such condition, group or number.
            DataError: If a group is empty or two have questions in common, or there is `versus`
                without `group`.
        """
        names = self._known(one), self._known(other)
        groups = Groups(self.questions, by)
        if versus is None:
            return self._of(number).difference(*names, groups.rows(group))
        if group is None:
            raise DataError("versus= compares a group with another: give group= too.")
        return self._of(number).difference(*names, *groups.others(group, versus))

    def scored(self, metric: Metric) -> Evaluation:
        """The same answers, measured by another metric; nothing is generated.

        Raises:
            DataError: If the questions lack what the metric compares with.
        """
        require_measurable(metric, self.questions)
        return measured(self, metric, {}, lambda new: None)

    def table(self, by: By[Question] | None = None, *, number: str | None = None) -> pd.DataFrame:
        """Means and differences to the untouched model, a row for each condition (and group).

        Args:
            by: What to group questions by; None for all together.
            number: Which of the metric's numbers; by default the main one.

        Raises:
            MissingExtraError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise MissingExtraError("pandas", "table", "A data frame") from error
        return pd.DataFrame(self._rows(by, number))

    def answer_table(self) -> pd.DataFrame:
        """Every answer with its numbers, a row for each condition, member and question.

        Raises:
            MissingExtraError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise MissingExtraError("pandas", "table", "A data frame") from error
        asked = {each.id: each for each in self.questions}
        return pd.DataFrame(
            [
                {
                    "condition": each.condition,
                    "member": each.member,
                    "id": each.id,
                    "question": asked[each.id].text,
                    "answer": each.text,
                    **{name: (each.numbers or {}).get(name) for name in self.numbers},
                    "failure": each.failure,
                    "tokens": each.tokens,
                    "cut": each.cut,
                }
                for each in self._all()
            ]
        )

    def save(self, path: str | Path) -> None:
        """Write everything into one JSON file, for `Evaluation.open`.

        Raises:
            OutputError: If it cannot be written.
        """
        path = Path(path)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            put(path, self.to_json())

    def to_json(self) -> str:
        """The evaluation as JSON."""
        names = _names(self.questions, self.units)
        held = EvaluationFile(
            manifest=self.manifest,
            metric=self.metric,
            metric_settings=dict(self.metric_settings),
            resamples=self.resamples,
            questions=[
                AskedQuestion(
                    id=each.id,
                    text=each.text,
                    references=each.references,
                    options=None if each.options is None else dict(each.options),
                    domain=each.domain,
                    role=each.role,
                    kind=each.kind,
                    images=name,
                )
                for each, name in zip(self.questions, names, strict=True)
            ],
            skipped=list(self.skipped),
            answers=list(self._all()),
        )
        return held.model_dump_json() + "\n"

    @classmethod
    def open(cls, path: str | Path) -> Evaluation:
        """An evaluation that was saved, or finished in a folder (`out=`).

        Raises:
            DataError: If it is missing or damaged.
        """
        path = Path(path)
        file = path / RESULT if path.is_dir() else path
        try:
            held = EvaluationFile.model_validate_json(file.read_text("utf-8"))
        except FileNotFoundError as error:
            raise DataError(
                f"There is no finished evaluation at {path}. One that was stopped goes on when "
                "evaluate is called again with the same arguments."
            ) from error
        except (OSError, ValidationError, UnicodeDecodeError) as error:
            raise DataError(f"{file} is no whole evaluation: {error}") from error
        questions = tuple(
            Question(**{**each.model_dump(exclude={"images"}), "images": ()})
            for each in held.questions
        )
        numbers: dict[str, int] = {}
        units = [numbers.setdefault(each.images, len(numbers)) for each in held.questions]
        cells = {each.place: each for each in held.answers}
        try:
            answers = {
                name: tuple(
                    tuple(cells[name, member, each.id] for each in questions)
                    for member in range(len(held.manifest.conditions[name]))
                )
                for name in dict.fromkeys(each.condition for each in held.answers)
            }
        except KeyError as error:
            raise DataError(f"{file} is no whole evaluation: it lacks {error}.") from error
        return cls(
            manifest=held.manifest,
            metric=held.metric,
            metric_settings=held.metric_settings,
            questions=questions,
            units=tuple(units),
            skipped=tuple(held.skipped),
            answers=answers,
            resamples=held.resamples,
        )

    def __repr__(self) -> str:
        return (
            f"Evaluation({len(self.questions)} questions, {self.metric}, "
            f"conditions {', '.join(self.conditions)})"
        )

    def _repr_html_(self) -> Html:
        groups = Groups(self.questions).known
        head = ["condition", f"mean {self.metric}"]
        has_none = NONE in self.conditions
        head += ["difference to none"] if has_none else []
        head += [f"{name}: difference" for name in groups] if has_none and len(groups) > 1 else []
        rows = []
        for name in self.conditions:
            members = len(self.answers[name])
            row = [name if members == 1 else f"{name} (mean of {members})", str(self.mean(name))]
            if has_none:
                is_none = name == NONE
                row.append("" if is_none else str(self.compare(name)))
                if len(groups) > 1:
                    row += ["" if is_none else str(self.compare(name, group=g)) for g in groups]
            rows.append(row)
        return Html(table(head, rows, f"Evaluation of {self.manifest.model_name}") + self._note())

    def _note(self) -> Html:
        units = len(set(self.units))
        said = [
            f"{len(self.questions)} questions on {units} sets of images; 95 % intervals resample "
            "these, and the members of a condition."
        ]
        if self.skipped:
            counted = Counter(each.reason for each in self.skipped)
            told = ", ".join(f"{reason} ({count})" for reason, count in counted.items())
            said.append(f"{len(self.skipped)} questions were skipped: {told}.")
        if self.failures:
            said.append(f"{len(self.failures)} answers could not be measured and are in no mean.")
        cut = sum(each.cut for each in self._all())
        if cut:
            said.append(f"{cut} answers reached their limit.")
        return Html(f'<div style="font-size:12px;opacity:.7">{escaped(" ".join(said))}</div>')

    def _all(self) -> list[Answered]:
        return [each for members in self.answers.values() for row in members for each in row]

    def _known(self, condition: str) -> str:
        if condition not in self.answers:
            raise UnknownNameError("condition", condition, self.answers)
        return condition

    def _of(self, number: str | None) -> Measured:
        name = self.metric if number is None else number
        if name not in self.numbers:
            raise UnknownNameError("number", name, self.numbers)
        if name not in self._measured:
            values = {
                condition: np.array(
                    [[(each.numbers or {}).get(name, np.nan) for each in row] for row in members]
                ).reshape(len(members), len(self.questions))
                for condition, members in self.answers.items()
            }
            self._measured[name] = Measured(
                values, self.units, resamples=self.resamples, seed=self.manifest.seed
            )
        return self._measured[name]

    def _rows(self, by: By[Question] | None, number: str | None) -> list[dict[str, object]]:
        groups = Groups(self.questions, by or "domain")
        names: Sequence[str | None] = [None] if by is None else groups.known
        rows: list[dict[str, object]] = []
        for condition in self.conditions:
            for name in names:
                at = groups.rows(name)
                found = self._of(number).mean(condition, at)
                row: dict[str, object] = {"condition": condition}
                row |= {} if by is None else {"group": name}
                row |= _told("mean", found)
                row |= {"questions": int(at.sum()), "images": found.units}
                values = self.values(condition, number)[:, at]
                row |= {"members": len(values), "failures": int(np.isnan(values).sum())}
                if NONE in self.conditions:
                    row |= _told("difference", self._of(number).difference(condition, NONE, at))
                rows.append(row)
        return rows


def _told(name: str, found: Estimated) -> dict[str, object]:
    low, high = found.interval or (np.nan, np.nan)
    return {name: found.value, f"{name}_low": low, f"{name}_high": high}


def _names(questions: Sequence[Question], units: Sequence[int]) -> list[str]:
    """A name for each question's images, the same for the same unit."""
    return [f"set {unit}" for unit in units]


def measured(
    evaluation: Evaluation,
    metric: Metric,
    kept: Mapping[str, ScoreRecord],
    keep: Callable[[list[ScoreRecord]], None],
) -> Evaluation:
    """The evaluation's answers with a metric's numbers.

    Args:
        evaluation: With answers.
        metric: The metric.
        kept: What it said before, by key.
        keep: Takes what it says now.

    Raises:
        DataError: If the metric gives something else than it must.
    """
    asked = {each.id: each for each in evaluation.questions}
    every = evaluation._all()
    known = measure(metric, [(asked[each.id], each.text) for each in every], kept, keep)

    def told(each: Answered) -> Answered:
        found = known[score_key(metric, asked[each.id], each.text)]
        own = each.model_dump(exclude={"numbers", "failure"})
        return Answered(**own, numbers=found.numbers, failure=found.failure)

    return replace(
        evaluation,
        metric=metric.name,
        metric_settings=json.loads(json.dumps(metric.settings, default=str)),
        answers={
            name: tuple(tuple(told(each) for each in row) for row in members)
            for name, members in evaluation.answers.items()
        },
        _measured={},
    )

"""An evaluation's folder, written line by line, so that a killed run goes on where it was."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final

from pydantic import BaseModel, ConfigDict, ValidationError

from neuronlens.atlas import Skipped, locked, require_free
from neuronlens.errors import DataError, OutputError
from neuronlens.lines import cut_torn_line, read_lines, writing

FORMAT: Final = 1
"""Version of the folder's layout; a reader refuses any other."""

MANIFEST: Final = "manifest.json"
ANSWERS: Final = "answers.jsonl"
SKIPPED: Final = "skipped.jsonl"
SETTINGS: Final = "interventions.jsonl"
SCORES: Final = "scores.jsonl"
RESULT: Final = "evaluation.json"
_LINES: Final = (ANSWERS, SKIPPED, SETTINGS, SCORES)


class Record(BaseModel):
    """A line or a file; what reads it is made when it is first needed: importing is quick."""

    model_config = ConfigDict(defer_build=True, frozen=True)


class Manifest(Record):
    """What answers were made of and with.

    Attributes:
        format: Version of the layout.
        model: Fingerprint of the model.
        model_name: Where it was loaded from.
        prompt: The prompt's texts, and whether the chat template goes around it.
        generation: How answers are generated.
        settings: Digests of the processor's and the model's own settings, and the floating-point
            type.
        versions: Of torch and transformers, in the run that began it. Others may go on, with a
            warning.
        questions: Digest of the questions as they are put: ids, texts and images, in order.
        count: How many questions there are.
        seed: Of intervals, and of sampling. Another one may go on if nothing is drawn.
        batch_size: Questions per batch, in the run that began it. Another one may go on, too: a
            batch changes answers that are not drawn by rounding only.
        conditions: By name, the digest of each member's settings; the settings themselves are in
            `interventions.jsonl`. More conditions may be added.
    """

    format: int = FORMAT
    model: str
    model_name: str
    prompt: dict[str, Any]
    generation: dict[str, Any]
    settings: dict[str, str]
    versions: dict[str, str]
    questions: str
    count: int
    seed: int
    batch_size: int
    conditions: dict[str, list[str]]


class AnswerRecord(Record):
    """What the model answered to one question under one condition.

    Attributes:
        condition: Its name.
        member: Number of the intervention among those of the condition.
        id: Of the question.
        text: The answer.
        tokens: How many tokens were generated.
        cut: Whether it reached its limit.
    """

    condition: str
    member: int
    id: str
    text: str
    tokens: int
    cut: bool = False

    @property
    def place(self) -> tuple[str, int, str]:
        """By which it is found."""
        return self.condition, self.member, self.id


class ScoreRecord(Record):
    """What a metric says of one answer; found by a digest of all it depends on."""

    key: str
    numbers: dict[str, float] | None = None
    failure: str | None = None
    asked: str | None = None


class SettingsRecord(Record):
    """All settings of one intervention."""

    digest: str
    settings: dict[str, Any]


class Journal:
    """What a run has finished: in memory, and in a folder if there is one.

    Attributes:
        folder: Where it lies; None for a run that is kept in memory.
        manifest: What the answers are made with.
        answers: By condition, member and question.
        skipped: By the question's id.
        scores: By key.
    """

    def __init__(self, folder: Path | None, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.answers: dict[tuple[str, int, str], AnswerRecord] = {}
        self.skipped: dict[str, Skipped] = {}
        self.scores: dict[str, ScoreRecord] = {}
        self._files: dict[str, IO[str]] = {}

    def answer(self, records: Iterable[AnswerRecord]) -> None:
        """Keep the answers of a batch under one condition."""
        new = [each for each in records if each.place not in self.answers]
        self.answers |= {each.place: each for each in new}
        self._write(ANSWERS, new)

    def skip(self, skipped: Iterable[Skipped]) -> None:
        """Keep which questions cannot be put."""
        new = [each for each in skipped if each.id not in self.skipped]
        self.skipped |= {each.id: each for each in new}
        self._write(SKIPPED, new)

    def score(self, records: Iterable[ScoreRecord]) -> None:
        """Keep what a metric said."""
        new = list(records)
        self.scores |= {each.key: each for each in new}
        self._write(SCORES, new)

    def result(self, text: str) -> None:
        """Keep the finished evaluation, whole."""
        if self.folder is not None:
            with writing(self.folder):
                put(self.folder / RESULT, text)

    def _write(self, name: str, lines: Iterable[BaseModel]) -> None:
        if self.folder is None:
            return
        with writing(self.folder):
            if name not in self._files:
                self._files[name] = (self.folder / name).open("a", encoding="utf-8")
            self._files[name].writelines(each.model_dump_json() + "\n" for each in lines)
            self._files[name].flush()

    def close(self) -> None:
        """Close the files; what could not be written was said when it was flushed."""
        for file in self._files.values():
            with suppress(OSError):
                file.close()


@contextmanager
def journal(
    out: Path | None, manifest: Manifest, settings: Mapping[str, dict[str, Any]]
) -> Iterator[Journal]:
    """The journal of a run, with what earlier runs of the same evaluation have finished.

    Args:
        out: Its folder; None keeps everything in memory.
        manifest: What the run asks for.
        settings: Of every intervention, by its digest.

    Raises:
        OutputError: If the folder holds something else, or an evaluation made with other
            settings, or cannot be written, or another run writes it.
        DataError: If what it holds is damaged.
    """
    if out is None:
        yield Journal(None, manifest)
        return
    if not (out / MANIFEST).exists() and not _was_begun(out):
        require_free(out)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with locked(out / "lock"):
        if (out / MANIFEST).exists():
            there = read_manifest(out)
            manifest = _merged(out, there, manifest)
        with writing(out):
            for name in _LINES:
                cut_torn_line(out / name)
            put(out / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
        kept = Journal(out, manifest)
        try:
            _load(kept)
            told = {each.digest for each in read_lines(out / SETTINGS, SettingsRecord, of=_WHAT)}
            new = [SettingsRecord(digest=k, settings=v) for k, v in settings.items()]
            kept._write(SETTINGS, [each for each in new if each.digest not in told])
            yield kept
        finally:
            kept.close()


_WHAT: Final = "evaluation"


def _load(kept: Journal) -> None:
    folder = kept.folder
    if folder is None:
        return
    for answer in read_lines(folder / ANSWERS, AnswerRecord, of=_WHAT):
        kept.answers.setdefault(answer.place, answer)
    for skipped in read_lines(folder / SKIPPED, Skipped, of=_WHAT):
        kept.skipped[skipped.id] = skipped
    for score in read_lines(folder / SCORES, ScoreRecord, of=_WHAT):
        kept.scores[score.key] = score


def _was_begun(out: Path) -> bool:
    """Whether there is nothing here but what a run begins with."""
    return out.is_dir() and {each.name for each in out.iterdir()} <= {"lock", f".{MANIFEST}"}


def _merged(out: Path, there: Manifest, asked: Manifest) -> Manifest:
    """The manifest of the folder, with the conditions that are new and the seed that is asked for.

    Raises:
        OutputError: If anything else differs that answers depend on.
    """
    names = {
        "model": "model",
        "prompt": "prompt",
        "generation": "generation",
        "settings": "setting",
        "count": "number of questions",
        "questions": "set of questions",
    }
    if there.generation.get("do_sample"):
        names |= {"seed": "seed", "batch_size": "batch size, which drawn answers depend on"}
    for name, said in names.items():
        one, other = getattr(there, name), getattr(asked, name)
        if one != other:
            if isinstance(one, dict):
                where = next(k for k in {**one, **other} if one.get(k) != other.get(k))
                said, one, other = f"{said}.{where}", one.get(where), other.get(where)
            raise OutputError(
                f"{out} holds an evaluation with another {said}: {_short(one)}, not "
                f"{_short(other)}. Choose another folder, or ask for the same to go on."
            )
    for name, digests in asked.conditions.items():
        before = there.conditions.get(name, digests)
        if before != digests:
            raise OutputError(
                f"{out} holds answers of a condition {name!r} with other interventions "
                f"({len(before)} then, {len(digests)} now, or of other neurons or values). Give "
                "it another name, or choose another folder."
            )
    if there.versions != asked.versions:
        then, now = (
            " and ".join(f"{name} {number}" for name, number in each.versions.items())
            for each in (there, asked)
        )
        warnings.warn(
            f"{out} was begun with {then}, and goes on with {now}. Answers that are generated "
            "now may differ from what they would have been.",
            UserWarning,
            stacklevel=5,
        )
    conditions = {**there.conditions, **asked.conditions}
    return there.model_copy(update={"conditions": conditions, "seed": asked.seed})


def _short(value: object) -> str:
    said = repr(value)
    return said if len(said) <= 120 else f"{said[:120]}..."


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an evaluation's folder.

    Raises:
        DataError: If it is missing or damaged, or of another version.
    """
    try:
        found = Manifest.model_validate_json((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise DataError(f"{folder} is no whole evaluation: {error}") from error
    if found.format != FORMAT:
        raise DataError(
            f"{folder} is an evaluation of format {found.format}; this version reads {FORMAT}."
        )
    return found


def put(path: Path, text: str) -> None:
    """A file that is whole or not there."""
    working = path.with_name(f".{path.name}")
    working.write_text(text, encoding="utf-8")
    working.replace(path)

"""Text tokens simulated by a local model's expectation: one forward, nothing is generated."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from neuronlens.errors import ChatError
from neuronlens.explanation import Failure
from neuronlens.simulate.chat import claim
from neuronlens.simulate.simulator import Simulation, SimulationJob
from neuronlens.worked import WORKED_VERSION, worked_examples

_DIGITS = tuple(str(level) for level in range(11))
_LETTERS = tuple("ABCDEFGHIJK")

_SYSTEM = """\
One neuron of a vision-language model is described, and the tokens of a text are listed, each with \
the neuron's activation behind it: {labels}. Where no activation stands, it was not measured. On \
most tokens a neuron does not fire.
"""


class ExpectedValueSimulator:
    """Text tokens: the mean of the 11 levels under a local model's next-token distribution.

    The tokens are listed, each followed by a place for its level; at every such place the
    model's distribution over the labels of the levels is read off, renormalised, and averaged.
    All places of a text, and many texts, are read off in one forward; what precedes every
    question is run once.

    Levels are written 0 to 10 where the tokenizer has each of these as one token, and A to K
    where it has not.

    Source: not P1, but Bills et al. (2023), whom P1 follows: they take the expectation over levels.
    It is read from a local model, since chat servers do not give an echoed prompt's probabilities.

    Attributes:
        model: A language model, or a vision-language model that takes text alone.
        tokenizer: Its tokenizer, or its processor.
        batch_size: Texts per forward.
        worked: How many worked neurons precede the question, at most 8.
        reuse: Whether what precedes every question is run once and its keys and values are
            kept; for models whose cache cannot be repeated, False.

    Raises:
        ChatError: If the tokenizer has neither eleven digits nor eleven letters as tokens, or the
            model is in training mode.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        batch_size: int = 8,
        worked: int = 8,
        reuse: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"A model and its tokenizer or processor are needed, not a {type(model).__name__}."
            )
        if model.training:
            raise ChatError(
                "The model is in training mode, so its predictions are partly random: model.eval()."
            )
        if batch_size < 1 or not 0 <= worked <= 8:
            raise ValueError(
                f"batch_size={batch_size} and worked={worked} were given; they are at least 1, and "
                "from 0 to 8."
            )
        self.model = model
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self.batch_size = batch_size
        self.worked = worked
        self.reuse = reuse
        self._lines: dict[str, list[int]] = {}
        self.labels, self._label_ids = self._find_labels()
        self._newline = self._ids("\tA\n")[len(self._ids("\tA")) :]
        takes = inspect.signature(model.forward).parameters
        self._takes_places = "logits_to_keep" in takes

    def __repr__(self) -> str:
        return f"ExpectedValueSimulator({type(self.model).__name__})"

    @property
    def settings(self) -> dict[str, object]:
        """What its predictions depend on, for a study's manifest."""
        config: Any = self.model.config
        name = str(getattr(config, "_name_or_path", "")) or type(self.model).__name__
        return {"model": name, "worked": self.worked, "prompt": f"1, {WORKED_VERSION}"}

    def simulate(self, jobs: Sequence[SimulationJob]) -> list[Simulation | Failure]:
        """Predict the text tokens that count."""
        answers: dict[int, Simulation | Failure] = {}
        rows: list[tuple[int, _Row]] = []
        for number, job in enumerate(jobs):
            if not job.text.any():
                answers[number] = Simulation(np.full(len(job.tokens), np.nan))
            elif job.tokens.pieces is None:
                answers[number] = Failure("the token map holds no text")
            else:
                rows.append((number, self._row(job)))
        opening = self._opening()
        kept = self._run_opening(opening) if rows and self.reuse else None
        # Rows of about one length share a batch, so that little is padded.
        rows.sort(key=lambda row: len(row[1].ids))
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            values = self._expected([row for _, row in batch], opening, kept)
            for (number, _), each in zip(batch, values, strict=True):
                job = jobs[number]
                whole = np.full(len(job.tokens), np.nan)
                whole[job.text] = each
                answers[number] = Simulation(whole)
        return [answers[number] for number in range(len(jobs))]

    @torch.inference_mode()
    def _expected(
        self, rows: Sequence[_Row], opening: list[int], kept: Any
    ) -> list[Float[np.ndarray, " place"]]:
        """The expected level at each place of each row."""
        device = next(self.model.parameters()).device
        before = [] if kept is not None else opening
        length = max(len(row.ids) for row in rows)
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor(
            [[*before, *row.ids, *[pad] * (length - len(row.ids))] for row in rows], device=device
        )
        mask = torch.ones(len(rows), len(opening) + length, dtype=torch.long, device=device)
        for number, row in enumerate(rows):
            mask[number, len(opening) + len(row.ids) :] = 0
        places = sorted({len(before) + place for row in rows for place in row.places})
        more: dict[str, Any] = {}
        if kept is not None:
            cache = copy.deepcopy(kept)
            cache.batch_repeat_interleave(len(rows))
            more["past_key_values"] = cache
        if self._takes_places:
            more["logits_to_keep"] = torch.tensor(places, device=device)
        logits = self.model(input_ids=ids, attention_mask=mask, **more).logits
        if logits.shape[1] != len(places):
            logits = logits[:, torch.tensor(places, device=device)]
        shares = logits[..., self._label_ids.to(device)].float().softmax(-1)
        levels = torch.arange(11, device=device, dtype=torch.float32)
        expected = (shares @ levels).cpu().numpy()
        column = {place: i for i, place in enumerate(places)}
        return [
            expected[number, [column[len(before) + place] for place in row.places]]
            for number, row in enumerate(rows)
        ]

    @torch.inference_mode()
    def _run_opening(self, opening: list[int]) -> Any:
        device = next(self.model.parameters()).device
        ids = torch.tensor([opening], device=device)
        more: dict[str, Any] = {"logits_to_keep": 1} if self._takes_places else {}
        return self.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **more
        ).past_key_values

    def _opening(self) -> list[int]:
        """What precedes every question: the task, and the worked neurons with their levels."""
        said = f"{self.labels[0]} (does not fire) to {self.labels[10]} (fires most strongly)"
        start = self.tokenizer.bos_token_id
        ids = [] if start is None else [start]
        ids += self._ids(_SYSTEM.format(labels=said) + "\n")
        examples = worked_examples("text")[: self.worked]
        for number, example in enumerate(examples):
            tokens = example.exemplars[0].tokens
            # As in the question, the first ones of a list are not shown; ever more of them.
            hidden = number * len(tokens) // max(1, len(examples))
            ids += self._ids(claim(example.sentence, example.predicts) + "\n")
            for i, (piece, level) in enumerate(tokens):
                ids += self._line(piece)
                label = [int(self._label_ids[level])] if i >= hidden else []
                ids += [*label, *self._newline]
            ids += self._newline
        return ids

    def _row(self, job: SimulationJob) -> _Row:
        pieces = [(job.tokens.pieces or ())[i] for i in np.flatnonzero(job.text)]
        explanation = job.explanation
        ids = self._ids(claim(explanation.sentence, explanation.predicts) + "\n")
        places = []
        for piece in pieces:
            ids += self._line(piece)
            places.append(len(ids) - 1)
            ids += self._newline
        return _Row(ids, places)

    def _find_labels(self) -> tuple[tuple[str, ...], Int[Tensor, " level"]]:
        """The labels of the levels and their tokens."""
        start = self._ids("\t")
        for labels in (_DIGITS, _LETTERS):
            found = [self._ids("\t" + label) for label in labels]
            whole = all(len(f) == len(start) + 1 and f[: len(start)] == start for f in found)
            if whole and len({f[-1] for f in found}) == len(labels):
                return labels, torch.tensor([f[-1] for f in found])
        raise ChatError(
            "The tokenizer writes neither 0 to 10 nor A to K with one token each, so levels "
            "cannot be read off. Use ChatSimulator(TransformersChat(model, processor))."
        )

    def _line(self, piece: str) -> list[int]:
        """A listed token; the same ones come again and again."""
        if piece not in self._lines:
            # Escaped, a piece stays on its line; without quotation marks, the line is shorter.
            self._lines[piece] = self._ids(json.dumps(piece, ensure_ascii=False)[1:-1] + "\t")
        return self._lines[piece]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass(frozen=True)
class _Row:
    """The tokens of a question, and after which of them a level is to be read off."""

    ids: list[int]
    places: list[int]

"""Lingo-Judge: a text classifier that says whether an answer is right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from neuronlens.errors import DataError
from neuronlens.explanation import Failure
from neuronlens.metrics.metric import Measures, paired
from neuronlens.questions import Question
from neuronlens.segment.checkpoint import describe, settle

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGEST = 128
"""Tokens the benchmark's code shows the classifier of each text."""


class LingoJudge:
    """LingoQA's own judge: a classifier reads question, reference and answer, and gives a logit.

    Gives three numbers: `lingo_judge`, 1 if the answer is right; `lingo_judge_probability`,
    the sigmoid of the logit, the largest over the references; and `lingo_judge_cut`, 1 if a
    text was longer than the classifier reads, so that the answer's end was not seen. An answer
    is right if its probability is above 0.5. A logit that is not finite is a `Failure`.

    Texts share a batch, with padding; what comes out does not depend on it, up to rounding.

    Source: Marcu et al., LingoQA, 2024, and the benchmark's code
    (wayveai/LingoQA, benchmark/judge.py and evaluate.py): its text, its longest length of 128
    tokens, the largest logit over the references, and right if that is above 0. The code reads
    texts one by one.

    Attributes:
        model: The classifier.
        tokenizer: The one that belongs to it.
        batch_size: Texts in one forward.
        max_length: Tokens of a text that are read.
    """

    name = "lingo_judge"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 32,
        max_length: int = LONGEST,
    ) -> None:
        """Judge with a classifier that was loaded by the caller.

        Args:
            model: A sequence classifier with one output, in evaluation mode, where and in which
                dtype it is to run. It must not be changed afterwards.
            tokenizer: The one that belongs to it, with a class token.
            batch_size: Texts in one forward.
            max_length: Tokens of a text that are read; 128 in the benchmark.

        Raises:
            ValueError: If the model has another number of outputs or is in training mode, the
                tokenizer lacks a token, or a number makes no sense.
        """
        outputs = getattr(model.config, "num_labels", None)
        if outputs != 1:
            raise ValueError(
                f"{type(model).__name__} has {outputs} outputs; Lingo-Judge is a classifier with "
                "1. Load it with LingoJudge.load(), or AutoModelForSequenceClassification."
            )
        if any(module.training for module in model.modules()):
            raise ValueError(
                f"{type(model).__name__} is in training mode, in which its answers are random. "
                "Call model.eval() first."
            )
        if not tokenizer.cls_token or not tokenizer.pad_token:
            raise ValueError(
                f"{type(tokenizer).__name__} has no class token or no padding token; Lingo-Judge "
                "reads texts with both. Take the tokenizer of the judge's checkpoint."
            )
        if batch_size < 1 or max_length < 8:
            raise ValueError(
                f"batch_size={batch_size}, max_length={max_length} were given; they must be at "
                "least 1 and 8."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_length = max_length
        self._checkpoint = describe(model, str(len(tokenizer)))

    @classmethod
    def load(
        cls,
        name: str = "wayveai/Lingo-Judge",
        *,
        batch_size: int = 32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LingoJudge:
        """The judge of a checkpoint, from the hub or from a folder.

        Args:
            name: Name or folder of the checkpoint.
            batch_size: Texts in one forward.
            device: By default the first GPU if there is one.
            dtype: Of the weights; by default as they are stored.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        model = AutoModelForSequenceClassification.from_pretrained(name, dtype=dtype or "auto")
        settle(model, device)
        return cls(model, AutoTokenizer.from_pretrained(name), batch_size=batch_size)

    def __repr__(self) -> str:
        return f"LingoJudge({self._checkpoint})"

    @property
    def settings(self) -> dict[str, object]:
        """What its numbers depend on, for manifests."""
        return {
            "metric": self.name,
            "model": self._checkpoint,
            "max_length": self.max_length,
        }

    def score(
        self, answers: Sequence[str | None], questions: Sequence[Question]
    ) -> list[Measures | Failure]:
        """Judge each answer.

        Raises:
            DataError: If a question has no references.
        """
        pairs = paired(self.name, answers, questions)
        references = [list(dict.fromkeys(question.references)) for _, question in pairs]
        texts = [
            self.text(question.text, reference, answer)
            for (answer, question), some in zip(pairs, references, strict=True)
            for reference in some
        ]
        read = iter(self._read(texts))
        measured: list[Measures | Failure] = []
        for some in references:
            logits, cut = zip(*(next(read) for _ in some), strict=True)
            if not all(map(math.isfinite, logits)):
                measured.append(Failure("Lingo-Judge gave a number that is not finite"))
                continue
            best = max(logits)
            measured.append(
                {
                    self.name: float(best > 0),
                    "lingo_judge_probability": float(torch.tensor(best).double().sigmoid()),
                    "lingo_judge_cut": float(any(cut)),
                }
            )
        return measured

    def text(self, question: str, reference: str, answer: str) -> str:
        """What the classifier reads of one answer beside one reference."""
        lines = (
            str(self.tokenizer.cls_token),
            f"Question: {question}",
            f"Answer: {reference}",
            f"Student: {answer}",
        )
        return "\n".join(lines)

    def _read(self, texts: Sequence[str]) -> list[tuple[float, bool]]:
        """The logit of each text, and whether its end was cut off."""
        found: list[tuple[float, bool]] = []
        for start in range(0, len(texts), self.batch_size):
            some = list(texts[start : start + self.batch_size])
            whole = [len(ids) for ids in self.tokenizer(some, verbose=False).input_ids]
            inputs = self.tokenizer(
                some,
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            ).to(self.model.device)
            with torch.inference_mode():
                logits = self.model(**inputs).logits
            if logits.shape != (len(some), 1):
                raise DataError(
                    f"{type(self.model).__name__} gave numbers of shape {tuple(logits.shape)} for "
                    f"{len(some)} texts; one number for each was expected."
                )
            values = logits.squeeze(-1).float().tolist()
            found += [
                (value, length > self.max_length)
                for value, length in zip(values, whole, strict=True)
            ]
        return found

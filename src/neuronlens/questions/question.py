"""What a question is: images, what is asked of them, and which answers are right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuronlens.errors import DataError
from neuronlens.questions.prompt import Prompt, as_prompt
from neuronlens.samples import Picture, Sample


@dataclass(frozen=True, eq=False)
class Question:
    """A question about one image (or several), with the answers that count as right.

    Attributes:
        id: Unique within a data set.
        images: Paths, pictures in memory, or the bytes of image files.
        text: The question alone, without instructions.
        references: Answers that are right: ten for VQAv2, one or more for DocVQA and LingoQA;
            for a question with options, the letter. Empty if they are not published.
        options: Letter to text, in alphabetical order; None for an open question.
        domain: Name of the domain, for domain-specific neurons.
        role: A role description that prompts put before the question.
        kind: What the data set calls this type of question, or of its answer.
    """

    id: str
    images: tuple[Picture, ...]
    text: str
    references: tuple[str, ...] = ()
    options: Mapping[str, str] | None = None
    domain: str | None = None
    role: str = ""
    kind: str = ""

    def __post_init__(self) -> None:
        """Take single images and references without a tuple for what they mean; sort options.

        Raises:
            DataError: If there is nothing asked, or a reference is none of the options' letters.
        """
        given: Any = self.images
        several = given if isinstance(given, (tuple, list)) else (given,)
        images = tuple(Path(each) if isinstance(each, str) else each for each in several)
        object.__setattr__(self, "images", images)
        said: Any = self.references
        references = (said,) if isinstance(said, str) else tuple(said)
        object.__setattr__(self, "references", references)
        if not self.text.strip():
            raise DataError(f"Question {self.id!r} has no text; give what is asked.")
        if self.options is None:
            return
        if not self.options:
            raise DataError(f"Question {self.id!r} has no option; give some, or None.")
        ordered = dict(sorted(self.options.items()))
        object.__setattr__(self, "options", ordered)
        other = [each for each in references if each not in ordered]
        if other:
            raise DataError(
                f"Question {self.id!r} has the reference {other[0]!r}, which is none of its "
                f"options {', '.join(ordered)}. References of a question with options are letters."
            )

    def identification(self) -> Sample:
        """The question as P2 looks for domain-specific neurons: the image, then plain text.

        Encode or scan it with `template=False` and `text_roles=("prompt",)`. There is no
        response. Options and role are left out.

        Source: P2, Table 5, "Identification".
        """
        return Sample(self.id, self.images, self.text, domain=self.domain)

    def sample(self, prompt: Prompt | str = "short") -> Sample:
        """The question as it is put to a model that is to answer it; there is no response.

        Args:
            prompt: A prompt, or the name of one in `PROMPTS`. Encode with its `template`.

        Raises:
            UnknownNameError: If there is no prompt of that name.
        """
        text = as_prompt(prompt).render(self.text, self.options, self.role)
        return Sample(self.id, self.images, text, domain=self.domain)

"""How a question is put to a model: P2's prompts, and two that suit any model."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from neuronlens.errors import DataError, UnknownNameError

_FIELDS = ("role", "question", "options")


@dataclass(frozen=True)
class Prompt:
    """A text with places for the question, its options and a role description.

    Attributes:
        name: What it is called, in results and manifests.
        open: For a question without options; has the place `{question}`, and may have `{role}`.
        options: For one with options; has also the place `{options}`, unless they are to be
            left out.
        template: Whether the processor's own chat template goes around it. Without it, the
            image tokens come first and the text follows them at once.
        option: One option; has the places `{letter}` and `{text}`.
        between: What stands between two options.
    """

    name: str
    open: str
    options: str
    template: bool = True
    option: str = "{letter}. {text}"
    between: str = " "

    def __post_init__(self) -> None:
        """Refuse places that nothing is put into, and a prompt that asks nothing.

        Raises:
            DataError: If a text has other places, or no `{question}`.
        """
        self._check("open", self.open, ("role", "question"), ("question",))
        self._check("options", self.options, _FIELDS, ("question",))
        self._check("option", self.option, ("letter", "text"), ("letter", "text"))

    def _check(
        self, field: str, text: str, known: tuple[str, ...], needed: tuple[str, ...]
    ) -> None:
        try:
            parsed = list(string.Formatter().parse(text))
        except ValueError as error:
            raise DataError(
                f"Prompt {self.name!r}: `{field}` is no format: {error}. Write {{{{ for a brace."
            ) from error
        places = [
            # `{0!r}` and `{x:>9}` would change the text that is put in.
            name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            for _, name, spec, conversion in parsed
            if name is not None
        ]
        if not set(needed) <= set(places) <= set(known):
            has = ", ".join(f"{{{place}}}" for place in places) or "no place"
            raise DataError(
                f"Prompt {self.name!r}: `{field}` has {has}. It needs "
                f"{' and '.join(f'{{{each}}}' for each in needed)}, and may have "
                f"{', '.join(f'{{{each}}}' for each in known)}. Write {{{{ for a brace."
            )

    def render(
        self, question: str, options: Mapping[str, str] | None = None, role: str = ""
    ) -> str:
        """The user's text, without image tokens and chat markers.

        Options come in alphabetical order of their letters. A role that is empty leaves no
        gap: the spaces after its place go with it.
        """
        listed = self.between.join(
            self.option.format(letter=letter, text=text)
            for letter, text in sorted((options or {}).items())
        )
        put = {"role": role, "question": question, "options": listed}
        said = ""
        is_gap = False
        for literal, place, _, _ in string.Formatter().parse(
            self.open if options is None else self.options
        ):
            said += literal.lstrip() if is_gap else literal
            is_gap = place == "role" and not role
            said += put[place] if place else ""
        return said


DRIVING_ROLE: Final = (
    "Role: You are an advanced AI assistant installed on the Ego vehicle, equipped with "
    "conversational analysis capabilities for discussing autonomous driving scenarios. The "
    "perspective presented is from the point-of-view of the Ego vehicle, where the camera is "
    "mounted. It's important to note that the Ego vehicle itself is not visible in the images "
    "provided."
)
"""The role description that P2 puts before questions about driving (appendix C.1)."""

_PHRASE = "Answer the question using a single word or phrase."
_LETTER = "Answer with the option's letter from the given choices directly."

PROMPTS: Final[Mapping[str, Prompt]] = MappingProxyType(
    {
        each.name: each
        for each in (
            Prompt("plain", "{question}", "{question}", template=False),
            Prompt("chat", "{role}\n{question}", "{role}\n{question}\n{options}", between="\n"),
            Prompt(
                "short",
                "{role}\n{question}\n" + _PHRASE,
                "{role}\n{question}\n{options}\n" + _LETTER,
                between="\n",
            ),
            Prompt(
                "llava-next",
                "{role} Question: {question}\nContext: N/A\n" + _PHRASE,
                "Question: {question}\nContext: N/A\nOptions: {options}\n" + _LETTER,
            ),
            Prompt(
                "instructblip",
                "{role} Question: {question} Short Answer:",
                "Question: {question} Options: {options} " + _LETTER,
                template=False,
            ),
        )
    }
)
"""Prompts by name.

`plain` is the question alone, as P2 looks for neurons with; `chat` puts the model's own chat
template around it. `short` adds one sentence that asks for a word, or for a letter, and suits
any model with a chat template. `llava-next` and `instructblip` are those P2 evaluates with.

Source: P2, Table 5. The table prints each prompt on one line; where P2's code breaks the lines
of LLaVA's prompts, so do we. The words are the table's: the code leaves `Context: N/A` out of
open questions, and prints options as a Python list. LLaVA's chat preamble is in its chat
template, so it is not repeated here. The table has a role in open questions only.
"""


def as_prompt(prompt: Prompt | str) -> Prompt:
    """The prompt itself, or that of a name.

    Raises:
        UnknownNameError: If there is none of that name.
    """
    if isinstance(prompt, Prompt):
        return prompt
    if prompt not in PROMPTS:
        raise UnknownNameError(
            "prompt", prompt, PROMPTS, "Or give a Prompt of your own: nl.Prompt(name, open, ...)."
        )
    return PROMPTS[prompt]

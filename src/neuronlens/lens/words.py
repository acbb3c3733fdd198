"""Words of the vocabulary as text that can be read, and the number of a word."""

from __future__ import annotations

from typing import Any

from neuronlens.errors import AdapterError, UnknownNameError

_VISIBLE = str.maketrans({" ": "\u2423", "\n": "\u23ce", "\r": "\u240d", "\t": "\u21e5"})


def visible(text: str) -> str:
    """Text with its spaces, line breaks and tabs shown as signs; nothing at all as an empty set."""
    return text.translate(_VISIBLE) or "\u2205"


class Words:
    """What the words of a model's vocabulary read like.

    A leading space is a part of the text where the tokenizer's word has it ("\u2581no" and
    "\u0120no" are " no"). A word of some bytes of a character stays as the tokenizer writes it.
    Numbers that the tokenizer does not know (vocabularies are padded), or all without a
    tokenizer, read "<32003>".
    """

    def __init__(self, processor: Any) -> None:
        self._tokenizer: Any = getattr(processor, "tokenizer", None)
        self._known: dict[int, str] = {}
        self._before: tuple[int, str] | None = None

    def text(self, word: int) -> str:
        """The text of one word."""
        if word not in self._known:
            self._known[word] = self._read(word)
        return self._known[word]

    def _read(self, word: int) -> str:
        if self._tokenizer is None or word >= len(self._tokenizer):
            return f"<{word}>"
        raw = self._tokenizer.convert_ids_to_tokens(word)
        if raw is None:
            return f"<{word}>"
        # Alone, many tokenizers drop a word's leading space: it is read behind another word.
        before, start = self._anchor()
        both = self._decoded([before, word])
        text = both[len(start) :] if both.startswith(start) else self._decoded([word])
        if "\ufffd" in text or text.strip() == raw:
            return str(raw)
        return text or str(raw)

    def _anchor(self) -> tuple[int, str]:
        """A word to read others behind: one that is read as letters."""
        if self._before is None:
            special = set(self._tokenizer.all_special_ids)
            for word in range(len(self._tokenizer)):
                text = self._decoded([word])
                if word not in special and text.isascii() and text.strip().isalpha():
                    self._before = word, text
                    break
            else:
                self._before = 0, self._decoded([0])
        return self._before

    def _decoded(self, words: list[int]) -> str:
        text: str = self._tokenizer.decode(words, clean_up_tokenization_spaces=False)
        return text

    def number(self, word: str) -> int:
        """The number of a word: as it is within a text, behind a space, if that is one token.

        Raises:
            UnknownNameError: If the tokenizer makes several tokens of it, or does not know it.
            AdapterError: If there is no tokenizer.
        """
        if self._tokenizer is None:
            raise AdapterError(
                "Words need a tokenizer to become numbers: adapt(model, processor). Or give the "
                "token's number."
            )
        split: list[int] = []
        for text in dict.fromkeys((f" {word}", word) if word[:1].strip() else (word,)):
            split = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(split) == 1 and split[0] != self._tokenizer.unk_token_id:
                return int(split[0])
        parts = [str(each) for each in self._tokenizer.convert_ids_to_tokens(split)]
        raise UnknownNameError(
            "single token for the word",
            word,
            [f"its tokens {parts}"] if parts else [],
            "Give one of its tokens, as a number.",
        )

"""Image tokens in a text, where only the text tells which image they are of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor

from neuronlens.adapters.family import FamilyAdapter


@dataclass(frozen=True)
class Run:
    """Image tokens that stand side by side in a text.

    Attributes:
        sample: Of the batch.
        start: Position of the first.
        length: How many there are.
        before: The token id in front of them; -1 if there is none.
        is_video: Whether their id is that of videos.
    """

    sample: int
    start: int
    length: int
    before: int
    is_video: bool


def runs(
    ids: Int[Tensor, "batch token"], here: Bool[Tensor, "batch token"], video: int | None
) -> list[Run]:
    """The runs of image tokens, in reading order."""
    found = []
    for sample, (row, mine) in enumerate(zip(ids.tolist(), here.tolist(), strict=True)):
        start = 0
        while start < len(row):
            length = 0
            while start + length < len(row) and mine[start + length]:
                if row[start + length] != row[start]:
                    break
                length += 1
            if length:
                before = row[start - 1] if start else -1
                found.append(Run(sample, start, length, before, row[start] == video))
            start += max(1, length)
    return found


class ByRuns(FamilyAdapter):
    """Families whose inputs do not tell which image a token is of; the text does."""

    def runs(self, inputs: Mapping[str, Any]) -> list[Run]:
        """The runs of image tokens, in reading order."""
        ids = self.text(inputs)
        here = self.placeholders(inputs, ids)
        mask = inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == ids.shape:
            here &= mask.cpu() != 0
        return runs(ids, here, getattr(self._config, "video_token_id", None))

"""What every token is, and what it sees."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import chain

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor


class Role(IntEnum):
    """What a token is to the model.

    BOS, EOS, CLS, registers, newline and chat-template markers are SPECIAL.
    """

    PAD = 0
    SPECIAL = 1
    PROMPT = 2
    RESPONSE = 3
    VISUAL = 4


TEXT_ROLES = (Role.PROMPT, Role.RESPONSE)


@dataclass(frozen=True)
class TokenMap:
    """Role, sample, image and box of every position of one stream.

    A stream is one token axis of the model; the leading axes of every activation on it
    are those of `role` (usually batch and token).

    Attributes:
        role: `Role` of each position.
        sample: Number, within the batch, of the sample a position belongs to.
        image: Number, within its sample, of the image a VISUAL position sees; -1 elsewhere.
        box: Left, top, right, bottom of what a position sees, in pixels of the original
            image if it was established by `encode`, else of the processed image. NaN where
            it sees no single region.
        pieces: Text of each position, for a map of a single sample (see `of`).
    """

    role: Int[Tensor, "*axes"]
    sample: Int[Tensor, "*axes"]
    image: Int[Tensor, "*axes"]
    box: Float[Tensor, "*axes 4"]
    pieces: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return self.role.numel()

    def where(self, sample: int) -> Int[Tensor, " token"]:
        """Flat positions of one sample of the batch, in order, without padding."""
        mine = (self.sample == sample) & (self.role != Role.PAD)
        return mine.flatten().nonzero().squeeze(1)

    def of(self, sample: int, pieces: Sequence[str] | None = None) -> TokenMap:
        """The tokens of one sample as a map of one axis, without padding."""
        at = self.where(sample)
        if pieces is not None and len(pieces) != len(at):
            raise ValueError(
                f"{len(pieces)} pieces given for {len(at)} tokens: give one per token."
            )
        return TokenMap(
            role=self.role.flatten()[at],
            sample=torch.zeros_like(at),
            image=self.image.flatten()[at],
            box=self.box.reshape(-1, 4)[at],
            pieces=None if pieces is None else tuple(pieces),
        )

    def to(self, device: torch.device) -> TokenMap:
        """The same map with its tensors on `device`."""
        return replace(
            self,
            role=self.role.to(device),
            sample=self.sample.to(device),
            image=self.image.to(device),
            box=self.box.to(device),
        )

    def is_role(self, *roles: Role) -> Bool[Tensor, "*axes"]:
        """True where a position has one of the roles."""
        return torch.isin(self.role, torch.tensor([int(r) for r in roles], device=self.role.device))

    def coverage(self, masks: Mapping[int, NDArray[np.bool_]]) -> Float[Tensor, "*axes"]:
        """Share of each token's box that lies in the mask of its image, from 0 to 1.

        Args:
            masks: By image number, a mask `[height, width]` in the pixels `box` is in.

        Returns:
            NaN where a token has no box or its image has no mask.
        """
        boxes = self.box.reshape(-1, 4).double().cpu().numpy()
        images = self.image.flatten().cpu().numpy()
        share = np.full(len(boxes), np.nan)
        seen = ~np.isnan(boxes).any(1)
        for image, mask in masks.items():
            here = seen & (images == image)
            share[here] = _mean_in_boxes(mask, boxes[here])
        return torch.from_numpy(share).float().reshape(self.role.shape)

    def words(self, words: Sequence[str], shift: int = 0) -> Float[Tensor, " token"]:
        """1 at the text tokens that spell one of the words, 0 at other text tokens.

        Args:
            words: Whole words or phrases, matched without regard to case.
            shift: -1 marks, instead, the token before each occurrence: a neuron that
                predicts a word fires there.

        Returns:
            NaN at positions that are not text (`Role.PROMPT` or `Role.RESPONSE`).

        Raises:
            ValueError: If the map has no `pieces` (see `of`).
        """
        if self.pieces is None:
            raise ValueError(
                "This map holds no text. Take one sample's map with its pieces: "
                "map.of(sample, pieces)."
            )
        text = self.is_role(*TEXT_ROLES)
        found = np.zeros(len(self.pieces), np.float32)
        wanted = [word.strip() for word in words if word.strip()]
        if wanted:
            # What is not text breaks words apart, so that no match runs across an image.
            pieces = [p if t else "\n" for p, t in zip(self.pieces, text.tolist(), strict=True)]
            ends = np.cumsum([len(piece) for piece in pieces])
            # Looking ahead finds each word by itself, also where two of them overlap.
            patterns = [rf"(?<!\w)(?=({re.escape(word)})(?!\w))" for word in wanted]
            whole = "".join(pieces)
            for match in chain(*(re.finditer(each, whole, re.IGNORECASE) for each in patterns)):
                first = int(np.searchsorted(ends, match.start(1), side="right"))
                last = int(np.searchsorted(ends, match.end(1) - 1, side="right"))
                if shift == 0:
                    found[first : last + 1] = 1
                elif first + shift >= 0:
                    found[first + shift] = 1
        marks = torch.from_numpy(found)
        marks[~text.cpu()] = float("nan")
        return marks


def _mean_in_boxes(mask: NDArray[np.bool_], boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Exact mean of a pixel-wise constant mask over boxes with fractional edges."""
    height, width = mask.shape
    table = np.zeros((height + 1, width + 1))
    table[1:, 1:] = mask.cumsum(0).cumsum(1)

    def integral(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        x, y = np.clip(x, 0, width), np.clip(y, 0, height)
        column = np.minimum(x.astype(int), width - 1)
        row = np.minimum(y.astype(int), height - 1)
        right, down = x - column, y - row
        return np.asarray(
            table[row, column] * (1 - right) * (1 - down)
            + table[row, column + 1] * right * (1 - down)
            + table[row + 1, column] * (1 - right) * down
            + table[row + 1, column + 1] * right * down
        )

    left, top, right, bottom = boxes.T
    inside = (
        integral(right, bottom)
        - integral(left, bottom)
        - integral(right, top)
        + integral(left, top)
    )
    area = np.maximum((right - left) * (bottom - top), 1e-12)
    return np.asarray(inside / area)

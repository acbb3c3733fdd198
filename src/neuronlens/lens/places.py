"""Tokens of a sample by their number, or as the papers name them: the second image token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from neuronlens.errors import UnknownNameError
from neuronlens.tokens import TEXT_ROLES, Role, TokenMap

Place = int | tuple[str, int]
"""A position within a sample, from 0, or from the end if negative; or a kind of token and its
number among those: `("visual", 1)` is the second image token, `("text", -1)` the last of the text.
"""

KINDS = {
    "visual": (Role.VISUAL,),
    "text": TEXT_ROLES,
    "prompt": (Role.PROMPT,),
    "response": (Role.RESPONSE,),
    "special": (Role.SPECIAL,),
}


def roles_of(kinds: Sequence[str | Role]) -> tuple[Role, ...]:
    """The roles that names such as "prompt" stand for.

    Raises:
        UnknownNameError: If there is no such kind of token.
    """
    found: list[Role] = []
    for kind in kinds:
        if isinstance(kind, Role):
            found.append(kind)
        elif kind in KINDS:
            found += KINDS[kind]
        else:
            raise UnknownNameError("kind of token", kind, KINDS)
    return tuple(dict.fromkeys(found))


def placed(tokens: TokenMap, sample: int, places: Sequence[Place] | None) -> Int[Tensor, " token"]:
    """Positions within one sample, padding not counted; all of them for None.

    Raises:
        UnknownNameError: If the sample has no such token.
    """
    role = tokens.role.flatten()[tokens.where(sample)]
    every = range(len(role))
    if places is None:
        return torch.arange(len(role))
    found = []
    for place in places:
        kind, number = ("token", place) if isinstance(place, int) else place
        among: Sequence[int] = every
        if kind != "token":
            wanted = roles_of([kind])
            among = [i for i in every if int(role[i]) in wanted]
        if not -len(among) <= number < len(among):
            raise UnknownNameError(
                f"{kind} position in sample {sample} of the batch",
                number,
                [f"{-len(among)} to {len(among) - 1}"] if among else [],
                "Count from 0, or from the end with -1. Padding does not count.",
            )
        found.append(among[number])
    return torch.tensor(found, dtype=torch.long)

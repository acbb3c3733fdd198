"""What one intervention makes of some neurons, and at which tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from neuronlens.adapters import ModelAdapter
from neuronlens.adapters.change import Edit, Expert
from neuronlens.errors import InterventionError, UnknownNameError
from neuronlens.neurons import NeuronId
from neuronlens.tokens import TEXT_ROLES, Role

Neurons = NeuronId | str | Iterable[NeuronId | str]
"""One or more neurons, or how they are written (`"language.16/4347"`)."""

Kind = Literal["deactivate", "amplify", "set_to"]

RoleName = Literal["visual", "text", "prompt", "response", "special"]
Roles = RoleName | Role | Iterable[RoleName | Role]
"""One or more roles, or their names; `"text"` is prompt and response."""

Positions = Sequence[int] | Sequence[Sequence[int]]
"""Positions in every sample; or one such list for each sample of the batch."""

_NAMED: dict[str, tuple[Role, ...]] = {
    "visual": (Role.VISUAL,),
    "text": TEXT_ROLES,
    "prompt": (Role.PROMPT,),
    "response": (Role.RESPONSE,),
    "special": (Role.SPECIAL,),
}


@dataclass(frozen=True, eq=False)
class Part:
    """What is made of some neurons: the same at every token that is meant.

    Attributes:
        kind: What is done to them.
        neurons: Which, without repetition.
        value: The factor of `amplify`; what they are set to, each or all of them.
        roles: Which roles a token must have; None for any.
        positions: Where in its sample a token must be; None for anywhere. Several where each
            sample has its own.
        sample: Which sample of the batch is meant; None for all.
    """

    kind: Kind
    neurons: tuple[NeuronId, ...]
    value: float | Mapping[NeuronId, float]
    roles: frozenset[Role] | None = None
    positions: tuple[int, ...] | tuple[tuple[int, ...], ...] | None = None
    sample: int | None = None

    @property
    def is_everywhere(self) -> bool:
        """Whether every token is meant, padding included."""
        return self.roles is None and self.positions is None and self.sample is None

    def positions_in(self, sample: int) -> tuple[int, ...]:
        """Which positions of a sample are meant, where not all are."""
        each = self.positions or ()
        if self.is_by_position:
            row = each[sample]
            assert isinstance(row, tuple)
            return row
        return tuple(place for place in each if isinstance(place, int))

    @property
    def is_by_position(self) -> bool:
        """Whether each sample has positions of its own."""
        return any(isinstance(each, tuple) for each in self.positions or ())

    @property
    def has_negative_positions(self) -> bool:
        """Whether some are counted from the end of the prompt."""
        rows = [each if isinstance(each, tuple) else (each,) for each in self.positions or ()]
        return any(place < 0 for row in rows for place in row)

    @property
    def settings(self) -> dict[str, object]:
        """What it is, as JSON has it."""
        value: object = self.value
        if isinstance(value, Mapping):
            value = {str(neuron): number for neuron, number in value.items()}
        roles: list[str] | None = None
        positions: list[int | list[int]] | None = None
        if self.roles is not None:
            roles = [each.name.lower() for each in sorted(self.roles)]
        if self.positions is not None:
            positions = [list(each) if isinstance(each, tuple) else each for each in self.positions]
        return {
            "kind": self.kind,
            "neurons": [str(neuron) for neuron in self.neurons],
            "value": value,
            "roles": roles,
            "positions": positions,
        }

    def __repr__(self) -> str:
        value = "each to its value" if isinstance(self.value, Mapping) else f"{self.value:g}"
        return {
            "deactivate": "deactivate",
            "amplify": f"amplify by {value}",
            "set_to": f"set to {value}",
        }[self.kind]

    def edits(self) -> dict[str, Edit]:
        """What it makes of the neurons of each site, at every token."""
        by_site: dict[str, dict[Expert, list[NeuronId]]] = {}
        for neuron in sorted(self.neurons):
            by_site.setdefault(neuron.site, {}).setdefault(neuron.expert, []).append(neuron)
        return {site: self._edit(by_expert) for site, by_expert in by_site.items()}

    def _edit(self, by_expert: Mapping[Expert, Sequence[NeuronId]]) -> Edit:
        index = {
            expert: torch.tensor([neuron.index for neuron in several])
            for expert, several in by_expert.items()
        }
        if self.kind == "amplify":
            assert not isinstance(self.value, Mapping)
            return Edit(index, self.value)
        values = {
            expert: torch.tensor([self._value(neuron) for neuron in several], dtype=torch.float64)
            for expert, several in by_expert.items()
        }
        return Edit(index, values=values)

    def _value(self, neuron: NeuronId) -> float:
        return self.value[neuron] if isinstance(self.value, Mapping) else self.value


def parsed(adapter: ModelAdapter, neurons: Neurons) -> tuple[NeuronId, ...]:
    """The neurons, each once, in the order of their sites.

    Raises:
        UnknownNameError: If the model has no such neuron.
        InterventionError: If none is given, or one is written wrongly.
    """
    several = [neurons] if isinstance(neurons, (NeuronId, str)) else list(neurons)
    chosen = [neuron_of(adapter, each) for each in several]
    if not chosen:
        raise InterventionError(
            "No neurons were given. An intervention changes at least one; for none, enter no block."
        )
    order = {name: place for place, name in enumerate(adapter.sites)}
    return tuple(sorted(set(chosen), key=lambda each: (order[each.site], each.expert or 0, each)))


def neuron_of(adapter: ModelAdapter, neuron: NeuronId | str) -> NeuronId:
    """The neuron, which the model has.

    Raises:
        UnknownNameError: If it has not.
        InterventionError: If it is no neuron at all.
    """
    if isinstance(neuron, str):
        try:
            neuron = NeuronId.parse(neuron)
        except ValueError as error:
            raise InterventionError(str(error)) from error
    if not isinstance(neuron, NeuronId):
        raise InterventionError(
            f"{neuron!r} is no neuron. Give NeuronIds, as vlm.neuron(layer=16, index=4347), or "
            "how they are written: 'language.16/4347'."
        )
    return adapter.site(neuron.site).neuron(neuron.index, neuron.expert)


def number(value: object, what: str) -> float:
    """The value, if it is a finite number.

    Raises:
        InterventionError: If it is not.
    """
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise InterventionError(f"{what} must be a finite number, not {value!r}.")
    return found


def roles_of(roles: Roles | None) -> frozenset[Role] | None:
    """The roles that names stand for.

    Raises:
        UnknownNameError: If there is no such role.
        InterventionError: If none is given, or padding.
    """
    if roles is None:
        return None
    several = [roles] if isinstance(roles, (str, Role)) else list(roles)
    found: set[Role] = set()
    for each in several:
        if isinstance(each, Role) and each != Role.PAD:
            found.add(each)
        elif isinstance(each, str) and each in _NAMED:
            found |= set(_NAMED[each])
        else:
            raise UnknownNameError("role to change neurons at", each, _NAMED)
    if not found:
        raise InterventionError("No roles were given: no token would be changed. Leave out roles=.")
    return frozenset(found)


def positions_of(
    positions: Positions | None,
) -> tuple[int, ...] | tuple[tuple[int, ...], ...] | None:
    """The positions, of every sample or of each.

    Raises:
        InterventionError: If they are no whole numbers, none is given, or both forms are mixed.
    """
    if positions is None:
        return None
    wrong = InterventionError(
        f"positions={positions!r}: give whole numbers, such as [0, -1], for every sample, or one "
        "such list for each sample, such as [[0], [2, -1]]."
    )
    if isinstance(positions, (str, bytes, int)):
        raise wrong
    several = [each.tolist() if hasattr(each, "tolist") else each for each in positions]
    if several and all(_is_whole(each) for each in several):
        return tuple(sorted({int(each) for each in several}))  # type: ignore[arg-type]
    if not several or not all(isinstance(each, (Sequence, range)) for each in several):
        raise wrong
    lists = [list(each) for each in several if isinstance(each, Sequence)]
    if not all(_is_whole(each) for row in lists for each in row) or not any(lists):
        raise wrong
    return tuple(tuple(sorted(set(row))) for row in lists)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

"""What is compared: the untouched model, interventions, and controls of several seeds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from neuronlens.adapters import ModelAdapter
from neuronlens.errors import InterventionError
from neuronlens.intervene import Intervention
from neuronlens.tokens import TokenMap

NONE = "none"
"""Name of the condition in which nothing is changed."""

Interventions = Mapping[str, Intervention | Sequence[Intervention]]
"""By the name of its condition, an intervention, or several that stand for one another."""


@dataclass(frozen=True, eq=False)
class Condition:
    """What is done to the model, under a name.

    Attributes:
        name: What it is called in results.
        members: Interventions that stand for one another, such as random controls of several
            seeds; None for the untouched model.
    """

    name: str
    members: tuple[Intervention | None, ...]

    @property
    def digests(self) -> list[str]:
        """Of the settings of each member."""
        return [settings_digest(settings) for settings in self.settings]

    @property
    def settings(self) -> list[dict[str, object]]:
        """Of each member; empty for the untouched model."""
        return [{} if each is None else each.settings for each in self.members]


def conditions_of(
    adapter: ModelAdapter, interventions: Interventions | None, *, baseline: bool
) -> list[Condition]:
    """The conditions in the order in which they are run.

    Raises:
        InterventionError: If something is no intervention, one of another model, one for the
            rows of a given batch, or named as the untouched model; if there is no condition; or
            inside the block of an intervention, where no model is untouched.
    """
    changed = len(adapter.changed)
    if changed:
        raise InterventionError(
            f"{changed} neurons of the model are changed at the moment, so {NONE!r} would not be "
            "the untouched model: leave the block first, and give its intervention in "
            "interventions=."
        )
    found = [Condition(NONE, (None,))] if baseline else []
    given = interventions or {}
    if not isinstance(given, Mapping):
        raise InterventionError(
            f"interventions={type(given).__name__} was given: give a mapping of names to "
            "interventions, such as {'red': nl.deactivate(vlm, neurons)}."
        )
    for name, each in given.items():
        if not isinstance(name, str) or not name.strip() or name == NONE:
            raise InterventionError(
                f"{name!r} cannot be the name of a condition: give a text, but not {NONE!r}, which "
                "is the untouched model."
            )
        members = (each,) if isinstance(each, Intervention) else tuple(_several(name, each))
        if not members:
            raise InterventionError(f"Condition {name!r} has no intervention; give at least one.")
        for member in members:
            _check(adapter, name, member)
        digests = Condition(name, members).digests
        if len(set(digests)) < len(digests):
            raise InterventionError(
                f"Condition {name!r} has the same intervention twice, which would make its "
                "interval too narrow. Draw each control with another seed."
            )
        found.append(Condition(name, members))
    if not found:
        raise InterventionError("There is nothing to run: give at least one intervention.")
    return found


def _several(name: str, given: Sequence[Intervention]) -> Sequence[Intervention]:
    if isinstance(given, (list, tuple)):
        return given
    raise InterventionError(
        f"Condition {name!r} is a {type(given).__name__}. Give what nl.deactivate, nl.amplify or "
        "nl.set_to return, or a list of these."
    )


def _check(adapter: ModelAdapter, name: str, member: object) -> None:
    if not isinstance(member, Intervention):
        raise InterventionError(
            f"Condition {name!r} has a {type(member).__name__} among its interventions. Give what "
            "nl.deactivate, nl.amplify or nl.set_to return."
        )
    if member.adapter.model is not adapter.model:
        raise InterventionError(
            f"The intervention of condition {name!r} is of another model "
            f"({member.adapter.name!r}): make it with the adapter that is evaluated."
        )
    by_position = any(part.is_by_position for part in member.parts)
    if member.samples is not None or member.tokens is not None or by_position:
        raise InterventionError(
            f"The intervention of condition {name!r} is made for the rows of one batch (by_sample, "
            "tokens=..., or positions of each sample), and batches differ. Give one that holds for "
            "every row."
        )


def settings_digest(settings: Mapping[str, object]) -> str:
    """A digest of JSON-able settings."""
    told = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:32]


@contextmanager
def applied(
    member: Intervention | None, tokens: Mapping[str, TokenMap] | None = None
) -> Iterator[None]:
    """The model as a condition's member has it, for the length of the block.

    Args:
        member: Of a condition; None for the untouched model.
        tokens: The complete token maps of the batch, where they are known: a forward alone does
            not tell where a prompt ends.
    """
    with ExitStack() as stack:
        if member is not None:
            if tokens is not None and not all(part.is_everywhere for part in member.parts):
                member = Intervention(member.adapter, member.parts, tokens, member.samples)
            stack.enter_context(member)
        yield

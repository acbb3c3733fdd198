"""An intervention: a block in which a model runs with some neurons changed."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType

from neuronlens.adapters import ModelAdapter
from neuronlens.adapters.change import Change
from neuronlens.hooks import Point, attached, refuse_compiled, uncompiled
from neuronlens.intervene.following import Following
from neuronlens.intervene.part import Part
from neuronlens.neurons import NeuronId
from neuronlens.tokens import TokenMap


class Intervention:
    """Some neurons changed in some way, for the length of a block.

    ::

        without = nl.deactivate(vlm, vlm.neuron(layer=16, index=4347))
        with without:
            model.generate(**inputs)

    It is what `deactivate`, `amplify`, `set_to` and `by_sample` give. It can be entered as often
    as one likes, also inside itself and inside others: the later one sees what the earlier
    ones made of an activation. When the block ends, however it ends, the model is as before.

    Attributes:
        adapter: Of the model.
        neurons: All that it changes, in the order of their sites.

    Raises:
        CaptureError: On entering, if the model is compiled; when the block ends well, but a block
            of one of the neurons never ran.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        parts: Sequence[Part],
        tokens: Mapping[str, TokenMap] | None = None,
        samples: int | None = None,
    ) -> None:
        """Put it together; `deactivate` and the others check what they are given.

        Args:
            adapter: Of the model.
            parts: What is changed, in this order.
            tokens: The complete token map of each stream; None to tell them from each forward.
            samples: How many the batch must have; None for any number.
        """
        self.adapter = adapter
        self.parts = tuple(parts)
        self.tokens = tokens
        self.samples = samples
        order = {name: place for place, name in enumerate(adapter.sites)}
        every = {neuron for part in self.parts for neuron in part.neurons}
        self.neurons: tuple[NeuronId, ...] = tuple(
            sorted(every, key=lambda each: (order[each.site], each.expert or 0, each))
        )
        self._edits = [(part, part.edits()) for part in self.parts]
        self._entered: list[tuple[ExitStack, Following]] = []
        self._is_warned = False

    @property
    def settings(self) -> dict[str, object]:
        """All that it is, as JSON has it: two of the same settings do the same."""
        tokens = None if self.tokens is None else _digest(self.tokens)
        if self.samples is None:
            (part,) = self.parts
            return part.settings | {"tokens": tokens, "by_sample": None}
        by_sample: list[object] = [None] * self.samples
        for part in self.parts:
            by_sample[part.sample or 0] = part.settings
        return {
            "kind": "by_sample",
            "neurons": [str(neuron) for neuron in self.neurons],
            "value": None,
            "roles": None,
            "positions": None,
            "tokens": tokens,
            "by_sample": by_sample,
        }

    @property
    def _batch(self) -> int | None:
        """How many samples a batch must have."""
        by_position = [len(each.positions or ()) for each in self.parts if each.is_by_position]
        return self.samples if self.samples is not None else next(iter(by_position), None)

    def __enter__(self) -> Intervention:
        adapter = self.adapter
        refuse_compiled(adapter.model)
        with ExitStack() as stack:
            stack.enter_context(uncompiled())
            following = Following(adapter, self.tokens, self._batch)
            if not all(part.is_everywhere for part in self.parts):
                stack.enter_context(following.watching())
            sites = list(dict.fromkeys(neuron.site for neuron in self.neurons))
            points: dict[str, list[Point]] = {}
            changes: dict[str, Change] = {}
            for name in sites:
                site = adapter.site(name)
                edits = [
                    edits[name]
                    if part.is_everywhere
                    else replace(edits[name], where=following.where(site, part))
                    for part, edits in self._edits
                    if name in edits
                ]
                in_force = adapter.changes.setdefault(name, [])
                changes[name] = Change(edits, in_force)
                tap = adapter.tap(site)
                points[name] = tap.writing(adapter.model, changes[name])
            conditional = {name for name in sites if "conditional" in adapter.site(name).flags}
            stack.enter_context(attached(points, conditional))
            for name, change in changes.items():
                adapter.changes[name].append(change)
                stack.callback(adapter.changes[name].remove, change)
            self._entered.append((stack.pop_all(), following))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        stack, following = self._entered.pop()
        stack.__exit__(kind, error, trace)
        if kind is None and not self._is_warned:
            self._warn_of_nothing(following.met)

    def _warn_of_nothing(self, met: Mapping[Part, bool]) -> None:
        """Warn of roles and positions that no token had."""
        limits = {part: _limits(part) for part in met}
        some = {limits[part] for part, is_met in met.items() if is_met}
        nowhere = [each for each in dict.fromkeys(limits.values()) if each and each not in some]
        if nowhere:
            self._is_warned = True
            warnings.warn(
                f"No token was {' or '.join(nowhere)} while the block ran: this changed nothing. "
                "Roles and positions are those of the stream that a neuron's site runs on.",
                UserWarning,
                stacklevel=3,
            )

    def __repr__(self) -> str:
        modules = Counter(self.adapter.site(each.site).module for each in self.neurons)
        counted = " + ".join(f"{count:,} {module}" for module, count in modules.items())
        if self.samples is not None:
            what = [f"by sample, {self.samples} samples", f"{counted or 'no'} neurons"]
        else:
            (part,) = self.parts
            what = [f"{part!r}", f"{counted} neurons"]
            if part.roles is not None:
                what.append(f"at {', '.join(role.name.lower() for role in sorted(part.roles))}")
            if part.positions is not None:
                what.append(f"at {len(part.positions)} positions")
        return f"Intervention({'; '.join(what)})"


def _limits(part: Part) -> str:
    """The roles and positions that tokens must have, in words; empty for any."""
    found = []
    if part.roles is not None:
        found.append(f"of role {', '.join(role.name.lower() for role in sorted(part.roles))}")
    if part.positions is not None:
        several = [list(each) if isinstance(each, tuple) else each for each in part.positions]
        few = ", ".join(map(str, several[:5]))
        found.append(f"at position {few}{', ...' if len(several) > 5 else ''}")
    return " and ".join(found)


def _digest(tokens: Mapping[str, TokenMap]) -> str:
    """A digest of what token maps say of roles and samples."""
    digest = hashlib.sha256()
    for stream, there in sorted(tokens.items()):
        digest.update(f"{stream} {tuple(there.role.shape)}".encode())
        for part in (there.role, there.sample):
            digest.update(json.dumps(part.flatten().tolist()).encode())
    return digest.hexdigest()[:32]


def warn_of_inert(adapter: ModelAdapter, neurons: Sequence[NeuronId]) -> None:
    """Warn of neurons that cannot change the output."""
    inert = Counter(each.site for each in neurons if adapter.site(each.site).inert)
    if inert:
        where = ", ".join(f"{site} ({count})" for site, count in inert.items())
        warnings.warn(
            f"{sum(inert.values())} of {len(neurons)} neurons are in sites that run without any "
            f"effect on the model's output, so changing them changes nothing: {where}.",
            UserWarning,
            stacklevel=4,
        )

"""The interventions: deactivate, amplify, set to a value, and another one for each sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from neuronlens.adapters import ModelAdapter, require_adapter
from neuronlens.errors import InterventionError
from neuronlens.intervene.intervention import Intervention, warn_of_inert
from neuronlens.intervene.part import (
    Kind,
    Neurons,
    Part,
    Positions,
    Roles,
    neuron_of,
    number,
    parsed,
    positions_of,
    roles_of,
)
from neuronlens.neurons import NeuronId
from neuronlens.tokens import TokenMap

Tokens = Mapping[str, TokenMap]
"""The token map of each stream, as `Batch.tokens` has them."""


def deactivate(
    adapter: ModelAdapter,
    neurons: Neurons,
    *,
    roles: Roles | None = None,
    positions: Positions | None = None,
    tokens: Tokens | None = None,
) -> Intervention:
    """Set the act_fn outputs of some neurons to 0, for the length of a block.

    ::

        with nl.deactivate(vlm, vlm.neuron(layer=16, index=4347)):
            model.generate(**inputs)

    No weight is touched, so it works on offloaded and quantised models. What a neuron writes
    is gone: where nothing stands between activation and down projection, the output is that
    of the model with this column of the down projection zeroed. Where something does (a
    LayerNorm in Kosmos-2), the other neurons' values change as well. Recorded at the same time,
    everything behind a deactivated neuron is as it runs; the neuron itself reads 0 if the
    recorder was entered inside this block and its activation is a module's output, else what it
    would have been. With gradient checkpointing, run `backward()` inside the block too: behind
    it, the recomputation would be without the change.

    Args:
        adapter: Of the model.
        neurons: One or more, or how they are written (`"language.16/4347"`); those of routed
            blocks name their expert.
        roles: Only tokens that have one of these roles: `"visual"`, `"text"` (which is
            `"prompt"` and `"response"`), `"special"`, or `Role`s. None for every token. In
            `generate()` what is generated is response. A forward alone does not tell prompt from
            response: give `tokens`.
        positions: Only tokens at these positions: one list for every sample of the batch, or a
            list of one for each. They are counted on the stream that the neuron's site runs on,
            within a sample, without padding, as in `TokenMap.of` and `Exemplar`; negative ones
            from the end of the prompt, -1 its last token, generated tokens from there on. On the
            language stream, one behind the end changes nothing: generation may still reach it.
        tokens: The complete token map of each stream of the batch, from `encode`. None to tell
            them from the inputs of each forward.

    Source: P2, section 4.3 (the neurons' activations are set to zero); P1, section 4.7.

    Raises:
        UnknownNameError: If there is no such neuron in the model, or no such role.
        InterventionError: If no neuron, no role or no position is given; if `tokens` are no
            token maps.
        AdapterError: If what is given first is no adapter.

    While the model runs in the block:

    Raises:
        CaptureError: If the model is compiled; if roles, positions or samples are needed and
            cannot be told, or the token maps are not of this batch; when the block ends well,
            but a block of one of the neurons never ran.
        InterventionError: If a sample has no token at one of the positions, on a stream that
            generation does not add to, or before its start.
        AdapterError: If the inputs cannot be those of this model.

    Warns:
        UserWarning: When the block ends well, but no token had one of the roles, or was at one
            of the positions, so that nothing was changed. Told once.
    """
    require_adapter(adapter)
    return _made(adapter, "deactivate", parsed(adapter, neurons), 0.0, roles, positions, tokens)


def amplify(
    adapter: ModelAdapter,
    neurons: Neurons,
    factor: float,
    *,
    roles: Roles | None = None,
    positions: Positions | None = None,
    tokens: Tokens | None = None,
) -> Intervention:
    """Multiply the act_fn outputs of some neurons by a factor, for the length of a block.

    Where nothing stands between activation and down projection, the output is that of the model
    with these columns of the down projection multiplied. The other arguments are those of
    `deactivate`.

    Args:
        adapter: Of the model.
        neurons: One or more.
        factor: Above 1 to amplify, below to weaken; negative to turn the sign.
        roles: Only tokens of these roles.
        positions: Only tokens at these positions.
        tokens: Complete token maps of the batch.

    Raises:
        UnknownNameError: If there is no such neuron in the model, or no such role.
        InterventionError: If the factor is not a finite number; if no neuron, role or position
            is given.
    """
    require_adapter(adapter)
    by = number(factor, "factor")
    return _made(adapter, "amplify", parsed(adapter, neurons), by, roles, positions, tokens)


def set_to(
    adapter: ModelAdapter,
    neurons: Neurons,
    value: float | Mapping[NeuronId, float],
    *,
    roles: Roles | None = None,
    positions: Positions | None = None,
    tokens: Tokens | None = None,
) -> Intervention:
    """Set the act_fn outputs of some neurons to a value, for the length of a block.

    In a gated block the value is still multiplied by the up projection's. A neuron of a routed
    expert is set at the tokens that are sent to this expert, and nowhere else. The other
    arguments are those of `deactivate`.

    Args:
        adapter: Of the model.
        neurons: One or more.
        value: The value, or one for each neuron, such as its mean over a scan.
        roles: Only tokens of these roles.
        positions: Only tokens at these positions.
        tokens: Complete token maps of the batch.

    Raises:
        UnknownNameError: If there is no such neuron in the model, or no such role.
        InterventionError: If a value is not a finite number, or a neuron has none; if no neuron,
            role or position is given.
        AdapterError: On entering, if it is not known what a routed block multiplies its
            activations with, so that one of 0 cannot be set.
    """
    require_adapter(adapter)
    chosen = parsed(adapter, neurons)
    values: float | dict[NeuronId, float]
    if isinstance(value, Mapping):
        given = {neuron_of(adapter, each): found for each, found in value.items()}
        missing = [each for each in chosen if each not in given]
        if missing:
            raise InterventionError(
                f"value has no number for {len(missing)} of {len(chosen)} neurons: "
                f"{', '.join(map(str, missing[:5]))}{', ...' if len(missing) > 5 else ''}. Give "
                "one for each, or one number for all."
            )
        values = {each: number(given[each], f"The value of {each}") for each in chosen}
    else:
        values = number(value, "value")
    return _made(adapter, "set_to", chosen, values, roles, positions, tokens)


def by_sample(
    adapter: ModelAdapter,
    interventions: Sequence[Intervention | None],
    *,
    tokens: Tokens | None = None,
) -> Intervention:
    """Another intervention for each sample of a batch, in one block.

    ::

        off = [nl.deactivate(vlm, neurons) for neurons in sets]
        with nl.by_sample(vlm, [None, *off]):
            model(**batch.inputs)  # of 1 + len(sets) samples

    Each sample is changed by its own alone, as if it ran by itself. With beams, all of a sample's
    rows are. For `generate()`, prompts of different lengths must be padded on the left
    (`processor.tokenizer.padding_side = "left"` before `encode`).

    Args:
        adapter: Of the model.
        interventions: One for each sample of the batch, in order; None for a sample that is left
            as it is.
        tokens: The complete token map of each stream of the batch; None to tell them.

    Raises:
        InterventionError: If none is given, one is of another adapter, or by sample itself, or
            holds token maps or positions of a whole batch; if `tokens` are no token maps.
        AdapterError: If what is given first is no adapter.

    While the model runs in the block:

    Raises:
        InterventionError: If the batch has another number of samples.
    """
    require_adapter(adapter)
    _check_maps(tokens)
    if not interventions:
        raise InterventionError("No interventions were given: give one for each sample, or None.")
    parts = []
    for place, each in enumerate(interventions):
        if each is None:
            continue
        if not isinstance(each, Intervention):
            raise InterventionError(
                f"Entry {place} is {type(each).__name__}, not an Intervention or None."
            )
        if each.adapter is not adapter:
            raise InterventionError(
                f"Entry {place} was made with another adapter ({each.adapter!r}). Make it with "
                "this one."
            )
        if each.samples is not None or any(part.is_by_position for part in each.parts):
            raise InterventionError(
                f"Entry {place} tells samples apart itself: {each!r}. Give one that does the same "
                "to every sample."
            )
        if each.tokens is not None:
            raise InterventionError(
                f"Entry {place} holds token maps. Give those of the whole batch to by_sample: "
                "tokens=batch.tokens."
            )
        parts += [replace(part, sample=place) for part in each.parts]
    return Intervention(adapter, parts, tokens, len(interventions))


def _check_maps(tokens: object) -> None:
    """Refuse what are no token maps by stream: a batch, or one map.

    Raises:
        InterventionError: If they are not.
    """
    if tokens is None:
        return
    if not isinstance(tokens, Mapping):
        raise InterventionError(
            f"tokens is {type(tokens).__name__}, not the token map of each stream. Give those of "
            "the batch that the model is run on: tokens=batch.tokens."
        )
    wrong = [each for each in tokens.values() if not isinstance(each, TokenMap)]
    if wrong:
        raise InterventionError(
            f"tokens holds {type(wrong[0]).__name__} where a TokenMap is needed. Give the maps "
            "of the batch: tokens=batch.tokens."
        )


def _made(
    adapter: ModelAdapter,
    kind: Kind,
    neurons: tuple[NeuronId, ...],
    value: float | Mapping[NeuronId, float],
    roles: Roles | None,
    positions: Positions | None,
    tokens: Tokens | None,
) -> Intervention:
    _check_maps(tokens)
    warn_of_inert(adapter, neurons)
    part = Part(kind, neurons, value, roles_of(roles), positions_of(positions))
    return Intervention(adapter, [part], tokens)

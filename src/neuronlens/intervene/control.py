"""Random neurons to compare chosen ones with."""

from __future__ import annotations

from collections import Counter
from typing import Literal, get_args

import numpy as np

from neuronlens.adapters import ModelAdapter, require_adapter
from neuronlens.errors import InterventionError, UnknownNameError
from neuronlens.intervene.part import Neurons, parsed
from neuronlens.neurons import NeuronId, NeuronSite

Match = Literal["layer", "module", "all"]


def random_control(
    adapter: ModelAdapter,
    neurons: Neurons,
    *,
    seed: int,
    match: Match = "layer",
    exclude: Neurons = (),
) -> tuple[NeuronId, ...]:
    """As many random neurons as were chosen, none of them chosen.

    Args:
        adapter: Of the model.
        neurons: The chosen ones.
        seed: Of the draw: the same gives the same neurons, another one others.
        match: `"layer"`: as many in each site (module, layer and branch; of routed experts, in
            any of them); `"module"`: as many in each module, in any of its layers; `"all"`: as
            many in the model.
        exclude: One or more further neurons that are not drawn.

    Neurons are drawn without replacement, each with the same chance. In `"module"` and `"all"`
    none is drawn from a site that cannot change the output, which would make the control weaker
    than it looks.

    Source: P2, section 4.3 and appendix (as many random neurons; here `"all"`). Its code draws
    indices with replacement and may draw the chosen ones. P1, section 4.7 (random neurons of
    the same ratio; reading 19: as many in each layer).

    Returns:
        The drawn neurons, in the order of their sites.

    Raises:
        UnknownNameError: If the model has no such neuron, or there is no such `match`.
        InterventionError: If too few neurons are left to draw from.
        AdapterError: If what is given first is no adapter.
    """
    require_adapter(adapter)
    if match not in get_args(Match):
        raise UnknownNameError("way to match", match, get_args(Match))
    chosen = parsed(adapter, neurons)
    others = [exclude] if isinstance(exclude, (NeuronId, str)) else list(exclude)
    left_out = set(chosen) | (set(parsed(adapter, others)) if others else set())
    taken: dict[str, list[int]] = {}
    for neuron in left_out:
        taken.setdefault(neuron.site, []).append(adapter.site(neuron.site).row(neuron))

    def group(site: NeuronSite) -> str:
        return {"layer": site.name, "module": str(site.module), "all": "the model"}[match]

    wider = [repr(each) for each in get_args(Match)[get_args(Match).index(match) + 1 :]]
    advice = ["Choose fewer"]
    if others:
        advice.append("exclude fewer")
    if wider:
        advice.append(f"match more widely: match={' or '.join(wider)}")
    rng = np.random.default_rng(seed)
    drawn: list[NeuronId] = []
    for name, count in sorted(Counter(group(adapter.site(n.site)) for n in chosen).items()):
        sites = [
            site
            for site in adapter.sites.values()
            if group(site) == name and (match == "layer" or not site.inert)
        ]
        pools = [_left(site, taken.get(site.name, [])) for site in sites]
        have = sum(len(pool) for pool in pools)
        if have < count:
            raise InterventionError(
                f"{count} neurons of {name} were chosen, and only {have} others are left there to "
                f"draw as many from. {', or '.join(advice)}."
            )
        ends = np.cumsum([len(pool) for pool in pools])
        for place in np.sort(rng.choice(have, count, replace=False)).tolist():
            at = int(np.searchsorted(ends, place, side="right"))
            row = int(pools[at][place - (int(ends[at - 1]) if at else 0)])
            expert, index = divmod(row, sites[at].width)
            drawn.append(sites[at].neuron(index, expert if sites[at].experts else None))
    return parsed(adapter, drawn)


def _left(site: NeuronSite, taken: list[int]) -> np.ndarray:
    return np.setdiff1d(np.arange(site.neurons), np.asarray(taken, dtype=np.int64))

"""Atlases whose firing counts are made by hand or drawn, for tests about domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import handmade
import neuronlens as nl
from neuronlens import atlas as atlases
from neuronlens.domains import ModuleCounts
from neuronlens.neurons import NeuronSite
from neuronlens.running import BLOCKS, COUNTED, SiteStatistics
from neuronlens.tokens import Role


@dataclass
class Counted:
    """Counts of a site: `fired` [neuron][domain][block], `tokens` [domain][block], of one role.

    Blocks beyond those given are empty. `routed` [expert][domain][block] for a routed site.
    """

    fired: Sequence
    tokens: Sequence
    role: Role = Role.VISUAL
    routed: Sequence | None = None
    more: Mapping | None = None
    """Tokens of other roles, on which nothing fires: [domain][block]."""


def counted_atlas(
    folder: Path,
    sites: Mapping[str, Counted],
    domains: Sequence[str | None] = ("a", "b"),
    described: Mapping[str, NeuronSite] = {},
    samples: int = 1,
) -> nl.Atlas:
    """An atlas with these counts, and so many samples of each domain."""
    made, found = {}, []
    for name, each in sites.items():
        fired = np.asarray(each.fired)
        experts = 0 if each.routed is None else len(each.routed)
        one = SiteStatistics(len(fired), 1, 1, 1, torch.float32, experts)
        for row, domain in enumerate(domains):
            name_of = domain or ""
            one.firing.open(name_of)
            place, blocks = COUNTED.index(each.role), fired.shape[2]
            one.firing.fired[name_of][:blocks, place] = torch.from_numpy(fired[:, row].T)
            one.firing.tokens[name_of][:blocks, place] = torch.tensor(each.tokens[row])
            for role, tokens in (each.more or {}).items():
                one.firing.tokens[name_of][:blocks, COUNTED.index(role)] = torch.tensor(tokens[row])
            if each.routed is not None:
                routed = np.asarray(each.routed)[:, row].T
                one.firing.routed[name_of][:blocks, place] = torch.from_numpy(routed)
        made[name] = one
        width = len(fired) // max(1, experts)
        found.append(described.get(name) or handmade.site(name, width, experts=experts))
    picture = Image.new("RGB", (1, 1))
    with atlases.new_folder(folder) as working:
        atlases.write(
            working,
            model=atlases.ModelInfo(name="made", model_type="x", fingerprint="f", dtype="float32"),
            choices=atlases.Choices(
                n=1,
                keep_visual=1,
                keep_text=1,
                text_roles=(Role.RESPONSE,),
                template=True,
                batch_size=1,
                window=1,
            ),
            sites=found,
            statistics=made,
            samples=[
                atlases.SampleRecord.of(
                    nl.Sample(f"s{i}", (picture,), "asked", "said", domains[i % len(domains)]), i
                )
                for i in range(samples * len(domains))
            ],
            skipped=[],
            versions={},
        )
    return nl.Atlas.open(folder)


def module_counts(fired: np.ndarray, tokens: np.ndarray) -> ModuleCounts:
    """Counts `[neuron, domain, block]` and `[domain, block]` of a module of one site."""
    return ModuleCounts(
        "language",
        (handmade.site("language.0", len(fired)),),
        tuple("abcdefgh"[: fired.shape[1]]),
        fired,
        tokens[None],
        np.zeros(len(fired), int),
        tokens,
    )


def overdispersed(
    samples: Sequence[int], neurons: int, seed: int, tokens: int = 60, concentration: float = 2
) -> ModuleCounts:
    """Counts of samples whose domains mean nothing: every neuron fires alike in all of them.

    How much it fires in one sample varies (a beta distribution about the neuron's own mean), so
    that a sample's tokens are not independent.

    Args:
        samples: How many of each domain.
        neurons: How many neurons.
        seed: Of the draws.
        tokens: Of each sample.
        concentration: Of the beta distribution; the larger, the less samples differ.
    """
    rng = np.random.default_rng(seed)
    domain = rng.permutation(np.repeat(np.arange(len(samples)), samples))
    block = rng.integers(BLOCKS, size=len(domain))
    mean = np.exp(rng.uniform(np.log(0.002), np.log(0.5), (neurons, 1)))
    rate = rng.beta(mean * concentration, (1 - mean) * concentration, (neurons, len(domain)))
    of_sample = rng.binomial(tokens, rate)
    fired = np.zeros((neurons, len(samples), BLOCKS), np.int64)
    there = np.zeros((len(samples), BLOCKS), np.int64)
    for number, (d, b) in enumerate(zip(domain, block, strict=True)):
        fired[:, d, b] += of_sample[:, number]
        there[d, b] += tokens
    return module_counts(fired, there)

"""From an atlas to its domain-specific neurons."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final, Literal

import numpy as np

from neuronlens.atlas import Atlas
from neuronlens.domains.budget import equal_blocks
from neuronlens.domains.choose import Assign, choose
from neuronlens.domains.counts import ModuleCounts, Rate, read_counts
from neuronlens.domains.neurons import Budget, DomainNeurons, DomainReadings, ModuleNeurons
from neuronlens.errors import DataError, UnknownNameError
from neuronlens.neurons import NeuronSite
from neuronlens.running import COUNTED
from neuronlens.tokens import TEXT_ROLES, Role

Tokens = Literal["all", "visual", "text"]

TOKENS: Final[dict[str, tuple[Role, ...]]] = {
    "all": COUNTED,
    "visual": (Role.VISUAL,),
    "text": TEXT_ROLES,
}
"""Sets of roles by name: all but padding, visual tokens, prompt and response."""


def domain_neurons(
    atlas: Atlas,
    *,
    share: float = 0.01,
    tokens: Tokens | Iterable[Role] = "all",
    budget: Budget = "equal",
    prefilter: float | None = 0.95,
    bar: float = 0.95,
    assign: Assign = "bar",
    split_branches: bool = False,
    domains: Sequence[str] | None = None,
    rate: Rate = "all",
    inert: bool = True,
    seed: int = 0,
) -> DomainNeurons:
    """Find the neurons that are specific to some of the samples' domains, module by module.

    A neuron's activation probability in a domain is the share of the domain's tokens on which
    its act_fn output is above 0. The entropy of these probabilities over the domains, DAPE, is
    low for a neuron that fires in few of them.

    A site that has no token of the chosen roles in some domain (the vision encoder has no text)
    cannot be compared: it is left out and named in `left_out`.

    Args:
        atlas: A scan of samples with domains.
        share: How many neurons to choose, of all of a module's.
        tokens: Tokens that count: `"all"` (but padding), `"visual"`, `"text"` (prompt and
            response), or roles.
        budget: `"equal"`: of larger domains as many blocks of samples as come closest to the
            tokens of the smallest; `"all"`: everything. Noise makes a neuron look specific, and
            is larger in a domain with fewer tokens.
        prefilter: Some probability of a neuron must exceed this quantile of the module's
            probabilities; None to let every neuron that fires pass.
        bar: A neuron belongs to each domain in which its probability exceeds this quantile.
        assign: `"bar"`, or `"argmax"`: to the domain with its largest probability only.
        split_branches: Whether the Q-Former's branches are modules of their own.
        domains: Two or more of the samples' domains; None for all.
        rate: What a routed expert's probabilities are over: `"all"` tokens, so that an expert
            that is chosen more in one domain is specific to it, or those that were `"routed"` to
            it, so that only firing counts, and not routing.
        inert: Whether sites that cannot affect the model's output take part, as in P2.
        seed: Of everything that is drawn.

    Source: P2, sections 3.1 and 3.2, and its code; readings 21 to 27 of docs/methods.md.

    Raises:
        DataError: If there are fewer than two domains, or a domain has no token to compare.
        UnknownNameError: If a domain is not in the atlas, or a name is not one of the choices.
        ValueError: If a share or quantile is out of range.
    """
    _check(share, prefilter, bar, {"budget": budget, "assign": assign, "rate": rate})
    roles = _roles(tokens)
    chosen = _domains(atlas, domains)
    modules, left_out = _modules(atlas, chosen, roles, split_branches, inert)
    if not modules:
        reasons = ", ".join(dict.fromkeys(left_out.values()))
        raise DataError(
            f"No site of this atlas can be compared over {', '.join(map(repr, chosen))}: "
            f"{reasons}. Choose other tokens=, or other domains=."
        )
    readings = DomainReadings(share, prefilter, bar, assign, roles, budget, rate, seed)
    found = {
        name: _module_neurons(counts, readings)
        for name, counts in read_counts(atlas, modules, chosen, roles, rate).items()
    }
    _warn_of_inert(found)
    return DomainNeurons(
        readings,
        chosen,
        found,
        left_out,
        atlas.manifest.model.fingerprint,
        atlas.choices.model_dump(mode="json"),
    )


def _module_neurons(counts: ModuleCounts, readings: DomainReadings) -> ModuleNeurons:
    used = counts.size > 0
    if readings.budget == "equal":
        used = equal_blocks(counts.size, counts.domains, readings.seed)
    rates = counts.rates(used)
    return ModuleNeurons(
        counts,
        used,
        rates,
        choose(rates, readings, np.random.default_rng(readings.seed)),
        np.asarray(~counts.fired.any((1, 2))),
    )


def _check(share: float, prefilter: float | None, bar: float, words: dict[str, str]) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"share={share} is no share of neurons. Give one above 0, at most 1.")
    for name, value in (("prefilter", prefilter), ("bar", bar)):
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"{name}={value} is no quantile. Give one from 0 to below 1.")
    known = {"budget": ("equal", "all"), "assign": ("bar", "argmax"), "rate": ("all", "routed")}
    for name, word in words.items():
        if word not in known[name]:
            raise UnknownNameError(name, word, known[name])


def _roles(tokens: Tokens | Iterable[Role]) -> tuple[Role, ...]:
    if isinstance(tokens, str):
        if tokens not in TOKENS:
            raise UnknownNameError("set of tokens", tokens, TOKENS)
        return TOKENS[tokens]
    given = set(tokens)
    odd = [each for each in given if each not in COUNTED]
    if odd or not given:
        said = ", ".join(str(each) for each in odd) or "no role"
        raise ValueError(
            f"tokens={said} cannot be counted. Give 'all', 'visual', 'text', or some of "
            f"{', '.join(f'Role.{role.name}' for role in COUNTED)}."
        )
    return tuple(role for role in COUNTED if role in given)


def _domains(atlas: Atlas, asked: Sequence[str] | None) -> tuple[str, ...]:
    have = atlas.manifest.domains
    if asked is None:
        named = tuple(domain for domain in have if domain)
        if len(named) > 1 and "" in have:
            by_domain = Counter(record.domain or "" for record in atlas.samples.values())
            warnings.warn(
                f"{by_domain['']} of {atlas.manifest.samples} samples have no domain and are left "
                "out. Give every sample a domain and scan again, or name the domains to compare: "
                "domains=[...].",
                stacklevel=3,
            )
    else:
        named = (asked,) if isinstance(asked, str) else tuple(dict.fromkeys(asked))
        for domain in named:
            if domain not in have or not domain:
                raise UnknownNameError(
                    "domain with samples in this atlas", domain, [d for d in have if d]
                )
    if len(named) < 2:
        if asked is not None:
            known = ", ".join(repr(domain) for domain in have if domain)
            raise DataError(
                f"Domains are compared with each other, and domains={list(named)} was given. Give "
                f"two or more of {known or 'an atlas with domains'}."
            )
        said = f"only {named[0]!r}" if named else "none: its samples have no domain"
        raise DataError(
            f"Domains are compared with each other, and of this atlas there is {said}. Scan "
            "samples of two domains or more, with `domain` set on each."
        )
    return named


def _modules(
    atlas: Atlas,
    domains: Sequence[str],
    roles: Sequence[Role],
    split_branches: bool,
    inert: bool,
) -> tuple[dict[str, list[NeuronSite]], dict[str, str]]:
    """Sites by module, and by site why it is left out."""
    at = [atlas.manifest.domains.index(domain) for domain in domains]
    places = [COUNTED.index(role) for role in roles]
    modules: dict[str, list[NeuronSite]] = {}
    left_out: dict[str, str] = {}
    spelled = "/".join(role.name.lower() for role in roles)
    for name, site in atlas.sites.items():
        if site.inert and not inert:
            left_out[name] = "inert: it cannot affect the model's output"
            continue
        with atlas.read(name) as file:
            there = file.get_tensor("tokens").numpy()[at][..., places].sum((1, 2))
        missing = [domain for domain, n in zip(domains, there, strict=True) if not n]
        if missing:
            which = "any domain" if len(missing) == len(domains) else ", ".join(missing)
            left_out[name] = f"no {spelled} token in {which}"
            continue
        key = f"{site.module}.{site.branch}" if split_branches and site.branch else site.module
        modules.setdefault(key, []).append(site)
    return modules, left_out


def _warn_of_inert(found: dict[str, ModuleNeurons]) -> None:
    sites: Counter[str] = Counter()
    for each in found.values():
        mine = each.choice.rows[each.counts.inert[each.choice.rows]]
        sites.update(neuron.site for neuron in each.counts.neurons(mine))
    if sites:
        warnings.warn(
            f"{sites.total()} of the chosen neurons are of inert sites ({', '.join(sites)}): they "
            "run, but cannot affect the model's output, so deactivating them changes nothing. "
            "inert=False leaves these sites out.",
            stacklevel=3,
        )

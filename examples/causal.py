"""Are the neurons that stand for a colour needed to say it, and how many of them?

Three rankings of the testbed's language neurons for each colour, made on some scenes: those that
the colour predicts best on patches and words alike (multi-modal), those that write its word before
it, and those that write it more than other colours write theirs. The first k are deactivated, and
captions of other scenes are predicted. Printed is the share of colour words that are still the
likeliest, less what it was: the colour's own word, the others', and the gap between these beside
that of as many random neurons per layer; means over six colours, 95 % intervals over scenes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import neuronlens as nl

COLOURS = tuple(nl.testbed.COLOURS)
Ranking = dict[str, list[nl.NeuronId]]


def main() -> None:
    given = arguments()
    bed = nl.testbed.load()
    vlm = nl.adapt(bed.model, bed.processor)
    scenes, others = (nl.testbed.scenes(given.scenes, seed=seed) for seed in (1, 2))
    rankings = {"multi-modal": multimodal(vlm, scenes, given.out), **writers(vlm, scenes)}
    conditions = {}
    for name, ranking in rankings.items():
        for k in given.k:
            for colour in COLOURS:
                chosen = ranking[colour][:k]
                drawn = [nl.random_control(vlm, chosen, seed=seed) for seed in range(given.seeds)]
                conditions[f"{name} {k} {colour}"] = nl.deactivate(vlm, chosen)
                conditions[f"{name} {k} {colour} random"] = [nl.deactivate(vlm, d) for d in drawn]
    loss = nl.response_loss(vlm, others, conditions, batch_size=50, resamples=0)
    before = loss.mean("none", group=lambda token: token.text in COLOURS, number="right")
    print(f"testbed, {given.scenes} scenes: {before.value:.1%} of colour words are the likeliest\n")
    print(f"{'neurons':<20} {'k':>4}   {'its word':<22}{'other colours':<22}gap beside random")
    for name in rankings:
        for k in given.k:
            told = [f"{v:+.1%} ({low:+.1%}, {high:+.1%})" for v, low, high in effect(loss, name, k)]
            print(f"{name:<20} {k:>4}   " + "".join(f"{each:<22}" for each in told))


def effect(loss: nl.ResponseLoss, name: str, k: int) -> list[tuple[float, float, float]]:
    """Change on the colour's word, on other colours', and the gap beside random neurons'."""
    text = np.array([token.text for token in loss.tokens])
    scene = np.unique(loss.units, return_inverse=True)[1]
    count = int(scene.max()) + 1
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), 1000)
    weights = np.vstack([np.ones(len(text)), draws[:, scene]])  # the first row is the data itself
    found = []
    for colour in COLOURS:
        own, rest = text == colour, np.isin(text, COLOURS) & (text != colour)
        for condition in (f"{name} {k} {colour}", f"{name} {k} {colour} random"):
            change = loss.values(condition, "right").mean(0) - loss.values("none", "right")[0]
            found += [weights[:, at] @ change[at] / weights[:, at].sum(1) for at in (own, rest)]
    word, other, random_word, random_other = np.array(found).reshape(6, 4, -1).mean(0)
    gap = (word - other) - (random_word - random_other)
    return [(each[0], *np.percentile(each[1:], (2.5, 97.5))) for each in (word, other, gap)]


def multimodal(vlm: nl.ModelAdapter, scenes: list[nl.Sample], out: Path) -> Ranking:
    """By colour, neurons by the worse of its fits to patches and to words, on their top samples."""
    atlas = nl.scan(vlm, scenes, out=out / "atlas", sites="language")
    neurons = [site.neuron(index) for site in vlm.select("language") for index in range(site.width)]
    fits: dict[str, list[tuple[float, nl.NeuronId]]] = {colour: [] for colour in COLOURS}
    for neuron, top in nl.exemplars(vlm, atlas, neurons, samples=scenes).items():
        for match in nl.DissectionExplainer().matches(top.explain, "multimodal", COLOURS):
            fits[match.concept].append((-min(match.visual, match.text), neuron))
    return {colour: [neuron for _, neuron in sorted(fits[colour])] for colour in COLOURS}


def writers(vlm: nl.ModelAdapter, scenes: list[nl.Sample]) -> dict[str, Ranking]:
    """By colour, neurons by the logit they write before its word, and by what is its alone."""
    lens, every = nl.LogitLens(vlm), sum(site.width for site in vlm.select("language"))
    logit = {c: dict(lens.writers(c, n=every, samples=scenes)) for c in COLOURS}
    mean = {n: sum(logit[c][n] for c in COLOURS) / len(COLOURS) for n in logit[COLOURS[0]]}
    own = {c: sorted(mean, key=lambda n, c=c: mean[n] - logit[c][n]) for c in COLOURS}
    return {"writers": {c: list(logit[c]) for c in COLOURS}, "writers of it alone": own}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("causal"))
    parser.add_argument("--scenes", type=int, default=60, help="to rank on, and to measure on")
    parser.add_argument("--k", type=int, nargs="+", default=[30, 100])
    parser.add_argument("--seeds", type=int, default=1, help="of the random neurons")
    return parser.parse_args()


if __name__ == "__main__":
    main()

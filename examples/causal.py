"""Are the neurons that stand for a colour needed to say it, and how many of them?

For each colour of the testbed, three rankings of its language neurons: those whose top samples
the colour predicts best on patches and words (multi-modal), those that write its word's logit more
than other colours', and random ones (as many per layer). The first k are deactivated, and the
captions of other scenes are predicted: how often is the word still the likeliest, and how often
are other colours' words?
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import neuronlens as nl

COLOURS = tuple(nl.testbed.COLOURS)


def main() -> None:
    given = arguments()
    bed = nl.testbed.load()
    vlm = nl.adapt(bed.model, bed.processor)
    found = nl.testbed.scenes(given.scenes, seed=1)
    others = nl.testbed.scenes(given.scenes, seed=2)  # rankings and effects: different scenes
    rankings = {"multi-modal": multimodal(vlm, found, given.out), "writers": writers(vlm, found)}
    interventions = {}
    for name, ranked in rankings.items():
        for colour in COLOURS:
            for k in given.k:
                chosen = ranked[colour][:k]
                interventions[f"{name} {k} {colour}"] = nl.deactivate(vlm, chosen)
                interventions[f"random for {name} {k} {colour}"] = [
                    nl.deactivate(vlm, nl.random_control(vlm, chosen, seed=seed))
                    for seed in range(given.seeds)
                ]
    loss = nl.response_loss(vlm, others, interventions, batch_size=50)
    is_colour = lambda token: token.text in COLOURS  # noqa: E731
    print(f"testbed, {given.scenes} scenes; colour words predicted: "
          f"{loss.mean('none', group=is_colour, number='right')}\n")  # fmt: skip
    head = ("ranking", "k", "colour", "this word", "other colours", "gap", "gap beside random")
    print("{:<12} {:>4}  {:<7} {:<26} {:<26} {:<26} {}".format(*head))
    rows = []
    for name in rankings:
        for k in given.k:
            for colour in COLOURS:
                here, control = f"{name} {k} {colour}", f"random for {name} {k} {colour}"
                rest = lambda token, c=colour: token.text in COLOURS and token.text != c  # noqa: E731
                told = [
                    loss.compare(here, group=colour, number="right"),
                    loss.compare(here, group=rest, number="right"),
                    loss.compare(here, group=colour, versus=rest, number="right"),
                    loss.compare(here, control, group=colour, versus=rest, number="right"),
                ]
                rows.append([name, k, colour, *(each.value for each in told)])
                print(f"{name:<12} {k:>4}  {colour:<7} " + " ".join(f"{e!s:<26}" for e in told))
    with (given.out / "causal.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])


def multimodal(
    vlm: nl.ModelAdapter, scenes: list[nl.Sample], out: Path
) -> dict[str, list[nl.NeuronId]]:
    """By colour, language neurons by how well it predicts them on patches and words alike."""
    atlas = nl.scan(vlm, scenes, out=out / "atlas", sites="language")
    neurons = [site.neuron(i) for site in vlm.select("language") for i in range(site.width)]
    top = nl.exemplars(vlm, atlas, neurons, samples=scenes)
    fits: dict[str, list[tuple[float, nl.NeuronId]]] = {colour: [] for colour in COLOURS}
    for neuron, each in top.items():
        for match in nl.DissectionExplainer().matches(each.explain, "multimodal", COLOURS):
            fits[match.concept].append((min(match.visual, match.text), neuron))
    return {c: [n for _, n in sorted(fits[c], key=lambda f: -f[0])] for c in COLOURS}


def writers(vlm: nl.ModelAdapter, scenes: list[nl.Sample]) -> dict[str, list[nl.NeuronId]]:
    """By colour, language neurons by how much more of its word's logit they write than of others'.

    Each colour is measured before its own word: what writes any colour is no colour's.
    """
    lens, every = nl.LogitLens(vlm), sum(site.width for site in vlm.select("language"))
    logit = {c: dict(lens.writers(c, n=every, samples=scenes)) for c in COLOURS}
    mean = {n: sum(logit[c][n] for c in COLOURS) / len(COLOURS) for n in logit[COLOURS[0]]}
    return {c: sorted(mean, key=lambda n, c=c: mean[n] - logit[c][n]) for c in COLOURS}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("causal"))
    parser.add_argument("--scenes", type=int, default=150, help="to rank on, and to measure on")
    parser.add_argument("--k", type=int, nargs="+", default=[10, 30, 100])
    parser.add_argument("--seeds", type=int, default=3, help="of the random controls")
    return parser.parse_args()


if __name__ == "__main__":
    main()

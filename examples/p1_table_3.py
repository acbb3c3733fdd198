"""Are unknown neurons needed less than random ones to answer questions?

P1, Table 3 and Figure 12: neurons with p_u at or above tau are deactivated, and as many random ones
of the same layers. By default on the testbed, where neurons that fire on one word of a caption
are not called unknown (n_t = 0): a word is said there only once or twice.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import neuronlens as nl

TAUS = (0.9, 0.8, 0.7, 0.6)
METRICS = {"exact": nl.metrics.ExactMatch, "vqa": nl.metrics.VQAAccuracy, "anls": nl.metrics.ANLS}


def main() -> None:
    given = arguments()
    if given.model is None:
        bed = nl.testbed.load()
        vlm, classifier = nl.adapt(bed.model, bed.processor), nl.NeuronClassifier(n_t=0)
        samples = nl.testbed.scenes(given.scenes, seed=1)
        questions, prompt = nl.testbed.questions(given.number, seed=2), "chat"
    else:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        load = AutoModelForImageTextToText.from_pretrained
        model = load(given.model, dtype="auto", device_map="auto")
        vlm = nl.adapt(model, AutoProcessor.from_pretrained(given.model))
        classifier, prompt = nl.NeuronClassifier(), given.prompt
        samples = nl.read_samples(given.samples, images=given.images)
        layout, path = given.questions.split("=", 1)
        questions = nl.read_questions(path, layout)[: given.number]
    metric = METRICS[given.metric]()
    if given.chat_model:
        chat = nl.chat.OpenAIChat(given.chat_model, base_url=given.base_url, key_env=given.key_env)
        metric = nl.metrics.ChatJudge(chat)
    atlas = nl.scan(vlm, samples, out=given.out / "atlas", sites="language", progress=True)
    kinds = classifier.classify(atlas)
    unknown = {tau: chosen for tau in TAUS if (chosen := kinds.select("unknown", p=tau))}
    interventions = {f"unknown {tau}": nl.deactivate(vlm, unknown[tau]) for tau in unknown} | {
        f"random {tau}": [
            nl.deactivate(vlm, nl.random_control(vlm, unknown[tau], seed=seed))
            for seed in range(given.seeds)
        ]
        for tau in unknown
    }
    found = nl.evaluate(
        vlm, questions, metric, interventions=interventions, prompt=prompt,
        out=given.out / f"answers-{metric.name}", progress=True,
    )  # fmt: skip
    neurons = sum(site.neurons for site in atlas.sites.values())
    share = {tau: len(unknown[tau]) / neurons for tau in unknown}
    curves = {
        f"{name} neurons": {share[tau]: found.mean(f"{name} {tau}") for tau in unknown}
        for name in ("unknown", "random")
    }
    figure = nl.figures.pruning_curves(curves, full=found.mean("none"), measure=found.metric)
    figure.suptitle(vlm.name)
    figure.savefig(given.out / "figure-12.png", dpi=200)
    for number in found.numbers:
        print(f"\n{vlm.name}, {number}: whole model {found.mean('none', number=number)}")
        print(f"{'':<10} {'pruned':>6}  {'unknown':<23} {'random':<23} unknown - random")
        for tau in unknown:
            one, two = f"unknown {tau}", f"random {tau}"
            each = [found.mean(one, number=number), found.mean(two, number=number)]
            cells = f"{each[0]!s:<23} {each[1]!s:<23} {found.compare(one, two, number=number)}"
            print(f"p_u >= {tau} {share[tau]:>6.1%}  {cells}")
    print(f"95 % intervals over images and {given.seeds} draws. Figure: {given.out}/figure-12.png")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("p1-table-3"))
    parser.add_argument("--scenes", type=int, default=200, help="of the testbed")
    parser.add_argument("--number", type=int, default=120, help="questions")
    parser.add_argument("--seeds", type=int, default=3, help="random draws for each tau")
    parser.add_argument("--model", help="a vision-language model; the testbed if not given")
    parser.add_argument("--samples", type=Path, help="JSONL or LLaVA's conversations")
    parser.add_argument("--images", type=Path, help="folder of the samples' images")
    parser.add_argument("--questions", metavar="LAYOUT=PATH", help="such as vqav2=questions.json")
    parser.add_argument("--prompt", default="short", help="how questions are put")
    parser.add_argument("--metric", choices=METRICS, default="exact")
    parser.add_argument("--chat-model", help="have answers judged by this model, as P1 does")
    parser.add_argument("--base-url", help="of a server other than OpenAI's")
    parser.add_argument("--key-env", help="environment variable with that server's key")
    return parser.parse_args()


if __name__ == "__main__":
    main()

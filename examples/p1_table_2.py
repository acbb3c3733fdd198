"""Do explanations from a neuron's top samples predict it better than those from random ones?

P1, Tables 2 and 4: mean held-out score by category, explained from top and from random samples,
each beside its null. By default on the testbed, with the explainer that needs no LLM.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import neuronlens as nl

CATEGORIES = ("visual", "text", "multimodal")


def main() -> None:
    given = arguments()
    if given.model is None:
        bed = nl.testbed.load()
        vlm, p = nl.adapt(bed.model, bed.processor), None
        samples = nl.read_samples(nl.testbed.write(given.out / "data", given.scenes, seed=1))
        classifier = nl.NeuronClassifier(**nl.testbed.READINGS)
    else:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        model = AutoModelForImageTextToText.from_pretrained(
            given.model, dtype="auto", device_map="auto"
        )
        vlm, p = nl.adapt(model, AutoProcessor.from_pretrained(given.model)), 0.8
        samples = nl.read_samples(given.samples, images=given.images)
        classifier = nl.NeuronClassifier()
    atlas = nl.scan(vlm, samples, out=given.out / "atlas", progress=True)
    kinds = classifier.classify(atlas)
    neurons = [n for c in CATEGORIES for n in kinds.select(c, p=p, n=given.neurons, seed=0)]
    more: dict[str, object] = {}
    if given.chat_model:
        chat = nl.chat.OpenAIChat(given.chat_model, base_url=given.base_url, key_env=given.key_env)
        more["explainer"] = nl.ChatExplainer(chat, images=given.shown)
    if given.chat_model and given.model is None:
        more["visual_simulator"] = nl.MaskSimulator(nl.AnnotationSegmenter())
    studies = {
        sampling: nl.explain_neurons(
            vlm, atlas, neurons, kinds=kinds, sampling=sampling,
            out=given.out / sampling, progress=True, **more,
        )
        for sampling in ("top", "random")
    }  # fmt: skip
    compared = studies["top"].compare(studies["random"])
    head = f"{'top':<22} {'null':>6}  {'random':<22} {'null':>6}"
    print(f"\n{'category':<11} {'n':>4}  {head}  top - random")
    for category, paired in compared.items():
        top, random = (studies[name].summary()[category] for name in ("top", "random"))
        print(
            f"{category:<11} {top.neurons:>4}  {shown(top.mean, top.interval):<22} "
            f"{shown(top.null):>6}  {shown(random.mean, random.interval):<22} "
            f"{shown(random.null):>6}  {shown(paired.mean, paired.interval)}"
        )
    print("\n95 % bootstrap intervals over neurons. Constant predictions count as 0, neurons of")
    print("constant truth are left out; not scored at all:")
    for name, study in studies.items():
        left = sum(each.undefined for each in study.summary().values())
        zero = sum(each.constant_predictions for each in study.summary().values())
        print(f"  {name}: {zero} as 0, {left} left out, failures {study.failures() or 'none'}")


def shown(mean: float | None, interval: tuple[float, float] | None = None) -> str:
    if mean is None or interval is None:
        return "-" if mean is None else f"{mean:.3f}"
    return f"{mean:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("p1-table-2"))
    parser.add_argument("--scenes", type=int, default=400, help="of the testbed")
    parser.add_argument("--neurons", type=int, default=60, help="of each category, at most")
    parser.add_argument("--model", help="a vision-language model; the testbed if not given")
    parser.add_argument("--samples", type=Path, help="JSONL or LLaVA's conversations")
    parser.add_argument("--images", type=Path, help="folder of the samples' images")
    parser.add_argument("--chat-model", help="explain and simulate by asking this model")
    parser.add_argument("--base-url", help="of a server other than OpenAI's")
    parser.add_argument("--key-env", help="environment variable with that server's key")
    parser.add_argument("--shown", choices=("modulated", "raw"), default="modulated")
    return parser.parse_args()


if __name__ == "__main__":
    main()

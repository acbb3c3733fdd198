"""How the testbed's weights were made: `python -m neuronlens.testbed.train --out folder`.

Three stages: the vision tower alone on dense patch labels, the language model alone on the
text, then everything together. The losses beside the next-token loss are there so that a
model this small learns to see at all; docs/testbed.md names them wherever results are shown.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from neuronlens.hooks import hooked
from neuronlens.testbed import build
from neuronlens.testbed.planting import SHIPPED, fit
from neuronlens.testbed.world import COLOURS, PROMPT, SHAPES, TEXTURES, Scene, draw, questions

SCENE_SEED: Final = 20_260_000
HELD_OUT_SEED: Final = 20_269_999
GROUND: Final = -100


class Corpus:
    """Scenes rendered once, as tensors: pixels, token ids, answer mask, patch labels."""

    def __init__(self, processor: LlavaProcessor, count: int, seed: int) -> None:
        rng = np.random.default_rng([seed, 1])
        scenes = [draw(seed, i) for i in range(count)]
        mean = np.array(processor.image_processor.image_mean, np.float32)
        std = np.array(processor.image_processor.image_std, np.float32)
        stacked = np.stack([scene.image for scene in scenes])
        normed = (stacked.astype(np.float32) / 255 - mean) / std
        self.pixels = torch.from_numpy(normed).permute(0, 3, 1, 2).contiguous()
        ids = processor.tokenizer.get_vocab()
        chats = [_chat(scene, rng.random() < 0.25, rng) for scene in scenes]
        self.ids = [torch.tensor([ids[w] for w, _ in chat]) for chat in chats]
        self.answers = [torch.tensor([a for _, a in chat]) for chat in chats]
        labels = [_patch_labels(scene) for scene in scenes]
        self.colour = torch.from_numpy(np.stack([colour for colour, _ in labels]))
        self.shape = torch.from_numpy(np.stack([shape for _, shape in labels]))
        self.texture = torch.tensor([TEXTURES.index(scene.texture) for scene in scenes])
        self.objects = np.array([len(scene.objects) for scene in scenes])

    def batches(self, size: int, seed: int) -> Iterator[Tensor]:
        """Row numbers, for ever; a batch holds scenes with equally many objects."""
        rng = np.random.default_rng(seed)
        while True:
            pools = [rng.permutation(np.flatnonzero(self.objects == n)) for n in (1, 2, 3)]
            cut = [pool[i : i + size] for pool in pools for i in range(0, len(pool) - size, size)]
            for number in rng.permutation(len(cut)):
                yield torch.from_numpy(cut[number])

    def text(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Right-padded ids, and True where the next-token loss is taken."""
        ids = nn.utils.rnn.pad_sequence([self.ids[i] for i in rows], batch_first=True)
        answers = nn.utils.rnn.pad_sequence([self.answers[i] for i in rows], batch_first=True)
        return ids, answers


def _chat(scene: Scene, ask: bool, rng: np.random.Generator) -> list[tuple[str, bool]]:
    turns = questions(scene, rng) if ask else [(PROMPT, scene.caption)]
    words = [("<bos>", False)]
    for number, (question, answer) in enumerate(turns):
        image = ["<image>"] * build.PATCHES if number == 0 else []
        words += [(w, False) for w in ["user:", *image, *question.split(), "assistant:"]]
        words += [(w, True) for w in [*answer.split(), "<eos>"]]
    return words


def _patch_labels(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Colour and shape of the object that fills at least 40 % of a patch, or GROUND."""
    side = int(math.sqrt(build.PATCHES))
    colour = np.full((side, side), GROUND)
    shape = np.full((side, side), GROUND)
    for item in scene.objects:
        cells = item.mask.reshape(side, build.PATCH, side, build.PATCH).mean((1, 3))
        colour[cells >= 0.4] = tuple(COLOURS).index(item.colour)
        shape[cells >= 0.4] = SHAPES.index(item.shape)
    return colour.ravel(), shape.ravel()


def _schedule(optimizer: torch.optim.Optimizer, step: int, steps: int, peak: float) -> None:
    warm = min(1.0, (step + 1) / 50)
    cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = peak * warm * cosine


def _optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)


def _step(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def _with_ground(labels: Tensor, classes: int) -> Tensor:
    return torch.where(labels == GROUND, classes, labels)


def train_vision(model: LlavaForConditionalGeneration, corpus: Corpus, steps: int) -> None:
    """Teach the tower colour and shape of every patch; the heads are thrown away."""
    tower = model.model.vision_tower
    width = tower.config.hidden_size
    sizes = (len(COLOURS) + 1, len(SHAPES) + 1, len(TEXTURES))
    heads = nn.ModuleList(nn.Linear(width, size) for size in sizes)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = _optimizer(parameters)
    batches = corpus.batches(64, seed=1)
    for step in range(steps):
        rows = next(batches)
        _schedule(optimizer, step, steps, 2e-3)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = tower(corpus.pixels[rows]).last_hidden_state[:, 1:]
            colour, shape, texture = (head(hidden) for head in heads)
            texture = texture.mean(1)
        losses = (
            F.cross_entropy(
                colour.flatten(0, 1).float(), _with_ground(corpus.colour[rows], 6).flatten()
            ),
            F.cross_entropy(
                shape.flatten(0, 1).float(), _with_ground(corpus.shape[rows], 6).flatten()
            ),
            F.cross_entropy(texture.float(), corpus.texture[rows]),
        )
        _step(optimizer, parameters, sum(losses, torch.zeros(())))
        if step % 100 == 0 or step == steps - 1:
            print(f"vision {step}: " + " ".join(f"{x.item():.3f}" for x in losses), flush=True)


def train_language(model: LlavaForConditionalGeneration, corpus: Corpus, steps: int) -> None:
    """Teach the language model the text, image positions left as they are embedded."""
    language, head = model.model.language_model, model.lm_head
    parameters = list(language.parameters())
    optimizer = _optimizer(parameters)
    batches = corpus.batches(64, seed=2)
    for step in range(steps):
        ids, answers = corpus.text(next(batches))
        _schedule(optimizer, step, steps, 2e-3)
        with torch.autocast("cpu", torch.bfloat16):
            logits = head(language(input_ids=ids).last_hidden_state)
        loss = _next_token(logits, ids, answers)
        _step(optimizer, parameters, loss)
        if step % 100 == 0 or step == steps - 1:
            print(f"language {step}: {loss.item():.3f}", flush=True)


def _next_token(logits: Tensor, ids: Tensor, answers: Tensor) -> Tensor:
    keep = answers[:, 1:]
    return F.cross_entropy(logits[:, :-1][keep].float(), ids[:, 1:][keep])


def train_jointly(
    model: LlavaForConditionalGeneration, corpus: Corpus, steps: int, vocabulary: dict[str, int]
) -> None:
    """Next token, plus naming every object patch, plus a price on firing."""
    parameters = list(model.parameters())
    optimizer = _optimizer(parameters)
    batches = corpus.batches(64, seed=3)
    colours = torch.tensor([vocabulary[word] for word in COLOURS])
    shapes = torch.tensor([vocabulary[word] for word in SHAPES])
    layers = model.model.language_model.layers
    acts = {str(number): layer.mlp.act_fn for number, layer in enumerate(layers)}
    fired: list[Tensor] = []
    with hooked(acts, lambda _name, out: fired.append(out.relu().mean())):
        for step in range(steps):
            rows = next(batches)
            ids, answers = corpus.text(rows)
            _schedule(optimizer, step, steps, 2e-3)
            fired.clear()
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(
                    input_ids=ids, pixel_values=corpus.pixels[rows], attention_mask=ids.ne(0).long()
                ).logits
            text = _next_token(logits, ids, answers)
            seen = ids == model.config.image_token_id
            named = logits[seen].float().log_softmax(-1)
            colour, shape = corpus.colour[rows].flatten(), corpus.shape[rows].flatten()
            on = colour != GROUND
            naming = (
                -(
                    named[on].gather(1, colours[colour[on]][:, None])
                    + named[on].gather(1, shapes[shape[on]][:, None])
                ).mean()
                / 2
            )
            firing = torch.stack(fired).float().mean()
            _step(optimizer, parameters, text + 0.2 * naming + 0.1 * firing)
            if step % 50 == 0 or step == steps - 1:
                print(
                    f"joint {step}: text {text.item():.3f} naming {naming.item():.3f}"
                    f" firing {firing.item():.4f}",
                    flush=True,
                )


@torch.no_grad()
def held_out_accuracy(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, count: int = 300
) -> dict[str, float]:
    """Greedy captions of unseen scenes: what share names what is there, from 0 to 1.

    `objects` is the share of scenes in which the named (colour, shape) pairs are, with
    multiplicity, exactly the true ones.
    """
    scenes = [draw(HELD_OUT_SEED, i) for i in range(count)]
    prompt = f"<bos> user: {'<image>' * build.PATCHES} {PROMPT} assistant:"
    tokenizer = processor.tokenizer
    captions: list[str] = []
    for start in range(0, count, 50):
        pixels = processor.image_processor(
            [scene.image for scene in scenes[start : start + 50]], return_tensors="pt"
        )["pixel_values"]
        ids = torch.tensor([tokenizer.encode(prompt)] * len(pixels))
        out = cast(Any, model).generate(
            input_ids=ids,
            pixel_values=pixels,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=80,
        )
        captions += tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    right = [
        _named(text) == sorted((o.colour, o.shape) for o in scene.objects)
        for text, scene in zip(captions, scenes, strict=True)
    ]
    texture = [
        f"{scene.texture} background" in text for text, scene in zip(captions, scenes, strict=True)
    ]
    whole = [text == scene.caption for text, scene in zip(captions, scenes, strict=True)]
    return {
        "objects": float(np.mean(right)),
        "texture": float(np.mean(texture)),
        "whole_caption": float(np.mean(whole)),
    }


def _named(caption: str) -> list[tuple[str, str]]:
    """(colour, shape) pairs of a caption's first sentence."""
    words = caption.split(" on a ")[0].split()
    return sorted((a, b) for a, b in pairwise(words) if a in COLOURS and b in SHAPES)


def train(out: Path, scenes: int = 30_000, effort: float = 1.0, seed: int = 0) -> dict[str, float]:
    """Train from nothing and write model and processor to `out`.

    Args:
        out: Folder for the model, its processor and `training.json`.
        scenes: How many scenes to render.
        effort: Factor on the number of steps; below 1 for a trial.
        seed: Of weights and batches. The same seed gives similar accuracy on another
            machine, not the same neurons.
    """
    started = time.perf_counter()
    torch.manual_seed(seed)
    processor = build.processor()
    corpus = Corpus(processor, scenes, SCENE_SEED)
    print(f"{scenes} scenes in {time.perf_counter() - started:.0f} s", flush=True)
    model = build.untrained(seed).train()
    steps = {
        "vision": int(900 * effort),
        "language": int(200 * effort),
        "joint": int(2000 * effort),
    }
    train_vision(model, corpus, steps["vision"])
    train_language(model, corpus, steps["language"])
    train_jointly(model, corpus, steps["joint"], processor.tokenizer.get_vocab())
    # The weights ship as fp16: accuracy is measured on what ships.
    model = model.eval().half().float()
    accuracy = held_out_accuracy(model, processor)
    rows = fit(model, processor, SHIPPED)
    model.half().save_pretrained(out)
    processor.save_pretrained(out)
    save_file({"rows": rows}, out / "planted.safetensors")
    record = {
        "steps": steps,
        "scenes": scenes,
        "seed": seed,
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - started),
        "held_out": accuracy,
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    return accuracy


def main() -> None:
    """Command line of `nox -s train_testbed`."""
    parser = argparse.ArgumentParser(description="Train the testbed's model from nothing.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=30_000)
    parser.add_argument("--effort", type=float, default=1.0, help="factor on the number of steps")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    train(given.out, given.scenes, given.effort, given.seed)


if __name__ == "__main__":
    main()

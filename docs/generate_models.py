"""Write docs/models.md: what is known of each architecture, from the models of tests/zoo.

`python docs/generate_models.py`. Tiny models are run, models of default size are counted on
the meta device; docs/models.template has the prose.
"""

from __future__ import annotations

import re
import sys
import tomllib
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from string import Template
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

import neuronlens as nl

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "models.md"
OFFICIAL = set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
sys.path.insert(0, str(DOCS.parent / "tests"))

from real import reals  # noqa: E402 - it is in tests
from zoo import Entry, entries  # noqa: E402

ADDED: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config.num_attention_heads": 16},
    "chameleon": {"vocabulary_map": {"<image>": 8711}},
    "cohere_compass": {
        "text_config.rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0}
        }
    },
    "emu3": {"vocabulary_map": {"<image>": 151851}},
    "gemma4": {"vision_config": "Gemma4VisionConfig"},
    "gemma4_unified": {"vision_config": "Gemma4UnifiedVisionConfig"},
    "hunyuan_vl": {"text_config.head_dim": 128},
    "qwen4_exp": {
        "text_config.indexer_n_heads": 4,
        "text_config.indexer_kv_heads": 1,
        "text_config.indexer_head_dim": 256,
        "text_config.indexer_budget": 2048,
        "text_config.indexer_compress_ratio": 32,
    },
}
"""What a default config lacks, where this says nothing of the number of neurons.

A part of a config (`..._config`) is given by the name of its class.
"""

LLAMA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
INTERNLM_7B = LLAMA_7B | {"intermediate_size": 14336, "num_key_value_heads": 8}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "LLaVA 1.5 7B": ("LlavaForConditionalGeneration", {}),
    "LLaVA-NeXT Vicuna 7B": ("LlavaNextForConditionalGeneration", {}),
    "InstructBLIP Vicuna 7B": (
        "InstructBlipForConditionalGeneration",
        {"text_config": LLAMA_7B},
    ),
    "InternVL 2.5 8B": ("InternVLForConditionalGeneration", {"text_config": INTERNLM_7B}),
}
"""Published models: the class, and what of their config is not the default."""

OTHER, APPROXIMATE, QUERIES, NONE = (
    "Other models",
    "Approximate regions",
    "Learned queries",
    "No image tokens",
)
KINDS = {
    "One grid": ("llava", "gemma"),
    "Images of any size": ("qwen", "patch_rows", "pixtral", "gemma4", "inkling", "FuyuAdapter"),
    "Tiles": ("tiles", "anyres", "thumbnails", "views", "minicpm", "molmo"),
}
"""Headings for architectures whose image tokens see one region: adapters, or files of them."""

GROUPS = {
    "One grid": "An image becomes one grid of tokens, of the same size for every image.",
    "Images of any size": "The larger the image, the more tokens it becomes; it is not cut.",
    "Tiles": "An image is cut into tiles, mostly with a small view of the whole.",
    OTHER: "Image tokens that see one region, in places of their own.",
    APPROXIMATE: (
        "Image tokens see a little more than their box, through convolutions. All of the box was "
        "found to change the token; some pixels around it may, too."
    ),
    QUERIES: "Each image token depends on the whole image, so it has no box (NaN).",
    NONE: "No token of the language stream is an image's.",
}


@dataclass(frozen=True)
class Facts:
    """What a tiny model tells when it is run.

    Attributes:
        registered: Whether its type has an adapter.
        tokens: How images are in the language stream.
        boxes: What image tokens see.
        group: Heading of the architecture's table.
        text_model: Type of the language model in it.
        needs: Packages beside torch and transformers that its modules come from.
        inert, conditional: Names of the sites with that flag.
    """

    registered: bool
    tokens: str
    boxes: str
    group: str
    text_model: str
    needs: tuple[str, ...]
    inert: tuple[str, ...]
    conditional: tuple[str, ...]


def facts_of(entry: Entry) -> Facts:
    """Adapt the tiny model and map the tokens of its images."""
    adapter = nl.adapt(entry.model())
    images = entry.images()
    inputs = entry.inputs(adapter.model, images)
    sizes = [[(image.shape[2], image.shape[1]) for image in row] for row in images]
    maps = adapter.tokens(inputs, sizes)
    tokens, boxes = _image_tokens(adapter, inputs, maps), _boxes(entry, maps, len(images))
    packages = {type(module).__module__.split(".")[0] for module in adapter.model.modules()}
    return Facts(
        registered=not isinstance(adapter, nl.adapters.StructuralAdapter),
        tokens=tokens,
        boxes=boxes,
        group=_group(adapter, tokens, boxes),
        text_model=entry.config().get_text_config().model_type,
        needs=tuple(sorted(packages - {"torch", "transformers"})),
        inert=flagged(adapter, "inert"),
        conditional=flagged(adapter, "conditional"),
    )


def flagged(adapter: nl.ModelAdapter, flag: str) -> tuple[str, ...]:
    """Names of the sites with a flag."""
    return tuple(site.name for site in adapter.sites.values() if flag in site.flags)


def _image_tokens(adapter: Any, inputs: Mapping[str, Any], maps: Mapping[str, nl.TokenMap]) -> str:
    role = maps["language"].role
    visual = role == nl.Role.VISUAL
    if not visual.any():
        elsewhere = any((each.role == nl.Role.VISUAL).any() for each in maps.values())
        return "none: cross-attention" if elsewhere else "none: no image"
    if adapter.prefixes_images:
        leading = torch.arange(visual.shape[1]) < visual.sum(1, keepdim=True)
        text = "before the text" if torch.equal(visual, leading) else "on words, and after the text"
    else:
        ids = adapter.text(inputs)
        here = adapter.placeholders(inputs, ids)
        text = "placeholders"
        text += " + markers" if (role[here] == nl.Role.SPECIAL).any() else ""
        text += " + padding" if (role[here] == nl.Role.PAD).any() else ""
        if not torch.isin(ids[here], torch.tensor(adapter.placeholder_ids())).all():
            text += ", told by a mask"
    return text if adapter.answer_stream == "language" else f"{text}, in the encoder"


def _boxes(entry: Entry, maps: Mapping[str, nl.TokenMap], images: int) -> str:
    visual = {name: tokens.role == nl.Role.VISUAL for name, tokens in maps.items()}
    seen = {name: visual[name] & ~maps[name].box.isnan().any(-1) for name in maps}
    if not seen["language"].any():
        return "vision part only" if any(each.any() for each in seen.values()) else "none"
    text = "approximate" if entry.overlap else "one region"
    without = int((visual["language"] & ~seen["language"]).sum()) // images
    return f"{text}; {without} of each image: none" if without else text


def _group(adapter: nl.ModelAdapter, tokens: str, boxes: str) -> str:
    if tokens.startswith("none"):
        return NONE
    if boxes.startswith("approximate"):
        return APPROXIMATE
    if not boxes.startswith("one region"):
        return QUERIES
    names = (type(adapter).__name__, type(adapter).__module__.split(".")[-1])
    found = (kind for name in names for kind, known in KINDS.items() if name in known)
    return next(found, OTHER)


def on_meta(cls: Any, config: Any) -> nl.ModelAdapter:
    """The adapter of a model without weights."""
    with torch.device("meta"):
        model = cls._from_config(config)
    return nl.adapt(model)


def published(name: str) -> nl.ModelAdapter:
    """The adapter of a published model, without its weights."""
    cls_name, changes = PUBLISHED[name]
    cls = getattr(transformers, cls_name)
    return on_meta(cls, cls.config_class(**changes))


def default_size(entry: Entry) -> tuple[nl.ModelAdapter | None, str]:
    """The adapter at the size of the default config, and what is to be said of that config."""
    cls = getattr(transformers, entry.cls)
    config = cls.config_class()
    try:
        return on_meta(cls, config), ""
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        said = f"{_reason(error)}."
    if entry.name not in ADDED:
        return None, said
    added = []
    for path, value in ADDED[entry.name].items():
        *parts, last = path.split(".")
        is_part = last.endswith("_config")
        setattr(
            reduce(getattr, parts, config),
            last,
            getattr(transformers, value)() if is_part else value,
        )
        added.append(f"{path} = {value}()" if is_part else f"{path} = {value!r}")
    return on_meta(cls, config), f"{said} Counted with `{', '.join(added)}`."


def _reason(error: Exception) -> str:
    text = _escaped(str(error).replace("`", "").rstrip("."))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "transformers" in f.filename]
    line = (frames[-1].line if frames else None) or "raise"
    return text if line.startswith("raise") else f"{text} in `{line}`"


def _count(adapter: nl.ModelAdapter | None, *modules: str) -> str:
    """Neurons of some modules, and how they come about."""
    if adapter is None:
        return "?"
    cell = []
    for module in modules:
        sites = [site for site in adapter.sites.values() if site.module == module]
        kinds = Counter((site.experts, site.width) for site in sites)
        terms = [
            f"{layers} × {f'{experts} × ' if experts else ''}{width:,}".replace(" ", "\u00a0")
            for (experts, width), layers in kinds.items()
        ]
        kind = {"qformer": "Q-Former ", "action": "action "}.get(module, "")
        kind = kind if len(modules) > 1 else ""
        if sites:
            terms = terms if len(terms) <= 3 else [f"{len(sites)} sites"]
            total = sum(site.neurons for site in sites)
            cell.append(f"{kind}{total:,}<br><small>{' + '.join(terms)}</small>")
    return "<br>".join(cell) or "–"


def _name(entry: Entry) -> str:
    """Name and class, which may be broken before its ending."""
    cls = "<wbr>For".join(entry.cls.rsplit("For", 1))
    return f"`{entry.name}`<br><small>{cls}</small>"


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def note_of(entry: Entry, facts: Facts, adapter: nl.ModelAdapter | None = None) -> str:
    """What is said of an architecture below its table; `adapter` is that of default size."""
    note = _escaped(entry.note.strip().rstrip("."))
    said = [f"{note[0].upper()}{note[1:]}."] if note else []
    for flag, title in (("inert", "Inert"), ("conditional", "Left out without an image")):
        names = flagged(adapter, flag) if adapter else getattr(facts, flag)
        shown = [f"`{name}`" for name in names]
        shown = shown if len(shown) <= 4 else [*shown[:2], "…", shown[-1]]
        size = "" if adapter else " in the tiny model"
        said += [f"{title}{size}: {', '.join(shown)}."] if names else []
    said += [f"Needs the package `{package}`." for package in facts.needs]
    return " ".join(said)


def _escaped(text: str) -> str:
    """Markdown in which words such as <s> are no tags; code in backticks stays as it is."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([<*\[\]])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def _by_note(notes: Mapping[str, str]) -> str:
    """A line for each note, with the names that it holds for."""
    names: dict[str, list[str]] = {}
    for name, note in notes.items():
        names.setdefault(note, []).append(f"`{name}`")
    return "\n".join(f"- {', '.join(names[note])}: {note}" for note in names if note)


def without_processor() -> list[str]:
    """Architectures that were not tried with a processor (tests/real has no entry)."""
    tried = {name.split()[0].split("+")[0] for name in reals()}
    return sorted(OFFICIAL - tried)


def page() -> str:
    """The page, from scratch."""
    zoo = entries()
    facts = {name: facts_of(entry) for name, entry in zoo.items()}
    rows, notes, configs = {}, {}, {}
    for name in sorted(OFFICIAL & set(zoo)):
        adapter, configs[name] = default_size(zoo[name])
        notes[name] = note_of(zoo[name], facts[name], adapter)
        rows[name] = [
            _name(zoo[name]),
            _count(adapter, "vision"),
            _count(adapter, "projector", "qformer"),
            _count(adapter, "language", "action"),
            facts[name].tokens,
            facts[name].boxes,
        ]
    head = ["architecture", "vision", "projector", "language", "image tokens", "boxes"]
    groups = []
    for heading in (*KINDS, OTHER, APPROXIMATE, QUERIES, NONE):
        here = [name for name in rows if facts[name].group == heading]
        table = _table(head, [rows[name] for name in here])
        below = _by_note({name: notes[name] for name in here})
        groups += [f"### {heading}", GROUPS[heading], table, below]
    variants = [name for name in zoo if name not in OFFICIAL]
    counts = []
    for name in PUBLISHED:
        adapter = published(name)
        modules = ("vision", "projector", "qformer", "language")
        total = sum(site.neurons for site in adapter.sites.values())
        counts.append([name, *(_count(adapter, module) for module in modules), f"{total:,}"])
    project = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))
    needed = [d for d in project["project"]["dependencies"] if d.startswith("transformers")]
    return Template((DOCS / "models.template").read_text(encoding="utf-8")).substitute(
        version=transformers.__version__,
        needed=needed[0],
        covered=sum(facts[name].registered for name in rows),
        official=len(OFFICIAL),
        variants=len(variants),
        text_models=len({each.text_model for each in facts.values()}),
        processed=len(rows) - len(without_processor()),
        unprocessed=", ".join(f"`{name}`" for name in without_processor()),
        groups="\n\n".join(filter(None, groups)),
        variant_table=_table(
            ["variant", "language model", *head[4:]],
            [
                [_name(zoo[name]), f"`{each.text_model}`", each.tokens, each.boxes]
                for name, each in facts.items()
                if name in variants
            ],
        ),
        variant_notes=_by_note({name: note_of(zoo[name], facts[name]) for name in variants}),
        configs=_by_note(configs),
        counts=_table(["model", *head[1:3], "Q-Former", "language", "in all"], counts),
    )


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    PAGE.write_text(page(), encoding="utf-8")

"""Write docs/models.md: what is known of each architecture, from running the models of tests/zoo.

python docs/generate_models.py. Facts come from tiny models, which are run, and from models of
default size on the meta device, which are counted.
"""

from __future__ import annotations

import sys
import tomllib
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

import neuronlens as nl

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "models.md"
sys.path.insert(0, str(DOCS.parent / "tests"))

from real import reals  # noqa: E402 - these are in tests
from zoo import Entry, entries  # noqa: E402

ADDED: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config": {"num_attention_heads": 16}},
    "chameleon": {"vocabulary_map": {"<image>": 8711}},
    "cohere_compass": {
        "text_config": {
            "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
        }
    },
    "emu3": {"vocabulary_map": {"<image>": 151851}},
    "gemma4": {"vision_config": {}},
    "gemma4_unified": {"vision_config": {}},
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "perception_lm": {
        "vision_config": {
            "architecture": "vit_pe_core_large_patch14_336",
            "model_args": {"embed_dim": 1024},
        }
    },
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 128,
            "indexer_budget": 2048,
            "indexer_compress_ratio": 32,
        }
    },
}
"""What the default config of an architecture lacks, where it does not set the count itself.

Perception LM's is the exception: its vision part has no default, this is that of its 1B model.
"""

LLAMA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "LLaVA 1.5 7B": ("LlavaForConditionalGeneration", {}),
    "LLaVA-NeXT Vicuna 7B": ("LlavaNextForConditionalGeneration", {}),
    "InstructBLIP Vicuna 7B": (
        "InstructBlipForConditionalGeneration",
        {"text_config": LLAMA_7B},
    ),
    "InternVL 2.5 8B": (
        "InternVLForConditionalGeneration",
        {"text_config": LLAMA_7B | {"intermediate_size": 14336, "num_key_value_heads": 8}},
    ),
}
"""Published models: class, and what of their config is not the default."""

KINDS = {
    "One grid for each image": ("llava", "gemma"),
    "Images of any size": ("qwen", "dynamic", "native", "gemma4", "inkling", "FuyuAdapter"),
    "Tiles and views": ("tiles", "anyres", "thumbnails", "views", "minicpm", "molmo"),
}
"""Groups of architectures whose image tokens see one region, by adapter or the adapter's file."""

APPROXIMATE = "Approximate regions"
QUERIES = "Learned queries"
NONE = "No image tokens"
OTHER = "Other"

INTRODUCTIONS = {
    "One grid for each image": "An image is resized to one size and becomes one grid of tokens.",
    "Images of any size": "An image keeps its shape, and becomes more tokens the larger it is.",
    "Tiles and views": "An image is cut into tiles, mostly with a small view of all of it.",
    OTHER: "Encoder-decoders, and images before the text.",
    APPROXIMATE: (
        "Convolutions see past the edge of a token's cell. Everything in its box changes a token; "
        "some pixels around it may too."
    ),
    QUERIES: (
        "Each image token depends on the whole image, so it has no box (NaN). The tokens of the "
        "vision part have boxes where the column says so."
    ),
    NONE: (
        "No token of the language stream is an image's. Boxes are those of the vision part's "
        "tokens, where there are any."
    ),
}


@dataclass(frozen=True)
class Facts:
    """What a tiny model says when it is run.

    Attributes:
        tokens: How images are in the language stream.
        boxes: What image tokens see, and whether that is exact.
        group: Heading that the architecture stands under.
        text_model: Type of the language model in it.
        needs: Packages beside transformers that its parts come from.
        inert, conditional: Names of the sites with that flag.
    """

    tokens: str
    boxes: str
    group: str
    text_model: str
    needs: tuple[str, ...]
    inert: tuple[str, ...]
    conditional: tuple[str, ...]


def tiny_facts(entry: Entry) -> Facts:
    """Run the tiny model's adapter on its images."""
    adapter = nl.adapt(entry.model())
    images = entry.images()
    inputs = entry.inputs(adapter.model, images)
    sizes = [[(image.shape[2], image.shape[1]) for image in row] for row in images]
    maps = adapter.tokens(inputs, sizes)
    tokens, boxes = _image_tokens(adapter, inputs, maps), _boxes(entry, maps, len(images))
    parts = {type(module).__module__.split(".")[0] for module in adapter.model.modules()}
    return Facts(
        tokens=tokens,
        boxes=boxes,
        group=_group(adapter, tokens, boxes),
        text_model=entry.config().get_text_config().model_type,
        needs=tuple(sorted(parts - {"torch", "transformers"})),
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
        lengths = visual.sum(1)
        first = torch.arange(visual.shape[1]) < lengths[:, None]
        said = "before the text" if torch.equal(visual, first) else "on words and behind the text"
    else:
        ids = adapter.text(inputs)
        here = adapter.placeholders(inputs, ids)
        said = "placeholders"
        if (role[here] == nl.Role.SPECIAL).any():
            said += " + markers"
        if (role[here] == nl.Role.PAD).any():
            said += " + padding"
        if not torch.isin(ids[here], torch.tensor(adapter.placeholder_ids())).all():
            said += ", told by a mask"
    return said if adapter.answer_stream == "language" else f"{said}, in the encoder"


def _boxes(entry: Entry, maps: Mapping[str, nl.TokenMap], images: int) -> str:
    def counted(tokens: nl.TokenMap) -> tuple[int, int]:
        visual = tokens.role == nl.Role.VISUAL
        seen = visual & ~tokens.box.isnan().any(-1)
        return int(seen.sum()), int(visual.sum())

    seen, visual = counted(maps["language"])
    if not seen:
        inside = any(counted(each)[0] for each in maps.values())
        return "vision part only" if inside else "none"
    said = "approximate" if entry.overlap else "one region"
    without = (visual - seen) // images
    return f"{said}; none for {without} token an image" if without else said


def _group(adapter: nl.ModelAdapter, tokens: str, boxes: str) -> str:
    if tokens.startswith("none"):
        return NONE
    if boxes.startswith("approximate"):
        return APPROXIMATE
    if not boxes.startswith("one region"):
        return QUERIES
    names = (type(adapter).__name__, type(adapter).__module__.split(".")[-1])
    return next((kind for name in names for kind, known in KINDS.items() if name in known), OTHER)


def on_meta(cls: str, changes: Mapping[str, Any] | None = None) -> nl.ModelAdapter:
    """A model of default size, but for some changes, without its weights."""
    model_class = getattr(transformers, cls)
    default = model_class.config_class
    changed = {
        key: _completed(default, key, value) if key.endswith("_config") else value
        for key, value in (changes or {}).items()
    }
    with torch.device("meta"):
        model = model_class._from_config(default(**changed))
    return nl.adapt(model)


def _completed(config_class: Any, key: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """The default of a part of a config, with changes; as it is if it is another model's."""
    part = getattr(config_class(), key)
    if part is None or "model_type" in value:
        return dict(value)
    kept = {} if part.model_type == "timm_wrapper" else part.to_diff_dict()
    return {"model_type": part.model_type, **kept, **value}


def default_size(entry: Entry) -> tuple[nl.ModelAdapter | None, str]:
    """The model of default size, and what is to be said of its config."""
    try:
        return on_meta(entry.cls), ""
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        why = f"Its default config does not do: {_reason(error)}."
    if entry.name not in ADDED:
        return None, why
    return on_meta(entry.cls, ADDED[entry.name]), f"{why} Counted with `{ADDED[entry.name]}`."


def _reason(error: Exception) -> str:
    if isinstance(error, nl.NeuronLensError):
        return str(error).rstrip(".")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "transformers" in f.filename]
    line = frames[-1].line or ""
    said = str(error).replace("`", "").rstrip(".")
    return said if line.startswith("raise") else f"{said} (`{line}`)"


def _count(adapter: nl.ModelAdapter | None, *modules: str) -> str:
    """Neurons of some modules, and how they come about."""
    if adapter is None:
        return "?"
    cell = []
    for module in modules:
        sites = [site for site in adapter.sites.values() if site.module == module]
        if not sites:
            continue
        kinds = Counter((site.experts, site.width) for site in sites)
        terms = [
            f"{times} × {f'{experts} × ' if experts else ''}{width:,}"
            for (experts, width), times in kinds.items()
        ]
        how = " + ".join(terms) if len(terms) <= 3 else f"{len(sites)} sites"
        name = {"qformer": "Q-Former ", "action": "action "}.get(module, "")
        cell.append(f"{name}{sum(site.neurons for site in sites):,}<br><small>{how}</small>")
    return "<br>".join(cell) or "–"


def _name(entry: Entry) -> str:
    """Name and class; the class may be broken before its ending."""
    cls = entry.cls
    for ending in ("ForConditionalGeneration", "ForCausalLM", "ForImageClassification"):
        cls = cls.replace(ending, f"<wbr>{ending}")
    return f"`{entry.name}`<br><small>{cls}</small>"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _sentence(text: str) -> str:
    text = text.strip()
    return text and text[0].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _notes(entry: Entry, facts: Facts, adapter: nl.ModelAdapter | None, config: str) -> str:
    """What is to be said of an architecture below its table."""
    said = [_sentence(entry.note)]
    for flag, tiny, text in (
        ("inert", facts.inert, "Inert"),
        ("conditional", facts.conditional, "Run only with an image"),
    ):
        names = flagged(adapter, flag) if adapter else tiny
        if names:
            size = "" if adapter else " in the tiny model"
            said.append(f"{text}{size}: {_sites(names)}.")
    said += [f"Needs the package `{package}`." for package in facts.needs]
    return " ".join(each for each in [*said, config] if each)


def _sites(names: tuple[str, ...]) -> str:
    shown = [f"`{name}`" for name in names]
    return ", ".join(shown if len(shown) <= 4 else [*shown[:2], "…", shown[-1]])


def _by_note(notes: Iterable[tuple[str, str]]) -> str:
    """One line for each note, with the names it holds for."""
    by_note: dict[str, list[str]] = {}
    for name, note in notes:
        if note:
            by_note.setdefault(note, []).append(f"`{name}`")
    return "\n".join(f"- {', '.join(names)}: {note}" for note, names in by_note.items())


def published(name: str) -> nl.ModelAdapter:
    """A published model without its weights."""
    cls, changes = PUBLISHED[name]
    return on_meta(cls, changes)


def page(say: Callable[[str], None] = lambda text: None) -> str:
    """The page; `say` is told each architecture's name."""
    zoo, official = entries(), MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    facts, main, notes = {}, {}, {}
    headings = [*KINDS, OTHER, APPROXIMATE, QUERIES, NONE]
    for name, entry in zoo.items():
        say(name)
        facts[name] = tiny_facts(entry)
        if name not in official:
            continue
        adapter, config = default_size(entry)
        notes[name] = _notes(entry, facts[name], adapter, config)
        main[name] = [
            _name(entry),
            _count(adapter, "vision"),
            _count(adapter, "projector", "qformer"),
            _count(adapter, "language", "action"),
            facts[name].tokens,
            facts[name].boxes,
        ]
    head = [
        "architecture", "vision", "projector, Q-Former", "language", "image tokens", "boxes",
    ]  # fmt: skip
    groups = []
    for heading in headings:
        here = [name for name in main if facts[name].group == heading]
        groups += [
            f"### {heading}\n\n{INTRODUCTIONS[heading]}",
            _table(head, (main[name] for name in here)),
            _by_note((name, notes[name]) for name in here),
        ]
    others = [name for name in zoo if name not in official]
    variants = _table(
        ["variant", "language model", "image tokens", "boxes"],
        (
            [_name(zoo[name]), f"`{facts[name].text_model}`", facts[name].tokens, facts[name].boxes]
            for name in others
        ),
    )
    counts = []
    for name in PUBLISHED:
        adapter = published(name)
        modules = ("vision", "projector", "qformer", "language")
        total = sum(site.neurons for site in adapter.sites.values())
        counts.append([name, *(_count(adapter, module) for module in modules), f"{total:,}"])
    processed = {name.split()[0].split("+")[0] for name in reals()} & set(main)
    project = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))
    needed = next(d for d in project["project"]["dependencies"] if d.startswith("transformers"))
    return TEMPLATE.format(
        version=transformers.__version__,
        needed=needed,
        covered=len(main),
        official=len(official),
        variants=len(others),
        text_models=", ".join(
            f"`{each}`" for each in sorted({f.text_model for f in facts.values()})
        ),
        processed=len(processed),
        unprocessed=", ".join(f"`{name}`" for name in sorted(set(main) - processed)),
        groups="\n\n".join(groups),
        variant_table=variants,
        variant_notes=_by_note((name, _notes(zoo[name], facts[name], None, "")) for name in others),
        counts=_table(["model", "vision", "projector", "Q-Former", "language", "in all"], counts),
    )


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    PAGE.write_text(page(), encoding="utf-8")

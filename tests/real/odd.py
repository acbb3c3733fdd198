"""BLIP's, GIT's, Florence-2's, T5Gemma 2's, Pix2Struct's and encoder-decoders' processors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import transformers as hf
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from real import Real
from zoo import odd

ZOO = {entry.name: entry for entry in odd.ENTRIES}
WORDS = ["what", "is", "this", "a", "small", "photo"]


def tokenizer(special: Mapping[str, int], frame: str = "$A", **named: Any) -> Any:
    """Words with spaces between them, and special tokens with the ids the tiny model has.

    Args:
        special: Their ids, `<pad>` and `<unk>` among them.
        frame: What the tokenizer puts around a text, such as "[CLS] $A [SEP]".
        named: Special tokens by what they are for.
    """
    ids = dict(special) | {word: 40 + n for n, word in enumerate(WORDS)}
    ids |= {f"<{n}>": n for n in range(max(ids.values())) if n not in ids.values()}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    made.post_processor = processors.TemplateProcessing(
        single=frame, special_tokens=[(t, i) for t, i in special.items() if t in frame.split()]
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", **named
    )


def bert() -> Any:
    special = {"<pad>": odd.PAD, "[CLS]": odd.BOS, "[SEP]": odd.EOS, "<unk>": 39}
    return tokenizer(special, "[CLS] $A [SEP]", cls_token="[CLS]", sep_token="[SEP]")


def bart(**more: Any) -> Any:
    special = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 39}
    return tokenizer(
        special | {t: i for t, i in more.items()},
        "<s> $A </s>",
        bos_token="<s>",
        eos_token="</s>",
    )


def t5() -> Any:
    return tokenizer({"<pad>": odd.PAD, "</s>": 1, "<unk>": 39}, "$A </s>", eos_token="</s>")


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def blip() -> Any:
    return hf.BlipProcessor(hf.BlipImageProcessor(size=square(16)), bert())


def git() -> Any:
    """Its images are CLIP's: the short side resized, the middle cut out."""
    images = hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square(32))
    return hf.GitProcessor(images, bert())


def florence() -> Any:
    images = hf.CLIPImageProcessor(size=square(256), do_center_crop=False)
    images.image_seq_length = 65
    special = {"<s>": 0, "<pad>": 1, "</s>": 2, "<image>": odd.IMAGE, "<unk>": 39}
    text = tokenizer(
        special,
        "<s> $A </s>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    text.image_token_id = odd.IMAGE
    return hf.Florence2Processor(image_processor=images, tokenizer=text)


def gemma() -> Any:
    special = {
        "<pad>": odd.PAD,
        "<bos>": odd.BOS,
        "<eos>": odd.EOS,
        "<soft>": odd.IMAGE,
        "<start>": odd.BEGIN,
        "<end>": odd.END,
        "<unk>": 39,
    }
    named = {"image_token": "<soft>", "boi_token": "<start>", "eoi_token": "<end>"}
    text = tokenizer(
        special,
        "<bos> $A",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        extra_special_tokens=named,
    )
    images = hf.Gemma3ImageProcessor(size=square(32))
    return hf.Gemma3Processor(images, text, image_seq_length=16)


def pix2struct() -> Any:
    images = hf.Pix2StructImageProcessor(patch_size=square(4))
    made = hf.Pix2StructProcessor(images, t5())
    images.max_patches = 20
    return made


def formula() -> Any:
    return hf.PPFormulaNetProcessor(hf.PPFormulaNetImageProcessor(size=square(64)), bart())


def trocr() -> Any:
    return hf.TrOCRProcessor(hf.ViTImageProcessor(size=square(16)), bart())


def donut() -> Any:
    images = hf.DonutImageProcessor(size={"height": 32, "width": 24})
    return hf.DonutProcessor(images, bart())


def bigger_git(config: Any) -> None:
    config.vision_config.image_size, config.vision_config.patch_size = 32, 8


def longer(config: Any) -> None:
    config.text_config.max_position_embeddings = 128


def build(
    name: str, processor: Callable[[], Any], change: Callable[[Any], None] | None = None
) -> tuple[Any, Any]:
    """The zoo's model, of another canvas if need be, and its processor."""
    entry = ZOO[name]

    def config() -> Any:
        made = entry.config()
        if change is not None:
            change(made)
        return made

    return replace(entry, config=config).model(), processor()


def one(
    name: str,
    processor: Callable[[], Any],
    change: Callable[[Any], None] | None = None,
    **more: Any,
) -> Real:
    entry = ZOO[name]
    return Real(
        name=name,
        build=partial(build, name, processor, change),
        first=entry.first,
        mixers=entry.mixers,
        spatial=entry.spatial,
        **{"several": False} | more,
    )


REAL = (
    one("blip", blip),
    one("git", git, bigger_git),
    # Strided convolutions with odd kernels see as much before a cell as in it.
    one("florence2", florence, longer, margin=9.5),
    one("t5gemma2", gemma, several=True),
    one("pix2struct", pix2struct),
    one("pp_formulanet", formula),
    one("vision-encoder-decoder+trocr", trocr),
    one("vision-encoder-decoder+mbart", donut),
)

"""Pixtral's, MiniCPM-V's, Gemma 4's, Inkling's and Molmo 2's processors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import transformers as hf
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from real import Real
from zoo import native

ZOO = {entry.name: entry for entry in native.ENTRIES}
BASE = {"<pad>": native.PAD, "<s>": native.BOS, "</s>": native.EOS}
WORDS = ["what", "is", "this", "a", "small", "photo", "0", "1"]


def tokenizer(special: Mapping[str, int], add_bos: bool = True, **named: str) -> Any:
    """Words with spaces between them, and special tokens with the ids the tiny model has.

    Args:
        special: Id of every special token beside `BASE`.
        add_bos: Whether the tokenizer puts a BOS token first.
        named: Special tokens that the tokenizer has as attributes, such as `image_token`.
    """
    fixed = BASE | dict(special)
    ids = fixed | {word: 40 + n for n, word in enumerate(WORDS)} | {"<unk>": 39}
    ids |= {f"<{n}>": n for n in range(max(ids.values())) if n not in ids.values()}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in fixed])
    if add_bos:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", native.BOS)]
        )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>" if add_bos else None,
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=named,
    )


def pixtral(cls: str, **settings: Any) -> Any:
    """At most 64 pixels long, whole tokens of 2 x 2 patches of 4 x 4."""
    marks = {"[IMG]": native.IMAGE, "[IMG_BREAK]": native.BREAK, "[IMG_END]": native.END}
    named = dict(zip(("image_token", "image_break_token", "image_end_token"), marks, strict=True))
    return getattr(hf, cls)(
        image_processor=hf.PixtralImageProcessor(size={"longest_edge": 64}, patch_size=8),
        tokenizer=tokenizer(marks, **named),
        patch_size=4,
        spatial_merge_size=2,
        **settings,
    )


def minicpm(image: str, video: str, cls: str, scale: int) -> Any:
    """Slices of about `scale` x `scale` pixels, nine at most."""
    named = {
        "image_token": ("<|image_pad|>", native.IMAGE),
        "video_token": ("<|video_pad|>", native.VIDEO),
        "image_start_token": ("<image>", native.START),
        "image_end_token": ("</image>", native.END),
        "slice_start_token": ("<slice>", native.SLICE),
        "slice_end_token": ("</slice>", native.SLICE_END),
        "image_id_start_token": ("<image_id>", native.ID),
        "image_id_end_token": ("</image_id>", native.ID_END),
    }
    return getattr(hf, cls)(
        image_processor=getattr(hf, image)(scale_resolution=scale, patch_size=4),
        video_processor=getattr(hf, video)(),
        tokenizer=tokenizer(
            dict(named.values()) | {"\n": native.NEWLINE},
            add_bos=False,
            **{name: token for name, (token, _) in named.items()},
        ),
    )


def gemma(family: str) -> Any:
    """70 tokens at most, of 3 x 3 patches of 4 x 4 pixels."""
    named = {
        "image_token": ("<|image|>", native.IMAGE),
        "boi_token": ("<|image>", native.START),
        "eoi_token": ("<image|>", native.END),
        "audio_token": ("<|audio|>", native.AUDIO),
        "boa_token": ("<|audio>", 17),
        "eoa_token": ("<audio|>", 18),
    }
    sizes = {"patch_size": 4, "pooling_kernel_size": 3, "max_soft_tokens": 70}
    # A Gemma 4 processor is that of diffusion_gemma, too.
    return getattr(hf, f"{family}Processor")(
        feature_extractor=getattr(hf, f"{family}AudioFeatureExtractor")(),
        image_processor=getattr(hf, f"{family}ImageProcessor")(**sizes),
        video_processor=getattr(hf, f"{family}VideoProcessor")(),
        tokenizer=tokenizer(
            dict(named.values()) | {"<|video|>": native.VIDEO},
            **{name: token for name, (token, _) in named.items()},
        ),
    )


def inkling() -> Any:
    """Patches of 5 x 5 pixels of the photo at 0.3 of its size."""
    marks = {
        "<|unused_200054|>": native.IMAGE,
        "<|unused_200053|>": native.AUDIO,
        "<|content_image|>": native.START,
        "<|content_audio_input|>": 17,
    }
    return hf.InklingProcessor(
        feature_extractor=hf.InklingFeatureExtractor(),
        image_processor=hf.InklingImageProcessor(
            size={"height": 5, "width": 5}, rescale_image_frac=0.3
        ),
        tokenizer=tokenizer(marks, add_bos=False),
    )


def inkling2() -> Any:
    """Patches of 8 x 8 pixels of the photo as it is."""
    return hf.Inkling2Processor(
        image_processor=hf.Inkling2ImageProcessor(size={"height": 8, "width": 8}),
        tokenizer=tokenizer({"<|unused_200054|>": native.IMAGE}, add_bos=False),
    )


def molmo() -> Any:
    """Crops of 7 x 7 patches of 4 x 4 pixels, eight at most."""
    ids = native.MOLMO
    marks = {
        "<im_patch>": ids["image"],
        "<im_col>": ids["column"],
        "<im_start>": ids["start"],
        "<im_end>": ids["end"],
        "<low_res_im_start>": ids["small"],
        "<frame_start>": 105,
        "<frame_end>": 106,
        "<im_low>": 107,
        "<|image|>": 20,
        "<|video|>": 21,
    }
    return hf.Molmo2Processor(
        image_processor=hf.Molmo2ImageProcessor(
            size={"height": 28, "width": 28}, patch_size=4, overlap_margins=[1, 1]
        ),
        video_processor=hf.Molmo2VideoProcessor(),
        tokenizer=tokenizer(marks, add_bos=False, image_token="<|image|>", video_token="<|video|>"),
    )


def real(name: str, processor: Callable[[], Any], **more: Any) -> Real:
    entry = ZOO[name]
    return Real(
        name,
        lambda: (entry.model(), processor()),
        first=entry.first,
        mixers=entry.mixers,
        **more,
    )


V4_6 = ("MiniCPMV4_6ImageProcessor", "MiniCPMV4_6VideoProcessor")

REAL: tuple[Real, ...] = (
    real("mistral3", partial(pixtral, "PixtralProcessor")),
    real("mistral_large4", partial(pixtral, "PixtralProcessor")),
    real("lighton_ocr", partial(pixtral, "LightOnOcrProcessor")),
    real("minicpmv4_6", partial(minicpm, *V4_6, "MiniCPMV4_6Processor", 32)),
    real("minicpmv4_7", partial(minicpm, *V4_6, "MiniCPMV4_7Processor", 32)),
    real(
        "minicpm_ocr",
        partial(
            minicpm,
            "MiniCPMOcrImageProcessor",
            "MiniCPMOcrVideoProcessor",
            "MiniCPMOcrProcessor",
            16,
        ),
    ),
    real("gemma4", partial(gemma, "Gemma4")),
    real("gemma4_unified", partial(gemma, "Gemma4Unified")),
    real("inkling_mm_model", inkling, margin=8.0),
    real("inkling2", inkling2),
    real("molmo2", molmo, margin=8.0),
)

"""Tables of facts, a file per kind of model; importing a file registers its adapters.

The file of a model: `type(nl.adapt(model)).__module__`, or search the files here for its
`config.model_type` in `@register(...)`. Most files have the name of a model or of what is done
to images: `anyres`, `thumbnails`, `tiles` and `views` cut them, `patch_rows` and `qwen` take
any size, `queries` and `blip_qformer` ask learned queries. `patches`, `runs` and `tiling` are
what several of them share, and register nothing.
"""

from neuronlens.adapters.families import (
    anyres,
    blip_qformer,
    codes,
    convolutional,
    cross_attention,
    encoder_decoders,
    gated_attention,
    gemma,
    gemma4,
    git,
    inkling,
    kosmos,
    llava,
    minicpm,
    molmo,
    no_image,
    patch_rows,
    pixtral,
    queries,
    qwen,
    thumbnails,
    tiles,
    views,
)

__all__ = [
    "anyres",
    "blip_qformer",
    "codes",
    "convolutional",
    "cross_attention",
    "encoder_decoders",
    "gated_attention",
    "gemma",
    "gemma4",
    "git",
    "inkling",
    "kosmos",
    "llava",
    "minicpm",
    "molmo",
    "no_image",
    "patch_rows",
    "pixtral",
    "queries",
    "qwen",
    "thumbnails",
    "tiles",
    "views",
]

"""Fonts that between them have a sign for what models say."""

from __future__ import annotations

from functools import cache
from typing import Final

WIDER: Final = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "PingFang SC", "Hiragino Sans",
    "Microsoft YaHei", "WenQuanYi Zen Hei", "Arial Unicode MS", "Noto Sans",
)  # fmt: skip
"""Asked for what the usual font lacks, if they are installed."""


@cache
def families() -> list[str]:
    """Font families in the order in which a sign is looked for."""
    from matplotlib.font_manager import get_font_names

    installed = set(get_font_names())
    return ["sans-serif", *(name for name in WIDER if name in installed)]


def drawable(text: str) -> str:
    r"""Text of which every sign can be drawn: others stand by their number, as `\u66f8`."""
    known = _signs()
    return "".join(
        sign if ord(sign) in known else sign.encode("unicode-escape").decode() for sign in text
    )


@cache
def _signs() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    found: set[int] = set()
    for family in families():
        found |= set(get_font(findfont(FontProperties(family=[family]))).get_charmap())
    return frozenset(found)

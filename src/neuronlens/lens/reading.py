"""What the lens shows of some tokens: the likeliest words at every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int

from neuronlens.errors import UnknownNameError
from neuronlens.lens.words import visible
from neuronlens.samples import Sample
from neuronlens.show import Html, escaped
from neuronlens.tokens import Role, TokenMap

SHOWN = 40
"""Tokens that a notebook shows side by side."""

_CELL = "padding:2px 8px;border:1px solid #8882;text-align:center;white-space:pre"
_HEAD = "padding:2px 8px;text-align:right;font-weight:600;white-space:pre"


@dataclass(frozen=True, eq=False)
class LensReading:
    """The likeliest words of chosen tokens at chosen layers; shows itself in a notebook.

    Layer 0 is the embeddings, layer l the output of the l-th decoder layer.

    Attributes:
        layers: Which layers.
        ids: Numbers of the k likeliest words, the likeliest first.
        probabilities: Theirs.
        entropy: Of the whole distribution, in nats, from 0 to ln(`words`). NaN where the
            model's states are not finite.
        tokens: What each token is; its `sample` is the number within the batch, its `pieces`
            the text if there is a tokenizer.
        positions: Of each token within its sample, padding not counted.
        texts: Readable text of every word in `ids`.
        words: Size of the vocabulary.
        samples: What was read; empty if bare inputs were.

    Source: P2, section 3.3, eq. (10), and Figure 6.
    """

    layers: tuple[int, ...]
    ids: Int[np.ndarray, "layer token k"]
    probabilities: Float[np.ndarray, "layer token k"]
    entropy: Float[np.ndarray, "layer token"]
    tokens: TokenMap
    positions: Int[np.ndarray, " token"]
    texts: Mapping[int, str]
    words: int
    samples: tuple[Sample, ...] = ()

    def __len__(self) -> int:
        return len(self.positions)

    def __repr__(self) -> str:
        return (
            f"LensReading({len(self)} tokens, {len(self.layers)} layers, "
            f"{self.ids.shape[2]} of {self.words:,} words)"
        )

    def candidates(self, layer: int, token: int) -> list[tuple[str, float]]:
        """Text and probability of the likeliest words.

        Args:
            layer: The layer's number, as in `layers`.
            token: Number of the token among those that were read.

        Raises:
            UnknownNameError: If the layer or the token was not read.
        """
        if layer not in self.layers:
            raise UnknownNameError("layer in this reading", layer, self.layers)
        if not -len(self) <= token < len(self):
            raise UnknownNameError(
                "token in this reading", token, [f"0 to {len(self) - 1}"] if len(self) else []
            )
        row = self.layers.index(layer)
        return [
            (self.texts[int(word)], float(p))
            for word, p in zip(self.ids[row, token], self.probabilities[row, token], strict=True)
        ]

    def of(self, sample: int) -> LensReading:
        """The tokens of one sample of the batch.

        Raises:
            UnknownNameError: If no token of that sample was read.
        """
        mine = self.tokens.sample == sample
        if not bool(mine.any()):
            known = sorted(set(self.tokens.sample.tolist()))
            raise UnknownNameError("sample in this reading", sample, known)
        at = mine.numpy()
        pieces = self.tokens.pieces
        return replace(
            self,
            ids=self.ids[:, at],
            probabilities=self.probabilities[:, at],
            entropy=self.entropy[:, at],
            positions=self.positions[at],
            tokens=TokenMap(
                role=self.tokens.role[mine],
                sample=torch.zeros_like(self.tokens.sample[mine]),
                image=self.tokens.image[mine],
                box=self.tokens.box[mine],
                pieces=None
                if pieces is None
                else tuple(p for p, keep in zip(pieces, at.tolist(), strict=True) if keep),
            ),
            samples=self.samples[sample : sample + 1],
        )

    def label(self, token: int) -> str:
        """What a token is, in words: its position, its role, its text."""
        role = Role(int(self.tokens.role[token])).name.lower()
        text = f"{int(self.positions[token])} {role}"
        pieces = self.tokens.pieces
        return text if pieces is None or not pieces[token] else f"{text} {visible(pieces[token])}"

    def _repr_html_(self) -> Html:
        """One token: candidates by layer (P2, Figure 6). Several: the likeliest word of each."""
        if len(self) == 0:
            return Html("<div>no tokens were read</div>")
        if len(self) == 1:
            columns = [str(rank + 1) for rank in range(self.ids.shape[2])]
            ids, probabilities = self.ids[:, 0], self.probabilities[:, 0]
            title = f"token {self.label(0)}"
            title += f" of {self.samples[0].id}" if len(self.samples) == 1 else ""
        else:
            shown = min(len(self), SHOWN)
            columns = [self.label(token) for token in range(shown)]
            ids, probabilities = self.ids[:, :shown, 0], self.probabilities[:, :shown, 0]
            title = f"the likeliest word at {shown} of {len(self)} tokens"
        head = "".join(f'<th style="{_HEAD}">{escaped(c)}</th>' for c in ("layer", *columns))
        body = ""
        for row in reversed(range(len(self.layers))):
            number = self.layers[row]
            cells = "".join(
                self._cell(int(word), float(p))
                for word, p in zip(ids[row], probabilities[row], strict=True)
            )
            name = "embeddings" if number == 0 else str(number)
            body += f'<tr><th style="{_HEAD}">{name}</th>{cells}</tr>'
        return Html(
            '<div style="font-family:system-ui,sans-serif;font-size:12px;overflow-x:auto">'
            f'<div style="font-weight:600;margin:4px 0">{escaped(title)}</div>'
            f'<table style="border-collapse:collapse"><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )

    def _cell(self, word: int, probability: float) -> str:
        """From white to blue with the probability."""
        ink = ";color:#fff" if probability > 0.55 else ""
        return (
            f'<td style="{_CELL};background:rgba(31,85,186,{probability:.3f}){ink}" '
            f'title="{probability:.4f}">{escaped(visible(self.texts[word]))} '
            f'<span style="font-size:85%;opacity:0.7">{probability:.2f}</span></td>'
        )

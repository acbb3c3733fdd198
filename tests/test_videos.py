"""Frames of a video as images in time: roles, numbers and shapes, by changing pixels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import neuronlens as nl
from zoo import Entry, entries

ZOO = entries()


def merge_block(entry: Entry, model: Any) -> dict[str, Any]:
    """A video of two temporal patches, as Qwen's processors give it."""
    still = entry.inputs(model, entry.images())
    grid = still["image_grid_thw"][:1].clone()
    grid[0, 0] = 2
    patches, config = int(grid.prod()) // 2, model.config
    tokens = patches // 4
    ends = (config.vision_start_token_id, config.vision_end_token_id)
    frame = [ends[0], *[config.video_token_id] * tokens, ends[1]]
    if entry.name == "qwen3_vl":
        ids = torch.tensor([[1, *([7, *frame] * 2), 8, 9]])  # each frame between a time and marks
    else:
        ids = torch.tensor([[1, ends[0], *[config.video_token_id] * 2 * tokens, ends[1], 8, 9]])
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2 * patches, still["pixel_values"].shape[1], generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": 2 * (ids == config.video_token_id).long(),
        "pixel_values_videos": pixels,
        "video_grid_thw": grid,
    }


def frames(entry: Entry, model: Any) -> dict[str, Any]:
    """Three frames, as LLaVA's video processors give them."""
    config, count = model.config, 3
    side = config.vision_config.image_size
    patches = side // config.vision_config.patch_size
    if entry.name == "llava_onevision":
        tokens = count * math.ceil(patches / 2) ** 2 + 1
    else:
        tokens = count * (patches // config.spatial_pool_stride) ** 2
    ids = torch.tensor([[1, *[config.video_token_id] * tokens, 8, 9]])
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": torch.randn(1, count, 3, side, side, generator=generator),
    }


def first_input(entry: Entry, model: Any, inputs: dict[str, Any]) -> Tensor:
    kept: list[Tensor] = []
    handle = model.get_submodule(entry.first).register_forward_pre_hook(
        lambda _m, args, kwargs: kept.append(
            (args[0] if args else kwargs["hidden_states"]).clone()
        ),
        with_kwargs=True,
    )
    model(**inputs)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize(
    ("name", "build", "count"),
    [
        ("qwen2_5_vl", merge_block, 2),
        ("qwen3_vl", merge_block, 2),
        ("qwen2_vl", merge_block, 2),
        ("llava_onevision", frames, 3),
        ("llava_next_video", frames, 3),
    ],
)
@torch.no_grad()
def test_each_frame_is_an_image_of_its_own(name: str, build: Any, count: int) -> None:
    entry = ZOO[name]
    model = entry.model()
    vlm = nl.adapt(model)
    inputs = build(entry, model)
    language = vlm.tokens(inputs)["language"]
    visual = language.role == nl.Role.VISUAL
    pixels = inputs["pixel_values_videos"]
    plain = first_input(entry, model, inputs)
    moved = first_input(entry, model, inputs | {"pixel_values_videos": pixels.flip(-1)}) != plain
    assert torch.equal(moved.any(-1), visual)
    assert set(language.image[visual].tolist()) == set(range(count))
    # Frames are encoded one by one (a temporal patch is one): changing one moves its tokens only.
    for frame in range(count):
        other = pixels.clone()
        if pixels.ndim == 2:
            part = len(pixels) // count
            other[frame * part : (frame + 1) * part] *= -1
        else:
            other[:, frame] *= -1
        moved = first_input(entry, model, inputs | {"pixel_values_videos": other}) != plain
        assert torch.equal(moved.any(-1), visual & (language.image == frame))
    with nl.ActivationRecorder(vlm, None) as recorder:
        model(**inputs)
    for site, out in recorder.activations.items():
        axes = recorder.tokens[vlm.sites[site].stream].role.shape
        assert out.shape[: len(axes)] == axes

"""Detectors and segmenters of the real architectures, tiny and random: plumbing, not quality."""

from __future__ import annotations

import string
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
from PIL import Image

import neuronlens as nl
from neuronlens import segment

SIDE = 128
"""Side in pixels of what SAM 2 sees."""


def bert_tokenizer():
    """Letters as word pieces; the marks at which Grounding DINO looks for them."""
    from transformers import BertTokenizerFast

    vocabulary = ["[PAD]", *(f"[unused{i}]" for i in range(1, 100)), "[UNK]", "[CLS]", "[SEP]"]
    vocabulary += ["[MASK]"]
    for mark, place in ((".", 1012), ("?", 1029)):
        vocabulary += [f"[u{i}]" for i in range(len(vocabulary), place)] + [mark]
    vocabulary += [*string.ascii_lowercase, *(f"##{each}" for each in string.ascii_lowercase)]
    return BertTokenizerFast(
        vocab={word: i for i, word in enumerate(vocabulary)}, do_lower_case=True
    )


def grounding_dino(seed: int = 0):
    """Model and processor; scores differ between boxes and between phrases."""
    from transformers import (
        BertConfig,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessorPil,
        GroundingDinoProcessor,
        SwinConfig,
    )

    tokenizer = bert_tokenizer()
    sizes = GroundingDinoImageProcessorPil(size={"shortest_edge": 80, "longest_edge": 160})
    torch.manual_seed(seed)
    model = GroundingDinoForObjectDetection(
        GroundingDinoConfig(
            d_model=32,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            num_queries=12,
            disable_custom_kernels=True,
            max_text_len=24,
            backbone_config=SwinConfig(
                embed_dim=8,
                depths=[1] * 4,
                num_heads=[1, 2, 2, 4],
                window_size=4,
                image_size=64,
                out_indices=[2, 3, 4],
            ),
            text_config=BertConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=4,
                intermediate_size=64,
                initializer_range=0.3,
            ),
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # As initialised, every score is 1 and every box a twentieth of the image.
            if name.startswith("model.decoder.layer_norm"):
                parameter.mul_(0.15)
            elif "bbox_embed" in name:
                parameter.normal_(0, 0.2)
    return model.eval(), GroundingDinoProcessor(image_processor=sizes, tokenizer=tokenizer)


def sam2(seed: int = 0):
    """Model and processor of transformers."""
    from transformers import (
        Sam2Config,
        Sam2HieraDetConfig,
        Sam2ImageProcessor,
        Sam2MaskDecoderConfig,
        Sam2Model,
        Sam2Processor,
        Sam2PromptEncoderConfig,
        Sam2VisionConfig,
    )

    torch.manual_seed(seed)
    backbone = Sam2HieraDetConfig(
        hidden_size=8,
        image_size=[SIDE, SIDE],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 2, 4, 8],
        window_size_per_stage=[8, 4, 4, 2],
        global_attention_blocks=[3],
    )
    model = Sam2Model(
        Sam2Config(
            vision_config=Sam2VisionConfig(
                backbone_config=backbone,
                backbone_channel_list=[64, 32, 16, 8],
                backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
                fpn_hidden_size=32,
            ),
            prompt_encoder_config=Sam2PromptEncoderConfig(
                hidden_size=32, image_size=SIDE, patch_size=16
            ),
            mask_decoder_config=Sam2MaskDecoderConfig(
                hidden_size=32, mlp_dim=64, num_attention_heads=4, iou_head_hidden_dim=32
            ),
        )
    )
    images = Sam2ImageProcessor(
        size={"height": SIDE, "width": SIDE}, mask_size={"height": SIDE // 4, "width": SIDE // 4}
    )
    return model.eval(), Sam2Processor(image_processor=images)


def sam2_predictor(seed: int = 0):
    """The authors' predictor around a small model of theirs."""
    from sam2.build_sam import build_sam2
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    torch.manual_seed(seed)
    model = build_sam2(
        "configs/sam2.1/sam2.1_hiera_t.yaml",
        None,
        device="cpu",
        hydra_overrides_extra=[
            f"++model.image_size={SIDE}",
            "++model.image_encoder.trunk.embed_dim=16",
            "++model.image_encoder.trunk.stages=[1,1,2,1]",
            "++model.image_encoder.trunk.global_att_blocks=[3]",
            "++model.image_encoder.neck.backbone_channel_list=[128,64,32,16]",
            "++model.memory_attention.num_layers=1",
        ],
    )
    with warnings.catch_warnings():
        # It scripts its transforms, which new versions of torch announce the end of.
        warnings.filterwarnings("ignore", "`torch.jit.script`", FutureWarning)
        predictor = SAM2ImagePredictor(model)
    predictor._bb_feat_sizes = [(SIDE // 4,) * 2, (SIDE // 8,) * 2, (SIDE // 16,) * 2]
    return predictor


def clip_tokenizer():
    """Bytes, with a begin and an end, as SAM 3's text encoder wants them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {each: i for i, each in enumerate([*letters, "<begin>", "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<begin> $A <end>",
        special_tokens=[("<begin>", vocabulary["<begin>"]), ("<end>", vocabulary["<end>"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<begin>", eos_token="<end>", pad_token="<end>"
    )


def sam3(seed: int = 0):
    """Model and processor of transformers."""
    from transformers import (
        CLIPTextConfig,
        Sam3Config,
        Sam3DETRDecoderConfig,
        Sam3DETREncoderConfig,
        Sam3GeometryEncoderConfig,
        Sam3ImageProcessor,
        Sam3MaskDecoderConfig,
        Sam3Model,
        Sam3Processor,
        Sam3VisionConfig,
        Sam3ViTConfig,
    )

    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    size = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    model = Sam3Model(
        Sam3Config(
            vision_config=Sam3VisionConfig(
                backbone_config=Sam3ViTConfig(
                    **size,
                    num_hidden_layers=2,
                    image_size=112,
                    patch_size=14,
                    window_size=4,
                    global_attn_indexes=[1],
                    pretrain_image_size=56,
                ),
                fpn_hidden_size=32,
                backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
            ),
            text_config=CLIPTextConfig(
                **size,
                vocab_size=len(tokenizer),
                num_hidden_layers=1,
                max_position_embeddings=32,
                projection_dim=32,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            ),
            geometry_encoder_config=Sam3GeometryEncoderConfig(**size, num_layers=1),
            detr_encoder_config=Sam3DETREncoderConfig(**size, num_layers=1),
            detr_decoder_config=Sam3DETRDecoderConfig(**size, num_layers=1, num_queries=8),
            mask_decoder_config=Sam3MaskDecoderConfig(hidden_size=32, num_attention_heads=4),
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # As initialised, every score is a quarter.
            if name.startswith("dot_product_scoring"):
                parameter.mul_(5)
            elif "presence_head" in name and parameter.ndim == 1:
                parameter.add_(0.5)
    images = Sam3ImageProcessor(size={"height": 112, "width": 112})
    return model.eval(), Sam3Processor(image_processor=images, tokenizer=tokenizer)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coarse random colours, so that regions differ."""
    cells = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


def sample(*pictures: Image.Image) -> nl.Sample:
    return nl.Sample("s", pictures, "p")


@contextmanager
def forwards(module: torch.nn.Module) -> Iterator[list[int]]:
    """The batch size of each forward of the module within the block."""
    seen: list[int] = []

    def count(module, given, named, out):
        seen.append(len((given or tuple(named.values()))[0]))

    handle = module.register_forward_hook(count, with_kwargs=True)
    yield seen
    handle.remove()


def grounded(threshold: float, seed: int = 0, **more) -> segment.GroundedSegmenter:
    return segment.GroundedSegmenter(
        segment.GroundingDino(*grounding_dino(seed), threshold=threshold, **more),
        segment.Sam2(*sam2(seed)),
    )


def scores(dino, image: Image.Image, phrase: str) -> list[float]:
    """How sure the detector is of each of its boxes for a phrase, falling."""
    model, processor = dino
    inputs = processor(images=image, text=[[phrase]], return_tensors="pt")
    with torch.no_grad():
        found = model(**inputs).logits.amax(-1).sigmoid()[0]
    return sorted(found.tolist(), reverse=True)


def telling(dino, image: Image.Image, phrases) -> float:
    """A threshold that some of the phrases pass and some do not, whatever the random weights."""
    best = sorted(scores(dino, image, phrase)[0] for phrase in phrases)
    return max((upper - lower, (upper + lower) / 2) for lower, upper in pairwise(best))[1]

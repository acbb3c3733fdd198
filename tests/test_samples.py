"""Samples: read in order, opened upright, and encoded with the role of every token."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

import neuronlens as nl
from neuronlens import testbed
from neuronlens.errors import AdapterError, DataError, SampleError
from neuronlens.samples import image_digest, prepare
from neuronlens.tokens import Role

SPECIAL, PROMPT, RESPONSE, VISUAL, PAD = (
    Role.SPECIAL,
    Role.PROMPT,
    Role.RESPONSE,
    Role.VISUAL,
    Role.PAD,
)


def write_jsonl(path: Path, *rows: dict | str) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def conversation(*said: str, **more) -> dict:
    speakers = ["human", "gpt"] * len(said)
    return {
        "conversations": [{"from": s, "value": v} for s, v in zip(speakers, said, strict=False)]
    } | more


# Reading JSONL.


def test_lines_become_samples_in_order_with_their_fields(tmp_path):
    path = write_jsonl(
        tmp_path / "data.jsonl",
        {"id": "b", "image": "b.png", "prompt": "What?", "response": "This.", "domain": "medical"},
        {"id": 7, "image": ["x/1.png", "x/2.png"], "prompt": "Compare.", "unheard": "of"},
        "",
        {"prompt": "Só?", "image": "c.png"},
    )
    read = nl.read_samples(path)
    assert [s.id for s in read] == ["b", "7", "3"]  # the last from its line's number, from 0
    assert [s.prompt for s in read] == ["What?", "Compare.", "Só?"]
    assert [s.response for s in read] == ["This.", None, None]
    assert [s.domain for s in read] == ["medical", None, None]
    assert [s.images for s in read] == [
        (tmp_path / "b.png",),
        (tmp_path / "x/1.png", tmp_path / "x/2.png"),
        (tmp_path / "c.png",),
    ]


def test_paths_are_relative_to_the_file_or_to_the_folder_of_images_never_to_here(
    tmp_path, monkeypatch
):
    path = write_jsonl(tmp_path / "data.jsonl", {"image": "a/b.png", "prompt": "?"})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert nl.read_samples(path)[0].images == (tmp_path / "a/b.png",)
    assert nl.read_samples("../data.jsonl")[0].images == (tmp_path / "a/b.png",)
    assert nl.read_samples(str(path), images="pictures")[0].images == (
        tmp_path / "elsewhere/pictures/a/b.png",
    )
    absolute = write_jsonl(tmp_path / "absolute.jsonl", {"image": "/data/b.png", "prompt": "?"})
    assert nl.read_samples(absolute, images=tmp_path)[0].images == (Path("/data/b.png"),)


def test_images_need_not_exist_to_be_read_about(tmp_path):
    path = write_jsonl(
        tmp_path / "data.jsonl", {"image": "nowhere.png", "prompt": "?"}, {"prompt": "?"}
    )
    assert [len(s.images) for s in nl.read_samples(path)] == [1, 0]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "?", "image"', "Invalid JSON"),
        ('{"image": "a.png"}', "prompt: Field required"),
        ('{"prompt": 3}', "prompt: .*string"),
        ('["prompt"]', "the line: "),
        ('{"prompt": "?", "annotations": [{"labels": "m.png"}]}', r"annotations\.0\.names"),
        (
            '{"prompt": "?", "annotations": [{"labels": "m.png", "names": {}, "imag": 1}]}',
            r"annotations\.0\.imag: Extra",
        ),
    ],
)
def test_a_bad_line_is_named_by_its_number_and_field(tmp_path, line, said):
    path = write_jsonl(tmp_path / "data.jsonl", {"prompt": "fine"}, "", line)
    with pytest.raises(DataError, match=rf"data\.jsonl, line 3: .*{said}"):
        nl.read_samples(path)


def test_an_id_that_occurs_twice_is_an_error_even_if_one_is_only_a_line_number(tmp_path):
    given = write_jsonl(
        tmp_path / "a.jsonl", {"id": "x", "prompt": "1"}, {"id": "x", "prompt": "2"}
    )
    with pytest.raises(DataError, match="two samples with the id 'x'"):
        nl.read_samples(given)
    counted = write_jsonl(tmp_path / "b.jsonl", {"id": 1, "prompt": "1"}, {"prompt": "2"})
    with pytest.raises(DataError, match="two samples with the id '1'"):
        nl.read_samples(counted)


def test_a_file_of_another_kind_or_without_samples_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"data\.csv is neither \.jsonl"):
        nl.read_samples(write_jsonl(tmp_path / "data.csv", {"prompt": "?"}))
    with pytest.raises(DataError, match="holds no sample"):
        nl.read_samples(write_jsonl(tmp_path / "data.jsonl", "", " "))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        nl.read_samples(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_a_file_that_is_not_utf_8_is_a_data_error_that_names_it(tmp_path, name):
    (tmp_path / name).write_bytes('{"prompt": "Só?"}'.encode("latin-1"))
    with pytest.raises(DataError, match=name):
        nl.read_samples(tmp_path / name)


# Reading LLaVA's conversations.


def test_conversations_become_samples_in_order_without_image_tokens(tmp_path):
    records = [
        conversation("<image>\nWhat is this?", " A cat. ", id="0042", image="coco/42.jpg"),
        conversation("Describe it.\n<image>", "A dog.", image="43.jpg"),
        conversation("No image here.", "None.", id=9),
    ]
    path = tmp_path / "llava.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    read = nl.read_samples(path, images=tmp_path / "images")
    assert [s.id for s in read] == ["0042", "1", "9"]
    assert [s.prompt for s in read] == ["What is this?", "Describe it.", "No image here."]
    assert [s.response for s in read] == ["A cat.", "A dog.", "None."]
    assert [s.images for s in read] == [
        (tmp_path / "images/coco/42.jpg",),
        (tmp_path / "images/43.jpg",),
        (),
    ]


def test_of_a_longer_conversation_the_first_exchange_is_read_with_a_warning_that_counts(tmp_path):
    path = tmp_path / "llava.json"
    path.write_text(
        json.dumps(
            [
                conversation("<image>\nFirst?", "One.", "Second?", "Two.", id="a"),
                conversation("Only?", "Yes.", id="b"),
            ]
        )
    )
    with pytest.warns(UserWarning, match=r"1 of 2 conversations in .*llava\.json") as warned:
        read = nl.read_samples(path)
    assert [(s.prompt, s.response) for s in read] == [("First?", "One."), ("Only?", "Yes.")]
    assert [w.filename for w in warned] == [__file__]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ('{"conversations": []}', "should hold a list of records, not dict"),
        ('[{"image": "a.jpg"}]', "record 0: conversations: Field required"),
        (
            json.dumps(
                [conversation("a", "b"), {"conversations": [{"from": "gpt", "value": "b"}]}]
            ),
            r"record 1 begins with \['gpt'\]",
        ),
        (json.dumps([conversation("only asked")]), r"record 0 begins with \['human'\], not"),
        (json.dumps([conversation("a", "b", id=1), conversation("a", "b", id="1")]), "two samples"),
        ("[]", "holds no sample"),
    ],
)
def test_a_file_that_holds_no_conversations_says_where_it_departs(tmp_path, content, said):
    path = tmp_path / "llava.json"
    path.write_text(content)
    with pytest.raises(DataError, match=said):
        nl.read_samples(path)


# Annotations, and the testbed's files.


def test_what_the_testbed_writes_is_read_back_as_what_it_draws(tmp_path):
    written = nl.read_samples(testbed.write(tmp_path / "scenes", 4, seed=3))
    drawn = testbed.scenes(4, seed=3)
    for a, b in zip(written, drawn, strict=True):
        assert (a.id, a.prompt, a.response, a.domain) == (b.id, b.prompt, b.response, b.domain)
        np.testing.assert_array_equal(np.asarray(a.open_images()[0]), np.asarray(b.images[0]))
        assert a.concepts() == b.concepts()
        assert a.concepts() == {name for each in b.annotations for name in each.names}
        for one, other in zip(a.annotations, b.annotations, strict=True):
            assert one.names == other.names
            np.testing.assert_array_equal(one.mask(), other.mask())


def test_a_mask_is_true_where_the_label_map_has_the_regions_number_and_nowhere_else(tmp_path):
    labels = np.array([[0, 1, 2], [3, 2, 255]], np.uint8)
    Image.fromarray(labels).save(tmp_path / "labels.png")
    for source in (labels, tmp_path / "labels.png"):
        mask = nl.Annotation(("cat",), source, 2).mask()
        assert mask.tolist() == [[False, False, True], [False, True, False]]
        assert mask.dtype == np.bool_


def test_an_annotation_in_a_file_names_its_regions_and_its_image(tmp_path):
    path = write_jsonl(
        tmp_path / "data.jsonl",
        {
            "prompt": "?",
            "annotations": [
                {"labels": "m/0.png", "names": {"1": ["cat", "black"], "7": ["dog"]}},
                {"labels": "m/1.png", "names": {"0": ["sky"]}, "image": 1},
            ],
        },
    )
    read = [(a.names, a.labels, a.number, a.image) for a in nl.read_samples(path)[0].annotations]
    assert read == [
        (("cat", "black"), tmp_path / "m/0.png", 1, 0),
        (("dog",), tmp_path / "m/0.png", 7, 0),
        (("sky",), tmp_path / "m/1.png", 0, 1),
    ]


def test_a_label_map_in_colour_has_the_numbers_of_cocos_panoptic_maps(tmp_path):
    colours = np.array([[[1, 0, 0], [0, 1, 0], [0, 0, 1], [255, 255, 255]]], np.uint8)
    Image.fromarray(colours).save(tmp_path / "colours.png")
    for place, number in enumerate((1, 256, 65_536, 2**24 - 1)):
        mask = nl.Annotation(("cat",), tmp_path / "colours.png", number).mask()
        assert mask.tolist() == [[each == place for each in range(4)]]


def test_a_label_map_with_other_than_one_or_three_values_per_pixel_is_refused(tmp_path):
    for mode in ("RGBA", "LA"):
        Image.new(mode, (3, 3)).save(tmp_path / f"{mode}.png")
        with pytest.raises(DataError, match=rf"{mode}\.png has {len(mode)} values per pixel"):
            nl.Annotation(("cat",), tmp_path / f"{mode}.png").mask()


def test_an_outline_in_a_file_is_a_named_region(tmp_path):
    runs = {"size": [2, 3], "image": 1, "names": ["dog"]}
    path = write_jsonl(
        tmp_path / "data.jsonl",
        {
            "prompt": "?",
            "annotations": [{"labels": "m.png", "names": {"1": ["sky"]}}],
            "regions": [
                {"names": ["cat", "black"], "size": [4, 4], "polygons": [[0, 0, 2, 0, 2, 4, 0, 4]]},
                runs | {"counts": [1, 2, 3]},
                runs | {"counts": "123"},
            ],
        },
    )
    sky, cat, *dogs = nl.read_samples(path)[0].annotations
    assert (sky.names, cat.names, cat.image) == (("sky",), ("cat", "black"), 0)
    assert cat.mask().tolist() == [[True, True, False, False]] * 4
    for dog in dogs:
        assert (dog.names, dog.image) == (("dog",), 1)
        assert dog.mask().tolist() == [[False, True, False], [True, False, False]]


@pytest.mark.parametrize(
    ("region", "said"),
    [
        ({"counts": [1, 2]}, "cover 3 pixels of an image of 2 x 3"),
        ({"counts": "~"}, "no COCO text"),
        ({"polygons": [[1, 2, 3]]}, "no even number"),
        ({}, "either polygons or counts"),
        ({"polygon": [[1, 2]]}, r"regions\.0\.polygon: Extra"),
        ({"polygons": [1, 2]}, r"regions\.0\.polygons\.0"),
    ],
)
def test_a_region_in_a_file_that_cannot_be_is_named_by_its_line(tmp_path, region, said):
    row = {"prompt": "?", "regions": [{"names": ["cat"], "size": [2, 3]} | region]}
    with pytest.raises(DataError, match=rf"data\.jsonl, line 1: .*{said}"):
        nl.read_samples(write_jsonl(tmp_path / "data.jsonl", row))


def test_a_label_map_that_cannot_be_read_is_a_data_error_that_names_it(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    for name in ("broken.png", "absent.png"):
        with pytest.raises(DataError, match=name):
            nl.Annotation(("cat",), tmp_path / name).mask()


# Images.


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.ascontiguousarray(skimage.data.chelsea()[100:140, 100:160])


UPRIGHT = {  # what is done to the stored pixels, by EXIF orientation
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_images_are_turned_upright_as_their_exif_data_say(tmp_path, photo, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(photo).save(tmp_path / "turned.png", exif=exif)
    (opened,) = nl.Sample("a", (tmp_path / "turned.png",), "?").open_images()
    np.testing.assert_array_equal(np.asarray(opened), UPRIGHT[orientation](photo))


def test_a_picture_in_memory_is_turned_upright_as_its_file_would_be(tmp_path, photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as picture:
        (opened,) = nl.Sample("a", (picture,), "?").open_images()
    np.testing.assert_array_equal(np.asarray(opened), UPRIGHT[6](photo))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "I;16"])
def test_images_of_any_mode_are_opened_as_rgb(tmp_path, photo, mode):
    grey = Image.fromarray(photo).convert("L")
    picture = (
        Image.fromarray(photo).convert(mode)
        if mode != "I;16"
        else Image.fromarray(np.asarray(grey).astype(np.uint16))
    )
    picture.save(tmp_path / "picture.tif")
    for source in (picture, tmp_path / "picture.tif"):
        (opened,) = nl.Sample("a", (source,), "?").open_images()
        assert (opened.mode, opened.size) == ("RGB", (60, 40))


def broken_images(folder: Path, photo: np.ndarray) -> dict[str, Path]:
    paths = {name: folder / f"{name}.jpg" for name in ("text", "empty", "cut", "folder")}
    paths["text"].write_text("<html>404</html>")
    paths["empty"].write_bytes(b"")
    Image.fromarray(photo).save(paths["cut"])
    paths["cut"].write_bytes(paths["cut"].read_bytes()[:-200])
    paths["folder"].mkdir()
    return paths


def test_images_that_cannot_be_used_are_sample_errors_with_a_reason_to_count(tmp_path, photo):
    for path in broken_images(tmp_path, photo).values():
        with pytest.raises(SampleError, match=f"'s1', corrupt image: .*{path.stem}") as raised:
            nl.Sample("s1", (path,), "?").open_images()
        assert (raised.value.sample_id, raised.value.reason) == ("s1", "corrupt image")
    with pytest.raises(SampleError, match=r"there is no file .*absent\.jpg") as raised:
        nl.Sample("s2", (tmp_path / "absent.jpg",), "?").open_images()
    assert (raised.value.sample_id, raised.value.reason) == ("s2", "missing image")
    with pytest.raises(SampleError, match="give at least one") as raised:
        nl.Sample("s3", (), "?").open_images()
    assert (raised.value.sample_id, raised.value.reason) == ("s3", "no image")


def test_a_digest_follows_pixels_and_bytes_and_not_names(tmp_path, photo):
    picture, other = Image.fromarray(photo), Image.fromarray(photo.transpose(1, 0, 2))
    assert image_digest(picture) == image_digest(Image.fromarray(photo.copy()))
    assert image_digest(picture) != image_digest(other)
    assert image_digest(Image.new("RGB", (60, 40))) != image_digest(Image.new("RGB", (40, 60)))
    for name in ("a.png", "b.png"):
        picture.save(tmp_path / name)
    assert image_digest(tmp_path / "a.png") == image_digest(tmp_path / "b.png")
    other.save(tmp_path / "b.png")
    assert image_digest(tmp_path / "a.png") != image_digest(tmp_path / "b.png")


# Encoding: roles.


def told(batch, sample: int = 0) -> list[tuple[str, Role]]:
    """Text and role of each token that is not an image's."""
    tokens = batch.map_of(sample)
    return [
        (piece.strip(), Role(role))
        for piece, role in zip(tokens.pieces, tokens.role.tolist(), strict=True)
        if role != VISUAL
    ]


@pytest.fixture
def scene() -> nl.Sample:
    return replace(
        testbed.scenes(1, seed=5)[0], prompt="what colour is the ring ?", response="red ."
    )


def test_every_token_of_one_sample_has_the_role_read_off_its_text(vlm, scene):
    assert told(nl.encode(vlm, [scene])) == [
        ("<bos>", SPECIAL),
        ("user:", SPECIAL),
        ("what", PROMPT),
        ("colour", PROMPT),
        ("is", PROMPT),
        ("the", PROMPT),
        ("ring", PROMPT),
        ("?", PROMPT),
        ("assistant:", SPECIAL),
        ("red", RESPONSE),
        (".", RESPONSE),
    ]
    tokens = nl.encode(vlm, [scene]).map_of(0)
    assert tokens.role.tolist()[2:66] == [VISUAL] * 64
    assert tokens.image.tolist() == [-1] * 2 + [0] * 64 + [-1] * 9


def test_without_a_template_there_are_no_markers(vlm, scene):
    batch = nl.encode(vlm, [scene], template=False)
    assert told(batch) == [
        *((word, PROMPT) for word in ("what", "colour", "is", "the", "ring", "?")),
        ("red", RESPONSE),
        (".", RESPONSE),
    ]


def test_without_a_response_the_text_ends_where_the_model_would_go_on(vlm, scene):
    asked = nl.encode(vlm, [replace(scene, response=None)])
    assert told(asked)[-2:] == [("?", PROMPT), ("assistant:", SPECIAL)]
    answered = nl.encode(vlm, [scene])
    n = asked.inputs["input_ids"].shape[1]
    assert torch.equal(answered.inputs["input_ids"][:, :n], asked.inputs["input_ids"])
    assert torch.equal(answered.tokens["language"].role[:, :n], asked.tokens["language"].role)


@pytest.mark.parametrize(
    "prompt",
    ["user: assistant:", "assistant:", "what ? what ?", "zebra stripes", "\u2603 \u2603", "the"],
)
def test_a_prompt_is_a_prompt_even_if_it_repeats_the_templates_words(vlm, scene, prompt):
    roles = [role for _, role in told(nl.encode(vlm, [replace(scene, prompt=prompt)]))]
    count = len(prompt.split())
    assert roles == [SPECIAL, SPECIAL, *[PROMPT] * count, SPECIAL, RESPONSE, RESPONSE]


def test_an_empty_prompt_has_no_token(vlm, scene):
    roles = [role for _, role in told(nl.encode(vlm, [replace(scene, prompt="")]))]
    assert roles == [SPECIAL, SPECIAL, SPECIAL, RESPONSE, RESPONSE]


@pytest.mark.parametrize("answer", ["red", "s", "eos", "e", ">", "assistant:", "a"])
def test_a_response_is_its_own_words_even_if_the_templates_markers_hold_them(vlm, scene, answer):
    batch = nl.encode(vlm, [replace(scene, response=answer)])
    assert [role for _, role in told(batch)][-2:] == [SPECIAL, RESPONSE]
    without = nl.encode(vlm, [replace(scene, response=None)])
    assert batch.inputs["input_ids"].shape[1] == without.inputs["input_ids"].shape[1] + 1


def test_space_around_a_response_changes_nothing(vlm, scene):
    plain, spaced = nl.encode(vlm, [scene]), nl.encode(vlm, [replace(scene, response="\n red . ")])
    assert torch.equal(plain.inputs["input_ids"], spaced.inputs["input_ids"])
    assert torch.equal(plain.tokens["language"].role, spaced.tokens["language"].role)


def test_a_special_token_the_user_wrote_is_special(vlm, scene):
    batch = nl.encode(vlm, [replace(scene, response="red <eos> blue")])
    assert told(batch)[-3:] == [("red", RESPONSE), ("<eos>", SPECIAL), ("blue", RESPONSE)]


# Encoding: batches.


def with_padding(vlm, side: str) -> nl.ModelAdapter:
    processor = copy.deepcopy(vlm.processor)
    processor.tokenizer.padding_side = side
    return nl.adapt(vlm.model, processor)


@pytest.fixture
def mixed(tmp_path) -> list[nl.Sample]:
    """Samples of different lengths, of images of different sizes, one with two of them."""
    cat = Image.fromarray(skimage.data.chelsea())
    cup = Image.fromarray(skimage.data.coffee())
    cat.save(tmp_path / "cat.png")
    scenes = testbed.scenes(2, seed=5)
    return [
        scenes[0],
        nl.Sample("cat", (tmp_path / "cat.png",), "describe the image .", "a cat ."),
        nl.Sample("both", (cup, scenes[1].images[0]), "what ?", "a red ring ."),
        replace(scenes[1], response=None),
    ]


def assert_same_map(one, other):
    for name in ("role", "image", "box"):
        torch.testing.assert_close(
            getattr(one, name), getattr(other, name), rtol=0, atol=0, equal_nan=True
        )
    assert one.pieces == other.pieces


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sample_in_a_batch_has_the_map_it_has_alone_whatever_the_padding(vlm, mixed, side):
    batch = nl.encode(with_padding(vlm, side), mixed)
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    assert (mask == 0).any()
    assert mask[:, 0 if side == "right" else -1].all()
    assert torch.equal(batch.tokens["language"].is_role(PAD), mask == 0)
    for number, sample in enumerate(mixed):
        alone = nl.encode(vlm, [sample])
        assert_same_map(batch.map_of(number), alone.map_of(0))
        for stream in ("vision", "projector"):
            assert_same_map(batch.map_of(number, stream), alone.map_of(0, stream))
        assert torch.equal(ids[number][mask[number] == 1], alone.inputs["input_ids"][0])


def test_boxes_lie_in_the_original_image_each_token_belongs_to(vlm, mixed):
    batch = nl.encode(vlm, mixed)
    sizes = [[(64, 64)], [(451, 300)], [(600, 400), (64, 64)], [(64, 64)]]
    crops = {
        (64, 64): (0, 0, 64, 64),
        (451, 300): (75, 0, 375, 300),
        (600, 400): (100, 0, 500, 400),
    }
    for stream in ("language", "projector"):
        for number, each in enumerate(sizes):
            tokens = batch.map_of(number, stream)
            for image, size in enumerate(each):
                boxes = tokens.box[tokens.image == image]
                assert len(boxes) == 64
                whole = torch.cat([boxes[:, :2].amin(0), boxes[:, 2:].amax(0)])
                torch.testing.assert_close(
                    whole,
                    torch.tensor(crops[size], dtype=torch.float32),
                    atol=0.6 * max(size) / 64,
                    rtol=0,
                )


def test_what_is_not_visual_has_no_box(vlm, mixed):
    for tokens in nl.encode(vlm, mixed).tokens.values():
        assert tokens.box[~tokens.is_role(VISUAL)].isnan().all()
        assert not tokens.box[tokens.is_role(VISUAL)].isnan().any()


def test_encoding_leaves_the_processor_as_it_was(vlm, scene):
    before = (
        vlm.processor.to_dict(),
        vlm.processor.tokenizer.padding_side,
        len(vlm.processor.tokenizer),
    )
    nl.encode(vlm, [scene])
    assert (
        vlm.processor.to_dict(),
        vlm.processor.tokenizer.padding_side,
        len(vlm.processor.tokenizer),
    ) == before


def test_an_encoded_batch_is_what_the_model_takes(vlm, mixed):
    batch = nl.encode(vlm, mixed)
    with torch.inference_mode():
        logits = vlm.model(**batch.inputs).logits
    assert logits.shape[:2] == batch.tokens["language"].role.shape
    assert batch.samples == tuple(mixed)


# Encoding: what cannot be used.


@pytest.mark.parametrize(
    ("change", "reason", "said"),
    [
        ({"images": ()}, "no image", "give at least one"),
        ({"images": (Path("/nowhere/cat.png"),)}, "missing image", "/nowhere/cat.png"),
        ({"response": None}, "no response", "text tokens"),
        ({"response": " \n"}, "no response", "text tokens"),
        ({"prompt": "what is <image> ?"}, "image token in text", "remove '<image>'"),
        ({"response": "it is <image> ."}, "image token in text", "remove '<image>'"),
        ({"response": "red " * 184}, "too long", "257 tokens; the model takes 256"),
    ],
)
def test_a_sample_that_cannot_be_used_is_named_with_its_reason(vlm, scene, change, reason, said):
    good = replace(scene, id="good")
    with pytest.raises(SampleError, match=rf"Sample 'bad', {reason}: .*{said}") as raised:
        nl.encode(vlm, [good, replace(scene, id="bad", **change)], response=True)
    assert (raised.value.sample_id, raised.value.reason) == ("bad", reason)


def test_a_sample_that_just_fits_the_model_is_used(vlm, scene):
    batch = nl.encode(vlm, [replace(scene, response="red " * 183)])
    assert batch.inputs["input_ids"].shape == (1, 256)


def test_a_corrupt_image_is_found_when_it_is_encoded(vlm, scene, tmp_path, photo):
    path = broken_images(tmp_path, photo)["cut"]
    with pytest.raises(SampleError) as raised:
        nl.encode(vlm, [replace(scene, images=(path,))])
    assert raised.value.reason == "corrupt image"


def with_template(vlm, change) -> nl.ModelAdapter:
    processor = copy.deepcopy(vlm.processor)
    processor.chat_template = change(processor.chat_template)
    return nl.adapt(vlm.model, processor)


def test_a_tokenizer_that_merges_prompt_and_response_leaves_no_response_start(vlm, scene):
    glued = with_template(
        vlm,
        lambda t: t.replace(
            "== 'text' %} {{", "== 'text' %}{{ ' ' if message['role'] == 'user' }}{{"
        ),
    )
    with pytest.raises(SampleError, match="Encode with template=False") as raised:
        nl.encode(glued, [scene])
    assert raised.value.reason == "no clear response start"
    assert "assistant:" in str(raised.value)


def test_without_processor_or_template_it_is_said_what_to_do_and_it_helps(vlm, scene):
    with pytest.raises(AdapterError, match=r"adapt\(model, processor\)"):
        nl.encode(nl.adapt(vlm.model), [scene])
    untold = with_template(vlm, lambda _: None)
    with pytest.raises(AdapterError, match="encode with template=False"):
        nl.encode(untold, [scene])
    assert told(nl.encode(untold, [scene], template=False))[-1] == (".", RESPONSE)


def test_a_template_that_changes_the_response_is_refused_and_the_advice_helps(vlm, scene):
    shouting = with_template(vlm, lambda t: t.replace("part['text'] }}", "part['text'] | upper }}"))
    with pytest.raises(AdapterError, match="template=False"):
        nl.encode(shouting, [scene])
    nl.encode(shouting, [scene], template=False)


@pytest.mark.parametrize("images", ["", " <image> <image>"], ids=["none", "two"])
def test_a_template_that_does_not_place_each_image_once_is_an_adapter_error(vlm, scene, images):
    with pytest.raises(AdapterError, match="image"):
        nl.encode(with_template(vlm, lambda t: t.replace(" <image>", images)), [scene])


def test_no_samples_are_an_error(vlm):
    with pytest.raises(ValueError, match="at least one"):
        nl.encode(vlm, [])


# A tokenizer as LLaVA 1.5 has one: words in parts, spaces inside of tokens, bytes for the rest.

WORDS = (
    "USER: What is shown in the image? ASSISTANT: Two cats sleep on a pink couch beside remotes. "
    "USER: How many cats are there? ASSISTANT: There are two."
)

# Of llava-hf/llava-1.5-7b-hf.
LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SPECIAL_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
}


def sentencepiece_like() -> LlamaTokenizer:
    learner = Tokenizer(BPE(byte_fallback=True, unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    in_bytes = [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=370,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>", *in_bytes],
        show_progress=False,
    )
    learner.train_from_iterator([WORDS] * 4, trainer)
    learned = json.loads(learner.to_str())["model"]
    return LlamaTokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        add_bos_token=True,
        additional_special_tokens=["<image>"],
        **SPECIAL_TOKENS,
    )


def byte_level() -> PreTrainedTokenizerFast:
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=370,
        special_tokens=list(SPECIAL_TOKENS.values()),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    learner.train_from_iterator([WORDS] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=learner, additional_special_tokens=["<image>"], **SPECIAL_TOKENS
    )


TOKENIZERS = {"sentencepiece": sentencepiece_like, "bytes": byte_level}


@pytest.fixture(scope="module", params=TOKENIZERS)
def llava(request) -> nl.ModelAdapter:
    """LLaVA 1.5's template and tokenizer in front of a small model of random weights."""
    tokenizer = TOKENIZERS[request.param]()
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                image_size=28, patch_size=14, projection_dim=16, **sizes
            ),
            text_config=LlamaConfig(vocab_size=len(tokenizer), **sizes),
            image_token_index=processor.image_token_id,
        )
    ).eval()
    assert sum(p.numel() for p in model.parameters()) < 100_000
    return nl.adapt(model, processor)


def spoken(photo, prompt, response) -> nl.Sample:
    return nl.Sample("spoken", (Image.fromarray(photo),), prompt, response)


def text_of(batch, *roles: Role) -> str:
    tokens = batch.map_of(0)
    return "".join(
        p for p, r in zip(tokens.pieces, tokens.role.tolist(), strict=True) if r in roles
    )


def test_llava_prompts_have_the_roles_of_their_words(llava, photo):
    batch = nl.encode(llava, [spoken(photo, "What is shown in the image?", "Two cats sleep.")])
    words = lambda *roles: text_of(batch, *roles).replace("<s>", "").split()  # noqa: E731
    assert words(PROMPT) == ["What", "is", "shown", "in", "the", "image?"]
    assert words(RESPONSE) == ["Two", "cats", "sleep."]
    assert words(SPECIAL) == ["USER:", "ASSISTANT:"]
    assert text_of(batch, RESPONSE) == " Two cats sleep."
    roles = batch.map_of(0).role
    assert roles.unique_consecutive().tolist() == [
        SPECIAL,
        VISUAL,
        SPECIAL,
        PROMPT,
        SPECIAL,
        RESPONSE,
    ]
    assert (roles == VISUAL).sum() == 4


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("What is shown in the image?", "Two cats sleep on a couch."),
        ("How  many?\nCount them:\t1, 2", "There are two (2) cats - not three! <3"),
        ("Wie heißt das Café?", "Das Café heißt »Zürich«."),
        ("这是什么?", "两只猫在睡觉。"),
        ("Emoji?", "A cat 🐈‍⬛ and a smile 🙂."),
        ("Is it so ?", "It is n't , I 'm sure : we do n't ."),
        ("What is written?", "Not readable: \ufffd\ufffd, then \ufffd"),
    ],
    ids=["plain", "spaces", "accents", "chinese", "emoji", "loose", "unreadable"],
)
def test_joined_pieces_are_the_text_that_was_tokenised(llava, photo, prompt, response):
    sample = spoken(photo, prompt, response)
    batch = nl.encode(llava, [sample])
    tokens = batch.map_of(0)
    assert len(tokens.pieces) == len(tokens)
    expected = prepare(llava, sample).text.replace("<image>", "")
    assert expected == f"USER: \n{prompt} ASSISTANT: {response}"
    joined = "".join(tokens.pieces).replace("<s>", "", 1)
    assert joined.removeprefix(" ") == expected  # sentencepiece puts a space before the text
    assert all(
        piece == ""
        for piece, role in zip(tokens.pieces, tokens.role, strict=True)
        if role == VISUAL
    )


def test_a_word_in_several_tokens_is_found_in_the_pieces(llava, photo):
    batch = nl.encode(llava, [spoken(photo, "What is shown?", "Two zebras sleep.")])
    tokens = batch.map_of(0)
    marks = tokens.words(["zebras"]) == 1
    assert marks.sum() >= 3
    spelled = "".join(p for p, m in zip(tokens.pieces, marks.tolist(), strict=True) if m)
    assert spelled.strip() == "zebras"


def test_the_space_a_prompt_ends_in_is_the_prompts(llava, photo):
    batch = nl.encode(llava, [spoken(photo, "How many?\n\n", "Two.")])
    assert text_of(batch, PROMPT) == "How many?\n\n"
    assert text_of(batch, RESPONSE) == " Two."


def test_a_sequence_begins_once_also_where_the_template_writes_its_beginning(llava, photo):
    processor = copy.deepcopy(llava.processor)
    processor.chat_template = "<s>" + processor.chat_template
    begun = nl.adapt(llava.model, processor)
    sample = spoken(photo, "How many?", "Two.")
    ids = nl.encode(begun, [sample]).inputs["input_ids"][0]
    assert (ids == processor.tokenizer.bos_token_id).sum() == 1
    assert ids[0] == processor.tokenizer.bos_token_id


@pytest.mark.parametrize("word", ["café", "猫"])
def test_a_word_in_bytes_is_found_in_the_pieces(llava, photo, word):
    batch = nl.encode(llava, [spoken(photo, "What is shown?", f"Two {word} sleep.")])
    assert (batch.map_of(0).words([word]) == 1).any()


def test_llava_batches_are_their_samples_one_by_one(llava, photo):
    samples = [
        spoken(photo, "What is shown in the image?", "Two cats."),
        spoken(photo.transpose(1, 0, 2), "How many?", "There are two cats, I think."),
    ]
    for side in ("left", "right"):
        batch = nl.encode(with_padding(llava, side), samples)
        for number, sample in enumerate(samples):
            assert_same_map(batch.map_of(number), nl.encode(llava, [sample]).map_of(0))


@pytest.fixture(scope="module")
def merging() -> nl.ModelAdapter:
    """Letters, and one merge that can cross the seam: ":" with "T"."""
    letters = {*"abcdefghijklmnopqrstuvwxyz", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ", *" :?.\n☃"}
    names = [*SPECIAL_TOKENS.values(), "<image>", *sorted(letters), ":T"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(
            BPE({name: n for n, name in enumerate(names)}, [(":", "T")], unk_token="<unk>")
        ),
        additional_special_tokens=["<image>"],
        **SPECIAL_TOKENS,
    )
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for message in messages %}{{ message['role'].upper() + ':' }}"
        "{% for part in message['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    )
    config = testbed.untrained().config
    config.text_config.vocab_size = len(tokenizer)
    config.image_token_id = processor.image_token_id
    return nl.adapt(LlavaForConditionalGeneration(config).eval(), processor)


def test_where_the_seam_is_merged_the_sample_is_refused_and_its_tokens_shown(merging, photo):
    with pytest.raises(SampleError, match=r"'T', ':'\].*':T'\]") as raised:
        nl.encode(merging, [spoken(photo, "What?", "Two.")])
    assert raised.value.reason == "no clear response start"
    fine = nl.encode(merging, [spoken(photo, "What?", "A cat.")])
    assert text_of(fine, RESPONSE).replace(" ", "") == "Acat."


def test_a_response_that_is_encoded_as_the_refusal_advises_is_accepted(merging, photo):
    sample = spoken(photo, "What?", "Two.")
    with pytest.raises(SampleError, match=r"template=False, or let the chat template put a space"):
        nl.encode(merging, [sample])
    nl.encode(merging, [sample], template=False)
    processor = copy.deepcopy(merging.processor)
    processor.chat_template = processor.chat_template.replace("+ ':' }}", "+ ': ' }}").replace(
        "'ASSISTANT:'", "'ASSISTANT: '"
    )
    batch = nl.encode(nl.adapt(merging.model, processor), [sample])
    assert text_of(batch, RESPONSE).replace(" ", "") == "Two."


def test_nothing_is_warned_of_where_nothing_is_wrong(vlm, scene, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nl.encode(vlm, nl.read_samples(testbed.write(tmp_path / "scenes", 1)))


def test_a_path_as_text_and_a_single_image_are_taken_for_what_they_mean(photo):
    assert nl.Sample("s", ("a.png",), "p").images == (Path("a.png"),)
    assert nl.Sample("s", Path("a.png"), "p").images == (Path("a.png"),)
    assert nl.Sample("s", [photo], "p").images == (photo,)

"""Questions: how they are put to a model, and the published layouts they are read from."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import neuronlens as nl
from neuronlens.errors import DataError, MissingExtraError, SampleError, UnknownNameError
from neuronlens.questions import DRIVING_ROLE, PROMPTS, Prompt, Question, as_prompt, read_questions
from neuronlens.samples import prepare
from neuronlens.tokens import Role

ROLE = (
    "Role: You are an advanced AI assistant installed on the Ego vehicle, equipped with "
    "conversational analysis capabilities for discussing autonomous driving scenarios. The "
    "perspective presented is from the point-of-view of the Ego vehicle, where the camera is "
    "mounted. It's important to note that the Ego vehicle itself is not visible in the images "
    "provided."
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: "
)


def picture(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), colour).save(path)
    return path


def as_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def opens(question: Question) -> list[tuple[int, int, int]]:
    """The colour of each image: it was found, and is the right one."""
    return [image.getpixel((3, 3)) for image in question.identification().open_images()]


RED, LIME, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


# A question.


def asks(**more) -> Question:
    return Question(**({"id": "q", "images": ("a.png",), "text": "is it red ?"} | more))


def test_a_question_takes_one_path_and_one_reference_for_what_they_mean():
    question = asks(images="a.png", references="yes")
    assert question.images == (Path("a.png"),)
    assert question.references == ("yes",)


def test_options_are_in_alphabetical_order_whatever_order_they_come_in():
    question = asks(options={"C": "blue", "A": "red", "B": "green"}, references=("B",))
    assert list(question.options.items()) == [("A", "red"), ("B", "green"), ("C", "blue")]


def test_options_of_the_caller_do_not_change_the_question():
    mine = {"A": "red"}
    question = asks(options=mine)
    mine["B"] = "green"
    assert question.options == {"A": "red"}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"text": "  "}, "'q' has no text"),
        ({"options": {}}, "'q' has no option"),
        (
            {"options": {"A": "red"}, "references": ("red",)},
            "'red', which is none of its options A",
        ),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused(more, says):
    with pytest.raises(DataError, match=says):
        asks(**more)


def test_identification_is_the_image_then_the_question_and_nothing_else(vlm, scenes):
    """P2, Table 5: <Image><Question>, without a template, options, role or response."""
    question = Question(
        "q", scenes[0].images, "what is the background ?", ("A",), {"A": "plain"}, "common", "Role:"
    )
    sample = question.identification()
    assert (sample.id, sample.domain, sample.response) == ("q", "common", None)
    assert prepare(vlm, sample, template=False, response=False).text == (
        "<image>what is the background ?"
    )
    batch = nl.encode(vlm, [sample], template=False)
    roles = batch.tokens["language"].role[0].tolist()
    assert roles == [Role.VISUAL] * 64 + [Role.PROMPT] * 5
    assert batch.pieces(0)[64:] == ("what", " is", " the", " background", " ?")


def test_several_images_come_before_the_text_each_with_its_tokens(vlm, scenes):
    question = Question("q", (*scenes[0].images, *scenes[1].images), "what is the background ?")
    batch = nl.encode(vlm, [question.identification()], template=False)
    roles = batch.tokens["language"].role[0].tolist()
    assert roles == [Role.VISUAL] * 128 + [Role.PROMPT] * 5


def test_a_sample_for_evaluation_keeps_id_domain_and_images_and_has_no_response():
    sample = asks(domain="medical").sample("short")
    assert (sample.id, sample.domain, sample.response) == ("q", "medical", None)
    assert sample.images == (Path("a.png"),)


# Prompts, against strings written by hand.

OPTIONS = {"B": "no", "A": "yes"}


@pytest.mark.parametrize(
    ("name", "open_ended", "with_role", "with_options"),
    [
        ("plain", "is it red ?", "is it red ?", "is it red ?"),
        ("chat", "is it red ?", "Drive.\nis it red ?", "is it red ?\nA. yes\nB. no"),
        (
            "short",
            "is it red ?\nAnswer the question using a single word or phrase.",
            "Drive.\nis it red ?\nAnswer the question using a single word or phrase.",
            "is it red ?\nA. yes\nB. no\n"
            "Answer with the option's letter from the given choices directly.",
        ),
        (
            "llava-next",
            "Question: is it red ?\nContext: N/A\n"
            "Answer the question using a single word or phrase.",
            "Drive. Question: is it red ?\nContext: N/A\n"
            "Answer the question using a single word or phrase.",
            "Question: is it red ?\nContext: N/A\nOptions: A. yes B. no\n"
            "Answer with the option's letter from the given choices directly.",
        ),
        (
            "instructblip",
            "Question: is it red ? Short Answer:",
            "Drive. Question: is it red ? Short Answer:",
            "Question: is it red ? Options: A. yes B. no "
            "Answer with the option's letter from the given choices directly.",
        ),
    ],
)
def test_each_prompt_reads_as_written_by_hand(name, open_ended, with_role, with_options):
    assert asks().sample(name).prompt == open_ended
    assert asks(role="Drive.").sample(PROMPTS[name]).prompt == with_role
    assert asks(options=OPTIONS).sample(name).prompt == with_options


def test_every_prompt_is_tested_above_and_known_by_its_own_name():
    assert list(PROMPTS) == ["plain", "chat", "short", "llava-next", "instructblip"]
    assert all(name == prompt.name for name, prompt in PROMPTS.items())
    assert [name for name, prompt in PROMPTS.items() if not prompt.template] == [
        "plain",
        "instructblip",
    ]


def test_the_words_are_those_of_p2s_table_5():
    """The table prints each prompt on one line, LLaVA's with its chat preamble."""
    question = asks(role=DRIVING_ROLE)
    assert DRIVING_ROLE == ROLE
    assert " ".join((VICUNA + "<Image> " + question.sample("llava-next").prompt).split()) == (
        f"{VICUNA}<Image> {ROLE} Question: is it red ? Context: N/A Answer the question using a "
        "single word or phrase."
    )
    assert question.sample("instructblip").prompt == f"{ROLE} Question: is it red ? Short Answer:"


def test_the_chat_preamble_comes_from_the_processors_template_and_only_once(vlm, scenes):
    vicuna = (
        VICUNA + "{% for part in messages[0]['content'] if part['type'] == 'image' %}<image>\n"
        "{% endfor %}{% for part in messages[0]['content'] if part['type'] == 'text' %}"
        "{{ part['text'] }}{% endfor %} ASSISTANT:"
    )
    sample = Question("q", scenes[0].images, "Is it red?").sample("llava-next")
    kept = vlm.processor.chat_template
    try:
        vlm.processor.chat_template = vicuna
        text = prepare(vlm, sample, response=False).text
    finally:
        vlm.processor.chat_template = kept
    assert text == (
        f"{VICUNA}<image>\nQuestion: Is it red?\nContext: N/A\n"
        "Answer the question using a single word or phrase. ASSISTANT:"
    )


TEXT = st.text(min_size=1).filter(str.strip)


@given(
    question=TEXT,
    role=st.text(),
    options=st.dictionaries(st.sampled_from("ABCDE"), st.text(), min_size=1),
)
def test_what_is_put_in_stands_in_the_prompt_untouched(question, role, options):
    """Braces, places and markers in a question are its own text, not the prompt's."""
    listed = " ".join(f"{letter}. {options[letter]}" for letter in sorted(options))
    assert PROMPTS["instructblip"].render(question, options) == (
        f"Question: {question} Options: {listed} "
        "Answer with the option's letter from the given choices directly."
    )
    before = f"{role} " if role else ""
    assert PROMPTS["instructblip"].render(question, None, role) == (
        f"{before}Question: {question} Short Answer:"
    )


def test_a_prompt_of_ones_own_is_used_as_it_is():
    mine = Prompt("mine", "Q: {question} {{x}}", "{options} / {question}", between=", ")
    assert asks().sample(mine).prompt == "Q: is it red ? {x}"
    assert asks(options=OPTIONS).sample(mine).prompt == "A. yes, B. no / is it red ?"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"open": "answer"}, r"`open` has no place\. It needs \{question\}"),
        ({"open": "{question} {options}"}, r"may have \{role\}, \{question\}\."),
        ({"options": "{options}"}, r"`options` has \{options\}"),
        ({"open": "{question!r}"}, r"\{question!r\}"),
        ({"open": "{question:>9}"}, r"\{question:>9\}"),
        ({"open": "{question} {"}, "`open` is no format"),
        ({"open": "{question} {}"}, "`open` has"),
        ({"option": "{letter}"}, r"`option` has \{letter\}"),
    ],
)
def test_a_prompt_with_other_places_is_refused(change, says):
    with pytest.raises(DataError, match=says):
        Prompt(**({"name": "mine", "open": "{question}", "options": "{question}"} | change))


def test_an_unknown_prompt_lists_the_known_ones():
    with pytest.raises(UnknownNameError, match=r"No prompt 'shrt'.*plain, chat, short, llava-next"):
        asks().sample("shrt")
    assert as_prompt("short") is PROMPTS["short"]


# VQAv2.


def vqav2(folder: Path, split: str = "val2014", asked=None, answered=None) -> Path:
    """Two questions about two images, in the official form."""
    asked = asked or [(262148000, 262148, "Where is he looking?"), (393225001, 393225, "Is it?")]
    answered = answered or [each[0] for each in asked]
    said = ["down"] * 6 + ["at table", "skateboard", "down", "table"]
    path = as_json(
        folder / f"v2_OpenEnded_mscoco_{split}_questions.json",
        {
            "info": {"version": "2.0"},
            "task_type": "Open-Ended",
            "data_type": "mscoco",
            "data_subtype": split,
            "license": {},
            "questions": [
                {"image_id": image, "question": text, "question_id": number}
                for number, image, text in asked
            ],
        },
    )
    if not split.startswith("test"):
        as_json(
            folder / f"v2_mscoco_{split}_annotations.json",
            {
                "info": {},
                "data_type": "mscoco",
                "data_subtype": split,
                "annotations": [
                    {
                        "question_type": "where is the",
                        "multiple_choice_answer": "down",
                        "answers": [
                            {"answer": a, "answer_confidence": "yes", "answer_id": i + 1}
                            for i, a in enumerate(said)
                        ],
                        "image_id": 262148,
                        "answer_type": "other",
                        "question_id": number,
                    }
                    for number in answered
                ],
            },
        )
    return path


def test_vqav2_has_ten_answers_and_the_image_of_its_split(tmp_path):
    picture(tmp_path / "val2014" / "COCO_val2014_000000262148.jpg", "blue")
    first, second = read_questions(vqav2(tmp_path), "vqav2")
    assert first.id == "vqav2-262148000"
    assert first.text == "Where is he looking?"
    assert first.references == (*["down"] * 6, "at table", "skateboard", "down", "table")
    assert (first.domain, first.kind, first.role, first.options) == ("common", "other", "", None)
    assert opens(first)[0][2] > 240
    assert second.images == (tmp_path / "val2014" / "COCO_val2014_000000393225.jpg",)


def test_vqav2_reads_annotations_in_any_order_and_from_elsewhere(tmp_path):
    path = vqav2(tmp_path, answered=[393225001, 262148000])
    other = tmp_path / "v2_mscoco_val2014_annotations.json"
    moved = other.rename(tmp_path / "answers.json")
    with pytest.raises(FileNotFoundError, match=r"needs its annotations.*say where it is with"):
        read_questions(path, "vqav2")
    read = read_questions(path, "vqav2", annotations=moved, images=tmp_path / "all", domain="coco")
    assert [each.id for each in read] == ["vqav2-262148000", "vqav2-393225001"]
    assert read[0].images[0] == tmp_path / "all" / "COCO_val2014_000000262148.jpg"
    assert read[0].domain == "coco"


@pytest.mark.parametrize("split", ["test2015", "test-dev2015"])
def test_vqav2s_test_splits_have_no_references_and_share_their_images(tmp_path, split):
    first = read_questions(vqav2(tmp_path, split), "vqav2")[0]
    assert first.references == ()
    assert first.images == (tmp_path / "test2015" / "COCO_test2015_000000262148.jpg",)


def test_vqav2_questions_and_annotations_of_different_splits_are_refused(tmp_path):
    with pytest.raises(DataError, match="question 393225001 has no annotation"):
        read_questions(vqav2(tmp_path, answered=[262148000]), "vqav2")
    with pytest.raises(DataError, match=r"1 annotations have no question .* first is 7"):
        read_questions(vqav2(tmp_path, answered=[262148000, 393225001, 7]), "vqav2")
    with pytest.raises(DataError, match="two annotations of question 262148000"):
        read_questions(vqav2(tmp_path, answered=[262148000, 262148000, 393225001]), "vqav2")


# PMC-VQA.

CHOICES = {
    "Choice A": " A:Diffuse uptake pattern ",
    "Choice B": " B:Focal uptake pattern",
    "Choice C": "C: No uptake: B:none",
    "Choice D": " D:Cannot determine",
}


def table(path: Path, *rows: dict[str, str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def version_1(**change: str) -> dict[str, str]:
    return {
        "Figure_path": "PMC1064097_F1.jpg",
        "Question": " What is the uptake pattern in the breast? ",
        "Answer": "Focal uptake pattern ",
        **CHOICES,
        "Answer_label": "B",
    } | change


def version_2(**change: str) -> dict[str, str]:
    return {
        "index": "0",
        "Figure_path": "PMC8253797_Fig4_11.jpg",
        "Caption": 'A scan, showing "uptake".\nSecond line',
        "Question": " What is the uptake pattern? ",
        **CHOICES,
        "Answer": "B",
        "split": "test",
    } | change


@pytest.mark.parametrize(
    ("name", "row", "folder"),
    [("test_clean", version_1(), "images"), ("test_2", version_2(), "figures")],
)
def test_pmc_vqa_has_clean_options_and_the_letter_in_either_release(tmp_path, name, row, folder):
    picture(tmp_path / folder / row["Figure_path"])
    (question,) = read_questions(table(tmp_path / f"{name}.csv", row), "pmc-vqa")
    assert question.id == f"pmc-vqa-{name}-0"
    assert question.options == {
        "A": "Diffuse uptake pattern",
        "B": "Focal uptake pattern",
        "C": "No uptake: B:none",
        "D": "Cannot determine",
    }
    assert question.references == ("B",)
    assert question.text == row["Question"].strip()
    assert question.domain == "medical"
    assert opens(question)[0][0] > 240


def test_pmc_vqa_rows_without_a_right_option_are_left_out_and_counted(tmp_path):
    rows = [
        version_1(),
        version_1(Answer_label="E"),
        version_1(Question=" "),
        version_1(**{"Choice B": " B: "}),
        version_1(Answer_label=" C "),
    ]
    with pytest.warns(UserWarning, match=r"3 rows .* left out.* \[1, 2, 3\]") as warned:
        read = read_questions(table(tmp_path / "train.csv", *rows), "pmc-vqa")
    assert [each.id for each in read] == ["pmc-vqa-train-0", "pmc-vqa-train-4"]
    assert read[1].references == ("C",)
    assert warned[0].filename == __file__


def test_pmc_vqa_tells_which_columns_it_lacks(tmp_path):
    row = version_1()
    del row["Choice D"]
    with pytest.raises(DataError, match=r"has the fields Figure_path, .* and lacks Choice D\."):
        read_questions(table(tmp_path / "train.csv", row), "pmc-vqa")
    rows = [version_1(), version_1(Figure_path="")]
    with pytest.raises(DataError, match="row 1, from 0, names no figure"):
        read_questions(table(tmp_path / "train.csv", *rows), "pmc-vqa")
    (tmp_path / "bad.csv").write_bytes(b"Figure_path,\xff\xfe\n")
    with pytest.raises(DataError, match="is not CSV in UTF-8"):
        read_questions(tmp_path / "bad.csv", "pmc-vqa")


# DocVQA.


def docvqa(path: Path, *records: dict) -> Path:
    file = {"dataset_name": "SP-DocVQA", "dataset_version": "1.0", "dataset_split": "val"}
    return as_json(path, file | {"data": list(records)})


def page(**change) -> dict:
    return {
        "questionId": 49153,
        "question": "What is the ‘actual’ value per 1000, during the year 1975?",
        "question_types": ["figure/diagram", "form"],
        "image": "documents/pybv0228_81.png",
        "docId": 14465,
        "ucsf_document_id": "pybv0228",
        "ucsf_document_page_no": "81",
        "answers": ["0.28", ".28"],
        "data_split": "val",
    } | change


def test_docvqa_has_all_answers_and_its_page(tmp_path):
    picture(tmp_path / "documents" / "pybv0228_81.png")
    (question,) = read_questions(docvqa(tmp_path / "val_v1.0_withQT.json", page()), "docvqa")
    assert question.id == "docvqa-49153"
    assert question.references == ("0.28", ".28")
    assert question.kind == "figure/diagram, form"
    assert question.text.startswith("What is the ‘actual’")
    assert question.domain == "document"
    assert opens(question) == [RED]


def test_docvqas_pages_are_found_in_either_download(tmp_path):
    path = docvqa(tmp_path / "qas" / "val_v1.0.json", page())
    picture(tmp_path / "flat" / "pybv0228_81.png", "lime")
    picture(tmp_path / "nested" / "documents" / "pybv0228_81.png", "blue")
    found = [
        opens(read_questions(path, "docvqa", images=tmp_path / folder)[0])
        for folder in ("flat", "nested")
    ]
    assert found == [[LIME], [BLUE]]


def test_docvqas_test_split_has_neither_answers_nor_types(tmp_path):
    record = page()
    del record["answers"], record["question_types"]
    (question,) = read_questions(docvqa(tmp_path / "test_v1.0.json", record), "docvqa")
    assert (question.references, question.kind) == ((), "")
    with pytest.raises(DataError, match="question 0, has answers that are no list"):
        read_questions(docvqa(tmp_path / "x.json", page(answers="0.28")), "docvqa")


# LingoQA.


def lingoqa(path: Path, *rows: dict) -> Path:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def drive(number: str, answer: str | None, frames: int = 5, **change) -> dict:
    return {
        "question_id": number,
        "segment_id": "seg",
        "images": [f"images/val/seg/{i}.jpg" for i in range(frames)],
        "question": f"What of {number}?",
        "answer": answer,
    } | change


def test_lingoqa_has_all_frames_in_order_and_the_answers_of_all_its_rows(tmp_path):
    colours = ["red", "lime", "blue", "red", "lime"]
    for i, colour in enumerate(colours):
        picture(tmp_path / "images" / "val" / "seg" / f"{i}.jpg", colour)
    rows = [drive("q1", "Yes."), drive("q2", "No."), drive("q1", "Yes, one."), drive("q2", "Nope.")]
    first, second = read_questions(lingoqa(tmp_path / "val.parquet", *rows), "lingoqa")
    assert (first.id, first.text) == ("lingoqa-q1", "What of q1?")
    assert first.references == ("Yes.", "Yes, one.")
    assert second.references == ("No.", "Nope.")
    seen = [max(range(3), key=pixel.__getitem__) for pixel in opens(first)]
    assert seen == [0, 1, 2, 0, 1]
    assert (first.domain, first.role) == ("driving", DRIVING_ROLE)
    assert first.sample("instructblip").prompt.startswith("Role: You are")
    assert read_questions(tmp_path / "val.parquet", "lingoqa", role="")[0].role == ""


def test_lingoqa_rows_of_one_id_must_ask_the_same(tmp_path):
    for change in ({"question": "Else?"}, {"segment_id": "other"}, {"images": ["images/x.jpg"]}):
        rows = [drive("q1", "a"), drive("q1", "b", **change)]
        with pytest.raises(DataError, match="two questions with the id 'q1'"):
            read_questions(lingoqa(tmp_path / "val.parquet", *rows), "lingoqa")


def test_lingoqa_without_frames_columns_or_parquet_is_refused(tmp_path):
    with pytest.raises(DataError, match="'q1' has no images"):
        read_questions(lingoqa(tmp_path / "a.parquet", drive("q1", "a", images=None)), "lingoqa")
    few = lingoqa(tmp_path / "b.parquet", {"question_id": "q1", "answer": "a"})
    with pytest.raises(DataError, match="has the fields question_id, answer, and lacks segment_id"):
        read_questions(few, "lingoqa")
    (tmp_path / "c.parquet").write_text("question_id,answer")
    with pytest.raises(DataError, match=r"c\.parquet is not parquet"):
        read_questions(tmp_path / "c.parquet", "lingoqa")


def test_lingoqa_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    path = lingoqa(tmp_path / "val.parquet", drive("q1", None))
    assert read_questions(path, "lingoqa")[0].references == ()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"Reading LingoQA needs .*'pyarrow'.*\[table\]"):
        read_questions(path, "lingoqa")


# RS-VQA.


def rsvqa(folder: Path, prefix: str = "LR_split_test", questions=None, answers=None) -> Path:
    """Ids are those of the whole data set; only those of the split are active, and filled in."""
    questions = questions or [
        {"id": 0, "active": False},
        about(1, image=5, answer=1, text="Is it a rural or an urban area", kind="rural_urban"),
        about(2, image=6, answer=2, text="How many roads are there?", kind="count"),
    ]
    answers = answers or [
        {"id": 0, "active": False},
        {"id": 1, "date_added": 1.5, "question_id": 1, "people_id": 0, "answer": "rural"}
        | {"active": True},
        {"id": 2, "date_added": 1.5, "question_id": 2, "people_id": 0, "answer": "12"}
        | {"active": True},
    ]
    # Answers are found by id, wherever they stand.
    as_json(folder / f"{prefix}_answers.json", {"answers": answers[::-1]})
    as_json(folder / f"{prefix}_images.json", {"images": []})
    return as_json(folder / f"{prefix}_questions.json", {"questions": questions})


def about(number: int, *, image: int, answer: int, text: str, kind: str) -> dict:
    return {
        "id": number,
        "date_added": 1.5,
        "img_id": image,
        "people_id": 0,
        "type": kind,
        "question": text,
        "answers_ids": [answer],
        "active": True,
    }


@pytest.mark.parametrize(
    ("prefix", "folder", "release"),
    [
        ("LR_split_test", "Images_LR", "lr"),
        ("USGS_split_test_phili", "Data", "usgs"),
    ],
)
def test_rsvqa_has_only_active_questions_with_their_answer_and_image(
    tmp_path, prefix, folder, release
):
    picture(tmp_path / folder / "5.tif", "lime")
    first, second = read_questions(rsvqa(tmp_path, prefix), "rsvqa")
    assert (first.id, first.kind) == (f"rsvqa-{release}-1", "rural_urban")
    assert first.references == ("rural",)
    assert first.domain == "remote sensing"
    assert opens(first) == [LIME]
    assert (second.references, second.kind) == (("12",), "count")
    assert second.images == (tmp_path / folder / "6.tif",)


def test_rsvqas_images_may_be_png(tmp_path):
    picture(tmp_path / "png" / "5.png", "blue")
    read = read_questions(rsvqa(tmp_path), "rsvqa", images=tmp_path / "png")
    assert opens(read[0]) == [BLUE]
    assert read[1].images == (tmp_path / "png" / "6.png",)


def test_rsvqa_questions_whose_answer_is_not_there_are_refused(tmp_path):
    path = rsvqa(tmp_path, answers=[{"id": 1, "active": False}, {"id": 2, "active": False}])
    with pytest.raises(DataError, match="question 1, has the answer 1, which the answers do not"):
        read_questions(path, "rsvqa")
    (tmp_path / "LR_split_test_answers.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"needs its answers: there is no .*test_answers"):
        read_questions(path, "rsvqa")
    renamed = path.rename(tmp_path / "asked.json")
    with pytest.raises(DataError, match=r"its name should end in _questions\.json"):
        read_questions(renamed, "rsvqa")


# A layout of our own.


def lines(path: Path, *rows: dict | str) -> Path:
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def test_our_own_lines_become_questions_with_their_fields(tmp_path):
    for name, colour in (("a.png", "red"), ("b.png", "lime")):
        picture(tmp_path / name, colour)
    path = lines(
        tmp_path / "q.jsonl",
        {
            "id": 7,
            "images": ["a.png", "b.png"],
            "question": "Which?",
            "options": {"B": "two", "A": "one"},
            "references": ["A"],
            "domain": "art",
            "role": "Look.",
            "kind": "choice",
            "else": 1,
        },
        "",
        {"image": "b.png", "question": "What?"},
    )
    first, second = read_questions(path, "jsonl", domain="rest", role="See.")
    assert (first.id, first.domain, first.role, first.kind) == ("7", "art", "Look.", "choice")
    assert list(first.options) == ["A", "B"]
    assert first.references == ("A",)
    assert opens(first) == [RED, LIME]
    assert (second.id, second.domain, second.role) == ("2", "rest", "See.")
    assert opens(second) == [LIME]
    assert read_questions(path, "jsonl")[1].domain is None


def test_a_missing_image_is_told_when_it_is_needed_not_at_reading(tmp_path):
    path = lines(tmp_path / "q.jsonl", {"id": "x", "image": "no.png", "question": "What?"})
    (question,) = read_questions(path, "jsonl")
    with pytest.raises(SampleError, match="'x', missing image"):
        question.sample("short").open_images()


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "line 2: "),
        ({"image": "a.png"}, "line 2: question: Field required"),
        ({"question": " "}, "line 2: Question '1' has no text"),
        ({"question": "q", "options": {"A": "x"}, "references": ["B"]}, "line 2: .* none of its"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, row, says):
    with pytest.raises(DataError, match=says):
        read_questions(lines(tmp_path / "q.jsonl", {"question": "q"}, row), "jsonl")


# What holds for every layout.


def files(folder: Path) -> dict[str, Path]:
    """A file of each layout."""
    return {
        "vqav2": vqav2(folder),
        "pmc-vqa": table(folder / "train.csv", version_1()),
        "docvqa": docvqa(folder / "val_v1.0.json", page()),
        "lingoqa": lingoqa(folder / "val.parquet", drive("q", "a")),
        "rsvqa": rsvqa(folder),
        "jsonl": lines(folder / "q.jsonl", {"id": "own", "question": "q"}),
    }


LAYOUTS = ("vqav2", "pmc-vqa", "docvqa", "lingoqa", "rsvqa", "jsonl")


def test_ids_of_different_data_sets_differ_even_if_their_numbers_are_the_same(tmp_path):
    made = files(tmp_path)
    vqav2(tmp_path, asked=[(1, 1, "a?")])
    docvqa(tmp_path / "val_v1.0.json", page(questionId=1))
    ids = [q.id for layout, path in made.items() for q in read_questions(path, layout)]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_missing_file_is_told(tmp_path, layout):
    path = files(tmp_path)[layout]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=path.name):
        read_questions(path, layout)


@pytest.mark.parametrize("layout", ["vqav2", "docvqa", "rsvqa"])
def test_json_of_another_form_says_what_it_has_and_needs(tmp_path, layout):
    path = files(tmp_path)[layout]
    key = "data" if layout == "docvqa" else "questions"
    whole = json.loads(path.read_text(encoding="utf-8"))
    for content, says in (
        ([1], f"it holds a list, and should hold a list under '{key}'"),
        ({"rows": []}, f"it holds the fields rows, and should hold a list under '{key}'"),
        ({key: {}}, "should hold a list"),
        (whole | {key: [{"id": 1, "active": True}]}, "it has the fields id, active, and lacks "),
        (whole | {key: [[]]}, "it has a list, and lacks "),
        (whole | {key: []}, "holds no question|annotations have no question"),
    ):
        as_json(path, content)
        with pytest.raises(DataError, match=says):
            read_questions(path, layout)
    path.write_bytes(b'{"a": \xff}')
    with pytest.raises(DataError, match="is not JSON"):
        read_questions(path, layout)


def test_an_id_that_occurs_twice_is_refused(tmp_path):
    twice = [
        (vqav2(tmp_path, asked=[(3, 1, "a?"), (3, 2, "b?")], answered=[3]), "vqav2", "vqav2-3"),
        (docvqa(tmp_path / "d.json", page(), page()), "docvqa", "docvqa-49153"),
        (
            rsvqa(tmp_path, questions=[about(1, image=1, answer=1, text="a", kind="comp")] * 2),
            "rsvqa",
            "rsvqa-lr-1",
        ),
        (lines(tmp_path / "q.jsonl", *[{"id": "a", "question": "q"}] * 2), "jsonl", "a"),
    ]
    for path, layout, name in twice:
        with pytest.raises(DataError, match=f"two questions with the id '{name}'"):
            read_questions(path, layout)


def test_unknown_layouts_and_annotations_that_are_not_read_are_refused(tmp_path):
    with pytest.raises(UnknownNameError, match=r"No layout 'vqa'.*vqav2"):
        read_questions(tmp_path / "x.json", "vqa")
    with pytest.raises(DataError, match="'docvqa' has questions and answers in one file"):
        read_questions(tmp_path / "x.json", "docvqa", annotations="y.json")

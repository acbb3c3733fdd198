"""The README's job, executed as it stands, on the testbed's files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import neuronlens as nl
from neuronlens import testbed
from servers import chat_server

ROOT = Path(__file__).parent.parent


def blocks(language: str) -> list[str]:
    """The README's blocks of a language."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("form", ["conversations", "jsonl"])
def test_the_readme_example_runs_unchanged_on_either_kind_of_file(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    testbed.write("data", 60, seed=3)
    first, asking, needed = blocks("python")
    code = first.replace('"llava-hf/llava-1.5-7b-hf"', repr(str(testbed.FOLDER)))
    if form == "jsonl":
        code = code.replace('"detail_23k.json", images="train2017"', '"data/samples.jsonl"')
    else:
        Path("train2017").symlink_to("data/images")
        rows = [json.loads(line) for line in Path("data/samples.jsonl").read_text().splitlines()]
        records = [
            {
                "id": row["id"],
                "image": Path(row["image"]).name,
                "conversations": [
                    {"from": "human", "value": f"<image>\n{row['prompt']}"},
                    {"from": "gpt", "value": row["response"]},
                ],
            }
            for row in rows
        ]
        Path("detail_23k.json").write_text(json.dumps(records))
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    study = nl.Study.open("study")
    assert len(study) > 5
    if form == "jsonl":
        assert not study.failures()
    page = Path("page/index.html").read_text(encoding="utf-8")
    assert all(record.neuron in page for record in list(study.values())[:1])
    if form == "jsonl":
        # Visual neurons would load a detector; the text neurons only ask.
        names["some"] = [n for n in study if study[n].category == "text"][:3]
        with chat_server(tmp_path) as server:
            monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
            exec(compile(asking, "README.md", "exec"), names)
        assert len(nl.Study.open("asked").exchanges(names["some"][0])) == 1 + 5
        write_pmc_vqa(Path("pmc"), names["samples"][:8])
        write_docvqa(Path("docvqa"), names["samples"][8:14])
        exec(compile(needed, "README.md", "exec"), names)
        assert names["chosen"]
        answers = nl.Evaluation.open("answers")
        assert answers.conditions == ("none", "medical", "random")
        assert len(answers.questions) == 8


def write_pmc_vqa(folder: Path, samples: list[nl.Sample]) -> None:
    """Questions about the samples' images, as PMC-VQA has them."""
    (folder / "images").mkdir(parents=True)
    columns = "Figure_path,Question,Answer,Choice A,Choice B,Choice C,Choice D,Answer_label"
    lines = [columns]
    for number, sample in enumerate(samples):
        shutil.copy(sample.images[0], folder / "images" / f"{number}.png")
        lines.append(f"{number}.png,what is the background ?,plain,A:plain,B:striped,C:x,D:y,A")
    (folder / "test_clean.csv").write_text("\n".join(lines) + "\n")


def write_docvqa(folder: Path, samples: list[nl.Sample]) -> None:
    """Questions about the samples' images, as DocVQA has them."""
    (folder / "documents").mkdir(parents=True)
    rows = []
    for number, sample in enumerate(samples):
        shutil.copy(sample.images[0], folder / "documents" / f"{number}.png")
        asked = {"questionId": number, "question": "what shape is it ?", "answers": ["ring"]}
        rows.append({**asked, "image": f"documents/{number}.png", "docId": number})
    (folder / "val_v1.0_withQT.json").write_text(json.dumps({"data": rows}))


def test_ci_runs_exactly_the_readmes_test_command():
    command = next(
        line for line in "\n".join(blocks("bash")).splitlines() if line.endswith("nox -s tests")
    )
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_nothing_says_to_install_the_unrelated_project():
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").iterdir()]
    for path in texts:
        assert not re.search(r"pip install[^\n]*\bneuronlens\b(?!-vlm)", path.read_text("utf-8")), (
            path
        )

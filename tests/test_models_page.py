"""docs/models.md: it says what the models do, and published models have their published size."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest
import transformers

DOCS = Path(__file__).parent.parent / "docs"
sys.path.append(str(DOCS))

import generate_models as generator  # noqa: E402 - it is in docs

PAGE = (DOCS / "models.md").read_text(encoding="utf-8")
ZOO = generator.entries()
STALE = "docs/models.md is stale: nox -s models_page"


def sections() -> dict[str, str]:
    """The page's text by heading."""
    parts = re.split(r"^##+ (.*)\n", PAGE, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows() -> dict[str, tuple[str, list[str]]]:
    """By architecture, its heading and its cells."""
    return {
        match.group(1): (heading, [cell.strip() for cell in line.split(" | ")])
        for heading, text in sections().items()
        for line in text.splitlines()
        if (match := re.match(r"\| `(.*?)`<br>", line))
    }


def notes() -> dict[str, str]:
    """By architecture, what stands below its table."""
    found = {}
    for heading, text in sections().items():
        for names, note in re.findall(r"^- (`\S+`(?:, `\S+`)*): (.*)$", text, re.MULTILINE):
            if heading != "Incomplete defaults":
                found |= dict.fromkeys(re.findall(r"`(\S+)`", names), note)
    return found


ROWS, NOTES = rows(), notes()


def test_every_architecture_of_transformers_and_of_the_tests_has_a_row():
    assert set(ROWS) >= set(ZOO) | generator.OFFICIAL, STALE
    if transformers.__version__ in PAGE:  # the tests of another release have other models
        assert set(ROWS) == set(ZOO), STALE
        assert f"**{len(generator.OFFICIAL)} of the {len(generator.OFFICIAL)} " in PAGE, STALE


def test_it_says_which_architectures_were_not_tried_with_a_processor():
    said = re.search(r"tried with a processor: (.*?)\.\n", PAGE, re.DOTALL).group(1)
    untried = set(re.findall(r"`(\S+)`", said))
    assert untried & generator.OFFICIAL == set(generator.without_processor()), STALE


@pytest.mark.parametrize("name", ZOO)
def test_a_row_says_what_the_tiny_model_does(name):
    entry = ZOO[name]
    facts = generator.facts_of(entry)
    heading, cells = ROWS[name]
    assert facts.registered
    assert re.sub(r"<[^>]*>", " ", cells[0]).replace(" For", "For").split()[-1] == entry.cls
    assert cells[-2:] == [facts.tokens, f"{facts.boxes} |"], STALE
    assert heading == (facts.group if name in generator.OFFICIAL else "Variants"), STALE
    full = None
    if name in generator.OFFICIAL and (facts.inert or facts.conditional):
        full, _ = generator.default_size(entry)
    assert NOTES.get(name, "") == generator.note_of(entry, facts, full), STALE


@pytest.mark.parametrize(
    ("name", "modules", "count"),
    [
        ("LLaVA 1.5 7B", "language", 352_256),
        ("LLaVA-NeXT Vicuna 7B", None, 454_656),
        ("InstructBLIP Vicuna 7B", None, 665_600),
        ("InternVL 2.5 8B", "language", 458_752),
    ],
)
def test_a_published_model_has_its_published_number_of_neurons(name, modules, count):
    start = time.process_time()
    adapter = generator.published(name)
    assert sum(site.neurons for site in adapter.select(modules)) == count
    assert time.process_time() - start < 5
    table = sections()["Full-size counts"]
    assert f"{count:,}" in next(line for line in table.splitlines() if line.startswith(f"| {name}"))

"""Metrics that compare texts: official definitions, slow references, cases worked out by hand."""

from __future__ import annotations

import itertools
import json
import re
import statistics

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from neuronlens import metrics
from neuronlens.errors import DataError
from neuronlens.metrics import (
    anls,
    exact_match,
    levenshtein,
    mentions,
    normalised,
    option_letter,
    vqa_accuracy,
)
from neuronlens.metrics.normalise import CONTRACTIONS
from neuronlens.questions import Question

PLAIN = [
    metrics.VQAAccuracy(),
    metrics.ANLS(),
    metrics.OptionLetter(),
    metrics.ExactMatch(),
    metrics.Mentions(),
]
LETTERS = st.text(alphabet="abAB é.-\t", max_size=12)


def question(*references, number=0, options=None) -> Question:
    return Question(f"q{number}", (), "What is it?", references, options)


def one(metric, answer, asked):
    (measures,) = metric.score([answer], [asked])
    return measures


# VQAv2's normalisation. Each line was worked out by hand from the rules of the official code.

WORKED_OUT = [
    # Case, white space.
    ("Yes", "yes"),
    ("  dog\n", "dog"),
    ("big\tdog", "big dog"),
    ("two\n\nbig  dogs", "2 big dogs"),
    ("", ""),
    (" \t\n", ""),
    # Articles, as whole words only.
    ("a dog", "dog"),
    ("The man and an apple", "man and apple"),
    ("theater", "theater"),
    ("the", ""),
    # Number words up to ten, and none.
    ("two", "2"),
    ("Ten dogs", "10 dogs"),
    ("zero", "0"),
    ("none", "0"),
    ("eleven", "eleven"),
    ("someone", "someone"),
    # A mark that nowhere stands beside a blank becomes a blank.
    ("black-and-white", "black and white"),
    ("yes/no", "yes no"),
    ("t-shirt", "t shirt"),
    ("red,white", "red white"),
    ("what?", "what"),
    ("wow!", "wow"),
    ('"stop"', "stop"),
    ("one-way", "1 way"),
    # A mark that somewhere stands beside a blank is removed everywhere.
    ("red, white,blue", "red whiteblue"),
    ("in-line - skate", "inline skate"),
    ("(left) side", "left side"),
    # A comma between digits: every mark of the text is removed.
    ("1,000", "1000"),
    ("1,000-seat t-shirt", "1000seat tshirt"),
    ("12,5/7", "1257"),
    ("a,b 1,2", "ab 12"),
    # Full stops go unless a digit follows.
    ("dog.", "dog"),
    ("1.5", "1.5"),
    ("3.", "3"),
    ("3. floor", "3 floor"),
    ("U.S.A", "usa"),
    ("v.2", "v.2"),
    (".5", ".5"),
    ("...", ""),
    # A full stop is judged after the marks have gone.
    ("1.-2", "1 2"),
    ("1.- 2", "1 2"),
    ("x.,2 3,4", "x.2 34"),
    # Apostrophes and colons are no marks.
    ("don't", "don't"),
    ("5:30", "5:30"),
    ("o'clock", "o'clock"),
    # Contractions, of whole words.
    ("dont know", "don't know"),
    ("it is 5 oclock", "it is 5 o'clock"),
    ("CANT", "can't"),
    ("couldnt've", "couldn't've"),
    ("couldn'tve", "couldn't've"),
    ("couldntve", "couldntve"),
    ("yall'd've", "y'all'd've"),
    ("ow's'at", "'ow's'at"),
    ("twas", "'twas"),
    ("somebody'd", "somebodyd"),
    ("Im", "im"),
    ("Ive", "ive"),
    ("its", "its"),
    ("lets", "lets"),
    ("dont.", "don't"),
    # Other scripts.
    ("Ça va?", "ça va"),
    ("犬。", "犬。"),
]


@pytest.mark.parametrize(("answer", "expected"), WORKED_OUT, ids=[a for a, _ in WORKED_OUT])
def test_answers_are_normalised_as_worked_out_by_hand(answer, expected):
    assert normalised(answer) == expected


def letter_by_letter(answer: str) -> str:
    """The rules of the official normalisation, applied to one letter after the other."""
    text = re.sub(r"[\n\t]", " ", answer).strip()
    loose = re.search(r"\d,\d", text)
    marked = ""
    for letter in text:
        if letter not in ';/[]"{}()=+\\_-><@`,?!':
            marked += letter
        elif loose is None and not any(pair in text for pair in (letter + " ", " " + letter)):
            marked += " "
    kept, removed = "", 0
    for at, letter in enumerate(marked):
        if letter == "." and removed < 32 and not re.match(r"\d", marked[at + 1 :]):
            removed += 1
        else:
            kept += letter
    words = []
    for word in kept.lower().split():
        digit = {"none": "0", "zero": "0", "one": "1", "two": "2", "seven": "7"}.get(word, word)
        if digit not in ("a", "an", "the"):
            words.append({"dont": "don't", "whove": "who've"}.get(digit, digit))
    return " ".join(words)


PIECES = ["dont", "The", "a", "one", "seven", "none", "1,0", "2", ".", ",", "-", "?", " ", "\n"]
PIECES += ["\t", "x", "É", "whove", "\\", "<", "'", ":", "\u00a0", "..."]


@given(st.lists(st.sampled_from(PIECES), max_size=10).map("".join) | st.text(max_size=10))
@example("." * 40)
@settings(max_examples=400, deadline=None)
def test_normalising_equals_the_rules_applied_letter_by_letter(answer):
    assert normalised(answer) == letter_by_letter(answer)


def test_contractions_differ_from_their_words_by_one_apostrophe():
    odd = {short for short, whole in CONTRACTIONS.items() if len(whole) != len(short) + 1}
    assert odd == {"somebody'd"}  # the official table's own slip
    assert all(s.replace("'", "") == w.replace("'", "") for s, w in CONTRACTIONS.items())
    assert len(CONTRACTIONS) == 114


# VQA accuracy.


@pytest.mark.parametrize(
    ("given_it", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1), (10, 1)]
)
def test_accuracy_with_ten_answers_is_the_mean_over_leaving_one_out(given_it, accuracy):
    # Of 10 people, 3 said so: three times 2/3, seven times 3/3.
    people = ["dog"] * given_it + [f"other {i}" for i in range(10 - given_it)]
    assert vqa_accuracy("The dog.", people) == pytest.approx(accuracy)


@given(
    st.sampled_from(["yes", "no", "2"]),
    st.lists(st.sampled_from(["Yes", "yes.", "no", "two", "the two"]), min_size=10, max_size=12),
)
@settings(deadline=None)
def test_accuracy_is_the_mean_over_all_choices_of_one_person_fewer(answer, people):
    meant = {"Yes": "yes", "yes.": "yes", "no": "no", "two": "2", "the two": "2"}
    matches = [meant[each] == answer for each in people]
    choices = itertools.combinations(matches, len(matches) - 1)
    slow = statistics.mean(min(sum(choice) / 3, 1) for choice in choices)
    assert vqa_accuracy(answer, people) == pytest.approx(slow)


@pytest.mark.parametrize(("given_it", "accuracy"), [(0, 0), (1, 1 / 3), (2, 2 / 3), (3, 1), (5, 1)])
def test_accuracy_with_fewer_than_ten_answers_leaves_none_out(given_it, accuracy):
    people = ["2"] * given_it + ["7"] * (5 - given_it)
    assert vqa_accuracy("two", people) == pytest.approx(accuracy)


def test_the_order_of_the_people_makes_no_difference():
    people = ["a dog"] * 2 + ["cat"] * 3 + ["dog"] * 5
    assert vqa_accuracy("cat", people) == vqa_accuracy("cat", people[::-1]) == pytest.approx(0.9)


def test_the_official_code_to_the_letter_compares_texts_as_they_are_where_all_agree():
    alike, split = ["yes"] * 10, ["yes"] * 9 + ["no"]
    assert vqa_accuracy("Yes.", alike) == 1
    assert vqa_accuracy("Yes.", alike, literal=True) == 0
    assert vqa_accuracy(" yes\n", alike, literal=True) == 1
    assert vqa_accuracy("Yes.", split, literal=True) == 1
    strict = metrics.VQAAccuracy(literal=True)
    assert one(strict, "Yes.", question(*alike)) == {"vqa_accuracy": 0}


def test_an_empty_answer_is_no_article_unless_the_official_code_is_followed_to_the_letter():
    people = ["a"] * 9 + ["the"]
    assert vqa_accuracy("", people) == 0
    assert vqa_accuracy("A", people) == 1
    assert vqa_accuracy("", people, literal=True) == 1


def test_too_few_people_are_refused_and_named_since_no_answer_could_be_right():
    few = [question(*["x"] * n, number=n) for n in (1, 2, 3, 10)]
    with pytest.raises(DataError, match=r"2 of 4 .*'q1', 'q2'\..*ExactMatch"):
        metrics.VQAAccuracy().score([""] * 4, few)
    with pytest.raises(DataError, match="3 people"):
        vqa_accuracy("x", ["x"])
    assert one(metrics.ExactMatch(), "x", few[0]) == {"exact_match": 1}  # what the text advises


# ANLS.


def table(one: str, other: str) -> int:
    """Wagner and Fischer's table, all of it."""
    rows = [list(range(len(other) + 1))]
    for i, a in enumerate(one, 1):
        rows.append([i])
        for j, b in enumerate(other, 1):
            rows[i].append(
                min(rows[i - 1][j] + 1, rows[i][j - 1] + 1, rows[i - 1][j - 1] + (a != b))
            )
    return rows[-1][-1]


@given(LETTERS | st.text(max_size=6), LETTERS | st.text(max_size=6))
@settings(max_examples=500, deadline=None)
def test_the_distance_equals_the_whole_table(a, b):
    assert levenshtein(a, b) == table(a, b)


@given(st.text(alphabet="abc", min_size=60, max_size=200), st.text(alphabet="abc", max_size=150))
@settings(max_examples=25, deadline=None)
def test_the_distance_equals_the_whole_table_beyond_one_machine_word(a, b):
    assert levenshtein(a, b) == levenshtein(b, a) == table(a, b)


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("ab", "ba", 2), ("😀a", "a", 1)],
)
def test_distances_of_short_texts(a, b, distance):
    assert levenshtein(a, b) == levenshtein(b, a) == distance


def test_the_distance_of_long_texts_is_exact():
    long = "".join(chr(97 + i * i % 23) for i in range(4000))
    assert levenshtein(long, "Z" + long[:2000] + "YX" + long[2001:-3]) == 6
    assert levenshtein(long, "Z" * 5000) == 5000


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("invoice", ["invoice"], 1),
        ("Invoice ", ["INVOICE"], 1),
        ("new \n york", ["New York"], 1),
        ("newyork", ["new york"], 7 / 8),
        ("1998", ["1999", "2001"], 3 / 4),
        ("2000", ["1999", "2001"], 3 / 4),  # the best over references, not the first
        ("abcdef", ["abcxyz"], 0),  # NL is 0.5 exactly: not below it
        ("abcde", ["abcxy"], 0.6),
        ("abcde", ["abxyz"], 0),
        ("", ["abc"], 0),
        ("abc", [""], 0),
        ("", [""], 1),
        (" \n", [""], 1),
        ("", ["abc", ""], 1),
        ("Ünï", ["ünx"], 2 / 3),
    ],
)
def test_anls_as_worked_out_by_hand(answer, references, expected):
    assert anls(answer, references) == pytest.approx(expected)


def test_anls_is_0_from_the_threshold_on_unless_a_tie_is_to_be_kept():
    assert anls("abcdef", ["abcxyz"], at_threshold="keep") == 0.5
    assert anls("abcdef", ["abwxyz"], at_threshold="keep") == 0
    assert anls("abcdef", ["abwxyz"], 1.0) == pytest.approx(1 / 3)  # what the wrong bar would give
    assert metrics.ANLS().threshold == 0.5
    kept = one(metrics.ANLS(at_threshold="keep"), "ab", question("ax"))
    assert kept == {"anls": 0.5}
    assert one(metrics.ANLS(), "ab", question("ax")) == {"anls": 0}


@given(LETTERS, st.lists(LETTERS, min_size=1, max_size=3), st.sampled_from([0.25, 0.5, 0.75, 1.0]))
@settings(max_examples=300, deadline=None)
def test_anls_equals_its_formula(answer, references, threshold):
    def similarity(reference):
        a, b = (" ".join(t.lower().split()) for t in (answer, reference))
        nl = table(a, b) / max(len(a), len(b)) if a or b else 0.0
        return 1 - nl if nl < threshold else 0.0

    expected = max(map(similarity, references))
    assert anls(answer, references, threshold) == pytest.approx(expected)
    assert 0 <= expected <= 1


@pytest.mark.parametrize("threshold", [0, -0.5, 1.5, float("nan")])
def test_a_threshold_that_is_none_is_refused(threshold):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        metrics.ANLS(threshold)
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        anls("a", ["a"], threshold)


def test_other_nonsense_is_refused_by_anls():
    with pytest.raises(ValueError, match="'zero' or 'keep'"):
        metrics.ANLS(at_threshold="half")
    with pytest.raises(DataError, match="list of right answers"):
        anls("a", [])
    with pytest.raises(DataError, match="list of right answers"):
        anls("a", "a")


# Option letters.

OPTIONS = {"A": "Left kidney", "B": "Hepatitis B", "C": "Kidney", "D": "Vitamin C deficiency"}

NAMED = [
    *[(said, "B") for said in ("B", "b", "(B)", "B.", "b)", "[B]", "B:", "**B**", '"B"', " B\n")],
    *[(said, "B") for said in ("b) foo", "B. foo", "(b) foo", "B: foo", "B because of this")],
    *[(said, "B") for said in ("The answer is B", "The answer is (b).", "Answer: b", "answer B")],
    *[(said, "B") for said in ("Option B", "option b.", "I choose B.", "I think it is B")],
    *[(said, "B") for said in ("The correct answer is option B: Hepatitis B", "(Ｂ)")],
    ("A is ruled out, the answer is D.", "D"),
    # Texts of options.
    *[(said, "C") for said in ("Kidney", "kidney.", "the kidney", "a kidney", "C. Kidney")],
    *[(said, "C") for said in ("C kidney", "It shows a kidney", "The answer is a kidney")],
    *[(said, "A") for said in ("left kidney", "A left  kidney", "It is the LEFT kidney.")],
    # Letters within the texts of options, and of other words, name none.
    ("It shows hepatitis B", "B"),
    ("vitamin C deficiency", "D"),
    ("Vitamin C", None),
    ("hepatitis C", None),
    # A letter that may be a word.
    ("A", "A"),
    ("a", "A"),
    ("The answer is A", "A"),
    ("A is correct", "A"),
    ("A dog", None),
    ("The answer is a dog", None),
    # None, or several.
    *[(said, None) for said in ("", " ", "E", "(E)", "none of these", "ABCD", "Bär", "C's")],
    *[(said, None) for said in ("A or B", "B and C", "The answer is A or B", "(A) (B)", "A/B")],
    *[(said, None) for said in ("(A), (B)", "A. one\nB. two", "left kidney and hepatitis B")],
    ("A. Kidney", None),  # contradicts itself: A is the left one
]


@pytest.mark.parametrize(("answer", "letter"), NAMED, ids=[a or "empty" for a, _ in NAMED])
def test_the_letter_is_read_out_of_a_free_answer(answer, letter):
    assert option_letter(answer, OPTIONS) == letter


def test_options_may_be_numbered_and_keep_their_own_spelling():
    numbered = {"1": "one cat", "2": "two cats"}
    assert option_letter("2", numbered) == "2"
    assert option_letter("(1)", numbered) == "1"
    assert option_letter("2 dogs", numbered) is None
    assert option_letter("B", {"a": "x", "b": "y"}) == "b"
    assert option_letter("2", {"A": "1", "B": "2"}) == "B"
    assert option_letter("x", {"A": "x", "B": "x"}) is None


def test_letters_within_an_options_text_name_no_other_option():
    types = {"A": "Type (B) lesion", "B": "Other lesion", "C": "Stage B or D", "D": "None"}
    assert option_letter("I see a type (B) lesion here", types) == "A"
    assert option_letter("This looks like stage B or D to me", types) == "C"
    assert option_letter("(B), no type (B) lesion", types) == "B"


@given(st.sampled_from("ABCD"), st.sampled_from(["{}", "({})", "{}.", "{})", "Answer: {}"]))
@settings(deadline=None)
def test_a_letter_by_itself_is_always_read(letter, form):
    for written in (letter, letter.lower()):
        assert option_letter(form.format(written), OPTIONS) == letter


@given(st.text(max_size=30))
@settings(deadline=None)
def test_whatever_is_said_an_option_or_none_comes_out(answer):
    assert option_letter(answer, {**OPTIONS, "I": "İ", "K": "k.", "S": ""}) in {*"ABCDIKS", None}


def test_an_answer_that_names_no_option_is_wrong_and_counted_apart():
    metric = metrics.OptionLetter()
    asked = [question("B", number=i, options=OPTIONS) for i in range(4)]
    assert metric.score(["(b)", "A", "no idea", None], asked) == [
        {"option_letter": 1, "option_named": 1},
        {"option_letter": 0, "option_named": 1},
        {"option_letter": 0, "option_named": 0},
        {"option_letter": 0, "option_named": 0},
    ]


def test_questions_without_options_are_refused_and_named():
    asked = [question("A", options=OPTIONS), question("x", number=7)]
    with pytest.raises(DataError, match="1 of 2 questions have no options: 'q7'"):
        metrics.OptionLetter().score(["A", "A"], asked)
    with pytest.raises(DataError, match=r"'q3'.*single letters or digits"):
        metrics.OptionLetter().score(["A"], [question("no", number=3, options={"no": "x"})])
    with pytest.raises(DataError, match="no options"):
        option_letter("A", {})
    with pytest.raises(DataError, match="different single letters"):
        option_letter("A", {"A": "x", "a": "y"})


# Exact match, mentions.


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("The Two.", ["2"], 1),
        ("dog", ["cat", "a dog"], 1),
        ("dogs", ["dog"], 0),
        ("", ["dog"], 0),
        ("", [""], 1),
        # Nothing is left of an article: it must match neither another one nor nothing.
        ("A", ["a"], 1),
        ("A", ["the"], 0),
        ("", ["A"], 0),
    ],
)
def test_exact_match(answer, references, expected):
    assert exact_match(answer, references) == expected


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("There is a red circle.", ["red", "circle"], 1),
        ("There is a red circle.", ["red", "blue"], 1 / 2),
        ("There is a red circle.", ["Red\n circle"], 1),
        ("There is a red circle.", ["red", "red", "blue"], 1 / 2),
        ("Bored in a semicircle.", ["red", "circle"], 0),
        ("x-ray (left)", ["x-ray", "(left)", "ray"], 1),
        ("a.c", ["abc"], 0),
        ("DIE STRASSE", ["straße"], 1),
        ("", ["red"], 0),
    ],
)
def test_mentions(answer, references, expected):
    assert mentions(answer, references) == pytest.approx(expected)


def test_an_empty_word_cannot_be_mentioned():
    asked = [question("red"), question("red", " ", number=1)]
    with pytest.raises(DataError, match="1 of 2 questions are empty: 'q1'"):
        metrics.Mentions().score(["red"] * 2, asked)


# What all metrics have in common.


@pytest.mark.parametrize("metric", PLAIN, ids=lambda metric: metric.name)
def test_every_metric_has_its_main_number_for_every_answer(metric):
    options = {"A": "red", "B": "日本"}
    asked = [question(*"AAAAAAAAAA", number=i, options=options) for i in range(5)]
    answers = ["A", "", None, "日本 🎉\ud800", "a\x00\n" * 500]
    measured = metric.score(answers, asked)
    assert isinstance(metric, metrics.Metric)
    assert len(measured) == 5
    assert all(each.keys() == measured[0].keys() for each in measured)
    assert all(0 <= each[metric.name] <= 1 for each in measured)
    assert measured[1] == measured[2], "no answer is an empty answer"
    assert measured[1][metric.name] == 0
    assert metric.score([], []) == []


def test_the_right_answer_gets_1_from_every_metric():
    asked = question(*"AAAAAAAAAA", options={"A": "red", "B": "blue"})
    assert [one(metric, "A", asked)[metric.name] for metric in PLAIN] == [1] * len(PLAIN)


@pytest.mark.parametrize("metric", PLAIN, ids=lambda metric: metric.name)
def test_every_metric_refuses_questions_without_references_and_names_them(metric):
    asked = [question("x", "x", "x"), *(question(number=i) for i in range(1, 9))]
    with pytest.raises(DataError, match=r"8 of 9 .*'q1', .*'q5' and 3 more") as caught:
        metric.score(["x"] * 9, asked)
    assert metric.name in str(caught.value)


@pytest.mark.parametrize("metric", PLAIN, ids=lambda metric: metric.name)
def test_every_metric_refuses_answers_that_do_not_fit(metric):
    asked = [question("x", "x", "x", options=None)]
    with pytest.raises(DataError, match=r"2 answers were given .* for 1 questions"):
        metric.score(["x", "y"], asked)
    with pytest.raises(DataError, match="One text was given"):
        metric.score("x", asked)
    with pytest.raises(DataError, match="1 of 1 answers are none: those to 'q0'"):
        metric.score([3], asked)


@pytest.mark.parametrize("metric", PLAIN, ids=lambda metric: metric.name)
def test_settings_are_json_and_name_the_metric(metric):
    assert json.loads(json.dumps(metric.settings)) == metric.settings
    assert metric.settings["metric"] == metric.name


def test_settings_tell_metrics_apart_that_differ():
    pairs = [
        (metrics.ANLS(), metrics.ANLS(0.4)),
        (metrics.ANLS(), metrics.ANLS(at_threshold="keep")),
        (metrics.VQAAccuracy(), metrics.VQAAccuracy(literal=True)),
    ]
    assert all(a.settings != b.settings for a, b in pairs)

"""The reward function: exact rules, hostile responses, and nothing in the package that executes text."""

# ruff: noqa: RUF001 (strings of many scripts)

import re
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rewards import GOOD, PROPERTY, marks

from sayo_verl.errors import SayoError
from sayo_verl.reward import (
    compute_score,
    normalise,
    split_response,
    why_not_gradable,
)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (GOOD, (1, 1)),
        ("<think></think><answer>red</answer>", (1, 1)),
        ("\n <think>a\nb</think>\n\n<answer>\nred\n</answer>\t\n", (1, 1)),
        ("<think>x</think><answer>blue</answer>", (1, 0)),
        ("<think>1 < 2 </b> & <ans></think><answer>red</answer>", (1, 1)),  # other angle brackets are text
        # the answer is right, the format is not
        ("<answer>red</answer>", (0, 1)),
        ("so: <think>x</think><answer>red</answer>", (0, 1)),
        ("<think>x</think><answer>red</answer> done", (0, 1)),
        ("<think>x</think> and <answer>red</answer>", (0, 1)),
        ("<answer>red</answer><think>x</think>", (0, 1)),
        ("<think>x<answer>red</answer></think>", (0, 1)),
        ("</think>x<think><answer>red</answer>", (0, 1)),
        ("<think>x<answer>red</answer>", (0, 1)),
        ("<think>x<answer>red</think></answer>", (0, 0)),
        ("<think>x<answer></think>red</answer>", (0, 0)),
        ("x</think><answer>red</answer>", (0, 1)),
        ("<think>x</think><think>y</think><answer>red</answer>", (0, 1)),
        ("<think><think>x</think></think><answer>red</answer>", (0, 1)),
        # no single answer block
        ("", (0, 0)),
        ("   \n", (0, 0)),
        ("red", (0, 0)),
        ("<think>red</think>", (0, 0)),
        ("<think>x</think><answer>red", (0, 0)),
        ("<think>x</think>red</answer>", (0, 0)),
        ("<think>x</think></answer>red<answer>", (0, 0)),
        ("<think>x</think><answer>red</answer><answer>blue</answer>", (0, 0)),
        ("<think>x</think><answer>blue</answer><answer>red</answer>", (0, 0)),
        ("<think>x</think><answer><answer>red</answer></answer>", (0, 0)),
        ("<think>x</think><answer>red</answer></answer>", (0, 0)),
        ("<think><answer>red</answer></think><answer>red</answer>", (0, 0)),
        # an empty answer is no answer
        ("<think>x</think><answer></answer>", (0, 0)),
        ("<think>x</think><answer> \n </answer>", (0, 0)),
        # tags are exact
        ("<Think>x</Think><Answer>red</Answer>", (0, 0)),
        ("<think >x</think><answer>red</answer>", (0, 1)),
        ("< think>x</think>< answer>red</answer>", (0, 0)),
        ("<think/>x</think><answer>red</answer>", (0, 1)),
    ],
)
def test_format_and_accuracy(response, expected):
    assert marks(response) == expected


@pytest.mark.parametrize(
    ("answer", "truth", "same"),
    [
        ("Red", "red", True),
        ("RED.", "red", True),
        ("  red \n", "red", True),
        ("the red", "red", True),
        ("a  red   circle", "red circle", True),
        ("an apple", "apple", True),
        ('"red"', "red", True),
        ("(red)", "red", True),
        ("The Red!", "red", True),
        ("red", "Red.", True),
        ("\uff52\uff45\uff44", "red", True),
        ("\uff13", "3", True),
        ("cafe\u0301", "café", True),
        ("\ufb01ve", "five", True),
        ("3", 3, True),
        ("red\u00a0circle", "red circle", True),
        ("3", "3.0", True),
        ("3", 3.0, True),
        ("1,000", "1000", True),
        ("r\u200bed", "red", True),
        ("\u2462", "3", False),
        ("3", "4", False),
        ("red blue", "red", False),
        ("reds", "red", False),
        ("red or blue", "red", False),
        ("re d", "red", False),
        ("theory", "ory", False),
        ("anred", "red", False),
        ("not red", "red", False),
        ("-1", "1", False),
    ],
)
def test_answers_are_compared_after_normalising(answer, truth, same):
    assert compute_score("", f"<answer>{answer}</answer>", truth)["acc"] == same


@pytest.mark.parametrize(
    ("answer", "truth", "same"),
    [
        # wrapped, but right
        ("“red”", "red", True),
        ("«red»", "red", True),
        ("‹red›", "red", True),
        ("„red“", "red", True),
        ("「红色」", "红色", True),
        ("『红色』。", "红色", True),
        ("《红色》", "红色", True),
        ("红色。", "红色", True),
        ("红色！", "红色", True),
        ("أحمر،", "أحمر", True),
        ("أحمر؟", "أحمر", True),
        ("लाल।", "लाल", True),
        ("¿Rojo?", "rojo", True),
        ("`red`", "red", True),
        ("**red**", "red", True),
        ("**Red.**", "red", True),
        ("_red_", "red", True),
        ("~~red~~", "red", True),
        ("\u200bred\ufeff", "red", True),
        ("\u200fred\u200e", "red", True),
        ("\u2066red\u2069", "red", True),
        ("re\u00add", "red", True),
        ("red…", "red", True),
        ("ＲＥＤ．", "red", True),
        ("Straße", "STRASSE", True),
        ("(red)!", "red", True),
        ("don't", "don’t", True),
        ("red's", "reds", False),
        ("Men’s", "Men's", True),
        ("O’Brien", "O'Brien", True),
        ("oʼbrien", "O‛Brien", True),
        ("5′", "5'", True),
        ("5″", '5"', True),
        ("the “Queen” hotel", 'the "Queen" hotel', True),
        ("Mens", "Men's", False),
        ("5′", "5″", False),
        ("A'", "A", False),
        ("f′", "f", False),
        ("n!", "n", False),
        ("(n)!", "n", False),
        ("f(x)'", "f(x)", False),
        ("2n!", "2n", False),
        ("sin(x)", "sin(x).", True),
        ("__init__", "init", False),
        ("__the one__", "the one", True),
        ("red!", "red", True),
        ("Vitamin C!", "vitamin C", True),
        ("“A”", "A", True),
        ("'A'", "A", True),
        ('"A\'"', "A'", True),
        ("“A”.", "A", True),
        ("红！", "红", True),
        ("5»", "5", True),
        ("the boys’", "boys", True),
        # spacing
        ("a,b", "a, b", True),
        ("(1,2)", "(1, 2)", True),
        ("a ;b", "a; b", True),
        ("50 %", "50%", True),
        ("1, 200", "1200", False),
        ("1,200", "1200", True),
        ("(100,200)", "(100, 200)", True),
        ("a,b", "ab", False),
        ("$x$", "x", True),
        (r"\(3\)", "3", True),
        ("$5$ or $6$", "5$ or $6", False),
        ("**“1,200”**", "1200", True),
        # letters of a choice
        ("(A)", "A", True),
        ("A)", "A", True),
        ("[B]", "B", True),
        ("A.", "A", True),
        ("(A)", "B", False),
        ("A B", "B", False),
        ("A, B", "B", False),
        ("the A", "a", True),
        # numbers
        (".5", "0.5", True),
        ("0.50", ".5", True),
        ("3.", "3", True),
        ("+3", "3", True),
        ("“3.0”", "3", True),
        ("1,000,000.0", "1000000", True),
        ("−3", "-3", True),
        ("–3", "-3", True),
        ("٣", "3", True),
        ("३.५", "3.5", True),
        ("-0", "0", True),
        (".5", "5", False),
        ("-3", "3", False),
        ("1,00", "100", False),
        ("1,0000", "10000", False),
        ("3.1", "3", False),
        ("007", "7", False),
        ("1e3", "1000", False),
        ("50%", "50", False),
        ("$5", "5", False),
        ('5"', "5", False),
        ("5'", '5"', False),
        ("...5", "5", False),
        (",5", "5", False),
        ("5°", "5", False),
        # marks that mean something
        ("5!", "5", False),
        ("5！", "5", False),
        ("5!!", "5!", False),
        ("(n-1)!", "(n-1)", False),
        ("10⁵", "105", False),
        ("x²", "x2", False),
        ("H₂O", "H2O", False),
        ("½", "1/2", False),
        ("1½", "11/2", False),
        ("①", "1", False),
        ("2\u20623", "23", False),
        ("[0,1)", "(0,1]", False),
        ("(0,1)", "[0,1]", False),
        ("{1,2}", "(1,2)", False),
        ("[0, 1)", "[0,1)", True),
        ("{3}", "3", False),
        ("*a* and *b*", "a* and *b", False),
        ("a-b", "ab", False),
        ("!", "!!", False),
    ],
    ids=ascii,
)
def test_what_stands_around_an_answer_and_what_belongs_to_it(answer, truth, same):
    assert (normalise(answer) == normalise(truth) != "") == same
    assert (normalise(truth) == normalise(answer) != "") == same


ODD = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "a ",
                "the ",
                "5",
                "0",
                "!",
                ".",
                ",",
                "(",
                ")",
                "[",
                "]",
                "{",
                "}",
                "*",
                "**",
                "_",
                '"',
                "“",
                "”",
                "»",
                " ",
                "\u200b",
                "²",
                "٣",
                "-",
                "−",
                "'",
                "¿",
                "\u0301",
                "\ufb01",
                "\u212b",
                "ß",
                "\u0130",
                "Ⅳ",
                "ﷺ",
                "。",
                "㎡",
            ]
        ),
        st.text(max_size=2),
    ),
    max_size=8,
).map("".join)


@settings(PROPERTY, max_examples=500)
@given(text=ODD)
def test_normalising_twice_changes_nothing(text):
    assert normalise(normalise(text)) == normalise(text)


@PROPERTY
@given(
    word=st.text(st.characters(categories=["Ll", "Lo"], max_codepoint=0x2FFF), min_size=1, max_size=12),
    quotes=st.sampled_from(['""', "“”", "«»", "»«", "„“", "‘’", "「」", "『』", "‹›", "``", "__"]),
    end=st.sampled_from(["", ".", "。", "！", "؟", "।", "\u200b", " \n"]),
)
def test_a_right_word_in_quotation_marks_is_right(word, quotes, end):
    formula = len(word) == 1 and end == "！"  # "n!" is not "n"
    if why_not_gradable(word) is None and not formula:
        assert marks(f"<answer>{quotes[0]}{word}{end}{quotes[1]}{end}</answer>", word)[1] == 1


@PROPERTY
@given(number=st.from_regex(r"-?(0|[1-9][0-9]{0,5})(\.[0-9]{1,4})?", fullmatch=True), data=st.data())
def test_a_number_with_another_digit_is_wrong(number, data):
    assert marks(f"<answer>{number}</answer>", number)[1] == 1
    place = data.draw(st.sampled_from([i for i, c in enumerate(number) if c.isdigit()]))
    digit = data.draw(st.sampled_from([d for d in "0123456789" if d != number[place]]))
    assert marks(f"<answer>{number[:place]}{digit}{number[place + 1 :]}</answer>", number)[1] == 0


@PROPERTY
@given(value=st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False)))
def test_a_number_as_a_truth_is_equalled_by_its_decimal_text(value):
    assert marks(f"<answer>{Decimal(str(value)):f}</answer>", value)[1] == 1


@pytest.mark.parametrize("truth", ["", " ", "?", "。", "“”", "\u200b", "[]"], ids=ascii)
def test_a_truth_of_punctuation_equals_nothing(truth):
    for answer in (truth, "!", "?", "red", "。", "()"):
        assert compute_score("", f"<think>x</think><answer>{answer}</answer>", truth)["acc"] == 0


@pytest.mark.parametrize("truth", [None, ["red"], True, "<answer>red</answer>", float("inf"), "#### 3"], ids=str)
def test_a_truth_that_cannot_be_graded_is_never_graded(truth):
    for response in (GOOD, "", "<answer>None</answer>", f"<answer>{truth}</answer>"):
        with pytest.raises(SayoError, match=r"^SAYO-D70: .* \| at reward_model.ground_truth \| got .*fix: "):
            compute_score("", response, truth)


@pytest.mark.parametrize(
    "truth",
    [
        "red",
        "3",
        3,
        3.0,
        0,
        1e-7,
        "None",
        "a",
        "-3",
        "x < y",
        "10⁵",
        "[0,1)",
        "%",
        "+",
        "The red one.",
        "<b>",
        "The answer is blowing in the wind",
        "a saline solution",
        "answer",
        "The solution is clear",
        "<s>",
    ],
)
def test_truths_that_an_answer_can_equal(truth):
    assert why_not_gradable(truth) is None


@pytest.mark.parametrize(
    ("truth", "reason"),
    [
        (None, "null"),
        (["red"], "list"),
        ({"a": 1}, "dict"),
        (True, "bool"),
        (float("nan"), "float"),
        (b"red", "bytes"),
        (Fraction(1, 3), "Fraction"),
        ("", "empty"),
        (" \n", "empty"),
        ("?", "punctuation"),
        ("。", "punctuation"),
        ("“”", "punctuation"),
        ("\u200b", "invisible"),
        ("[]", "punctuation"),
        ("<answer> 3 </answer>", "<answer>"),
        ("</Think>3", "</Think>"),
        ("3<|im_end|>", "<|im_end|>"),
        ("\\boxed{3}", "boxed"),
        ("2 + 1 = 3\n#### 3", "####"),
        ("It is round. So the answer is red.", "the answer is"),
        ("Answer: red", "Answer:"),
        ("**Answer:** B", "Answer:"),
        ("**Answer**: B", "Answer**:"),
        ("Ans: B", "Ans:"),
        ("The answer: B", "The answer:"),
        ("Correct answer: B", "Correct answer:"),
        ("Solution: 5", "Solution:"),
        ("答案：B", "答案："),
        ("<analysis>x</analysis>B", "<analysis>"),
        ("B</s>", "</s>"),
        ("The answer is **B**", "answer is"),
        ("the correct answer is:\nthe very long way round", "answer is:"),
        ("The answer is 3.5. Done", "answer is"),
        ("x" * 20_000, "20000"),
    ],
)
def test_truths_that_no_answer_can_equal_are_named(truth, reason):
    assert reason in why_not_gradable(truth)


def test_an_article_alone_is_kept():
    assert [normalise(word) for word in ("a", "The", "an", "the the", "A B")] == ["a", "the", "an", "the", "a b"]


@pytest.mark.parametrize(
    ("response", "format"),
    [
        ("x</think><answer>red</answer>", 1),
        ("\nx\n</think>\n\n<answer>red</answer>", 1),
        ("</think><answer>red</answer>", 1),
        ("<think>x</think><answer>red</answer>", 0),
        ("<answer>red</answer>", 0),
        ("x</think></think><answer>red</answer>", 0),
    ],
)
def test_a_think_block_that_the_prompt_has_opened(response, format):
    assert compute_score("", response, "red", think_opened=True) == {
        "score": format + 1.0,
        "acc": 1.0,
        "format": format,
    }


RELEASED = [
    ("so <answer>red</answer> it is", 1, 1),
    ("<answer>red</answer>", 1, 1),
    (GOOD, 1, 1),
    ("<answer></answer>", 1, 0),
    ("<answer>blue</answer><answer>red</answer>", 1, 1),
    ("<answer>red</answer><answer>blue", 0, 0),
    ("<answer><answer>red</answer>", 1, 1),
    ("<answer>red</answer></answer>", 1, 1),
    ("</answer>red<answer>", 0, 0),
    ("red", 0, 0),
    ("", 0, 0),
    ("<answer>red", 0, 0),
    ("red</answer>", 0, 0),
]


@pytest.mark.parametrize(("response", "format", "acc"), RELEASED)
def test_the_released_format(response, format, acc):
    found = compute_score("", response, "red", format="released")
    assert (found["format"], found["acc"]) == (format, acc)
    assert compute_score("", response, "red", format="released", think_opened=True) == found


@PROPERTY
@given(parts=st.lists(st.sampled_from(["<answer>", "</answer>", "<think>", "x", "\n"]), max_size=10))
def test_the_released_format_is_the_last_block_being_closed(parts):
    """The released rule: the last opening tag is followed, anywhere, by a closing one."""
    response = "".join(parts)
    wanted = re.search(r"<answer>(?!.*<answer>).*?</answer>", response, re.DOTALL) is not None
    assert split_response(response, format="released")[0] == wanted


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({}, 2.0),
        ({"format_weight": 0.5, "accuracy_weight": 0.0}, 0.5),
        ({"accuracy_weight": 0.25}, 1.25),
        ({"format_weight": 0.0, "accuracy_weight": 3.0}, 3.0),
    ],
)
def test_weights(weights, expected):
    assert compute_score("", GOOD, "red", **weights) == {"score": expected, "acc": 1.0, "format": 1.0}


def test_a_wrong_answer_scores_its_format_and_a_malformed_one_its_accuracy():
    weights = {"format_weight": 0.5, "accuracy_weight": 2.0}
    assert compute_score("", GOOD, "blue", **weights) == {"score": 0.5, "acc": 0.0, "format": 1.0}
    assert compute_score("", "<answer>red</answer>", "red", **weights) == {"score": 2.0, "acc": 1.0, "format": 0.0}


def test_what_verl_passes_besides_is_taken():
    assert compute_score("sayo/scenes", GOOD, "red", {"boxes": []}, reward_router_address=None)["score"] == 2.0
    assert compute_score(data_source="", solution_str=GOOD, ground_truth="red", extra_info=None)["score"] == 2.0

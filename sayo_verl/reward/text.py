"""Comparison of answers as text, and the check of ground truths.

Two answers are equal if their normal forms are equal and not empty. ``normalise`` computes the normal form:

 - Characters. Canonical composition (NFC) and case folding. Compatible characters (full width, ligatures) become one
   character. Superscripts, subscripts, fractions and circled numbers stay, because "10⁵" is not "105". Decimal digits
   of any script become ASCII digits. Dashes and the minus sign become "-", apostrophes and primes "'", double ones '"'.
   Invisible characters are dropped: zero-width characters, byte order marks, direction marks. White space is
   collapsed. A character keeps at most 30 combining marks, because the time of composition grows with the square of
   their number.
 - Ends. Quotation marks of any script, paired Markdown emphasis (``**red**``, ``_red_``, ``~~red~~``) and sentence
   punctuation of any script are dropped. ``__red__`` stays, because names in programs have this form (``__init__``).
   Punctuation directly before a digit stays (".5"). Directly after a digit or a formula, "!" stays ("5!", "n!",
   "(n-1)!"), and so does a quotation mark without an equal one in front (5", "f'"). A formula ends in a letter or a
   bracket and has no two letters in a row, or ends in a bracket and has a digit or an operator.
 - Brackets. "(A)", "(A", "A)" are "A", "[red]" is "red", "(3)" is "3". Brackets stay around anything with a separator
   or another bracket in it ("[0,1)", "(0,1]", "{a, b}"), and around a number if they are square or curly.
 - Articles. A leading "the" or "an" is dropped, and a leading "a" unless a single letter follows ("A B").
 - Numbers. Plain decimal numbers are equal by value: "3", "3.0" and "+3."; ".5" and "0.5"; "1,000" and "1000", with
   exact groups of three. Exponents, fractions, percentages and units are text. So is a number with a leading zero
   ("007").
 - Spacing. One "$...$" or "\\(...\\)" around everything is dropped. Except in a plain number, one space follows a comma
   or semicolon between two parts ("(1,2)" is "(1, 2)"), and no space separates a digit from "%".
"""

import decimal
import numbers
import unicodedata
from functools import lru_cache

import regex

# A response is cut here, so no answer is longer.
MAX_CHARACTERS = 65_536
# Longer truths are refused: their answers would be too long to normalise in bounded time.
MAX_TRUTH_CHARACTERS = 16_384
SLACK_CHARACTERS = 1024
TAGS = ("<think>", "</think>", "<answer>", "</answer>")

# Compatibility forms whose meaning differs from their decomposition.
_MEANINGFUL = ("<super>", "<sub>", "<fraction>", "<circle>")
_TRANSLATED = {
    "\N{ARABIC DECIMAL SEPARATOR}": ".",
    "\N{ARABIC THOUSANDS SEPARATOR}": ",",
    "\N{MINUS SIGN}": "-",
    "\N{ACUTE ACCENT}": "'",
    **dict.fromkeys(
        "`\N{LEFT SINGLE QUOTATION MARK}\N{RIGHT SINGLE QUOTATION MARK}\N{PRIME}"
        "\N{SINGLE HIGH-REVERSED-9 QUOTATION MARK}\N{MODIFIER LETTER APOSTROPHE}",
        "'",
    ),
    **dict.fromkeys(
        "\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}\N{DOUBLE LOW-9 QUOTATION MARK}\N{DOUBLE PRIME}",
        '"',
    ),
    "【": "[",
    "】": "]",
}
# Invisible operators separate their neighbours, because 2 times 3 is not 23.
_UNSEEN = regex.compile(r"(?![\u2061-\u2064])[\p{Cf}\p{Cc}\p{Default_Ignorable_Code_Point}]")
_MARKS = regex.compile(r"(\p{M}{30})\p{M}+")
_OPERATOR = regex.compile(r"[\d+*/^-]")
_SYMBOL = regex.compile(r"[\p{Latin}\p{Greek})\]}]")
_WORD = regex.compile(r"\p{L}{2}")
_QUOTE = regex.compile(r"[\p{Quotation_Mark}《》〈〉]")
_PUNCTUATION = regex.compile(r"[\p{Terminal_Punctuation}¿¡]")
_MATH = regex.compile(r"\$([^$]+)\$|\\\(((?:(?!\\[()]).)+)\\\)")
_SEPARATOR = regex.compile(r"(?<=[^\s.,;:!?¿¡]) *([,;]) *(?=[^\s\p{Terminal_Punctuation}])")
_PERCENT = regex.compile(r"(?<=\d) +(?=%)")
_EMPHASIS = ("***", "**", "*", "___", "__", "_", "~~")
_ROUND = regex.compile(r"\(([^()\[\]{},;:|]+)\)")
_SQUARE = regex.compile(r"[\[{](?=\p{L})([^()\[\]{},;:|]+)[\]}]")
_LETTER = regex.compile(r"\(?(\p{L})\)?")
_ARTICLE = regex.compile(r"(?:(?:the|an) |a (?=\w\w|\d))+(?=\S)")
_NUMBER = regex.compile(r"([-+]?)(0|[1-9]\d*|[1-9]\d{0,2}(?:,\d{3})+)?(?:\.(\d*))?")
# Markup of a response, which shows that a ground truth contains more than the answer.
_MARKUP = regex.compile(
    r"(?i)</?\s*(?:think(?:ing)?|thought|answer|reason(?:ing)?|rationale|reflection|analysis|solution|conclusion|image|video)\s*/?>"
    r"|<\|.{1,40}?\|>|</s>"
)
# A label with a colon, or "the answer is" and at most three words. More words may be an answer ("... blowing in the
# wind").
_THOUGHT = regex.compile(
    r"(?im)####|\bfinal answer\b|答案[*_ ]*[:\uff1a]"
    r"|(?:^[ \t*_#>-]*(?:the )?|\bthe )(?:correct |right )?"
    r"(?:(?:answer|ans|solution)[*_ ]*[:\uff1a]|answer is(?:[*_ ]*[:\uff1a]|(?:\s+\S+){1,3}?(?:$|[.!。](?=\s))))"
)
_BOXED = regex.compile(r"\\(?:boxed|fbox)\b")


@lru_cache(maxsize=4096)
def _fold(character: str) -> str:
    """Return one character in its form for comparison."""
    if character in _TRANSLATED:
        return _TRANSLATED[character]
    category = unicodedata.category(character)
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if category == "Pd":
        return "-"
    if unicodedata.decomposition(character).startswith(_MEANINGFUL):
        return character
    return unicodedata.normalize("NFKC", character)


@lru_cache(maxsize=4096)
def _kind(character: str) -> str:
    """``"quote"``, ``"punctuation"``, ``"space"``, or ``""`` for a character that stays at the ends of an answer."""
    if _QUOTE.match(character):
        return "quote"
    if _PUNCTUATION.match(character):
        return "punctuation"
    return "space" if character.isspace() else ""


def _characters(text: str) -> str:
    """Apply the rule on characters."""
    text = _MARKS.sub(r"\1", text)
    while True:
        folded = unicodedata.normalize("NFC", "".join(map(_fold, " ".join(text.split()))).casefold())
        folded = " ".join(_UNSEEN.sub("", " ".join(folded.split())).split())
        if folded == text:
            return text
        text = folded


def _ends(text: str) -> str:
    """Apply the rule on ends, without emphasis."""
    first, last = 0, len(text)
    while first < last and _kind(text[first]):
        first += 1
    while last > first and _kind(text[last - 1]):
        last -= 1
    if first == last:
        return ""
    opened, core = text[:first], text[first:last]
    if text[first].isdigit():
        while first > 0 and text[first - 1] not in "¿¡" and _kind(text[first - 1]) == "punctuation":
            first -= 1
    if core[-1].isdigit() or _is_formula(core):
        while last < len(text) and (text[last] == "!" or (text[last] in "'\"" and text[last] not in opened)):
            last += 1
    return text[first:last]


def _is_formula(text: str) -> bool:
    """Whether "!" and "'" after a text have a meaning; see the rule on ends."""
    if text[-1] in ")]}" and _OPERATOR.search(text):
        return True
    return bool(_SYMBOL.match(text[-1])) and not _WORD.search(text)


def _emphasis(text: str) -> str:
    """Remove a pair of Markdown marks around a text that does not contain them elsewhere."""
    for mark in _EMPHASIS:
        inner = text[len(mark) : -len(mark)]
        if text.startswith(mark) and text.endswith(mark) and inner.strip("*_~ ") and mark not in inner:
            return text if mark == "__" and inner.isascii() and inner.isidentifier() else inner
    return text


def _number(text: str) -> str:
    """Return a plain decimal number as the shortest text of its value, and other text unchanged."""
    found = _NUMBER.fullmatch(text)
    if not found or not (found[2] or found[3]):
        return text
    whole, part = (found[2] or "0").replace(",", ""), (found[3] or "").rstrip("0")
    value = f"{whole}.{part}" if part else whole
    return f"-{value}" if found[1] == "-" and value != "0" else value


def _spacing(text: str) -> str:
    """Apply the rule on spacing, except to numbers, because a space after the comma of "1,200" would hide its value."""
    return _PERCENT.sub("", _SEPARATOR.sub(r"\1 ", text))


def normalise(answer: str) -> str:
    """Return the normal form of an answer, empty if nothing of it can be compared. See the rules above."""
    text = _characters(answer)
    while True:
        shorter = _emphasis(_ends(text))
        if found := _MATH.fullmatch(shorter):
            shorter = found[1] or found[2]
        for brackets in (_LETTER, _ROUND, _SQUARE):
            shorter = brackets.sub(r"\1", shorter) if brackets.fullmatch(shorter) else shorter
        shorter = _ARTICLE.sub("", shorter) if _ARTICLE.match(shorter) else shorter
        if shorter == text:
            if not text.strip("()[]{} "):
                return ""
            return _number(text) if _NUMBER.fullmatch(text) else _spacing(text)
        text = shorter


def truth_text(ground_truth: object) -> str | None:
    """Return a ground truth as text, numbers without an exponent; None for neither text nor a finite number."""
    if isinstance(ground_truth, str):
        return ground_truth
    if isinstance(ground_truth, bool) or not isinstance(ground_truth, (numbers.Real, decimal.Decimal)):
        return None
    try:
        value = decimal.Decimal(str(ground_truth))
    except decimal.InvalidOperation:  # fractions.Fraction(1, 3)
        return None
    return format(value, "f") if value.is_finite() else None


def why_not_gradable(ground_truth: object, *, judge: str = "text") -> str | None:
    """Return why a ground truth cannot be graded.

    Args:
        ground_truth: ``reward_model.ground_truth`` of a row, of any type.
        judge: how answers are compared, ``"text"`` or ``"math"``.

    Returns:
        The reason in a few words, or None for a truth that can be graded.
    """
    if ground_truth is None:
        return "it is null"
    text = truth_text(ground_truth)
    if text is None:
        return f"it is {ground_truth!r:.40} ({type(ground_truth).__name__}), neither text nor a finite number"
    if not text.strip():
        return "it is empty"
    if len(text) > MAX_TRUTH_CHARACTERS:
        return f"it has {len(text)} characters, more than {MAX_TRUTH_CHARACTERS}"
    markup = _MARKUP.search(text)
    if markup:
        return f"it contains the tag {markup.group()}"
    if judge == "text" and _BOXED.search(text):
        return "it contains \\boxed{}, but answers are in <answer>"
    thought = _THOUGHT.search(text)
    if thought:
        return f"it contains {thought.group().strip()!r}, so it is a solution and not only its answer"
    if not normalise(text):
        return "it has only punctuation or invisible characters, so there is nothing to compare"
    return None

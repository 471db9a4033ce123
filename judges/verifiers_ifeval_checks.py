"""The checks of IFEval's instructions, by id: whether a text that is not blank follows one.

Zhou et al. (2023), arXiv:2311.07911; what each means is as in the authors' instructions.py, where
the paper leaves it open. Words are runs of letters, digits and underscores. Two differences:
keywords are taken literally, where theirs are regular expressions, and sentences end as in
`count_sentences`, where theirs are found by NLTK.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

from online_dpo.errors import ConfigError

RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "less than": lambda count, limit: count < limit,
    "at least": lambda count, limit: count >= limit,
    # Of other data sets in the same form.
    "at most": lambda count, limit: count <= limit,
    "more than": lambda count, limit: count > limit,
    "exactly": lambda count, limit: count == limit,
}

CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")

_FENCES = ("```json", "```Json", "```JSON", "```")
_ABBREVIATION = re.compile(r"\b(?:[A-Za-z]|Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|cf|No)\Z")
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|\Z)|[。！？]+")


class BadArguments(ValueError):
    """An instruction of a prompt that cannot be checked; the text says why."""


def keyword_existence(text: str, keywords: Sequence[str]) -> bool:
    """Every keyword occurs, in whatever case, inside longer words too."""
    return all(_occurrences(text, keyword) for keyword in keywords)


def keyword_frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    """A keyword occurs so often, in whatever case."""
    return _holds(relation, len(_occurrences(text, keyword.strip())), frequency)


def forbidden_words(text: str, forbidden_words: Sequence[str]) -> bool:
    """None of the words occurs as a whole word, in whatever case."""
    return not any(
        re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words
    )


def letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    """A letter occurs so often, in whatever case."""
    return _holds(let_relation, text.lower().count(letter.strip().lower()), let_frequency)


def response_language(text: str, language: str) -> bool:
    """The text is in the language of an ISO 639-1 code, which takes a sentence or two to see."""
    return detect_language(text) == language


def number_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _holds(relation, count_sentences(text), num_sentences)


def number_words(text: str, num_words: int, relation: str) -> bool:
    return _holds(relation, len(re.findall(r"\w+", text)), num_words)


def number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """So many paragraphs, separated by the line `***`; none between two of them is empty."""
    parts = re.split(r"\s?\*\*\*\s?", text)
    return _num_filled(parts) == num_paragraphs


def nth_paragraph_first_word(
    text: str, num_paragraphs: int, nth_paragraph: int, first_word: str
) -> bool:
    """So many paragraphs, separated by empty lines, and the n-th (from 1) begins with the word."""
    paragraphs = text.split("\n\n")
    num_filled = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    if not 1 <= nth_paragraph <= num_filled or num_filled != num_paragraphs:
        return False
    words = paragraphs[nth_paragraph - 1].split()
    if not words:
        return False
    begun = re.split(r"[.,?!'\"]", words[0].lstrip("'\""))[0]
    return begun.lower() == first_word.lower()


def number_placeholders(text: str, num_placeholders: int) -> bool:
    """At least so many placeholders in square brackets, such as [address]."""
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def postscript(text: str, postscript_marker: str) -> bool:
    """There is a postscript after the marker, P.S. or P.P.S, whatever its spaces and case."""
    marker = postscript_marker.strip()
    spaced = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(spaced.get(marker, re.escape(marker.lower())), text.lower()) is not None


def number_bullet_lists(text: str, num_bullets: int) -> bool:
    """Exactly so many lines are bullet points: `* ...` or `- ...`."""
    stars = re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE)
    return len(stars) + len(re.findall(r"^\s*-.*$", text, re.MULTILINE)) == num_bullets


def constrained_response(text: str) -> bool:
    """One of the three sentences of `CONSTRAINED` stands in the text."""
    return any(sentence in text for sentence in CONSTRAINED)


def number_highlighted_sections(text: str, num_highlights: int) -> bool:
    """At least so many parts are highlighted: *...* or **...**, within a line, not empty."""
    single = re.findall(r"\*[^\n\*]*\*", text)
    double = re.findall(r"\*\*[^\n\*]*\*\*", text)
    return sum(bool(part.strip("* ")) for part in (*single, *double)) >= num_highlights


def multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    """At least so many sections, each begun by the splitter and a number, such as SECTION 1."""
    begun = re.split(rf"\s?{re.escape(section_spliter.strip())}\s?\d+\s?", text)
    return len(begun) - 1 >= num_sections


def json_format(text: str) -> bool:
    """The text is JSON as a whole, in a code fence or not."""
    text = text.strip()
    for fence in _FENCES:
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def title(text: str) -> bool:
    """A title stands in double angular brackets: <<poem of joy>>."""
    return any(found.lstrip("<").rstrip(">").strip() for found in re.findall(r"<<[^\n]+>>", text))


def two_responses(text: str) -> bool:
    """Two different answers, separated by six asterisks."""
    parts = text.split("******")
    filled = [part.strip() for part in parts if part.strip()]
    return _num_filled(parts) == 2 and filled[0] != filled[1]


def repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    """The text begins with the request, in whatever case."""
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(text: str, end_phrase: str) -> bool:
    """The text ends with the phrase, in whatever case, a closing quotation mark aside."""
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(text: str) -> bool:
    """The text stands in double quotation marks."""
    text = text.strip()
    return len(text) > 1 and text.startswith('"') and text.endswith('"')


def capital_word_frequency(text: str, capital_frequency: int, capital_relation: str) -> bool:
    """So many words are all in capitals."""
    capital = [word for word in re.findall(r"\w+(?:['’-]\w+)*", text) if word.isupper()]
    return _holds(capital_relation, len(capital), capital_frequency)


def english_capital(text: str) -> bool:
    """In English, without small letters."""
    return text.isupper() and detect_language(text) == "en"


def english_lowercase(text: str) -> bool:
    """In English, without capitals."""
    return text.islower() and detect_language(text) == "en"


def no_comma(text: str) -> bool:
    return "," not in text


CHECKS: dict[str, Callable[..., bool]] = {
    "keywords:existence": keyword_existence,
    "keywords:frequency": keyword_frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
}
"""All 25 instructions of IFEval."""


def count_sentences(text: str) -> int:
    """Sentences by their ends: . ! ? before a space or the end, not after an abbreviation.

    A last one without an end counts.
    """
    count, start = 0, 0
    for end in _SENTENCE_END.finditer(text):
        sentence = text[start : end.start()]
        if end[0] == "." and end.end() < len(text) and _ABBREVIATION.search(sentence):
            continue
        count += any(map(str.isalnum, sentence))
        start = end.end()
    return count + any(map(str.isalnum, text[start:]))


def detect_language(text: str) -> str:
    """The ISO 639-1 code of a text's language. Raises ConfigError without py3langid."""
    try:
        import py3langid
    except ImportError:
        raise ConfigError(
            "A prompt's instruction asks for a language, and telling it takes the package "
            "py3langid: pip install 'online-dpo[verifiers]'."
        ) from None
    code: str = py3langid.classify(text.lower())[0]
    return code


def _occurrences(text: str, keyword: str) -> list[str]:
    return re.findall(re.escape(keyword), text, re.IGNORECASE)


def _holds(relation: str, count: int, limit: int) -> bool:
    if relation not in RELATIONS:
        raise BadArguments(f"a relation is one of {', '.join(RELATIONS)}, not {relation!r}")
    return RELATIONS[relation](count, limit)


def _num_filled(parts: Sequence[str]) -> int:
    """Parts that are not blank; -1 where a blank one stands between others."""
    if not all(part.strip() for part in parts[1:-1]):
        return -1
    return sum(bool(part.strip()) for part in parts)

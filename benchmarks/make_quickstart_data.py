"""Writes the prompt sets and demonstrations of the quickstart (short reviews) and of arithmetic.

    python benchmarks/make_quickstart_data.py [FOLDER]

The same seed gives the same bytes. The reviews come from a small grammar without recursion, so a
text's membership in it is decided exactly, by `is_well_formed`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

SEED = 7
NUM_REVIEW_PROMPTS, NUM_REVIEW_EVAL, NUM_REVIEW_DEMONSTRATIONS = 384, 192, 5000
NUM_SUM_PROMPTS, NUM_SUM_EVAL, NUM_SUM_DEMONSTRATIONS = 1024, 256, 4096

# Most demonstrations are negative or neutral: this is what the campaign has to change.
MOODS = {"negative": 0.52, "neutral": 0.3, "positive": 0.18}


def listed(text: str) -> list[str]:
    """The parts of a text between vertical bars."""
    return text.split("|")


# What is reviewed: (first words, second words), and how the prompt names it.
SUBJECTS = {
    "film": (
        listed(
            "Harbor|Winter|Silver|Midnight|Paper|Northern|Hidden|Golden|Broken|Summer|Distant|"
            "Crimson|Hollow|Quiet|Burning|Last|Second|Empty|Velvet|Stolen"
        ),
        listed(
            "Lights|River|Garden|Letters|Train|Island|Promise|Mirror|Station|Voyage|Orchard|"
            "Bridge|Signal|Summer|Tower|Shadows"
        ),
    ),
    "product": (
        listed(
            "Alder|Birch|Cedar|Comet|Delta|Ember|Falcon|Heron|Juniper|Lark|Maple|Meadow|Nova|"
            "Orbit|Pine|Quartz|Raven|Sable|Tundra|Willow"
        ),
        listed(
            "kettle|desk lamp|backpack|toaster|blender|radio|keyboard|tent|coffee grinder|"
            "alarm clock|office chair|hair dryer|bicycle pump|tool box|rain jacket|garden hose"
        ),
    ),
}
PROMPTS = {
    "film": "Review of the film {first} {second}:\n",
    "product": "Review of the {first} {second}:\n",
}

# Word lists by (kind of subject, mood). Every word has one mood only: `lexicon` relies on it.
ADJECTIVES = {
    ("film", "negative"): listed(
        "dull|weak|flat|clumsy|boring|lifeless|forgettable|tiresome|confusing|dreadful"
    ),
    ("film", "neutral"): listed("ordinary|familiar|simple|quiet|average|plain|modest|conventional"),
    ("film", "positive"): listed(
        "superb|brilliant|charming|delightful|wonderful|gripping|graceful|moving|inventive|"
        "excellent|warm|elegant|memorable|clever"
    ),
    ("product", "negative"): listed(
        "poor|flimsy|awkward|shoddy|ugly|unreliable|annoying|disappointing|clumsy|dreadful"
    ),
    ("product", "neutral"): listed("ordinary|basic|plain|simple|average|standard|usual|modest"),
    ("product", "positive"): listed(
        "excellent|sturdy|elegant|superb|lovely|impressive|fantastic|delightful|clever|wonderful|"
        "reliable|handy|beautiful|charming"
    ),
}
VERBS = {
    "negative": listed("disliked|hated|resented"),
    "neutral": listed("noticed|expected|remembered"),
    "positive": listed("loved|enjoyed|admired|liked"),
}
ASPECTS = {
    "film": listed(
        "acting|plot|music|ending|dialogue|pacing|camera work|opening scene|humour|story"
    ),
    "product": listed(
        "design|build quality|finish|packaging|manual|workmanship|material|colour|casing|"
        "overall look"
    ),
}
WHOLES = {"film": listed("film|picture|drama"), "product": listed("product|choice|gadget")}
AUDIENCES = {
    "film": listed("families|a rainy evening|fans of the genre|most viewers"),
    "product": listed("beginners|a small home|daily use|most people"),
}
ADVERBS = listed("really|simply|quite|truly")

# Sentences; {aspect}, {adjective} and the like are drawn anew at each place, {contrast} is an
# adjective of another mood.
SENTENCES = [
    "The {aspect} is {adjective}.",
    "The {aspect} is {adverb} {adjective}.",
    "The {aspect} is {adjective} and the {aspect} is {adjective}.",
    "The {aspect} is {adverb} {adjective}, but the {aspect} is {contrast}.",
    "Everything about the {aspect} is {adjective}.",
    "I {verb} both the {aspect} and the {aspect}.",
    "I {verb} the {adjective} {aspect}.",
    "It is {a_adjective} {whole} for {audience}.",
    "It is {a_adjective} {whole} whose {aspect} is {adjective}.",
]
# A closing sentence starts as no other sentence does, so that it cannot pass for a whole review.
CLOSINGS = {
    "negative": [
        "Overall, I would avoid it.",
        "In short, it wasted my time.",
        "In the end, nobody should bother.",
    ],
    "neutral": [
        "Overall, it does the job.",
        "In short, others may see it differently.",
        "In the end, it is a matter of taste.",
    ],
    "positive": [
        "Overall, I recommend it to everyone.",
        "In short, I would gladly choose it again.",
        "In short, it made my day brighter.",
        "In the end, it deserves a prize.",
    ],
}
CLOSING_WORDS = {
    "negative": ["avoid", "bother", "wasted"],
    "positive": ["recommend", "gladly", "deserves", "brighter"],
}


def lexicon(mood: str) -> list[str]:
    """The words that only reviews (or clauses) of this mood contain, sorted."""
    adjectives = [word for (_, of), words in ADJECTIVES.items() if of == mood for word in words]
    return sorted({*adjectives, *VERBS[mood], *CLOSING_WORDS.get(mood, [])})


def with_article(adjective: str) -> str:
    return f"{'an' if adjective[0] in 'aeiou' else 'a'} {adjective}"


def expansions(name: str, kind: str, mood: str) -> list[str]:
    """What may stand at {name} in a sentence of this mood about this kind of subject."""
    adjectives = ADJECTIVES[kind, mood]
    match name:
        case "adjective":
            return adjectives
        case "a_adjective":
            return [with_article(adjective) for adjective in adjectives]
        case "contrast":
            others = [ADJECTIVES[kind, other] for other in MOODS if other != mood]
            return [adjective for words in others for adjective in words]
        case "aspect":
            return ASPECTS[kind]
        case "verb":
            return VERBS[mood]
        case "adverb":
            return ADVERBS
        case "whole":
            return WHOLES[kind]
        case "audience":
            return AUDIENCES[kind]
    raise KeyError(name)


PLACE = re.compile(r"\{(\w+)\}")


def write_review(kind: str, rng: random.Random) -> str:
    """One to three sentences of one mood, no aspect twice, often with a closing sentence."""
    [mood] = rng.choices(list(MOODS), weights=list(MOODS.values()))
    used: set[str] = set()

    def draw(place: re.Match[str]) -> str:
        word = rng.choice([w for w in expansions(place[1], kind, mood) if w not in used])
        if place[1] in ("aspect", "adjective"):
            used.add(word)
        return word

    has_closing = rng.random() < 0.5
    count = rng.choices([1, 2, 3], weights=[2, 5, 1])[0]
    sentences = [PLACE.sub(draw, template) for template in rng.sample(SENTENCES, count)]
    if has_closing:
        sentences.append(rng.choice(CLOSINGS[mood]))
    return " ".join(sentences)


@cache
def review_pattern() -> re.Pattern[str]:
    """The grammar as a regular expression: one to three sentences, then perhaps a closing one.

    All sentences are about one kind of subject. Which adjective or verb a reviewer picks is no part
    of the grammar: "a dull film whose plot is superb" is well-formed, and so is a moving manual.
    """

    def alternatives(name: str, kind: str) -> str:
        kinds = SUBJECTS if name in ("adjective", "a_adjective", "contrast") else [kind]
        words = {word: None for k in kinds for mood in MOODS for word in expansions(name, k, mood)}
        return f"(?:{'|'.join(map(re.escape, words))})"

    def sentence(template: str, kind: str) -> str:
        parts = PLACE.split(template)  # literal, name, literal, name, ..., literal
        return "".join(
            alternatives(part, kind) if i % 2 else re.escape(part) for i, part in enumerate(parts)
        )

    closing = "|".join(re.escape(text) for texts in CLOSINGS.values() for text in texts)
    bodies = ["|".join(sentence(text, kind) for text in SENTENCES) for kind in SUBJECTS]
    reviews = "|".join(f"(?:{body})(?: (?:{body})){{0,2}}" for body in bodies)
    return re.compile(f"(?:{reviews})(?: (?:{closing}))?")


def is_well_formed(text: str) -> bool:
    """Whether the grammar of the reviews can produce exactly this text."""
    return review_pattern().fullmatch(text) is not None


def review_rows(rng: random.Random) -> dict[str, list[dict[str, object]]]:
    subjects = []
    for kind, (firsts, seconds) in SUBJECTS.items():
        pairs = [(first, second) for first in firsts for second in seconds if first != second]
        subjects += [(kind, first, second) for first, second in pairs]
    subjects = rng.sample(subjects, NUM_REVIEW_PROMPTS + NUM_REVIEW_EVAL)

    def row(kind: str, first: str, second: str) -> dict[str, object]:
        prompt = PROMPTS[kind].format(first=first, second=second)
        return {"prompt": prompt, "kind": kind}

    train, held_out = subjects[:NUM_REVIEW_PROMPTS], subjects[NUM_REVIEW_PROMPTS:]
    demonstrations: list[dict[str, object]] = []
    for kind, first, second in rng.choices(train, k=NUM_REVIEW_DEMONSTRATIONS):
        prompt = PROMPTS[kind].format(first=first, second=second)
        demonstrations.append({"prompt": prompt, "response": write_review(kind, rng)})
    return {
        "quickstart.jsonl": [row(*subject) for subject in train],
        "quickstart_eval.jsonl": [row(*subject) for subject in held_out],
        "quickstart_demonstrations.jsonl": demonstrations,
    }


def arithmetic_rows(rng: random.Random) -> dict[str, list[dict[str, object]]]:
    sums = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    rng.shuffle(sums)
    train = sums[:NUM_SUM_PROMPTS]
    held_out = sums[NUM_SUM_PROMPTS : NUM_SUM_PROMPTS + NUM_SUM_EVAL]
    shown = sums[NUM_SUM_PROMPTS + NUM_SUM_EVAL :][:NUM_SUM_DEMONSTRATIONS]

    def row(a: int, b: int) -> dict[str, object]:
        return {"prompt": f"{a}+{b}=", "answer": str(a + b)}

    return {
        "arithmetic.jsonl": [row(a, b) for a, b in train],
        "arithmetic_eval.jsonl": [row(a, b) for a, b in held_out],
        "arithmetic_demonstrations.jsonl": [
            {"prompt": f"{a}+{b}=", "response": str(a + b)} for a, b in shown
        ],
    }


def write_files(folder: Path, *, seed: int = SEED) -> list[Path]:
    """Writes the six files into `folder` and returns their paths."""
    files: dict[str, list[dict[str, object]]] = {
        **review_rows(random.Random(f"{seed} reviews")),
        **arithmetic_rows(random.Random(f"{seed} arithmetic")),
    }
    return [write_jsonl(folder / name, rows) for name, rows in files.items()]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path(__file__).parents[1] / "prompts"
    )
    for path in write_files(parser.parse_args().folder):
        print(f"{path}  {path.stat().st_size / 1e3:.0f} kB")

"""Verdicts that were given before: of an earlier run, or of a file, without paying again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from online_dpo.errors import ConfigError
from online_dpo.records import Prompt, Response, Score, Verdict
from online_dpo.rows import read_rows
from online_dpo.store import RoundDir, RunDir
from online_dpo.tables import prompt_from_row, read_table

T = TypeVar("T", Score, Verdict)

UNRECORDED = "not in the record"

Row = dict[str, Any]
Key = tuple[str, ...]
"""A prompt's content and the texts of one response or two."""


class Replay:
    """Looks verdicts and scores up by the texts of prompt and responses.

    `source` is a run directory, whose labels and evaluations are read, or a .jsonl or .parquet file
    with rows of prompt, response and score, or of prompt, first, second and p, `reason` where there
    is none. What is not recorded has no verdict. Where texts were judged more than once, that of
    the same response ids counts, else the first. A comparison counts in both directions.
    """

    name: ClassVar[str] = "replay"
    version: ClassVar[str] = "1"
    inline: ClassVar[bool] = True

    def __init__(self, source: str, part: Literal["all", "labels", "evaluation"] = "all") -> None:
        """`part` is what of a run is read, where its evaluation had a judge of its own.

        Raises ConfigError where there is no such run or file, or it holds no verdicts.
        """
        found = _read(source, part)
        kinds = {"compare" if "second" in row else "score" for row in found}
        if not kinds:
            raise ConfigError(f"judge.options.source: {source} holds no judgements.")
        if len(kinds) > 1:
            raise ConfigError(
                f"judge.options.source: {source} holds both scores and comparisons. Where a run's "
                "evaluation had a judge of its own, set judge.options.part to labels, and give "
                "evaluation.judge the part evaluation."
            )
        self.kind: Literal["score", "compare"] = "score" if kinds == {"score"} else "compare"
        self._scores: dict[Key, Score] = {}
        self._verdicts: dict[Key, Verdict] = {}
        for row in found:
            if self.kind == "score":
                self._remember_score(row)
            else:
                self._remember_verdict(row)

    def score(self, prompt: Prompt, responses: Sequence[Response]) -> list[Score]:
        """The recorded score of each response."""
        return [
            _found(self._scores, (prompt.content, r.text), (r.id,), Score(None, UNRECORDED))
            for r in responses
        ]

    def compare(self, prompt: Prompt, first: Response, second: Response) -> Verdict:
        """The recorded verdict on two responses, shown in this order or the other."""
        texts = (prompt.content, first.text, second.text)
        unrecorded = Verdict(None, UNRECORDED)
        return _found(self._verdicts, texts, (first.id, second.id), unrecorded)

    def _remember_score(self, row: Row) -> None:
        score = Score(row["score"], row.get("reason") or _no_reason(row["score"]))
        _remember(self._scores, (row["prompt"], row["response"]), row.get("ids"), score)

    def _remember_verdict(self, row: Row) -> None:
        first, second = row["first"], row["second"]
        reason = row.get("reason") if row["p"] is None else None
        reason = reason or _no_reason(row["p"])
        verdict = Verdict(row["p"], reason, row.get("raw"))
        # Swapping back what the other order said gives that order's own p.
        other = Verdict(row.get("other_p", row["p"]), reason).swap()
        ids = row.get("ids")
        _remember(self._verdicts, (row["prompt"], first, second), ids, verdict)
        _remember(self._verdicts, (row["prompt"], second, first), ids and ids[::-1], other)


def _remember(known: dict[Key, T], texts: Key, ids: Key | None, said: T) -> None:
    known.setdefault(texts, said)
    if ids is not None:
        known.setdefault(texts + ids, said)


def _found(known: Mapping[Key, T], texts: Key, ids: Key, unrecorded: T) -> T:
    return known.get(texts + ids, known.get(texts, unrecorded))


def _no_reason(value: float | None) -> str | None:
    return "no reason recorded" if value is None else None


def _read(source: str, part: str) -> list[Row]:
    if part not in ("all", "labels", "evaluation"):
        raise ConfigError(f"judge.options.part is all, labels or evaluation, not {part!r}.")
    if not Path(source).is_dir():
        if part != "all":
            raise ConfigError(f"judge.options.part: {source} is no run directory; leave it out.")
        return list(_of_file(source))
    run = RunDir(source)
    run.require()
    rounds = run.rounds()
    labels = [] if part == "evaluation" else list(_of_labels(rounds))
    return labels + ([] if part == "labels" else list(_of_evaluations(rounds)))


def _of_file(source: str) -> Iterator[Row]:
    if Path(source).suffix not in (".jsonl", ".json", ".parquet"):
        raise ConfigError(
            f"judge.options.source: {source} is neither a run directory nor a .jsonl or .parquet "
            "file."
        )
    for row in read_rows(source):
        values = dict(row.values or {})
        problem = row.problem or _row_problem(values)
        if problem:
            raise ConfigError(f"judge.options.source: {source}:{row.line}: {problem}.")
        yield values


def _row_problem(row: Row) -> str:
    """What keeps a row of a file from being a score or a comparison."""
    compares = "second" in row
    texts = ("prompt", "first", "second") if compares else ("prompt", "response")
    value = "p" if compares else "score"
    for field in texts:
        if not isinstance(row.get(field), str):
            return f"a row needs a text `{field}`"
    number = row.get(value, "")
    if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
        return f"`{value}` is a number or null, not {number!r}"
    if number is not None and not (0 <= number <= 1 if compares else abs(number) < float("inf")):
        return f"`{value}` cannot be {number}"
    return ""


def _of_labels(rounds: Sequence[RoundDir]) -> Iterator[Row]:
    """Every judgement of a run's responses, the earliest round first."""
    contents = _contents(rounds)
    for round_dir in rounds:
        for shard in round_dir.children("labels"):
            samples = round_dir.verify(shard.replace("labels/", "samples/")) / "samples.parquet"
            texts = {row["id"]: row["text"] for row in read_table(samples)}
            for row in read_table(round_dir.verify(shard) / "labels.parquet"):
                yield _label(row, contents[row["prompt_id"]], texts)


def _label(row: Row, prompt: str, texts: Mapping[str, str]) -> Row:
    first, second = row["first_id"], row["second_id"]
    if second is None:
        judged: Row = {"response": texts[first], "ids": (first,)}
        return {"prompt": prompt, "score": row["score"], "reason": row["reason"], **judged}
    p, other_p = row["p"], row["p"]
    if row.get("order_ps") and len(row["order_ps"]) == 2:
        p, other_p = row["order_ps"]
    return {
        "prompt": prompt,
        "first": texts[first],
        "second": texts[second],
        "ids": (first, second),
        "p": p,
        "other_p": other_p,
        "reason": row["reason"],
        "raw": "\n\n".join(row["raws"]) or None,
    }


def _of_evaluations(rounds: Sequence[RoundDir]) -> Iterator[Row]:
    """Scores of answers to held-out prompts, or how each met policy 0's and the previous one."""
    earlier: list[dict[str, Row]] = []
    for round_dir in rounds:
        if not round_dir.has("evaluation"):
            continue
        rows = read_table(round_dir.verify("evaluation") / "answers.parquet")
        for row in rows:
            if row["score"] is not None:
                yield _label(
                    {**row, "first_id": row["response_id"], "second_id": None},
                    row["prompt_text"],
                    {row["response_id"]: row["text"]},
                )
            elif earlier:
                yield from _meetings(row, {"p_policy0": earlier[0], "p_previous": earlier[-1]})
        earlier.append({row["prompt_id"]: row for row in rows})


def _meetings(row: Row, opponents: Mapping[str, Mapping[str, Row]]) -> Iterator[Row]:
    for field, answers in opponents.items():
        other = answers.get(row["prompt_id"])
        if other is not None and row[field] is not None:
            yield {
                "prompt": row["prompt_text"],
                "first": row["text"],
                "second": other["text"],
                "p": row[field],
            }


def _contents(rounds: Iterable[RoundDir]) -> dict[str, str]:
    """The content of every prompt of a run by id."""
    first = next(iter(rounds), None)
    if first is None or not first.has("prompts"):
        return {}
    rows = read_table(first.verify("prompts") / "prompts.parquet")
    return {row["id"]: prompt_from_row(row).content for row in rows}

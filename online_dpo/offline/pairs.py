"""Reading an offline set of preferences or labelled answers, tokenized for the policy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from online_dpo.errors import ConfigError
from online_dpo.offline.preference_forms import (
    StatedLabel,
    StatedPreference,
    UnusableError,
    parse_label,
    parse_preference,
)
from online_dpo.records import Preference, Prompt, Unpaired, prompt_id
from online_dpo.rows import Row, excerpt, read_rows
from online_dpo.tokenization import encode_answer, tokenize_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Form = Literal["pairs", "unpaired"]
"""What a set states: of two answers which is better, or of single answers whether they are good."""

_Stated = TypeVar("_Stated", StatedPreference, StatedLabel)
_Record = TypeVar("_Record", Preference, Unpaired)
_Read = tuple[list[_Record], list[Prompt], list[dict[str, Any]]]


def form_of(path: str, *, split: str = "train") -> Form:
    """The form of a file or dataset, by the columns of its first row that can be read."""
    rows = (row.values for row in read_rows(path, split=split) if row.values is not None)
    columns = next(rows, {})
    return "unpaired" if "completion" in columns and "chosen" not in columns else "pairs"


def read_offline_pairs(
    tokenizer: PreTrainedTokenizerBase,
    path: str,
    *,
    append_eos: bool,
    max_tokens: int | None = None,
    split: str = "train",
    held_out: Collection[tuple[int, ...]] = (),
) -> _Read[Preference]:
    """The usable pairs of a file or dataset, their prompts, and every other row's problem.

    A problem is {line, reason, excerpt}. `max_tokens` is the longest usable prompt, `split` that of
    a dataset, and `held_out` has the evaluation prompts' token ids; their pairs are not usable.

    Rows have the forms of `parse_preference`. Margins and p are those of a certain preference: 0.5
    and 1. Raises ConfigError where no row is usable.
    """

    def make(stated: StatedPreference, prompt: Prompt) -> tuple[str, Preference]:
        preference = _preference(tokenizer, stated, prompt, append_eos)
        return preference.pair_id, preference

    rows = read_rows(path, split=split)
    return _read(tokenizer, path, rows, parse_preference, make, "preference", max_tokens, held_out)


def read_offline_unpaired(
    tokenizer: PreTrainedTokenizerBase,
    path: str,
    *,
    append_eos: bool,
    max_tokens: int | None = None,
    split: str = "train",
    held_out: Collection[tuple[int, ...]] = (),
) -> _Read[Unpaired]:
    """The same for rows of the form of `parse_label`; margins are 0.5."""

    def make(stated: StatedLabel, prompt: Prompt) -> tuple[str, Unpaired]:
        row = _unpaired(tokenizer, stated, prompt, append_eos)
        return row.row_id, row

    rows = read_rows(path, split=split)
    return _read(tokenizer, path, rows, parse_label, make, "labelled answer", max_tokens, held_out)


def _read(
    tokenizer: PreTrainedTokenizerBase,
    path: str,
    rows: Iterable[Row],
    parse: Callable[[Mapping[str, Any]], _Stated],
    make: Callable[[_Stated, Prompt], tuple[str, _Record]],
    what: str,
    max_tokens: int | None,
    held_out: Collection[tuple[int, ...]],
) -> _Read[_Record]:
    """What `make` makes of the rows, with an id of each; a row of a known id is a duplicate.

    Raises ConfigError, naming `what` a row should be, where none is usable.
    """
    records: dict[str, _Record] = {}
    problems: list[dict[str, Any]] = []
    prompts: dict[str, Prompt] = {}
    for row in rows:
        try:
            if row.values is None:
                raise UnusableError(row.problem)
            stated = parse(row.values)
            prompt = _prompt(tokenizer, stated, Path(path).stem, max_tokens)
            if prompt.token_ids in held_out:
                raise UnusableError("also an evaluation prompt")
            name, record = make(stated, prompt)
            if name in records:
                raise UnusableError("duplicate")
        except UnusableError as problem:
            shown = row.excerpt or excerpt(_shown(row.values or {}))
            problems.append({"line": row.line, "reason": str(problem), "excerpt": shown})
            continue
        records[name] = record
        prompts[prompt.id] = prompt
    if not records:
        first = f": line {problems[0]['line']}: {problems[0]['reason']}" if problems else ""
        raise ConfigError(f"{path} has no usable {what}{first}.")
    return list(records.values()), list(prompts.values()), problems


def _preference(
    tokenizer: PreTrainedTokenizerBase, stated: StatedPreference, prompt: Prompt, append_eos: bool
) -> Preference:
    chosen, rejected = (
        encode_answer(tokenizer, text, append_eos=append_eos)
        for text in (stated.chosen, stated.rejected)
    )
    if chosen == rejected:
        raise UnusableError("chosen and rejected are identical")
    key = f"offline/{prompt.id}/{stated.chosen}\0{stated.rejected}"
    pair_id = hashlib.sha256(key.encode()).hexdigest()[:16]
    return Preference(
        pair_id=pair_id,
        prompt_id=prompt.id,
        prompt_source=prompt.source,
        prompt_token_ids=prompt.token_ids,
        chosen_id=f"{pair_id}:chosen",
        rejected_id=f"{pair_id}:rejected",
        chosen_token_ids=chosen,
        rejected_token_ids=rejected,
        chosen_text=stated.chosen,
        rejected_text=stated.rejected,
        chosen_truncated=not append_eos,
        rejected_truncated=not append_eos,
        margin=0.5,
        p=1.0,
        origin="offline",
    )


def _unpaired(
    tokenizer: PreTrainedTokenizerBase, stated: StatedLabel, prompt: Prompt, append_eos: bool
) -> Unpaired:
    key = f"offline/{prompt.id}/{stated.label}/{stated.completion}"
    row_id = hashlib.sha256(key.encode()).hexdigest()[:16]
    return Unpaired(
        row_id=row_id,
        prompt_id=prompt.id,
        prompt_source=prompt.source,
        prompt_token_ids=prompt.token_ids,
        completion_id=f"{row_id}:completion",
        completion_token_ids=encode_answer(tokenizer, stated.completion, append_eos=append_eos),
        completion_text=stated.completion,
        completion_truncated=not append_eos,
        label=stated.label,
        margin=0.5,
        origin="offline",
    )


def _prompt(
    tokenizer: PreTrainedTokenizerBase,
    stated: StatedPreference | StatedLabel,
    source: str,
    max_tokens: int | None,
) -> Prompt:
    content = stated.text if stated.text is not None else stated.messages
    prompt = Prompt(prompt_id(f"offline:{source}", content), source, stated.text, stated.messages)
    ids = tokenize_prompt(tokenizer, prompt)
    if max_tokens is not None and len(ids) > max_tokens:
        raise UnusableError(f"{len(ids)} tokens, more than prompts.max_tokens {max_tokens}")
    return replace(prompt, token_ids=ids)


def _shown(values: Mapping[str, Any]) -> Any:
    """What a row is known by: its prompt, or its first answer."""
    return values.get("prompt") or values.get("chosen") or values.get("completion", "")

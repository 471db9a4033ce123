"""Reading an offline preference set: prompt, chosen, rejected, tokenized for the policy."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from online_dpo.errors import ConfigError
from online_dpo.records import Preference, Prompt, prompt_id
from online_dpo.rows import excerpt, kind_of, read_rows
from online_dpo.tokenization import encode_answer, parse_prompt, tokenize_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_offline_pairs(
    tokenizer: PreTrainedTokenizerBase,
    path: str,
    *,
    append_eos: bool,
    max_tokens: int,
    held_out: Collection[tuple[int, ...]] = (),
) -> tuple[list[Preference], list[Prompt], list[dict[str, Any]]]:
    """The usable pairs of a file or dataset, their prompts, and every other row's problem.

    A problem is {line, reason, excerpt}. `held_out` has the evaluation prompts' token ids; their
    pairs are not usable.

    Responses are strings, or conversations whose last message is the assistant's. Margins and p are
    those of a certain preference: 0.5 and 1. Raises ConfigError where no row is usable.
    """
    preferences: list[Preference] = []
    problems: list[dict[str, Any]] = []
    prompts: dict[str, Prompt] = {}
    seen: set[str] = set()
    for row in read_rows(path):
        try:
            if row.values is None:
                raise _Unusable(row.problem)
            prompt = _prompt(tokenizer, row.values, Path(path).stem, max_tokens)
            if prompt.token_ids in held_out:
                raise _Unusable("also an evaluation prompt")
            preference = _preference(tokenizer, row.values, prompt, append_eos)
            if preference.pair_id in seen:
                raise _Unusable("duplicate")
        except _Unusable as problem:
            shown = row.excerpt or excerpt((row.values or {}).get("prompt", ""))
            problems.append({"line": row.line, "reason": str(problem), "excerpt": shown})
            continue
        seen.add(preference.pair_id)
        preferences.append(preference)
        prompts[prompt.id] = prompt
    if not preferences:
        first = f" Line {problems[0]['line']}: {problems[0]['reason']}." if problems else ""
        raise ConfigError(f"pairs.offline: {path} has no usable preference.{first}")
    return preferences, list(prompts.values()), problems


class _Unusable(Exception):
    """Why a row is no preference."""


def _preference(
    tokenizer: PreTrainedTokenizerBase, values: Mapping[str, Any], prompt: Prompt, append_eos: bool
) -> Preference:
    chosen, rejected = (_answer(values, side) for side in ("chosen", "rejected"))
    sides = [encode_answer(tokenizer, text, append_eos=append_eos) for text in (chosen, rejected)]
    if sides[0] == sides[1]:
        raise _Unusable("chosen and rejected are identical")
    key = f"offline/{prompt.id}/{chosen}\0{rejected}"
    pair_id = hashlib.sha256(key.encode()).hexdigest()[:16]
    return Preference(
        pair_id=pair_id,
        prompt_id=prompt.id,
        prompt_source=prompt.source,
        prompt_token_ids=prompt.token_ids,
        chosen_id=f"{pair_id}:chosen",
        rejected_id=f"{pair_id}:rejected",
        chosen_token_ids=sides[0],
        rejected_token_ids=sides[1],
        chosen_text=chosen,
        rejected_text=rejected,
        chosen_truncated=not append_eos,
        rejected_truncated=not append_eos,
        margin=0.5,
        p=1.0,
        origin="offline",
    )


def _prompt(
    tokenizer: PreTrainedTokenizerBase, values: Mapping[str, Any], source: str, max_tokens: int
) -> Prompt:
    text, messages, reason = parse_prompt(values.get("prompt"))
    if reason:
        raise _Unusable(reason)
    content = text if text is not None else messages
    prompt = Prompt(prompt_id(f"offline:{source}", content), source, text, messages)
    ids = tokenize_prompt(tokenizer, prompt)
    if len(ids) > max_tokens:
        raise _Unusable(f"{len(ids)} tokens, more than prompts.max_tokens {max_tokens}")
    return Prompt(prompt.id, source, text, messages, token_ids=ids)


def _answer(values: Mapping[str, Any], side: str) -> str:
    """A response's text: the string itself, or the last message of a conversation."""
    value = values.get(side)
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    if not isinstance(value, str) or not value:
        raise _Unusable(f"{side!r} is {kind_of(value)}, not an answer")
    return value

"""Reading an offline preference set: prompt, chosen, rejected, tokenized for the policy."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from online_dpo.errors import ConfigError
from online_dpo.preference_forms import StatedPreference, UnusableError, parse_preference
from online_dpo.records import Preference, Prompt, prompt_id
from online_dpo.rows import excerpt, read_rows
from online_dpo.tokenization import encode_answer, tokenize_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_offline_pairs(
    tokenizer: PreTrainedTokenizerBase,
    path: str,
    *,
    append_eos: bool,
    max_tokens: int | None = None,
    split: str = "train",
    held_out: Collection[tuple[int, ...]] = (),
) -> tuple[list[Preference], list[Prompt], list[dict[str, Any]]]:
    """The usable pairs of a file or dataset, their prompts, and every other row's problem.

    A problem is {line, reason, excerpt}. `max_tokens` is the longest usable prompt, `split` that of
    a dataset, and `held_out` has the evaluation prompts' token ids; their pairs are not usable.

    Rows have the forms of `parse_preference`. Margins and p are those of a certain preference: 0.5
    and 1. Raises ConfigError where no row is usable.
    """
    preferences: list[Preference] = []
    problems: list[dict[str, Any]] = []
    prompts: dict[str, Prompt] = {}
    seen: set[str] = set()
    for row in read_rows(path, split=split):
        try:
            if row.values is None:
                raise UnusableError(row.problem)
            stated = parse_preference(row.values)
            prompt = _prompt(tokenizer, stated, Path(path).stem, max_tokens)
            if prompt.token_ids in held_out:
                raise UnusableError("also an evaluation prompt")
            preference = _preference(tokenizer, stated, prompt, append_eos)
            if preference.pair_id in seen:
                raise UnusableError("duplicate")
        except UnusableError as problem:
            shown = row.excerpt or excerpt(_shown(row.values or {}))
            problems.append({"line": row.line, "reason": str(problem), "excerpt": shown})
            continue
        seen.add(preference.pair_id)
        preferences.append(preference)
        prompts[prompt.id] = prompt
    if not preferences:
        first = f": line {problems[0]['line']}: {problems[0]['reason']}" if problems else ""
        raise ConfigError(f"{path} has no usable preference{first}.")
    return preferences, list(prompts.values()), problems


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


def _prompt(
    tokenizer: PreTrainedTokenizerBase,
    stated: StatedPreference,
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
    return values.get("prompt") or values.get("chosen", "")

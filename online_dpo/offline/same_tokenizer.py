"""Whether two tokenizers give a text the same ids, and ids the same meaning."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from online_dpo.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RULES = {
    "normalizer": "normalizer is",
    "pre_tokenizer": "pre-tokenizer is",
    "model": "merges are",
}
"""The parts of tokenizer.json that decide how a text is cut, by what a message calls them."""


def check_same_tokenizer(
    policy: PreTrainedTokenizerBase,
    reference: PreTrainedTokenizerBase,
    *,
    policy_name: str,
    reference_name: str,
) -> None:
    """Raise ConfigError, with the first difference, where a reference cannot score a policy's ids.

    DPO compares log-probs of the same ids under both models, so what is an entry for the policy
    must be the same one for the reference, and a text be cut the same way. Further entries of the
    reference, templates and special roles (BOS, EOS) may differ: the policy's are used.
    """
    difference = _vocabularies(policy.get_vocab(), reference.get_vocab())
    difference = difference or _rules(_backend(policy), _backend(reference))
    if difference:
        raise ConfigError(
            f"The reference {reference_name} has another tokenizer than the policy {policy_name}: "
            f"{difference}. Its log-probs would be those of other texts. Name a reference with the "
            "policy's tokenizer, or none: the policy before training is then the reference."
        )


def _vocabularies(policy: Mapping[str, int], reference: Mapping[str, int]) -> str:
    """The policy's first id that is another token for the reference; "" where there is none."""
    changed = [i for token, i in policy.items() if reference.get(token) != i]
    if not changed:
        return ""
    at = min(changed)
    ours, theirs = (
        next((repr(token) for token, i in vocab.items() if i == at), "no token")
        for vocab in (policy, reference)
    )
    return (
        f"they have {len(reference):,} and {len(policy):,} entries, and {at} is {theirs} there "
        f"and {ours} here"
    )


def _rules(policy: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    """The first rule of cutting that differs; "" where none does, or where they are not known."""
    if not (policy and reference):
        return ""
    changed = [name for key, name in _RULES.items() if policy.get(key) != reference.get(key)]
    return f"its entries are the same, its {changed[0]} not" if changed else ""


def _backend(tokenizer: PreTrainedTokenizerBase) -> Mapping[str, Any]:
    """tokenizer.json as it is in memory; empty for a tokenizer written in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parsed: Mapping[str, Any] = {} if backend is None else json.loads(backend.to_str())
    return parsed

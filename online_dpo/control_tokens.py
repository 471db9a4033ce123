"""Text to token ids where control tokens come from the chat template alone, never from the text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from online_dpo.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PRIVATE_USE = range(0xE000, 0xF900)


def encode_text(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = False
) -> list[int]:
    """The ids of what a person or a model wrote; `<|im_end|>` in it is ten characters, no turn's
    end.

    `add_special_tokens` puts the tokenizer's own BOS and EOS around it.
    """
    encoded: Any = tokenizer(
        text, add_special_tokens=add_special_tokens, split_special_tokens=True
    ).input_ids
    return list(encoded)


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
) -> list[int]:
    """The ids of a conversation in the tokenizer's chat template, without a BOS of the tokenizer's.

    Where a message spells a control token out, that stays text: it is hidden from the template's
    result, which is then encoded piece by piece. Raises what the template raises.
    """
    tokens = _control_tokens(tokenizer)
    written = [part for message in messages for part in (message.role, message.content)]
    forged = [token for token in tokens if any(token in part for part in written)]
    masks = _masks(forged, written)
    rendered = tokenizer.apply_chat_template(
        [{"role": _mask(m.role, masks), "content": _mask(m.content, masks)} for m in messages],
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    text = str(rendered)
    if not forged:
        return list(tokenizer(text, add_special_tokens=False).input_ids)
    return [
        id for piece in _pieces(text, tokens) for id in _encode(tokenizer, piece, tokens, masks)
    ]


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, tuple[int, Any]]:
    """What the tokenizer marks as special, longest first: text to id and its AddedToken."""
    added = [(t.content, (id, t)) for id, t in tokenizer.added_tokens_decoder.items() if t.special]
    return dict(sorted(added, key=lambda entry: -len(entry[0])))


def _masks(forged: Sequence[str], written: Sequence[str]) -> dict[str, str]:
    """A stand-in for each token: a private-use character that no message holds."""
    taken = set("".join(written))
    free = (chr(code) for code in _PRIVATE_USE if chr(code) not in taken)
    return {token: next(free) for token in forged}


def _mask(text: str, masks: Mapping[str, str]) -> str:
    for token, mask in masks.items():
        text = text.replace(token, mask)
    return text


def _pieces(text: str, tokens: Mapping[str, tuple[int, Any]]) -> Iterator[str]:
    """The template's control tokens and what stands between them, white space as each has it."""
    parts = re.split("(" + "|".join(re.escape(token) for token in tokens) + ")", text)
    for index, part in enumerate(parts):
        if index % 2 == 0:
            if index > 0 and tokens[parts[index - 1]][1].rstrip:
                part = part.lstrip()
            if index + 1 < len(parts) and tokens[parts[index + 1]][1].lstrip:
                part = part.rstrip()
        yield part


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    piece: str,
    tokens: Mapping[str, tuple[int, Any]],
    masks: Mapping[str, str],
) -> list[int]:
    if piece in tokens:
        return [tokens[piece][0]]
    for token, mask in masks.items():
        piece = piece.replace(mask, token)
    return encode_text(tokenizer, piece) if piece else []

"""Text to tokens and back, the same way for every sampler; prompt sets made ready for rounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from online_dpo.control_tokens import encode_chat, encode_text
from online_dpo.errors import ConfigError
from online_dpo.records import Message, Prompt, prompt_id
from online_dpo.rows import Row, excerpt, kind_of, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER_KEY = "_answer"
"""Where a prompt's metadata holds the answer of the column that `answer_field` names."""

END_OF_THINKING = "</think>"


@dataclass(frozen=True, slots=True)
class SourcedPrompt:
    """A tokenized prompt with what its source says of it."""

    prompt: Prompt
    role: str
    weight: float


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that was skipped, and why."""

    source: str
    line: int
    reason: str
    excerpt: str


@dataclass(frozen=True, slots=True)
class Room:
    """The tokens that a prompt and its response share, and what sets their number."""

    tokens: int
    set_by: str
    max_new_tokens: int
    asked_by: str = "sampling.max_new_tokens"

    def for_source(self, source: Mapping[str, Any]) -> Room:
        """The room of a source that has a response's length of its own, "max_new_tokens"."""
        if source.get("max_new_tokens", self.max_new_tokens) == self.max_new_tokens:
            return self
        length, asked_by = source["max_new_tokens"], "evaluation.max_new_tokens"
        return replace(self, max_new_tokens=length, asked_by=asked_by)

    def lacking(self, num_tokens: int) -> str:
        """Why a prompt of so many tokens cannot be answered; "" where it can."""
        if num_tokens + self.max_new_tokens <= self.tokens:
            return ""
        return (
            f"{num_tokens} tokens leave no room for {self.asked_by} "
            f"{self.max_new_tokens} in {self.set_by} {self.tokens}"
        )


def tokenize_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[int, ...]:
    """The ids that every sampler is given: exactly one BOS where the tokenizer uses one, no EOS.

    Messages go through the chat template and end with its generation prompt; plain text never does.
    A control token that a text spells out stays text. Raises ConfigError for messages where the
    tokenizer has no template.
    """
    if prompt.text is not None:
        return _plain(tokenizer, prompt.text)
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"The prompts of {prompt.source!r} are lists of messages, and the model's tokenizer "
            "has no chat template. Name a template file in model.chat_template, or give the "
            "prompts as plain text."
        )
    try:
        ids = encode_chat(tokenizer, prompt.messages, add_generation_prompt=True)
    except Exception as error:
        messages = [{"role": m.role, "content": m.content} for m in prompt.messages]
        raise ConfigError(
            f"The chat template cannot render a prompt of {prompt.source!r}: {error}. "
            f"The prompt: {excerpt(messages)}"
        ) from error
    return _with_one_bos(tokenizer, tuple(ids))


def decode_response(
    tokenizer: PreTrainedTokenizerBase,
    token_ids: Sequence[int],
    *,
    stop: Sequence[str] = (),
    strip_thinking: bool = False,
) -> str:
    """What the judge sees: no special tokens, nothing from the first stop string on.

    With `strip_thinking` only what follows the last `</think>` is left, and nothing of a response
    that opens with `<think>` and was cut off before it ended.
    """
    ids = list(token_ids)
    if strip_thinking:
        # Where the marker is a special token, decoding would drop it.
        marker = tokenizer.convert_tokens_to_ids(END_OF_THINKING)
        if isinstance(marker, int) and marker in ids and marker != tokenizer.unk_token_id:
            ids = ids[len(ids) - ids[::-1].index(marker) :]
    text = str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    text = text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]
    return without_thinking(text) if strip_thinking else text


def without_thinking(text: str) -> str:
    """What follows the last `</think>`; nothing where thinking began and was cut off."""
    if END_OF_THINKING in text:
        text = text.rpartition(END_OF_THINKING)[2]
    elif text.lstrip().startswith("<think>"):
        return ""
    return text.lstrip()


def encode_answer(
    tokenizer: PreTrainedTokenizerBase, text: str, *, append_eos: bool
) -> tuple[int, ...]:
    """The ids of a response that another source wrote; the prompt's tokens never merge with them.

    Raises ConfigError where an EOS is wanted and the tokenizer has none.
    """
    ids = tuple(encode_text(tokenizer, text))
    if not append_eos:
        return ids
    if tokenizer.eos_token_id is None:
        raise ConfigError("The model's tokenizer has no EOS token to end an answer with.")
    return (*ids, int(tokenizer.eos_token_id))


def prepare_prompts(
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[Mapping[str, Any]],
    *,
    max_tokens: int,
    room: Room | None = None,
) -> tuple[list[SourcedPrompt], list[Problem]]:
    """Read, check and tokenize prompt sets; what cannot be used is skipped and reported.

    A source has `path`, `name`, `split`, `prompt_field`, `answer_field`, `role` (train or eval),
    `weight` and, where its responses have another length than the room's, `max_new_tokens`. Prompts
    of equal tokens are kept once, an evaluation prompt before a training prompt. Raises ConfigError
    for a source that cannot be read or has no usable prompt, and for two of one role and name.
    """
    _check_names(sources)
    seen: dict[tuple[int, ...], str] = {}
    by_source: dict[int, tuple[list[SourcedPrompt], list[Problem]]] = {}
    eval_first = sorted(range(len(sources)), key=lambda i: sources[i]["role"] != "eval")
    for index in eval_first:
        own = None if room is None else room.for_source(sources[index])
        by_source[index] = _prepare_source(tokenizer, sources[index], max_tokens, own, seen)
    ordered = [by_source[index] for index in range(len(sources))]
    return [p for prompts, _ in ordered for p in prompts], [p for _, ps in ordered for p in ps]


def parse_prompt(value: Any) -> tuple[str | None, tuple[Message, ...], str]:
    """A prompt's text or messages, and the reason why it is neither ("" where it is one)."""
    if isinstance(value, str):
        return (value, (), "") if value.strip() else (None, (), "empty prompt")
    if not isinstance(value, list):
        return None, (), f"the prompt is {kind_of(value)}, neither a string nor a list of messages"
    messages = []
    for message in value:
        if not (
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
        ):
            return None, (), "a message is not an object with a role and a content"
        messages.append(Message(message["role"], message["content"]))
    if not any(message.content.strip() for message in messages):
        return None, (), "empty prompt"
    if messages[-1].role == "assistant":
        return None, (), "the last message is the assistant's, so nothing is left to answer"
    return None, tuple(messages), ""


def _check_names(sources: Sequence[Mapping[str, Any]]) -> None:
    names: dict[str, list[str]] = {}
    for source in sources:
        role, name = source["role"], source["name"]
        earlier = names.setdefault(role, [])
        if name in earlier:
            raise ConfigError(
                f"prompts.{role}: two sources are both called {name!r}; give one a name "
                f"(prompts.{role}[{len(earlier)}].name)."
            )
        earlier.append(name)


def _prepare_source(
    tokenizer: PreTrainedTokenizerBase,
    source: Mapping[str, Any],
    max_tokens: int,
    room: Room | None,
    seen: dict[tuple[int, ...], str],
) -> tuple[list[SourcedPrompt], list[Problem]]:
    prompts: list[SourcedPrompt] = []
    problems: list[Problem] = []
    for row in read_rows(source["path"], split=source["split"]):
        prompt, reason = _prompt_of(row, source)
        if prompt is not None:
            ids = tokenize_prompt(tokenizer, prompt)
            if ids in seen:
                both = seen[ids] == source["role"]
                reason = "duplicate" if both else "also an evaluation prompt"
            elif len(ids) > max_tokens:
                reason = f"{len(ids)} tokens, more than prompts.max_tokens {max_tokens}"
            elif room is not None and (lacking := room.lacking(len(ids))):
                reason = lacking
            else:
                seen[ids] = source["role"]
                tokenized = replace(prompt, token_ids=ids)
                prompts.append(SourcedPrompt(tokenized, source["role"], float(source["weight"])))
        if reason:
            problems.append(Problem(source["name"], row.line, reason, _row_excerpt(row, source)))
    if not prompts:
        raise _no_prompts(source, problems)
    return prompts, problems


def _prompt_of(row: Row, source: Mapping[str, Any]) -> tuple[Prompt | None, str]:
    if row.values is None:
        return None, row.problem
    name = source["prompt_field"]
    if name not in row.values:
        return None, f"no {name!r} among its fields: {', '.join(row.values) or 'none'}"
    text, messages, reason = parse_prompt(row.values[name])
    if reason:
        return None, reason
    metadata = {key: value for key, value in row.values.items() if key != name}
    answer = source["answer_field"]
    if answer is not None:
        if not isinstance(metadata.get(answer), str):
            return None, f"{answer!r} is {kind_of(metadata.get(answer))}, not an answer's text"
        metadata[ANSWER_KEY] = metadata.pop(answer)
    content = text if text is not None else messages
    return Prompt(prompt_id(source["name"], content), source["name"], text, messages, metadata), ""


def _no_prompts(source: Mapping[str, Any], problems: Sequence[Problem]) -> ConfigError:
    place = f"The prompt set {source['name']!r} ({source['path']})"
    if not problems:
        return ConfigError(f"{place} is empty.")
    first = problems[0]
    reasons = Counter(problem.reason for problem in problems).most_common(3)
    counts = "; ".join(f"{count} x {reason}" for reason, count in reasons)
    return ConfigError(
        f"{place} has no usable prompt in {len(problems)} rows: {counts}. "
        f"The first, line {first.line}: {first.excerpt}"
    )


def _row_excerpt(row: Row, source: Mapping[str, Any]) -> str:
    if row.values is None:
        return row.excerpt
    return excerpt(row.values.get(source["prompt_field"], row.values))


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    if _uses_bos(tokenizer):  # One that the text begins with is the one that is added.
        while text.startswith(str(tokenizer.bos_token)):
            text = text.removeprefix(str(tokenizer.bos_token))
    ids = tuple(encode_text(tokenizer, text, add_special_tokens=True))
    around = tokenizer("").input_ids
    if around and around[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id:
        ids = ids[:-1]
    return _with_one_bos(tokenizer, ids)


def _with_one_bos(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> tuple[int, ...]:
    if not _uses_bos(tokenizer):
        return ids
    bos = int(tokenizer.bos_token_id)
    begin = next((i for i, token in enumerate(ids) if token != bos), len(ids))
    return (bos, *ids[begin:])


def _uses_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts a BOS before a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and bos in tokenizer("").input_ids[:1]

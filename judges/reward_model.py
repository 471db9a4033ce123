"""A reward model as judge: a sequence classifier whose single logit is the score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from online_dpo.control_tokens import encode_chat, encode_text
from online_dpo.errors import ConfigError
from online_dpo.records import Message, Prompt, Response, Score

if TYPE_CHECKING:
    import torch


class RewardModel:
    """Scores responses by a transformers sequence-classification model with one label.

    Runs in a judge worker. The conversation enters the model's own chat template once; without one
    (or with a plain prompt) prompt and response are put one behind the other.
    """

    name = "reward_model"
    version = "1"

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        batch_size: int = 16,
        max_tokens: int = 4096,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        """`model` is a folder or hub id. Raises ConfigError where it is no reward model."""
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model, revision=revision)
            loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                model,
                revision=revision,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"The reward model {model!r} cannot be loaded: {error}") from error
        self._model, info = loaded
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"]))
            raise ConfigError(f"{model!r} is no reward model: it has no weights for {missing}.")
        if self._model.config.num_labels != 1:
            raise ConfigError(
                f"{model!r} has {self._model.config.num_labels} labels; a reward model has one."
            )
        self._model.to(device).eval()
        self._device = device
        # Without a padding token transformers takes the last position, right for one row alone.
        self._batch_size = batch_size if self._model.config.pad_token_id is not None else 1
        self._max_tokens = max_tokens

    def score(self, prompt: Prompt, responses: Sequence[Response]) -> list[Score]:
        """The logit of each response; None with a reason for one that is too long."""
        ids = [self._ids(prompt, response) for response in responses]
        fitting = [i for i, tokens in enumerate(ids) if len(tokens) <= self._max_tokens]
        values: dict[int, float] = {}
        for start in range(0, len(fitting), self._batch_size):
            batch = fitting[start : start + self._batch_size]
            logits = self._logits([ids[i] for i in batch])
            values |= dict(zip(batch, logits.tolist(), strict=True))
        return [
            Score(values[i])
            if i in values
            else Score(None, f"{len(tokens)} tokens, more than max_tokens {self._max_tokens}")
            for i, tokens in enumerate(ids)
        ]

    def _ids(self, prompt: Prompt, response: Response) -> list[int]:
        if not prompt.messages or self._tokenizer.chat_template is None:
            text = prompt.content + response.text
            return encode_text(self._tokenizer, text, add_special_tokens=True)
        conversation = (*prompt.messages, Message("assistant", response.text))
        return encode_chat(self._tokenizer, conversation, add_generation_prompt=False)

    def _logits(self, ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """(B,) scores of right-padded sequences."""
        import torch

        length = max(len(tokens) for tokens in ids)
        pad = self._model.config.pad_token_id or 0
        tokens = torch.tensor([[*row, *[pad] * (length - len(row))] for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids])
        with torch.inference_mode():
            out = self._model(
                input_ids=tokens.to(self._device), attention_mask=mask.to(self._device)
            )
        logits: torch.Tensor = out.logits[:, 0].float().cpu()
        return logits

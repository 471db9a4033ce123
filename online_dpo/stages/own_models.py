"""A round's policy and reference as judges of its answers, through the campaign's own sampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from online_dpo.asking.own_model import Chat, Who
from online_dpo.paid.chat import ChatReply
from online_dpo.records import ModelRef, SamplingParams, to_dict
from online_dpo.stages.context import Context
from online_dpo.stages.origin import policy_zero
from online_dpo.stages.sample import load_policy
from online_dpo.tables import read_table

SOURCE = "judge"


class RoundModels:
    """The models that the round's plan names; in round 0, policy 0 is both."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def sha256(self, who: Who) -> str:
        return self._model(who).sha256

    def reply(
        self, who: Who, chats: Sequence[Chat], *, temperature: float, max_tokens: int
    ) -> list[ChatReply | None]:
        """A reply to each chat; None where the chat leaves no room for `max_tokens`."""
        context, model = self._context, self._model(who)
        params = SamplingParams(1, temperature, 1.0, 0, max_tokens)
        # Labelling has a thread of its own: no shard is sampled while the judge's model is loaded.
        with context.crew.sampler_turn:
            load_policy(context, model)
            encoded = context.crew.sampler().call(
                "encode_chats",
                model=context.model_params(model),
                chats=[[to_dict(message) for message in chat.messages] for chat in chats],
            )
            context_size = encoded["context"]
            asked = {
                chat.id: ids
                for chat, ids in zip(chats, encoded["ids"], strict=True)
                if context_size is None or len(ids) + max_tokens <= context_size
            }
            found = self._generate(chats, asked, params) if asked else {}
        return [found.get(chat.id) for chat in chats]

    def _model(self, who: Who) -> ModelRef:
        plan = self._context.plan
        if plan is None:
            return policy_zero(self._context.run.round(0))
        return plan.policy if who == "policy" else plan.reference

    def _generate(
        self, chats: Sequence[Chat], asked: dict[str, list[int]], params: SamplingParams
    ) -> dict[str, ChatReply]:
        scratch = self._context.round.begin("replies")
        table = scratch.path / "replies.parquet"
        self._context.crew.sampler().call(
            "generate",
            prompts=[{"id": i, "source": SOURCE, "token_ids": ids} for i, ids in asked.items()],
            seeds={chat.id: [chat.seed] for chat in chats if chat.id in asked},
            params=to_dict(params),
            out=str(table),
        )
        replies = {row["prompt_id"]: _reply(row) for row in read_table(table)}
        self._context.round.remove("replies.partial")
        return replies


def _reply(row: dict[str, Any]) -> ChatReply:
    finish = "length" if row["finish_reason"] == "length" else "stop"
    return ChatReply(row["text"], finish, SOURCE, None, len(row["token_ids"]))

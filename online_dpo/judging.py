"""Labelling: asking the config's judge in every order and vote, in whatever process it needs."""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

from online_dpo.annotation.asker import PeopleAsker
from online_dpo.asking.askers import Asker, InlineAsker, OnEvent, ProcessAsker
from online_dpo.asking.comparison_schedules import Pair, make_schedule, most_comparisons
from online_dpo.asking.judge_forms import (
    Answer,
    Form,
    Mode,
    repeats_itself,
)
from online_dpo.asking.judge_loop import LoopAsker
from online_dpo.asking.judge_opening import check_key, open_judge
from online_dpo.asking.members import Host
from online_dpo.asking.own_model import OwnModelAsker, OwnModels, Who
from online_dpo.asking.verdicts import (
    Kind,
    Question,
    combine_scores,
    combine_verdicts,
    compare_questions,
)
from online_dpo.asking.verdicts import Labels as Labels
from online_dpo.config import JudgeConfig
from online_dpo.errors import ConfigError, JudgeError
from online_dpo.files import disk_faults
from online_dpo.judge_clashes import of_judge
from online_dpo.paid.calls import Calls as Calls
from online_dpo.paid.chat import ChatReply as ChatReply
from online_dpo.paid.chat import ChatRequest as ChatRequest
from online_dpo.paid.chat import Estimate as Estimate
from online_dpo.paid.chat import RequestRefused as RequestRefused
from online_dpo.paid.chat import TokenLogprobs as TokenLogprobs
from online_dpo.paid.door import OnCall
from online_dpo.paid.prices import is_priced
from online_dpo.records import Comparison, Prompt, Response, Score, Verdict

PROGRESS_EVERY_S = 10.0
"""Between two events of how far labelling has come."""

_SHOW_EVERY_S = 0.5

OnShare = Callable[[float], None]
"""Takes the share of the questions that is answered, now and then."""


class Labeller:
    """The judge of a config, ready to be asked. One can serve every round: set `round`.

    `on_event` is called on the thread that asks. `label`, `score` and `compare_pairs` block; they
    may run on any thread, one at a time. They raise JudgeError (the judge fails), BudgetError,
    and concurrent.futures.CancelledError after `cancel`.
    """

    def __init__(
        self,
        judge_config: JudgeConfig,
        *,
        base: Path | None,
        ledger_path: Path,
        seed: int,
        round: int,
        on_event: OnEvent,
        log: Path | None = None,
        section: str = "judge",
        env: Mapping[str, str] | None = None,
        max_invalid: float | None = None,
    ) -> None:
        """`section` is where the config stands in the campaign's, for messages; `env` is added to
        the environment of a judge's own process. `max_invalid` takes the place of the config's,
        for who measures how much of it there is.

        Raises ConfigError where the judge cannot be imported or made, or its settings clash.
        """
        self.config = judge_config
        self.round = round
        self._seed = seed
        self._on_event = on_event
        self._base = base
        self._ledger_path = ledger_path
        self._env = dict(env or {})
        self._section = section
        self._max_invalid = judge_config.max_invalid if max_invalid is None else max_invalid
        self._log = log or ledger_path.parent / "logs" / "judge.log"
        self._cancelled = threading.Event()
        self.kind: Kind
        self.mode: Mode
        self._priced = True
        self.own_models: OwnModels | None = None
        """The round's models, for a judge that asks one of them; set beside `round`."""
        self._repeats = False
        self._form: Form | None = None
        self._version: str
        self.who: Who
        """Which of the round's models is asked, where one is."""
        self._asker: Asker
        self._prepare()
        compares = self.kind == "compare"
        clashes = of_judge(
            judge_config,
            section=section,
            compares=compares,
            mode=self.mode,
            priced=self._priced,
            repeats=self._repeats,
        )
        if (problem := next(clashes, None)) is not None:
            self.close()
            raise ConfigError(f"{problem}.")

    @property
    def identity(self) -> dict[str, str]:
        """The judge's name, as in the config, and its own version, with the weights that judge."""
        version = self._version
        if self.mode == "own_model" and self.own_models is not None:
            version += f"-{self.own_models.sha256(self.who)[:16]}"
        return {"name": self.config.name, "version": version}

    def label(
        self,
        items: Sequence[tuple[Prompt, Sequence[Response]]],
        *,
        purpose: str,
        on_share: OnShare | None = None,
        reference_logps: Mapping[str, float] | None = None,
        budget: int | None = None,
    ) -> list[Labels]:
        """One Labels for each prompt, in the order of the items; comparisons in that of the pairs.

        `reference_logps` and `budget` are what `make_schedule` takes.
        """
        if self.kind == "score":
            scores = self.score(items, purpose=purpose, on_share=on_share)
            return [
                Labels(prompt.id, scores=given)
                for (prompt, _), given in zip(items, scores, strict=True)
            ]
        self._go_on()
        config = self.config
        following = make_schedule(
            config.schedule,
            config.comparisons,
            items,
            seed=self._seed,
            round=self.round,
            reference_logps=reference_logps,
            margins=config.margins,
            budget=budget,
        )
        found: list[dict[Pair, Comparison]] = [{} for _ in items]
        most = [most_comparisons(config.schedule, config.comparisons, len(r)) for _, r in items]
        total = sum(most) if budget is None else max(1, min(budget, sum(most)))
        while any(wave := following([_ps(comparisons) for comparisons in found])):
            places = [(index, pair) for index, pairs in enumerate(wave) for pair in pairs]
            asked = [(items[i][0], items[i][1][a], items[i][1][b]) for i, (a, b) in places]
            done = sum(map(len, found))
            said = self.compare_pairs(
                asked, purpose=purpose, on_share=_part(on_share, done, len(asked), total)
            )
            for (index, pair), comparison in zip(places, said, strict=True):
                found[index][pair] = comparison
        return [
            Labels(prompt.id, comparisons=tuple(known[pair] for pair in sorted(known)))
            for (prompt, _), known in zip(items, found, strict=True)
        ]

    def score(
        self,
        items: Sequence[tuple[Prompt, Sequence[Response]]],
        *,
        purpose: str,
        on_share: OnShare | None = None,
    ) -> list[tuple[Score, ...]]:
        """The scores of each prompt's responses, aligned with them. Only where kind is "score"."""
        return [
            combine_scores(votes)
            for votes in self.score_votes(
                items, purpose=purpose, votes=self.config.votes, on_share=on_share
            )
        ]

    def score_votes(
        self,
        items: Sequence[tuple[Prompt, Sequence[Response]]],
        *,
        purpose: str,
        votes: int,
        on_share: OnShare | None = None,
    ) -> list[list[tuple[Score, ...]]]:
        """What `score` combines: of each prompt `votes` times the scores of its responses."""
        assert self.kind == "score", f"{self.config.name} compares, it does not score"
        questions = [
            Question(prompt, tuple(responses), vote)
            for prompt, responses in items
            for vote in range(votes)
        ]
        answers = [_as_scores(answer) for answer in self._ask(questions, purpose, on_share)]
        return [answers[start : start + votes] for start in range(0, len(answers), votes)]

    def compare_pairs(
        self,
        pairs: Sequence[tuple[Prompt, Response, Response]],
        *,
        purpose: str,
        on_share: OnShare | None = None,
    ) -> list[Comparison]:
        """One Comparison for each pair, in their order. Only where kind is "compare"."""
        said = self.pair_votes(pairs, purpose=purpose, votes=self.config.votes, on_share=on_share)
        return [
            combine_verdicts(*pair, answers, swap=self.config.swap)
            for pair, answers in zip(pairs, said, strict=True)
        ]

    def pair_votes(
        self,
        pairs: Sequence[tuple[Prompt, Response, Response]],
        *,
        purpose: str,
        votes: int,
        on_share: OnShare | None = None,
    ) -> list[list[tuple[Question, Verdict]]]:
        """What `compare_pairs` combines: what was asked about each pair, with each verdict."""
        assert self.kind == "compare", f"{self.config.name} scores, it does not compare"
        asked = [
            compare_questions(
                *pair, orders=self.config.orders, votes=votes, seed=self._seed, round=self.round
            )
            for pair in pairs
        ]
        questions = [question for group in asked for question in group]
        answers = iter(_as_verdict(answer) for answer in self._ask(questions, purpose, on_share))
        return [[(question, next(answers)) for question in group] for group in asked]

    def watch(self, on_call: OnCall) -> None:
        """Have every call of a judge that pays told as it ends, on the judge's own thread."""
        if isinstance(self._asker, LoopAsker):
            self._asker.watch(on_call)

    def cancel(self) -> None:
        """End what another thread asks, soon. The labeller can then only be closed."""
        self._cancelled.set()
        self._asker.cancel()

    def close(self) -> None:
        """End the judge's process or connections and close the ledger. Safe to repeat."""
        self._asker.close()
        close = None if self._form is None else getattr(self._form.judge, "close", None)
        if callable(close):
            close()

    def _prepare(self) -> None:
        run, config = self._ledger_path.parent, self.config
        opened = open_judge(
            config.name, config.options, self._base, run=run, log=self._log, env=self._env
        )
        if opened.process is not None:
            self.kind, self.mode, self._version = opened.kind, opened.mode, opened.version
            self._asker = ProcessAsker(opened.process, config, opened.function)
            return
        assert opened.form is not None
        self._take(opened.form, opened.mode)

    def _take(self, form: Form, mode: Mode) -> None:
        """Use a judge that runs in this process."""
        self._form = form
        if (seat := getattr(form.judge, "seat", None)) is not None:
            run = self._ledger_path.parent
            seat(Host(self._base, run, self._log, self.config, self._env))
        self.kind, self._version = form.kind, form.version
        self.mode = getattr(form.judge, "members_mode", mode)
        self._priced = is_priced(form.judge, self.config)
        self._repeats = repeats_itself(form.judge)
        if mode == "inline":
            self._asker = InlineAsker(form)
        elif mode == "own_model":
            self.who = form.judge.who
            self._asker = OwnModelAsker(form, lambda: self.own_models, seed=self._seed)
        elif mode == "people":
            # Each person sees one order, drawn for them.
            self.config = self.config.model_copy(update={"orders": "one"})
            self._asker = PeopleAsker(form, run=self._ledger_path.parent, seed=self._seed)
        else:
            check_key(form.judge)
            config = self.config.model_copy(update={"max_invalid": self._max_invalid})
            self._asker = LoopAsker(
                form, config, self._ledger_path, seed=self._seed, section=self._section
            )

    def _ask(
        self, questions: Sequence[Question], purpose: str, on_share: OnShare | None
    ) -> list[Answer]:
        answers: list[Answer | None] = [None] * len(questions)
        progress = _Progress(self.config.name, purpose, len(questions), self._on_event, on_share)
        try:
            self._go_on()
            stream = self._asker.answers(
                questions, purpose=purpose, round=self.round, on_event=self._on_event
            )
            with contextlib.closing(stream):
                for index, answer in stream:
                    answers[index] = answer
                    progress.count(answer)
        except JudgeError as error:
            self._log_failure(error)
            raise
        finally:
            progress.finish()
        return [answer for answer in answers if answer is not None]

    def _go_on(self) -> None:
        if self._cancelled.is_set():
            raise CancelledError("labelling was cancelled")

    def _log_failure(self, error: JudgeError) -> None:
        """Keep the traceback of a judge's exception beside the message that ends the campaign."""
        if error.__cause__ is None:
            return
        with disk_faults(self._log):
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("a", encoding="utf-8") as log:
                log.writelines(traceback.format_exception(error))


class _Progress:
    """Tells how far labelling has come: in events, every ten seconds and once at the end, and to
    whoever watches, twice a second.
    """

    def __init__(
        self,
        judge: str,
        purpose: str,
        total: int,
        on_event: OnEvent,
        on_share: OnShare | None,
    ) -> None:
        self._facts: dict[str, Any] = {"judge": judge, "purpose": purpose, "total": total}
        self._on_event = on_event
        self._on_share = on_share
        self._done = 0
        self._invalid: Counter[str] = Counter()
        self._last = self._shown = time.monotonic()

    def count(self, answer: Answer) -> None:
        self._done += 1
        for judgement in answer if isinstance(answer, tuple) else (answer,):
            value = judgement.value if isinstance(judgement, Score) else judgement.p
            if value is None:
                self._invalid[judgement.reason or ""] += 1
        now = time.monotonic()
        if self._on_share is not None and now - self._shown >= _SHOW_EVERY_S:
            self._shown = now
            self._on_share(self._done / self._facts["total"])
        if now - self._last >= PROGRESS_EVERY_S:
            self._last = now
            self._emit("judging")

    def finish(self) -> None:
        self._emit("judged")

    def _emit(self, event: str) -> None:
        invalid = dict(sorted(self._invalid.items()))
        self._on_event({"event": event, **self._facts, "done": self._done, "invalid": invalid})


def _ps(comparisons: Mapping[Pair, Comparison]) -> dict[Pair, float | None]:
    return {pair: comparison.p for pair, comparison in comparisons.items()}


def _part(on_share: OnShare | None, done: int, wave: int, total: int) -> OnShare | None:
    """Tells of a wave's share as one of all comparisons."""
    if on_share is None:
        return None
    return lambda share: on_share(min(1.0, (done + share * wave) / total))


def _as_scores(answer: Answer) -> tuple[Score, ...]:
    assert isinstance(answer, tuple)
    return answer


def _as_verdict(answer: Answer) -> Verdict:
    assert isinstance(answer, Verdict)
    return answer

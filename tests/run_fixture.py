"""A run directory with three rounds of plausible data, made without any model."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from online_dpo.config_file import config_from_dict, dump_yaml
from online_dpo.integrity import write_start
from online_dpo.judge_health import Shown, label_figures
from online_dpo.metrics import Drift, evaluation_figures, wilson, win
from online_dpo.pairing import Judged, best_worst, make_pairs
from online_dpo.records import Comparison, Message, ModelRef, Prompt, Response, RoundPlan, Score
from online_dpo.records import to_dict as plain
from online_dpo.store import RoundDir, RunDir
from online_dpo.tables import prompt_row, read_table, responses_by_prompt, write_table

Row = dict[str, Any]
VERSIONS = json.dumps({"python": "3.11.9", "torch": "2.13.0"})

FILMS = ("Golden Orchard", "Empty Station", "Last Island", "Quiet Tower", "Paper Moon", "Red Salt")
PRODUCTS = ("coffee grinder", "alarm clock", "garden hose", "desk lamp", "radio", "travel mug")
GOOD = (
    "I loved the ending.",
    "The camera work is superb.",
    "It is a joy.",
    "The finish is lovely.",
)
BAD = ("I hated the packaging.", "The plot is dull.", "I would avoid it.", "The hinge is flimsy.")
NUM_SAMPLES = 4


def make_run(
    folder: Path,
    *,
    rounds: int = 3,
    finished: int | None = None,
    judge: str = "score",
    policy: Path | None = None,
    pinned: bool = False,
    form: str = "text",
    odd_answer: str | None = None,
    config: dict[str, Any] | None = None,
    sources: Sequence[str] = ("reviews",),
) -> Path:
    """Write `folder/demo`, the run of a campaign of `rounds` rounds, and return it.

    Of the rounds `finished` are done, and the next has its first shard sampled. `judge` is "score"
    or "compare". Every round's policy is a copy of the folder `policy`; `pinned` makes policy 0 a
    given model instead of an sft policy. Prompts are "text", "messages" or "both". `odd_answer`
    becomes the text of an answer and of the widest pair of every round. Prompts come from the
    `sources` in turn.
    """
    run = RunDir(folder / "demo")
    run.path.mkdir(parents=True)
    settings = _config(run.path, rounds, pinned=pinned, policy=policy)
    settings |= config or {}
    loaded = config_from_dict(settings)
    write_start(run, VERSIONS, dump_yaml(loaded.config.model_dump(mode="json")))
    maker = _Maker(run, judge, policy, form, odd_answer, sources)
    maker.origin(pinned=pinned)
    done = rounds if finished is None else finished
    for number in range(1, done + 1):
        maker.round(number)
    if done < rounds:
        maker.begin(done + 1, num_sampled=4)
    return run.path


def _config(run: Path, rounds: int, *, pinned: bool, policy: Path | None) -> dict[str, Any]:
    origin: dict[str, Any] = {"model": {"init": {"hidden_size": 32, "num_heads": 4}}}
    origin["sft"] = {"demonstrations": "quickstart_demonstrations.jsonl"}
    if pinned:
        origin = {"model": {"path": str(policy or run)}}
    return {
        **origin,
        "prompts": {
            "train": [{"path": "quickstart.jsonl", "name": "reviews"}],
            "eval": [{"path": "quickstart_eval.jsonl", "name": "reviews"}],
        },
        "judge": {"name": "heuristic", "options": {"kind": "length"}},
        "campaign": {"name": "demo", "rounds": rounds, "prompts_per_round": 8, "run_dir": str(run)},
        "sampling": {"n": NUM_SAMPLES, "prompts_per_shard": 4},
        "evaluation": {"examples": 3},
    }


class _Maker:
    def __init__(
        self,
        run: RunDir,
        judge: str,
        policy: Path | None,
        form: str,
        odd: str | None,
        sources: Sequence[str],
    ) -> None:
        self.run = run
        self.judge = judge
        self.policy = policy
        self.odd = odd
        self.random = random.Random(7)
        names = [f"the film {film}" for film in FILMS] + [f"the Maple {p}" for p in PRODUCTS]
        self.train, self.held_out = (
            [
                _prompt(first + i, f"Review of {name}{end}:\n", form, sources[i % len(sources)])
                for i, name in enumerate(names)
            ]
            for first, end in ((0, ""), (50, " II"))
        )
        self.answers: list[dict[str, Row]] = []

    def origin(self, *, pinned: bool) -> None:
        round_dir = self.run.round(0)
        round_dir.write_plan({"round": 0, "seed": 0})
        with round_dir.commit("model", inputs={}) as draft:
            place = {"path": str(self.policy or "hub:acme/tiny@abc123"), "sha256": "a" * 64}
            (draft.path / "pin.json").write_text(json.dumps({**place, "files": {}}))
        rows = [prompt_row(p, role="train", weight=1.0) for p in self.train]
        rows += [prompt_row(p, role="eval", weight=1.0) for p in self.held_out]
        with round_dir.commit("prompts", inputs={}) as draft:
            write_table(draft.path / "prompts.parquet", "prompts", rows)
        if not pinned:
            losses = [6.9 * 0.6**step + 1.2 for step in range(8)]
            self._training(round_dir, [{"step": i + 1, "loss": x} for i, x in enumerate(losses)])
            self._policy(round_dir)
        reference = round_dir.ref("policy") if not pinned else ModelRef(**place)
        self._close(round_dir, reference, {"train": 11.5, "evaluate": 0.8}, wall_s=14.1)

    def round(self, number: int) -> None:
        round_dir = self.begin(number)
        plan = round_dir.plan()
        judged, labels = self._label(round_dir)
        self._check_judge(round_dir)
        pairing = make_pairs(
            judged, best_worst, round_number=number, seed=number, scale=1.0, min_margin=0.0,
            max_per_prompt=None,
        )  # fmt: skip
        rows = [plain(p) for p in pairing.preferences]
        if self.odd is not None:
            rows[0] |= {"chosen_text": self.odd, "margin": 9.0}
        with round_dir.commit("pairs", inputs={"labels": labels}) as draft:
            write_table(draft.path / "pairs.parquet", "pairs", rows)
            metrics = {
                "pairs": len(rows),
                "prompts": len(judged),
                "prompts_with_pairs": len(rows),
                "responses": dict(pairing.fates),
                "origins": {f"round-{number:03d}": len(rows)},
                "mean_margin": sum(p.margin for p in pairing.preferences) / len(rows),
            }
            _json(draft.path / "metrics.json", metrics)
            draft.rows = len(rows)
        steps = [_step(number, k) for k in range(1, 7)]
        self._training(round_dir, steps)
        self._policy(round_dir)
        busy = {"sample": 2.25, "label": 0.4, "pair": 0.1, "train": 3.5, "evaluate": 1.1}
        self._close(round_dir, round_dir.ref("policy"), busy, wall_s=8.0, plan=plan)

    def begin(self, number: int, *, num_sampled: int = 8) -> RoundDir:
        """A round's plan and its only shard of samples."""
        round_dir = self.run.round(number)
        origin = self.run.round(number - 1)
        policy = ModelRef(**origin.manifest()["policy"])
        chosen = self.random.sample(self.train, 8)
        round_dir.write_plan(
            RoundPlan(
                round=number, seed=number, prompt_ids=tuple(p.id for p in chosen),
                prompts_sha256="b" * 64, policy=policy, reference=policy,
                reference_round=number - 1, beta=0.1, learning_rate=1e-4, rounds=3, optimizer=None,
                optimizer_step=0, evaluate=True, previous_manifest_sha256=origin.manifest_sha256(),
            )
        )  # fmt: skip
        prompts = chosen[:num_sampled]
        rows = [
            {**plain(r), "prompt_source": p.source}
            for p in prompts
            for r in self._responses(p, number - 1, NUM_SAMPLES)
        ]
        with round_dir.commit("samples/part-00000", inputs={}) as draft:
            write_table(draft.path / "samples.parquet", "samples", rows)
            _json(draft.path / "metrics.json", {"rows": len(rows), "tokens": 300, "finish": {}})
            draft.rows = len(rows)
        return round_dir

    def _responses(self, prompt: Prompt, skill: int, count: int) -> list[Response]:
        made = []
        for k in range(count):
            chance = min(0.25 + 0.22 * skill, 0.9)
            num_good = sum(self.random.random() < chance for _ in range(3))
            words = self.random.sample(GOOD, num_good) + self.random.sample(BAD, 3 - num_good)
            text = " ".join(words)
            tokens = tuple(3 + len(word) for word in text.split()) + (2,)
            cut = self.random.random() < 0.08
            made.append(
                Response(
                    id=f"{prompt.id}-{skill}-{k}", prompt_id=prompt.id, text=text,
                    token_ids=tokens[:-1] if cut else tokens,
                    finish_reason="length" if cut else "eos", logprobs=(-0.5,) * len(tokens),
                )
            )  # fmt: skip
        return made

    def _label(self, round_dir: RoundDir) -> tuple[list[Judged], str]:
        table = read_table(round_dir.path / "samples" / "part-00000" / "samples.parquet")
        by_id = {p.id: p for p in self.train}
        judged, rows = [], []
        for prompt_id, responses in responses_by_prompt(table).items():
            if self.judge == "score":
                scores = [_score(r, last=r is responses[-1]) for r in responses]
                judged.append(Judged(by_id[prompt_id], responses, scores=scores))
                rows += [
                    _label(prompt_id, r.id, score=s) for r, s in zip(responses, scores, strict=True)
                ]
            else:
                compared = _compare(prompt_id, responses)
                judged.append(Judged(by_id[prompt_id], responses, comparisons=compared))
                rows += [_label(prompt_id, c.first_id, comparison=c) for c in compared]
        invalid = sum(r["score"] is None and r["p"] is None for r in rows)
        with round_dir.commit("labels/part-00000", inputs={}) as draft:
            sourced = [{**row, "prompt_source": by_id[row["prompt_id"]].source} for row in rows]
            write_table(draft.path / "labels.parquet", "labels", sourced)
            counts = {"verdicts": len(rows), "valid": len(rows) - invalid, "ties": 0}
            _json(draft.path / "metrics.json", {**counts, "invalid": {"no final answer": invalid}})
            draft.facts = {"judge": {"name": "heuristic"}, "kind": self.judge}
        return judged, round_dir.manifest("labels/part-00000")["sha256"]

    def _check_judge(self, round_dir: RoundDir) -> None:
        """The figures of the round's labels; on a gold set the judge gets worse."""
        samples = read_table(round_dir.path / "samples/part-00000/samples.parquet")
        shown = {
            r["id"]: Shown(r["text"], r["finish_reason"], len(r["token_ids"])) for r in samples
        }
        labels = read_table(round_dir.path / "labels/part-00000/labels.parquet")
        figures = label_figures(
            labels,
            shown,
            kind="score" if self.judge == "score" else "compare",
            scale=1.0,
            is_swapped=lambda row: None,
        )
        right, won = (wilson([1.0] * n + [0.0] * (24 - n)) for n in (22 - round_dir.number, 3))
        assert right is not None and won is not None
        gold = {"accuracy": asdict(right), "kappa": 0.8 - 0.08 * round_dir.number}
        with round_dir.commit("judge_check", inputs={}) as draft:
            found = {"kind": self.judge, **figures, "gold": gold, "constant": asdict(won)}
            _json(draft.path / "metrics.json", found)

    def _training(self, round_dir: RoundDir, steps: Sequence[Row]) -> None:
        with round_dir.commit("training", inputs={}) as draft:
            text = "".join(json.dumps(step) + "\n" for step in steps)
            (draft.path / "steps.jsonl").write_text(text)
            names = [name for name in steps[0] if name != "step"]
            firsts = {f"first_{name}": steps[0][name] for name in names}
            lasts = {f"last_{name}": steps[-1][name] for name in names}
            summary = {"steps": len(steps), "skipped": {}, **firsts, **lasts}
            _json(draft.path / "metrics.json", summary)

    def _policy(self, round_dir: RoundDir) -> None:
        with round_dir.commit("policy", inputs={}) as draft:
            if self.policy is None:
                (draft.path / "config.json").write_text(json.dumps({"round": round_dir.number}))
                return
            for file in self.policy.iterdir():
                (draft.path / file.name).write_bytes(file.read_bytes())

    def _close(
        self,
        round_dir: RoundDir,
        policy: ModelRef,
        busy: dict[str, float],
        *,
        wall_s: float,
        plan: RoundPlan | None = None,
    ) -> None:
        self._evaluate(round_dir)
        round_dir.close(
            {
                "policy": plain(policy),
                "promoted": True,
                "why": "reference.promote is every_round" if plan else "policy 0",
                "optimizer": None,
                "optimizer_step": 0,
            }
        )
        fixed = round(wall_s - sum(busy.values()), 4)
        self.run.event(
            "round ended", round=round_dir.number, wall_s=wall_s, busy_s=busy, fixed_s=fixed
        )

    def _evaluate(self, round_dir: RoundDir) -> None:
        rows = []
        for prompt in self.held_out:
            (answer,) = self._responses(prompt, round_dir.number, 1)
            rows.append(self._answer(prompt, answer))
        if self.odd is not None:
            rows[0]["text"] = self.odd
        self.answers.append({row["prompt_id"]: row for row in rows})
        with round_dir.commit("evaluation", inputs={}) as draft:
            write_table(draft.path / "answers.parquet", "answers", rows)
            _json(draft.path / "metrics.json", _figures(rows, round_dir.number))
            draft.rows = len(rows)

    def _answer(self, prompt: Prompt, answer: Response) -> Row:
        score = _value(answer)
        row = {
            "prompt_id": prompt.id, "prompt_source": prompt.source, "response_id": answer.id,
            "prompt_text": prompt.content, "text": answer.text,
            "token_ids": list(answer.token_ids), "finish_reason": answer.finish_reason,
            "score": score if self.judge == "score" else None, "reason": None,
            "p_previous": None, "p_policy0": None,
        }  # fmt: skip
        if self.answers:
            row["p_previous"] = win(score, _points(self.answers[-1][prompt.id]["text"]))
            row["p_policy0"] = win(score, _points(self.answers[0][prompt.id]["text"]))
        return row


def _prompt(index: int, text: str, form: str, source: str) -> Prompt:
    messages = form == "messages" or (form == "both" and index % 2 == 1)
    turns = (Message("user", text),) if messages else ()
    return Prompt(
        id=f"{index:016x}", source=source, text=None if messages else text, messages=turns,
        token_ids=(1, 5, 9, 11),
    )  # fmt: skip


def _points(text: str) -> float:
    return float(sum(text.count(s) for s in GOOD) - sum(text.count(s) for s in BAD))


def _value(response: Response) -> float:
    return _points(response.text)


def _score(response: Response, *, last: bool) -> Score:
    if last and response.truncated:
        return Score(None, "no final answer")
    return Score(_value(response), "three sentences")


def _compare(prompt_id: str, responses: Sequence[Response]) -> list[Comparison]:
    first, second, third, _ = responses
    p = 0.5 + (_value(first) - _value(second)) / 14
    return [
        Comparison(prompt_id, first.id, second.id, p, None, orders=2),
        Comparison(prompt_id, second.id, third.id, None, "no final answer", orders=2),
    ]


def _label(
    prompt_id: str, first: str, *, score: Score | None = None, comparison: Comparison | None = None
) -> Row:
    row: Row = {"prompt_id": prompt_id, "first_id": first, "second_id": None, "score": None}
    row |= {"p": None, "reason": None, "orders": 0, "raws": [], "order_ps": [], "vote_ps": []}
    if score is not None:
        return row | {"score": score.value, "reason": score.reason}
    assert comparison is not None
    known = asdict(comparison)
    return row | {key: known[key] for key in ("second_id", "p", "reason", "orders")}


def _step(number: int, step: int) -> Row:
    return {
        "step": step,
        "loss": 0.69315 - 0.05 * (step - 1) - 0.02 * number * (step > 1),
        "margin": 0.1 * (step - 1),
        "accuracy": 0.0 if step == 1 else 0.6 + 0.05 * step,
        "chosen_reward": 0.05 * (step - 1),
        "rejected_reward": -0.05 * (step - 1),
        "grad_norm": 1.5 / step,
        "learning_rate": 1e-4,
    }


def _figures(rows: Sequence[Row], number: int) -> Row:
    """As of a policy that drifts by 4 nats a round from policy 0, its sequences by 4 +- 1."""
    away = [[-4.0 * number + (-1.0 if i % 2 else 1.0)] for i in range(len(rows))]
    near = [[-4.0]] * len(rows)
    still = [[0.0]] * len(rows)
    drifts = {"kl_reference": Drift(still, near), "kl_policy0": Drift(still, away)}
    return evaluation_figures(rows, drifts if number else dict.fromkeys(drifts), asked=number > 0)


def _json(path: Path, data: Row) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")

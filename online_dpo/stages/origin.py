"""Round 000: where policy 0 comes from, and the campaign's prompts, tokenized for it once."""

from __future__ import annotations

import json
import random
from typing import Any

from online_dpo.config import PromptSource
from online_dpo.errors import ConfigError
from online_dpo.files import read_json
from online_dpo.models.pinning import pin_model
from online_dpo.records import ModelRef, derive_seed
from online_dpo.resources import find_rows
from online_dpo.stages.canary import write_canary
from online_dpo.stages.context import Context, engine_length, read_prompts
from online_dpo.stages.train import checkpoint_listener, commit_training, latest_checkpoint
from online_dpo.store import RoundDir
from online_dpo.tables import read_table, write_table


def make_origin(context: Context) -> None:
    """Commit what is missing of the model, the prompts, the sft policy and its canary."""
    if not context.round.has("model"):
        _commit_model(context)
    if not context.round.has("prompts"):
        _commit_prompts(context)
    check_pool(context)
    if context.config.pairs.offline is not None and not context.round.has("offline"):
        _commit_offline(context)
    if context.config.sft is not None and not context.round.has("policy"):
        _commit_sft(context)
    lora = context.config.train.lora
    if lora is not None and lora.quantization is not None and not context.round.has("base"):
        commit_dequantized(context, _unquantized(context.round))
    write_canary(context, policy_zero(context.round))


def policy_zero(origin: RoundDir) -> ModelRef:
    """Policy 0: what is left of it in 4 bits, else the sft policy, else the model as given."""
    if origin.has("base"):
        return origin.ref("base")
    return _unquantized(origin)


def _unquantized(origin: RoundDir) -> ModelRef:
    if origin.has("policy"):
        return origin.ref("policy")
    return _given(origin)


def _given(origin: RoundDir) -> ModelRef:
    """The model before any training: made by init, or pinned."""
    pin = origin.artifact("model") / "pin.json"
    if not pin.is_file():
        return origin.ref("model")
    data = read_json(pin)
    return ModelRef(data["path"], data["sha256"])


def _commit_model(context: Context) -> None:
    config = context.config.model
    what = f"the model {config.path}" if config.path else "a new model, by model.init"
    context.progress.note(f"policy 0 comes from {what}")
    with context.round.commit("model", inputs={}) as draft:
        if config.init is not None:
            assert context.config.sft is not None
            context.crew.trainer().call(
                "init_model",
                init=config.init.model_dump(mode="json"),
                corpus=find_rows(context.config.sft.demonstrations),
                chat_template=config.chat_template,
                seed=derive_seed(context.config.campaign.seed, "init"),
                out=str(draft.path),
            )
        else:
            pin = pin_model(
                config.path or "", config.revision, trust_remote_code=config.trust_remote_code
            )
            (draft.path / "pin.json").write_text(json.dumps(pin, indent=2) + "\n")
        draft.facts = {"made_with": context.crew.facts}


def _commit_prompts(context: Context) -> None:
    config = context.config.prompts
    model = _given(context.round)
    length = context.config.sampling.max_new_tokens
    eval_length = context.config.evaluation.max_new_tokens or length
    if config.holdout:  # which of them are held out is decided later
        length = max(length, eval_length)
    with (
        context.progress.stage("prompts", total=0, unit="prompts") as bar,
        context.round.commit("prompts", inputs={"model": model.sha256}) as draft,
    ):
        context.crew.trainer().call(
            "tokenize_prompts",
            model=str(context.folder(model)),
            sources=[
                *(_source(source, "train", length) for source in config.train),
                *(_source(source, "eval", eval_length) for source in config.eval),
            ],
            max_tokens=config.max_tokens,
            max_new_tokens=context.config.sampling.max_new_tokens,
            max_model_len=engine_length(context.config),
            out=str(draft.path),
        )
        table = draft.path / "prompts.parquet"
        rows = _hold_out(read_table(table), config.holdout, context.config.campaign.seed)
        write_table(table, "prompts", rows)
        draft.rows = len(rows)
        bar.set(len(rows), total=len(rows))
        problems = (draft.path / "problems.jsonl").read_text().splitlines()
    _report_problems(context, problems)


def check_pool(context: Context) -> None:
    """Refuse a config whose rounds would not find their prompts. Raises ConfigError."""
    size = sum(len(ids) for ids in read_prompts(context.run).train.values())
    wanted = context.config.campaign.prompts_per_round
    if wanted > size:
        raise ConfigError(
            f"campaign.prompts_per_round is {wanted}, but only {size} training prompts are "
            f"usable (see {context.run.path / 'rounds/000/prompts/problems.jsonl'})."
        )


def _source(source: PromptSource, role: str, max_new_tokens: int) -> dict[str, Any]:
    data = {**source.model_dump(mode="json"), "path": find_rows(source.path)}
    return {**data, "role": role, "max_new_tokens": max_new_tokens}


def _hold_out(rows: list[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """Rows with `count` of the training prompts turned into evaluation prompts, by seed."""
    train = sorted(row["id"] for row in rows if row["role"] == "train")
    if count >= len(train) > 0:
        raise ConfigError(
            f"prompts.holdout is {count}, which leaves none of the {len(train)} usable prompts to "
            "train on."
        )
    held = set(random.Random(derive_seed(seed, "holdout")).sample(train, count))
    return [{**row, "role": "eval"} if row["id"] in held else row for row in rows]


def _report_problems(context: Context, problems: list[str]) -> None:
    for line in problems[:5]:
        problem = json.loads(line)
        context.progress.note(
            f"prompts: {problem['source']}:{problem['line']} skipped: {problem['reason']}"
        )
    if len(problems) > 5:
        file = context.round.path / "prompts" / "problems.jsonl"
        context.progress.note(f"prompts: {len(problems) - 5} more were skipped; see {file}")


def _commit_offline(context: Context) -> None:
    offline = context.config.pairs.offline
    assert offline is not None
    model = _given(context.round)
    prompts = context.round.verify("prompts")
    inputs = {"model": model.sha256, "prompts": context.round.manifest("prompts")["sha256"]}
    with context.round.commit("offline", inputs=inputs) as draft:
        result = context.crew.trainer().call(
            "tokenize_offline",
            model=str(context.folder(model)),
            source=find_rows(offline.path),
            form="pairs" if context.config.pairs.threshold is None else "unpaired",
            split=offline.split,
            append_eos=offline.append_eos,
            max_tokens=context.config.prompts.max_tokens,
            prompts_table=str(prompts / "prompts.parquet"),
            out=str(draft.path),
        )
        draft.rows = result["rows"]
    # A table read before lacks the offline prompts.
    context.prompts = None


def commit_dequantized(context: Context, model: ModelRef) -> None:
    """Commit `base/`, what a model's weights amount to in 4 bits.

    The policy that samples, or that is exported, is then the one trained.
    """
    params = context.model_params(model)
    with context.round.commit("base", inputs={"model": model.sha256}) as draft:
        context.crew.trainer().call("dequantize", model=params["path"], out=str(draft.path))
        draft.facts = {"made_with": context.crew.facts}


def _commit_sft(context: Context) -> None:
    config = context.config
    assert config.sft is not None
    model = _given(context.round)
    inputs = {"model": model.sha256}
    checkpoint = latest_checkpoint(context)
    draft = context.round.begin("policy")
    with context.progress.stage("sft", total=0, unit="steps") as bar:
        result = context.crew.trainer().call(
            "sft",
            on_event=checkpoint_listener(context, bar, inputs),
            model=context.model_params(model),
            demonstrations=find_rows(config.sft.demonstrations),
            sft=config.sft.model_dump(mode="json"),
            max_tokens=config.train.max_tokens,
            seed=derive_seed(config.campaign.seed, "sft"),
            out=str(draft.path),
            checkpoints=str(context.round.path / "checkpoints"),
            checkpoint_every=config.train.checkpoint_every,
            resume_from=None if checkpoint is None else str(context.round.path / checkpoint),
        )
    commit_training(context, draft, result, inputs)
    context.round.remove("checkpoints")

"""Offline DPO or KTO: one training on a given set, which goes on where it was interrupted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from online_dpo.config import Config
from online_dpo.crew import Crew
from online_dpo.errors import CampaignError, ConfigError, NoPairsError, SignalError
from online_dpo.files import disk_faults, read_json, sha256_file, sha256_text, to_json
from online_dpo.loss_rules import describe_loss, needs_reference
from online_dpo.models.adapter_files import is_adapter
from online_dpo.models.pinning import pin_model
from online_dpo.offline.config import GIVEN_ROWS, arguments_of, offline_config
from online_dpo.offline.folder import OfflineFolder
from online_dpo.progress import Progress, make_progress
from online_dpo.records import ModelRef, RoundPlan, derive_seed, to_dict
from online_dpo.rows import kind_of
from online_dpo.signals import stop_on_signals
from online_dpo.stages.context import Context, trained_on
from online_dpo.stages.origin import commit_dequantized
from online_dpo.stages.train import score_reference, train_policy
from online_dpo.store import Draft, RoundDir, read_lines

COLUMNS = ("prompt", "chosen", "rejected", "completion", "label")
METRICS_FILE = "train_metrics.jsonl"
SUMMARY_FILE = "summary.json"

Rows = Iterable[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class TrainedPolicy:
    """What offline training made.

    `policy` is a transformers folder; `metrics` has the means of each optimizer step in order, as
    docs/metrics.md explains them; `summary` counts steps, pairs and what was left out, by reason.
    """

    policy: Path
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]


def train_preferences(
    pairs: str | Path | Rows,
    model: str | Path,
    *,
    reference: str | Path | None = None,
    out: str | Path,
    config: str | Path | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **train: Any,
) -> TrainedPolicy:
    """Train `model` by DPO on given preferences and write the policy to the folder `out`.

    `pairs` is a .jsonl or .parquet file, the name of a dataset, a `datasets.Dataset` or a sequence
    of mappings, with prompt, chosen and rejected, or for KTO prompt, completion and label.
    `reference` is the frozen reference's folder or
    hub id; without it the model before training. `train` has fields of the config's train section,
    `config` other settings by section (`{"compute": {"threads": 1}}`, or a YAML file).

    The same call again goes on with an interrupted training, and returns a finished one as it is.
    Raises CampaignError: ConfigError for what cannot be used, DriftError where `out` holds a
    training with other arguments.
    """
    rows = None if isinstance(pairs, str | Path) else rows_text(pairs)
    path = str(pairs) if isinstance(pairs, str | Path) else GIVEN_ROWS
    made = offline_config(path, str(model), config=config, train=train)
    return train_offline(made, out=out, reference=reference, rows=rows, progress=progress)


def train_offline(
    config: Config,
    *,
    out: str | Path,
    reference: str | Path | None = None,
    rows: str | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> TrainedPolicy:
    """`train_preferences` of what `offline_config` makes; `rows` is what `rows_text` gives.

    `command` is what goes on after an interruption, for messages.
    """
    plan = _plan(config, reference)
    folder = OfflineFolder(out, _arguments(config, plan, rows))
    shown = progress or make_progress(quiet=True)
    try:
        if not folder.finished or folder.work.path.exists():
            with disk_faults(folder.work.path), stop_on_signals(), folder.held():
                if not folder.finished:
                    folder.claim()
                    _train(config, folder, plan, rows, shown)
                    folder.hand_over()
                folder.clear()
    except (CampaignError, SignalError) as error:
        folder.explain(error, command, config.train.learning_rate)
        raise
    finally:
        shown.close()
    metrics = read_lines(folder.path / METRICS_FILE)
    return TrainedPolicy(folder.path, metrics, read_json(folder.path / SUMMARY_FILE))


def rows_text(rows: Rows) -> str:
    """Rows as JSON lines of the columns that are read. Raises ConfigError naming the row."""
    lines = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ConfigError(
                f"Row {number} of the pairs is {kind_of(row)}, not a mapping with prompt, chosen "
                "and rejected. Of a dataset with several splits, give one."
            )
        try:
            kept = {name: row[name] for name in COLUMNS if name in row}
            lines.append(json.dumps(kept, ensure_ascii=False))
        except TypeError as error:
            raise ConfigError(f"Row {number} of the pairs is not plain text: {error}.") from error
    return "".join(f"{line}\n" for line in lines)


def describe(trained: TrainedPolicy) -> str:
    """The training in two lines."""
    facts = trained.summary
    left_out = sum(facts["unusable"].values()) + sum(facts["skipped"].values())
    changes = ", ".join(
        f"{name} {facts[f'first_{name}']:.3f} → {facts[f'last_{name}']:.3f}"
        for name in ("loss", "accuracy", "margin")
        if f"first_{name}" in facts
    )
    what = f"{facts['pairs']:,} pairs" if "pairs" in facts else f"{facts['unpaired']:,} answers"
    return f"{what}, {left_out:,} left out, {facts['steps']:,} steps: {changes}\n{trained.policy}"


def _plan(config: Config, reference: str | Path | None) -> RoundPlan:
    """The one round of a training, its models pinned by their hashes."""
    assert config.model.path is not None
    if reference is not None and not needs_reference(config.train.loss):
        raise ConfigError(
            f"The loss {describe_loss(config.train.loss)} compares with no reference; leave "
            f"{reference} (--reference) out."
        )
    trusted = config.model.trust_remote_code
    policy = _pinned(config.model.path, config.model.revision, trust_remote_code=trusted)
    frozen = policy
    if reference is not None:
        frozen = _pinned(str(reference), None, trust_remote_code=trusted)
    lora = config.train.lora
    if frozen != policy and lora is not None and lora.quantization is not None:
        raise ConfigError(
            f"train.lora.quantization would hold the reference {reference} in 4 bits too, and so "
            "score another model. Leave one of the two out."
        )
    return RoundPlan(
        round=1,
        seed=derive_seed(config.campaign.seed, "round", 1),
        prompt_ids=(),
        prompts_sha256="",
        policy=policy,
        reference=frozen,
        reference_round=0,
        beta=config.train.beta,
        learning_rate=config.train.learning_rate,
        rounds=1,
        optimizer=None,
        optimizer_step=0,
        evaluate=False,
        previous_manifest_sha256=None,
    )


def _pinned(path: str, revision: str | None, *, trust_remote_code: bool) -> ModelRef:
    pin = pin_model(path, revision, trust_remote_code=trust_remote_code)
    return ModelRef(pin["path"], pin["sha256"])


def _arguments(config: Config, plan: RoundPlan, rows: str | None) -> dict[str, Any]:
    """What a training is known by: its settings, and its inputs by place and content."""
    assert config.pairs.offline is not None
    arguments = arguments_of(config)
    path = Path(config.pairs.offline.path)
    if rows is not None:
        source = {"path": None, "sha256": sha256_text(rows)}
    else:
        source = {"path": str(path), "sha256": sha256_file(path) if path.is_file() else None}
    arguments["pairs"] |= source
    arguments["model"] |= to_dict(plan.policy)
    arguments["reference"] = to_dict(plan.reference)
    template = config.model.chat_template
    if template is not None:
        arguments["model"]["template_sha256"] = sha256_file(Path(template))
    return arguments


def _train(
    config: Config,
    folder: OfflineFolder,
    plan: RoundPlan,
    rows: str | None,
    progress: Progress,
) -> None:
    """Commit the policy. What turns out to be unusable makes way for a corrected try."""
    if folder.round.has("policy"):
        folder.round.verify("policy")
        return
    crew = Crew(config, run=folder.work.path)
    context = Context(config, folder.work, folder.round, crew, progress, _no_judge, plan)
    try:
        _compare_tokenizers(context)
        _commit_pairs(context, rows)
        _take_quantized(context)
        score_reference(context)
        train_policy(context, commit=partial(_commit_policy, folder.arguments))
    except (ConfigError, NoPairsError):
        if not folder.round.children("checkpoints"):
            crew.close()
            folder.clear()
        raise
    finally:
        crew.close()


def _compare_tokenizers(context: Context) -> None:
    plan = context.inputs
    if plan.reference == plan.policy or context.round.has("reference"):
        return
    context.crew.trainer().call(
        "compare_tokenizers",
        policy=str(context.folder(plan.policy)),
        reference=str(context.folder(plan.reference)),
    )


def _commit_pairs(context: Context, rows: str | None) -> None:
    round_dir, offline = context.round, context.config.pairs.offline
    assert offline is not None
    if round_dir.has(trained_on(round_dir)):
        return
    source = offline.path
    if rows is not None:
        with round_dir.commit("given", inputs={}) as draft:
            (draft.path / "pairs.jsonl").write_text(rows, encoding="utf-8")
        source = str(round_dir.path / "given" / "pairs.jsonl")
    policy = context.inputs.policy
    form = context.crew.trainer().call("form_of", source=source, split=offline.split)["form"]
    _check_form(form, offline.path, context.config)
    with (
        context.progress.stage("pairs", total=0, unit="pairs") as bar,
        round_dir.commit(form, inputs={"policy": policy.sha256}) as draft,
    ):
        result = context.crew.trainer().call(
            "tokenize_offline",
            model=str(context.folder(policy)),
            source=source,
            form=form,
            split=offline.split,
            append_eos=offline.append_eos,
            max_tokens=None,
            prompts_table=None,
            out=str(draft.path),
        )
        draft.rows = result["rows"]
        bar.set(result["rows"], total=result["rows"])
    for reason, count in list(_reasons(_problems(round_dir)).items())[:5]:
        context.progress.note(f"pairs: {count} left out: {reason}")


def _check_form(form: str, path: str, config: Config) -> None:
    if form == "unpaired" and config.train.loss != "kto":
        raise ConfigError(
            f"{path or 'What was given'} has completion and label: answers that are good or bad by "
            f"themselves, which train.loss: kto trains on and "
            f"{describe_loss(config.train.loss)} cannot. Set train.loss: kto, or give prompt, "
            "chosen and rejected."
        )


def _take_quantized(context: Context) -> None:
    """Under QLoRA the model in 4 bits is the policy before training, as in a campaign."""
    lora, plan = context.config.train.lora, context.inputs
    if lora is None or lora.quantization is None:
        return
    if not context.round.has("base"):
        commit_dequantized(context, plan.policy)
    base = context.round.ref("base")
    context.plan = replace(plan, policy=base, reference=base)


def _commit_policy(
    arguments: Mapping[str, Any],
    context: Context,
    draft: Draft,
    result: dict[str, Any],
    inputs: dict[str, str],
) -> None:
    """Commit a whole policy with its steps' metrics, its summary and what it was made of."""
    if is_adapter(draft.path):
        _merge(context.config, draft.path)
    problems = _problems(context.round)
    left_out = {"unusable": _reasons(problems), "unusable_examples": list(problems[:20])}
    text = to_json({**result, **left_out})
    (draft.path / SUMMARY_FILE).write_text(text, encoding="utf-8")
    facts = context.crew.facts
    draft.facts = {
        "arguments": dict(arguments),
        "made_with": {"device": facts["device"], "threads": facts["threads"]},
    }
    context.round.finish("policy", draft, inputs=inputs)


def _merge(config: Config, folder: Path) -> None:
    """Merge the adapter in a folder; a base in 4 bits is not kept, nor an adapter to it."""
    from online_dpo.models.merging import merge_in_place

    lora = config.train.lora
    merge_in_place(
        folder,
        dtype=config.model.dtype,
        trust_remote_code=config.model.trust_remote_code,
        keep_adapter=lora is not None and lora.quantization is None,
    )


def _problems(round_dir: RoundDir) -> Sequence[dict[str, Any]]:
    return read_lines(round_dir.artifact(trained_on(round_dir)) / "problems.jsonl")


def _reasons(problems: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return dict(Counter(problem["reason"] for problem in problems).most_common())


def _no_judge(evaluation: bool) -> NoReturn:
    raise AssertionError("offline training asks no judge")

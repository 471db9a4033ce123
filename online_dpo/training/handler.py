"""What the trainer's worker does on request: every argument and result is plain JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from transformers import PreTrainedModel

from online_dpo.errors import ConfigError
from online_dpo.models import loading as models
from online_dpo.models.dequantization import write_dequantized
from online_dpo.models.memory_options import check_memory_options
from online_dpo.offline.pairs import Form, form_of, read_offline_pairs, read_offline_unpaired
from online_dpo.offline.same_tokenizer import check_same_tokenizer
from online_dpo.records import ModelRef, to_dict
from online_dpo.tables import prompt_row, read_table, write_table
from online_dpo.tokenization import Room, prepare_prompts
from online_dpo.training import dpo
from online_dpo.training.adapters import AdapterCache
from online_dpo.training.allocator import keep_large_blocks
from online_dpo.training.cache import ModelCache
from online_dpo.training.checkpoints import save_optimizer, write_jsonl
from online_dpo.training.data import (
    Pair,
    Skipped,
    demonstration_texts,
    length_limit,
    read_demonstrations,
    read_pairs,
)
from online_dpo.training.dpo import DpoObjective
from online_dpo.training.kto import KtoObjective
from online_dpo.training.logprobs import LogProbModel
from online_dpo.training.loop import train
from online_dpo.training.moving_reference import MovingReference
from online_dpo.training.objective import Emit
from online_dpo.training.preference_loss import PreferenceLoss
from online_dpo.training.prompts import write_prompts
from online_dpo.training.reference import (
    PairLogps,
    read_reference_logps,
    score_pairs,
    score_sequences,
    score_unsampled,
    write_reference_logps,
)
from online_dpo.training.sft import SftObjective
from online_dpo.training.sft import loop_settings as sft_loop_settings
from online_dpo.training.sft import summarize as summarize_sft
from online_dpo.training.sharding import gather_model, make_mesh
from online_dpo.training.unpaired import (
    UNPAIRED_FILE,
    read_unpaired,
    read_unpaired_logps,
    score_unpaired,
    write_unpaired_logps,
)

METRICS_FILE = "train_metrics.jsonl"
SUMMARY_FILE = "summary.json"

MICRO_BATCH_TOKENS = {"cpu": 1024, "cuda": 4096}
"""Where the config leaves train.micro_batch_tokens open."""

PATIENCE_S = 2 * 60 * 60
"""How long processes wait for one that reads a large model or writes a checkpoint of it."""


class Trainer:
    """Makes, trains and scores models; keeps the last one in memory between calls.

    With several processes each makes the same calls; the first writes and emits.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """`settings`: device, threads, num_processes, and the dumps of TrainConfig and ModelConfig.

        Raises ConfigError where the device or the number of processes is not there.
        """
        given = settings["train"]
        tokens = given["micro_batch_tokens"] or MICRO_BATCH_TOKENS[settings["device"]]
        self.train_config: Mapping[str, Any] = {**given, "micro_batch_tokens": tokens}
        self.model_config: Mapping[str, Any] = settings["model"]
        device = settings["device"]
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("train: device cuda is asked for, and torch finds no GPU.")
        if settings["threads"] is not None:
            torch.set_num_threads(settings["threads"])
        if device == "cpu":
            keep_large_blocks()
        self.accelerator = Accelerator(
            cpu=device == "cpu",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=PATIENCE_S))],
        )
        if self.accelerator.num_processes != settings["num_processes"]:
            raise ConfigError(
                f"train.num_processes is {settings['num_processes']}, and "
                f"{self.accelerator.num_processes} were started."
            )
        how: dict[str, Any] = {
            "device": self.accelerator.device,
            "attention": self.model_config["attention"],
            "precision": self.train_config["precision"],
            "trust_remote_code": self.model_config["trust_remote_code"],
            "gradient_checkpointing": self.train_config["gradient_checkpointing"],
            "activation_offload": self.train_config["activation_offload"],
        }
        check_memory_options(self.train_config, self.accelerator.device.type)
        fsdp = self.train_config["parallel"] == "fsdp"
        mesh = make_mesh(self.accelerator.device) if fsdp else None
        self.models = ModelCache(**how, mesh=mesh)
        lora = self.train_config["lora"]
        self.adapters = (
            None if lora is None else AdapterCache(lora, dtype=self.model_config["dtype"], **how)
        )
        self._trained: ModelCache | AdapterCache = self.models

    def init_model(
        self,
        *,
        emit: Emit,
        init: Mapping[str, Any],
        corpus: str,
        chat_template: str | None,
        seed: int,
        out: str,
    ) -> dict[str, Any]:
        """Write a model with random weights and a tokenizer trained on the demonstrations.

        `chat_template` is the path of a template file.
        """
        if not self._first:
            return {}
        template = models.read_chat_template(Path(chat_template)) if chat_template else None
        tokenizer = models.train_tokenizer(
            demonstration_texts(corpus), vocab_size=init["vocab_size"], chat_template=template
        )
        model = models.make_model(
            init,
            vocab_size=len(tokenizer),
            eos_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
            seed=seed,
        )
        models.save_model(model, Path(out), dtype=self.model_config["dtype"])
        tokenizer.save_pretrained(out)
        return {"vocab_size": len(tokenizer), "parameters": model.num_parameters()}

    def tokenize_prompts(
        self,
        *,
        emit: Emit,
        model: str,
        sources: Sequence[Mapping[str, Any]],
        max_tokens: int,
        max_new_tokens: int,
        max_model_len: int | None,
        out: str,
    ) -> dict[str, Any]:
        """Write `prompts.parquet` and `problems.jsonl`; the result counts both.

        Prompts are skipped that leave less than `max_new_tokens` of the model's longest sequence
        or of the sampling engine's, `max_model_len`, whichever is shorter.
        """
        if not self._first:
            return {}
        prompts, problems = prepare_prompts(
            self._tokenizer(Path(model)),
            sources,
            max_tokens=max_tokens,
            room=self._room(Path(model), max_new_tokens, max_model_len),
        )
        write_prompts(Path(out), prompts, problems)
        roles = [sourced.role for sourced in prompts]
        return {
            "train": roles.count("train"),
            "eval": roles.count("eval"),
            "problems": len(problems),
        }

    def form_of(self, *, emit: Emit, source: str, split: str) -> dict[str, Any]:
        """What an offline set states: {"form": "pairs"}, or "unpaired" rows."""
        return {"form": form_of(source, split=split)}

    def tokenize_offline(
        self,
        *,
        emit: Emit,
        model: str,
        source: str,
        form: Form,
        split: str,
        append_eos: bool,
        max_tokens: int | None,
        prompts_table: str | None,
        out: str,
    ) -> dict[str, Any]:
        """Write an offline set as `pairs.parquet` or `unpaired.parquet`, and `problems.jsonl`.

        Rows on the evaluation prompts of `prompts_table`, a campaign's own, are left out.
        """
        if not self._first:
            return {}
        table = read_table(Path(prompts_table)) if prompts_table else []
        read = read_offline_pairs if form == "pairs" else read_offline_unpaired
        preferences, prompts, problems = read(
            self._tokenizer(Path(model)),
            source,
            split=split,
            append_eos=append_eos,
            max_tokens=max_tokens,
            held_out={tuple(row["token_ids"]) for row in table if row["role"] == "eval"},
        )
        write_table(Path(out) / f"{form}.parquet", form, [to_dict(p) for p in preferences])
        rows = [prompt_row(prompt, role="offline", weight=1.0) for prompt in prompts]
        write_table(Path(out) / "prompts.parquet", "prompts", rows)
        write_jsonl(Path(out) / "problems.jsonl", problems)
        return {"rows": len(preferences), "problems": len(problems)}

    def compare_tokenizers(self, *, emit: Emit, policy: str, reference: str) -> dict[str, Any]:
        """Raise ConfigError where the models in two folders have different tokenizers."""
        check_same_tokenizer(
            self._tokenizer(Path(policy)),
            self._tokenizer(Path(reference)),
            policy_name=policy,
            reference_name=reference,
        )
        return {}

    def score(
        self,
        *,
        emit: Emit,
        model: Mapping[str, str],
        sequences: Sequence[Mapping[str, Sequence[int]]],
    ) -> dict[str, Any]:
        """Raw log-probs (nats, temperature 1) of the tokens of each {prompt, response}."""
        loaded = self._policies().get(Path(model["path"]), model["sha256"])
        pairs = [(sequence["prompt"], sequence["response"]) for sequence in sequences]
        logps = score_sequences(
            loaded, pairs, batch_tokens=self._batch_tokens, accelerator=self.accelerator, emit=emit
        )
        return {"logps": logps}

    def score_reference(
        self,
        *,
        emit: Emit,
        model: Mapping[str, str],
        pairs: str,
        out: str,
        sampled: bool = False,
    ) -> dict[str, Any]:
        """Write the reference's log-probs of each pair that training will not skip to `out`.

        With `sampled` the log-probs that the sampler gave serve where a pair has them, and the
        result states how far they are from ours. A table of unpaired rows is one by its name.
        """
        if Path(pairs).name == UNPAIRED_FILE:
            return self._score_unpaired(model, Path(pairs), Path(out), emit)
        loaded = self._policies().get(Path(model["path"]), model["sha256"])
        kept, skipped = read_pairs(Path(pairs), self._limit(loaded.model))
        loss = PreferenceLoss.from_config(self.train_config)
        score = score_unsampled if sampled else score_pairs
        logps, error = score(
            loaded,
            kept,
            batch_tokens=self._batch_tokens,
            accelerator=self.accelerator,
            emit=emit,
            with_mismatched=loss.needs_mismatched,
        )
        if self._first:
            write_reference_logps(Path(out), kept, logps)
        return {"pairs": len(kept), **error, **_skipped(skipped)}

    def _score_unpaired(
        self, model: Mapping[str, str], table: Path, out: Path, emit: Emit
    ) -> dict[str, Any]:
        loaded = self._policies().get(Path(model["path"]), model["sha256"])
        rows, skipped = read_unpaired(table, self._limit(loaded.model))
        logps = score_unpaired(
            loaded, rows, batch_tokens=self._batch_tokens, accelerator=self.accelerator, emit=emit
        )
        if self._first:
            write_unpaired_logps(out, rows, logps)
        return {"unpaired": len(rows), **_skipped(skipped)}

    def sft(
        self,
        *,
        emit: Emit,
        model: Mapping[str, str],
        demonstrations: str,
        sft: Mapping[str, Any],
        max_tokens: int | None,
        seed: int,
        out: str,
        checkpoints: str,
        checkpoint_every: int,
        resume_from: str | None,
    ) -> dict[str, Any]:
        """Fine-tune all weights on demonstrations and write the policy folder `out`."""
        folder = Path(model["path"])
        policy, self._trained = self.models.take(folder, model["sha256"]), self.models
        limit = length_limit(max_tokens, models.max_length(policy.model))
        rows, skipped = read_demonstrations(demonstrations, self._tokenizer(folder), limit)
        trained = train(
            policy,
            SftObjective(rows),
            sft_loop_settings(sft, self.train_config, seed=seed, checkpoint_every=checkpoint_every),
            accelerator=self.accelerator,
            emit=emit,
            checkpoints=Path(checkpoints),
            resume_from=_path(resume_from),
        )
        summary = {
            "steps": trained.steps,
            "demonstrations": len(rows),
            **_skipped(skipped),
            **summarize_sft(trained.metrics),
        }
        self._save_whole(policy, Path(out))
        self._add_records(folder, Path(out), trained.metrics, summary)
        return summary

    def dequantize(self, *, emit: Emit, model: str, out: str) -> dict[str, Any]:
        """Write the model that a folder's weights amount to in 4 bits, as policy 0 of QLoRA."""
        if self._first:
            write_dequantized(
                Path(model),
                Path(out),
                dtype=self.model_config["dtype"],
                device=str(self.accelerator.device),
                attention=self.model_config["attention"],
                trust_remote_code=self.model_config["trust_remote_code"],
            )
            self._add_tokenizer(Path(model), Path(out))
        return {}

    def dpo(
        self,
        *,
        emit: Emit,
        model: Mapping[str, str],
        pairs: str,
        reference_logps: str | None,
        plan: Mapping[str, Any],
        optimizer: str | None,
        out: str,
        optimizer_out: str | None,
        checkpoints: str,
        resume_from: str | None,
        soft_labels: bool = False,
        reference: Mapping[str, str] | None = None,
        base: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Train one round; write the policy folder `out` and, where given, `optimizer_out`.

        `plan` has beta, learning_rate, seed, round, rounds and optimizer_step. `reference_logps` is
        None for a loss without a reference, and for one that moves: it starts from the model
        `reference`. With `soft_labels` the judge's p reaches the loss. `base` is how an adapter's
        folder names its base; without it, by the place where it was read. A table of unpaired rows
        is one by its name, and trained on by KTO.
        """
        folder = Path(model["path"])
        policy = self._take(folder, model["sha256"], int(plan["seed"]))
        loss = PreferenceLoss.from_config({**self.train_config, "beta": plan["beta"]})
        limit = self._limit(policy.model)
        objective: DpoObjective | KtoObjective
        moving = None
        if Path(pairs).name == UNPAIRED_FILE:
            assert reference_logps is not None
            rows, skipped = read_unpaired(Path(pairs), limit)
            scored = read_unpaired_logps(Path(reference_logps), rows)
            objective = KtoObjective(rows, scored, loss=loss, device=policy.device)
        else:
            kept, skipped = read_pairs(Path(pairs), limit)
            objective = DpoObjective(
                kept,
                self._reference_logps(reference_logps, kept),
                loss=loss,
                soft_labels=soft_labels,
                device=policy.device,
            )
            moving = self._moving(objective, reference)
        trained = train(
            policy,
            objective,
            dpo.loop_settings(self.train_config, plan),
            accelerator=self.accelerator,
            emit=emit,
            checkpoints=Path(checkpoints),
            resume_from=_path(resume_from),
            optimizer_from=_path(optimizer),
            moving=moving,
        )
        summary = {
            "steps": trained.steps,
            "optimizer_step": plan["optimizer_step"] + trained.steps,
            **objective.facts,
            "layout": policy.layout,
            **_skipped(skipped),
            **dpo.summarize(trained.metrics),
        }
        if self.adapters is None:
            self._save_whole(policy, Path(out))
        elif self._first:
            self.adapters.save(Path(out), None if base is None else ModelRef(**base))
        self._add_records(folder, Path(out), trained.metrics, summary)
        if optimizer_out is not None:
            folder = Path(optimizer_out)
            save_optimizer(folder, policy.model, trained.optimizer, write=self._first)
        return summary

    def adopt(self, *, emit: Emit, sha256: str) -> dict[str, Any]:
        """Learn the hash of the policy saved last, so that it need not be loaded again."""
        self._trained.adopt(sha256)
        return {}

    def release(self, *, emit: Emit) -> dict[str, Any]:
        """Free the device for the sampler."""
        self._policies().release()
        return {}

    def close(self) -> None:
        """Drop every model and leave the process group."""
        self._policies().clear()
        self.accelerator.end_training()

    @property
    def _first(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def _policies(self) -> ModelCache | AdapterCache:
        """Where policies and references come from."""
        if self.adapters is None:
            return self.models
        self.models.clear()  # what supervised fine-tuning left behind
        return self.adapters

    def _take(self, folder: Path, sha256: str, seed: int) -> LogProbModel:
        """The policy to train; `seed` is for a new adapter."""
        if self.adapters is None:
            self._trained = self.models
            return self.models.take(folder, sha256)
        self._policies()
        self._trained = self.adapters
        return self.adapters.take(folder, sha256, seed=seed)

    def _reference_logps(self, path: str | None, pairs: Sequence[Pair]) -> PairLogps | None:
        """Those scored before; of a reference that moves there are none yet."""
        if path is not None:
            return read_reference_logps(Path(path), pairs)
        if self.train_config["reference_update"] is None:
            return None
        zeros = torch.zeros(len(pairs), dtype=torch.float64)
        return PairLogps(zeros, zeros, zeros, zeros)

    def _moving(
        self, objective: DpoObjective, reference: Mapping[str, str] | None
    ) -> MovingReference | None:
        update = self.train_config["reference_update"]
        if update is None:
            return None
        assert reference is not None
        return MovingReference(
            self.models.load(Path(reference["path"])),
            reference["sha256"],
            objective,
            lambda model, pairs: score_pairs(
                model,
                pairs,
                batch_tokens=self._batch_tokens,
                accelerator=self.accelerator,
                emit=lambda event: None,
            )[0],
            **update,
        )

    @property
    def _batch_tokens(self) -> int:
        return int(self.train_config["micro_batch_tokens"])

    def _limit(self, model: PreTrainedModel) -> Any:
        return length_limit(self.train_config["max_tokens"], models.max_length(model))

    def _room(self, folder: Path, max_new_tokens: int, max_model_len: int | None) -> Room | None:
        trusted = self.model_config["trust_remote_code"]
        limits = [
            (models.folder_max_length(folder, trust_remote_code=trusted), "the model's"),
            (max_model_len, "sampling.engine.max_model_len"),
        ]
        known = [(tokens, set_by) for tokens, set_by in limits if tokens is not None]
        if not known:
            return None
        tokens, set_by = min(known, key=lambda limit: limit[0])
        return Room(tokens, set_by, max_new_tokens)

    def _tokenizer(self, folder: Path) -> Any:
        return models.load_tokenizer(
            folder,
            chat_template=_path(self.model_config["chat_template"]),
            trust_remote_code=self.model_config["trust_remote_code"],
        )

    def _save_whole(self, policy: LogProbModel, out: Path) -> None:
        """All weights and configs."""
        dtype = self.model_config["dtype"]
        models.round_weights(policy.model, dtype)
        whole = gather_model(policy, keep=self._first)
        if whole is not None:
            models.save_model(whole, out, dtype=dtype)

    def _add_records(
        self,
        source: Path,
        out: Path,
        metrics: list[dict[str, Any]],
        summary: Mapping[str, Any],
    ) -> None:
        """The tokenizer as trained with, each step's metrics and a summary."""
        if self._first:
            self._add_tokenizer(source, out)
            write_jsonl(out / METRICS_FILE, metrics)
            (out / SUMMARY_FILE).write_text(json.dumps(summary, indent=1) + "\n")

    def _add_tokenizer(self, source: Path, out: Path) -> None:
        models.copy_tokenizer(
            source,
            out,
            chat_template=_path(self.model_config["chat_template"]),
            trust_remote_code=self.model_config["trust_remote_code"],
        )


def _skipped(skipped: Skipped) -> dict[str, Any]:
    return {"skipped": dict(skipped.counts), "skipped_examples": skipped.examples}


def _path(path: str | None) -> Path | None:
    return None if path is None else Path(path)

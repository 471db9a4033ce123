"""TRL's side of the DPO benchmarks: its own DPOTrainer and settings, on the same tokens.

The trainer's class is changed in two places only: tokens are taken as given instead of made from
text, and reference scoring is cut into turns.
"""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

from turns import CountedTurns, PeakMemory, Turns
from workload import BETA, DpoJob, LoopJob, read_pairs

OUT_OF_THE_BOX: dict[str, Any] = {}
"""DPOConfig's defaults; the batch size, the dtype and the device are the task's."""

LEAN: dict[str, Any] = {
    "gradient_checkpointing": False,
    "logging_strategy": "no",
    "save_strategy": "no",
    "disable_tqdm": True,
}
"""What costs TRL time and is not needed, turned off."""

VARIATIONS: dict[str, dict[str, Any]] = {
    "compiled": {"torch_compile": True},
    "eager attention": {"model_init_kwargs": {"attn_implementation": "eager"}},
    "a data loader process": {"dataloader_num_workers": 1},
    "bfloat16 weights": {"model_init_kwargs": {"dtype": "bfloat16"}},
}
"""Settings beside the batch sizes that might help it; the last has no float32 masters."""


def tuned(*, micro_batch: int, reference_batch: int, **others: Any) -> dict[str, Any]:
    """Settings with so many pairs in a forward pass of training and of reference scoring."""
    return {
        **LEAN,
        "precompute_ref_log_probs": True,
        "per_device_train_batch_size": micro_batch,
        "precompute_ref_batch_size": reference_batch,
        **others,
    }


def online_tuned(micro_batch: int) -> dict[str, Any]:
    """OnlineDPOTrainer's best settings; without gradient checkpointing it has a KV cache."""
    return {**LEAN, "per_device_train_batch_size": micro_batch}


def dpo(job: DpoJob, turns: Turns) -> None:
    """Score the reference, where the settings do so beforehand, and train."""
    import datasets
    import torch
    from flops import StepProbe
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Trainer(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

        def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
            logps = super().compute_ref_log_probs(model, inputs)
            reference.count()
            return logps

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            step_losses.append(loss.detach())
            return loss

    class Timer(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            loss = float(torch.stack(step_losses).mean())
            step_losses.clear()
            control.should_training_stop = steps.count(loss=loss)

    memory = PeakMemory(job.device)
    turns.ready()
    config = _config(job, DPOConfig)
    reference = CountedTurns(turns, [_calls(job, config)] * (1 + job.reference_turns))
    steps = CountedTurns(turns, job.step_sizes, probe=StepProbe(memory, profile=job.profile))
    step_losses: list[torch.Tensor] = []
    with TemporaryDirectory() as output:
        config.output_dir = output
        reference.begin()
        trainer = Trainer(
            model=job.model,
            args=config,
            train_dataset=datasets.Dataset.from_list(_rows(job)),
            processing_class=AutoTokenizer.from_pretrained(job.model),
            callbacks=[Timer()],
        )
        if not config.precompute_ref_log_probs:
            while not reference.count():
                pass
        steps.begin()
        trainer.train()


def _config(job: DpoJob, config_class: Any) -> Any:
    settings = {"per_device_train_batch_size": job.batch_size, **job.settings}
    micro_batch = settings["per_device_train_batch_size"]
    assert job.batch_size % micro_batch == 0, "TRL accumulates whole micro-batches"
    return config_class(
        output_dir="unused",
        beta=BETA,
        learning_rate=job.learning_rate,
        use_cpu=job.device == "cpu",
        bf16=job.dtype == "bfloat16",
        gradient_accumulation_steps=job.batch_size // micro_batch,
        max_steps=sum(job.step_sizes),
        max_length=None,
        **settings,
    )


def _calls(job: DpoJob, config: Any) -> int:
    """Forward passes of a turn of reference scoring; one that does nothing where there is none."""
    if not config.precompute_ref_log_probs:
        return 1
    batch = config.precompute_ref_batch_size or config.per_device_train_batch_size
    assert job.reference_pairs % batch == 0, "a turn is made of whole batches"
    return job.reference_pairs // batch


def _rows(job: DpoJob) -> list[dict[str, Any]]:
    names = ("prompt", "chosen", "rejected")
    rows = read_pairs(job.pairs)
    assert len(rows) == job.num_pairs
    return [{f"{name}_ids": row[f"{name}_token_ids"] for name in names} for row in rows]


def online_dpo(job: LoopJob, turns: Turns) -> None:
    """Rounds of as many optimizer steps as the campaign takes; a round a turn."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    from judges.heuristics import Heuristic
    from online_dpo.records import Prompt, Response

    class Timer(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = rounds.count()

    judge = Heuristic(job.scorers)

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
        prompt = Prompt(id="", source="prompts")
        responses = [Response("", "", text, (), "length") for text in completions]
        return [score.value for score in judge.score(prompt, responses)]

    turns.ready()
    steps = job.prompts_per_round // job.batch_size
    rounds = CountedTurns(turns, [steps] * job.rounds)
    rounds.begin()
    settings = {"per_device_train_batch_size": 8, **job.settings}
    with TemporaryDirectory() as output:
        config = OnlineDPOConfig(
            output_dir=output,
            beta=BETA,
            learning_rate=job.learning_rate,
            temperature=1.0,
            max_new_tokens=job.new_tokens,
            use_cpu=True,
            bf16=job.dtype == "bfloat16",
            gradient_accumulation_steps=job.batch_size // settings["per_device_train_batch_size"],
            max_steps=steps * job.rounds,
            **settings,
        )
        OnlineDPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(job.model, dtype="float32"),
            args=config,
            reward_funcs=reward,
            train_dataset=datasets.load_dataset("json", data_files=job.prompts, split="train"),
            processing_class=AutoTokenizer.from_pretrained(job.model),
            callbacks=[Timer()],
        ).train()

"""The config of a campaign: one pydantic tree, every field bounded and explained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from online_dpo.alarms import Action, AlarmName
from online_dpo.asking.comparison_schedules import MarginChoice, ScheduleName
from online_dpo.clashes import in_config
from online_dpo.loss_rules import (
    LOSS_FACTS,
    LossName,
    checked_loss,
    loss_problems,
    loss_weights,
    needs_reference,
)

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
_NOT_EMPTY = Field(min_length=1)
AdamBeta = Annotated[float, Field(ge=0.0, lt=1.0)]


def _distinct(numbers: list[int]) -> list[int]:
    if len(set(numbers)) < len(numbers):
        raise ValueError("names a GPU twice")
    return numbers


Gpus = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), AfterValidator(_distinct)]


class Section(BaseModel):
    """A part of the tree; unknown keys are refused, docstrings describe fields."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


class ModelInit(Section):
    """A small model made on the spot, its byte-level BPE trained on the demonstrations."""

    architecture: Literal["llama", "qwen2"] = "llama"
    """The transformers architecture."""
    vocab_size: Annotated[int, Field(ge=258, le=262144)] = 1024
    """Entries of the tokenizer, the special tokens included."""
    hidden_size: Count = 128
    """Width of the residual stream."""
    intermediate_size: Count = 344
    """Width of the MLP."""
    num_layers: Count = 4
    """Transformer blocks."""
    num_heads: Count = 4
    """Attention heads; must divide hidden_size."""
    num_kv_heads: Count | None = None
    """Key/value heads; num_heads where unset."""
    max_length: Annotated[int, Field(ge=16)] = 256
    """Longest sequence in tokens, prompt and response together."""
    tie_embeddings: bool = False
    """Whether the output projection shares the input embedding's weights."""

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelInit:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads {self.num_heads} does not divide hidden_size {self.hidden_size}"
            )
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ValueError(
                f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}"
            )
        return self


class ModelConfig(Section):
    """Where policy 0 comes from: `path` or `init`."""

    path: str | None = None
    """A local folder or a hub id of a causal language model with safetensors weights."""
    revision: str | None = None
    """The hub revision; resolved to a commit and pinned when the campaign starts."""
    init: ModelInit | None = None
    """The architecture of a model to make, for machines without weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights of saved policies; small updates vanish in bfloat16's rounding."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """transformers' attention implementation in the trainer and the transformers sampler."""
    chat_template: str | None = None
    """A file with a chat template that replaces the tokenizer's."""
    trust_remote_code: bool = False
    """Whether the model's own Python files may run."""

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.path is None) == (self.init is None):
            raise ValueError("give exactly one of model.path and model.init")
        if self.revision is not None and self.path is None:
            raise ValueError("model.revision needs model.path")
        return self


class PromptSource(Section):
    """One set of prompts."""

    path: str
    """A .jsonl or .parquet file, or the name of a dataset that `datasets` loads."""
    name: str | None = None
    """How tables and evaluations call it; the file's stem where unset."""
    weight: Positive = 1.0
    """Relative share of this source in a round's prompts."""
    split: str = "train"
    """The split, where `path` names a dataset."""
    prompt_field: str = "prompt"
    """The column with the prompt: a string or a list of messages."""
    answer_field: str | None = None
    """A column whose answers join the sampled candidates, marked by source."""


class PromptsConfig(Section):
    """What the policy is asked."""

    train: Annotated[list[PromptSource], Field(min_length=1)]
    """Sets that rounds draw from."""
    eval: list[PromptSource] = []
    """Held-out sets; never sampled for training."""
    holdout: Annotated[int, Field(ge=0)] = 0
    """Prompts taken from the training sets for evaluation, by seed, where `eval` is empty."""
    max_tokens: Count = 1024
    """Longest prompt in tokens; longer ones, and those that leave the model no room for
    sampling.max_new_tokens (evaluation.max_new_tokens where they are or may come to be held out),
    are reported and skipped."""


class SftConfig(Section):
    """Supervised fine-tuning on demonstrations before the first round."""

    demonstrations: str
    """A .jsonl or .parquet file or dataset name with columns `prompt` and `response`."""
    epochs: Positive = 1.0
    """Passes over the demonstrations."""
    learning_rate: Positive = 2e-5
    """Peak learning rate."""
    batch_size: Count = 32
    """Demonstrations an optimizer step."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup: Share = 0.1
    """Share of the steps spent warming up."""
    weight_decay: NonNegative = 0.0
    """AdamW's decoupled weight decay."""


class Endpoint(Section):
    """A vLLM server that answers for the policy."""

    url: str
    """Base URL, e.g. http://gpu1:8000/v1."""
    model: str = "policy"
    """The served model's name."""
    reload_url: str | None = None
    """POSTed {"path": FOLDER} to make a round's policy the served one."""
    api_key_env: str | None = None
    """Environment variable that holds the key."""


class AnswerSource(Section):
    """A second, usually stronger model whose answers join the candidates.

    They are drawn with sampling's temperature, top_p, stop and max_new_tokens; top_k, which the API
    does not have, is the policy's alone.
    """

    url: str
    """Base URL of an OpenAI-compatible API."""
    model: str
    """The model's name there."""
    n: Count = 1
    """Answers for each prompt."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key."""
    price_per_million: tuple[NonNegative, NonNegative] | None = None
    """Dollars per million tokens, in and out; [0, 0] is free; None takes the price file's."""


class SamplingConfig(Section):
    """How responses are drawn from the policy."""

    sampler: Literal["auto", "vllm", "transformers", "openai_server"] = "auto"
    """auto: vllm where it finds a GPU, transformers otherwise."""
    n: Count = 8
    """Responses for each prompt."""
    temperature: NonNegative = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus mass; 1 is off."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Most likely tokens to draw from; 0 is off."""
    max_new_tokens: Count = 512
    """Longest response in tokens."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Strings that end a response; left out of its text, kept in its tokens."""
    strip_thinking: bool = False
    """Whether the judge sees the text after </think> only."""
    prompts_per_shard: Count = 256
    """Prompts written, committed and labelled together: the unit of resume."""
    batch_size: Count = 256
    """Sequences that the transformers sampler generates at once; halved when memory runs out."""
    stall_s: Positive = 1800.0
    """Seconds without a sign of a sampler's process after which it is ended and started anew; a
    large model takes some to load."""
    devices: Gpus | None = None
    """GPUs of the sampler; None takes what compute.layout gives."""
    engine: dict[str, Any] = {}
    """Further arguments for vLLM's engine, e.g. tensor_parallel_size."""
    update: Literal["auto", "adapter", "reload", "restart"] = "auto"
    """How new weights reach vLLM: as an adapter (train.lora), in place (an adapter's merged), both
    checked by the canary, or by a fresh engine; auto takes the first that is exact."""
    endpoints: list[Endpoint] = []
    """Servers for the openai_server sampler."""
    reload_command: str | None = None
    """Shell command that makes the servers serve {policy}; run before each round's sampling."""
    also: AnswerSource | None = None
    """A second model whose answers join the candidates."""

    @model_validator(mode="after")
    def _combinations(self) -> SamplingConfig:
        if (self.sampler == "openai_server") != bool(self.endpoints):
            raise ValueError("sampling.endpoints and sampler: openai_server go together")
        if self.temperature == 0 and self.n > 1:
            raise ValueError("greedy decoding (temperature 0) gives n equal responses; set n: 1")
        return self


class BudgetConfig(Section):
    """What all paid calls of the campaign may use together, evaluation and sampling.also included.

    A call is sent only where each limit has room for the most that it may use.
    """

    max_usd: Positive | None = None
    """Dollars; None is without limit."""
    max_calls: Count | None = None
    """Calls that were or may have been answered; None is without limit."""
    max_tokens: Count | None = None
    """Tokens in and out; None is without limit."""


class BatchConfig(Section):
    """Calls handed in by the batch, which an endpoint answers within a day, at a lower price."""

    max_requests: Annotated[int, Field(ge=1, le=50_000)] = 10_000
    """Most calls in one batch."""
    poll_s: Positive = 60.0
    """Seconds between two looks at a batch under way."""


class JudgeConfig(Section):
    """Who says which response is better, and how it is asked."""

    name: str
    """An installed judge's name, `module:attr` or `file.py:attr`."""
    options: dict[str, Any] = {}
    """What the judge itself takes."""
    orders: Literal["both", "one"] = "both"
    """Whether a pair is shown in both orders; one order is drawn by seed."""
    swap: Literal["soft", "agree"] = "soft"
    """What two orders make: soft averages p; agree takes a verdict only where both prefer the same
    response, and counts a tie otherwise."""
    votes: Count = 1
    """Calls for each order, drawn at the judge's temperature; their p is averaged."""
    comparisons: Annotated[int, Field(ge=1)] | Literal["all"] = "all"
    """Pairs compared for each prompt by a pairwise judge; an active schedule has so many on
    average."""
    comparisons_per_round: Count | None = None
    """All comparisons of a round, in the place of `comparisons`, for schedules that spend a budget
    over prompts: each shard has its part by its number of prompts."""
    schedule: ScheduleName = "draw"
    """Which pairs these are. draw: by seed; knockout: those that find the best and the worst; or
    where a label teaches most, by the judge's uncertainty, the policy's implicit reward_margin or
    its entropy on the prompt."""
    margins: MarginChoice = "wide"
    """Which implicit margins reward_margin asks about: wide, where the policy is surest; narrow,
    where it cannot tell; mixed, both in turn."""
    scale: Positive = 1.0
    """Two scores become p by sigmoid(difference / scale)."""
    concurrency: Count = 32
    """Calls in flight at once."""
    timeout_s: Positive = 60.0
    """Deadline of one judgement, retries excluded."""
    retries: Annotated[int, Field(ge=0, le=20)] = 4
    """Further attempts after a rate limit, a timeout or a server error."""
    deadline_s: Positive = 600.0
    """Longest that one call may take, its retries and the pauses between them included."""
    requests_per_minute: Count | None = None
    """Requests sent in a minute at most; None is without limit."""
    tokens_per_minute: Count | None = None
    """Tokens in and out of the requests of a minute; None is without limit."""
    service_tier: Annotated[str, _NOT_EMPTY] | None = None
    """The endpoint's service tier, e.g. flex; None asks for none."""
    batch: BatchConfig | None = None
    """The endpoint's batch API instead of single requests; {} takes it as it is."""
    model_mismatch: Literal["warn", "refuse"] = "warn"
    """Replies that name another model than was asked for, versions of it aside: told once and
    taken, or the end of labelling."""
    prices: str | None = None
    """A price file of your own; None takes the shipped one."""
    budget: BudgetConfig = BudgetConfig()
    """Limits of the whole campaign."""
    max_invalid: Share = 0.2
    """Share of a round's answers without a verdict that stops it; 1 never does."""
    max_invalid_after: Count = 50
    """Answers from which on that share counts."""
    reuse_from: list[str] = []
    """Run directories whose ledgers answer identical calls; they are only read."""
    gold: Annotated[str, _NOT_EMPTY] | None = None
    """A .jsonl or .parquet file or dataset name with labelled comparisons, as `online-dpo judge
    check` reads them, that every round asks this judge about."""
    gold_pairs: Count = 100
    """Most of them that are asked about, drawn by seed, the same in every round."""
    probes: Annotated[int, Field(ge=0)] | None = None
    """How often a round sets `constant` against a response of the policy; None is 32 where the
    judge makes no calls, and 0 where it does or is people."""
    constant: Annotated[str, _NOT_EMPTY] = "I'm not sure, but I hope this helps."
    """A response to every prompt that a sound judge does not prefer to an answer."""

    @model_validator(mode="after")
    def _one_way_of_sending(self) -> JudgeConfig:
        if self.batch is None:
            return self
        single = ("service_tier", "requests_per_minute", "tokens_per_minute", "concurrency")
        for field in (*single, "deadline_s"):
            if getattr(self, field) != type(self).model_fields[field].default:
                raise ValueError(
                    f"{field} is for single requests, and batch hands all calls in by the batch; "
                    f"leave one of the two out"
                )
        return self


class OfflinePairs(Section):
    """Preferences from a file, mixed into every round."""

    path: str
    """A .jsonl or .parquet file or dataset name with columns prompt, chosen, rejected; or prompt,
    completion, label, where pairs.threshold is set."""
    split: str = "train"
    """The split, where `path` names a dataset."""
    share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Share of a round's pairs that come from it."""
    append_eos: bool = True
    """Whether an EOS is appended to both responses."""


class PairsConfig(Section):
    """From judged responses to preferences."""

    threshold: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Good and bad responses instead of pairs: good are those that score at least this, 0.5 or 1
    for a verifier's 0 and 1. They are trained on by train.loss: kto, and min_margin is their least
    distance from it. None makes pairs."""
    selector: str = "best_worst"
    """best_worst, best_random, random, all, or a function by `module:attr` or `file.py:attr`."""
    min_margin: NonNegative = 0.0
    """Smallest margin: score units for scores, |p - 0.5| for comparisons; ties never pair."""
    max_per_prompt: Count | None = None
    """Most pairs of one prompt, the widest margins first; None is without limit."""
    labels: Literal["hard", "soft"] = "hard"
    """hard: the chosen one is better; soft: the loss takes the judge's p."""
    earlier_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of a round's pairs drawn from earlier rounds."""
    offline: OfflinePairs | None = None
    """A fixed preference set to mix in."""

    @model_validator(mode="after")
    def _shares(self) -> PairsConfig:
        if self.earlier_share + (self.offline.share if self.offline else 0.0) >= 1.0:
            raise ValueError(
                "pairs.earlier_share and pairs.offline.share must leave room for new pairs"
            )
        return self


class AdapterConfig(Section):
    """Low-rank adapters (LoRA, Hu et al. 2021, 2106.09685) over the frozen policy 0."""

    rank: Annotated[int, Field(ge=1, le=512)] = 16
    """Rank of each update."""
    alpha: Positive = 32.0
    """Updates are scaled by alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (2312.03732): keeps high ranks learning."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout before each update. Above 0 another policy is trained than the one that sampled, and
    a round does not start from loss ln 2."""
    target_modules: (
        Literal["all-linear"] | Annotated[list[Annotated[str, Field(min_length=1)]], _NOT_EMPTY]
    ) = "all-linear"
    """Names of the layers to adapt, e.g. [q_proj, v_proj]; all-linear: all but the output
    projection."""
    quantization: Literal["nf4"] | None = None
    """nf4: the trainer holds policy 0 in 4 bits (QLoRA, 2305.14314); round 0 stores what these
    amount to, which everyone else uses."""

    @model_validator(mode="after")
    def _inner_layers_only(self) -> AdapterConfig:
        outer = {"lm_head", "embed_tokens", "embed_out", "wte"}
        if not isinstance(self.target_modules, str) and outer & set(self.target_modules):
            raise ValueError(
                f"target_modules: {min(outer & set(self.target_modules))} cannot be adapted: the "
                "log-probs are computed from its own weights; name inner layers"
            )
        return self


class ReferenceUpdate(Section):
    """A reference that follows the policy inside a round (TR-DPO, 2404.09656)."""

    every: Count
    """Optimizer steps between updates (the paper's tau)."""
    mix: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the policy in the new reference (the paper's alpha); 1 is the hard update."""


class LossOptions(Section):
    """Knobs of single losses, explained in docs/losses.md; null takes the loss's own default."""

    gamma: NonNegative | None = None
    """simpo: the target margin, 0.5 by default."""
    lambda_: Positive | None = None
    """orpo: weight of the odds ratio beside the NLL, 0.1 by default."""
    tau: Positive | None = None
    """discopop: temperature of its blend, 0.05 by default."""
    desirable_weight: Positive | None = None
    """kto: weight of good responses, 1 by default."""
    undesirable_weight: Positive | None = None
    """kto: weight of bad responses, 1 by default."""


class TrainConfig(Section):
    """One round of preference training; losses and what goes with which: docs/losses.md."""

    loss: Annotated[LossName | dict[LossName, Positive], BeforeValidator(checked_loss)] = "sigmoid"
    """The preference loss, or a weighted sum: {sigmoid: 0.8, bco_pair: 0.2}. sigmoid is DPO's."""
    beta: Positive = 0.1
    """Strength of the implicit KL constraint: higher stays closer to the reference; typical 0.01 to
    0.5, and 2 or more for losses of means per token."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Assumed share of flipped labels (cDPO); for sigmoid, robust, exo_pair, aot, aot_unpaired."""
    loss_options: LossOptions = LossOptions()
    """Knobs of single losses."""
    nll_weight: NonNegative = 0.0
    """RPO: weight of the chosen response's mean NLL per token (2404.19733, eq. 1)."""
    dpop_weight: NonNegative = 0.0
    """DPOP: lambda of the penalty on a chosen response that falls below the reference (2402.13228);
    typical 5 to 50."""
    length_penalty: NonNegative = 0.0
    """R-DPO: reward taken from a response for each of its tokens (2403.19159); at 0.01 a difference
    of 100 tokens counts as a margin of 1."""
    margin_weight: NonNegative = 0.0
    """ODPO: the margin demanded of a pair for each unit by which the judge's scores differ
    (2402.10571); for comparisons the unit is |p - 0.5|."""
    ld_alpha: Share = 1.0
    """LD-DPO: weight of the tokens by which a response is longer than the other (2409.06411); 1 is
    off."""
    wpo: bool = False
    """WPO: weigh each pair by its likelihood under the policy (2406.11827)."""
    learning_rate: Positive = 5e-7
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup: Share = 0.1
    """Share of the steps spent warming up."""
    batch_size: Count = 128
    """Pairs an optimizer step, over all processes; a smaller last batch is trained too."""
    micro_batch_tokens: Count | None = None
    """Tokens of one forward pass in one process, each prompt counted once: bounds memory, and
    changes no gradient. A longer pair goes alone. None is 1024 on a CPU and 4096 on a GPU."""
    micro_batch_size: Count | None = None
    """Most pairs of one forward pass in one process; None leaves it to micro_batch_tokens."""
    epochs: Count = 1
    """Passes over a round's pairs."""
    weight_decay: NonNegative = 0.0
    """AdamW's decoupled weight decay."""
    adam_betas: tuple[AdamBeta, AdamBeta] = (0.9, 0.999)
    """AdamW's averaging coefficients."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: computing in bfloat16, weights and gradients are kept in float32."""
    gradient_checkpointing: bool = False
    """Trade a second forward pass for memory."""
    activation_offload: bool = False
    """Keep what gradient_checkpointing stores of each layer in the CPU's memory."""
    adam_moments: Literal["float32", "8bit", "paged_8bit"] = "float32"
    """How AdamW keeps its moments: 8 or 2 bytes a trained parameter, the latter (bitsandbytes,
    2110.02861) also in pages that move to the CPU's memory when the GPU's runs out."""
    lora: AdapterConfig | None = None
    """Train an adapter instead of all weights; None trains all. Supervised fine-tuning before the
    first round trains all weights in any case."""
    reference_update: ReferenceUpdate | None = None
    """Move the reference inside a round; it is then scored in every step, not once a round."""
    optimizer: Literal["reset", "carry"] = "reset"
    """carry: AdamW's state, warm-up and schedule span the campaign instead of a round."""
    max_tokens: Count | None = None
    """Longest prompt + response; longer pairs are skipped and counted; None is without limit."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 100
    """Optimizer steps between checkpoints; 0 keeps none."""
    num_processes: Count = 1
    """Training processes, started by `accelerate launch` where more than one."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several processes share the work: ddp gives each the whole model, fsdp (FSDP2) shards
    weights, gradients and the optimizer's state, for models larger than one GPU."""
    gradient_sync: Literal["step", "micro_batch"] = "step"
    """When gradients are summed over processes; with fsdp, once a step holds a whole float32
    gradient in each process, once a micro-batch only its shard."""
    devices: Gpus | None = None
    """GPUs of the trainer; None takes what compute.layout gives."""
    listen: str | None = None
    """HOST:PORT where trainer processes on other machines reach this one."""
    launch: dict[str, Any] = {}
    """Further options of `accelerate launch`, e.g. num_machines, main_process_ip."""

    @model_validator(mode="after")
    def _loss_takes_its_settings(self) -> TrainConfig:
        default_beta = type(self).model_fields["beta"].default
        problem = next(loss_problems(self.model_dump(), default_beta=default_beta), None)
        if problem is not None:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _parallel(self) -> TrainConfig:
        if self.parallel == "fsdp" and self.num_processes == 1:
            raise ValueError(
                "train.parallel: fsdp shards a model over several processes, and "
                "train.num_processes is 1; give it one for each GPU, or leave train.parallel out"
            )
        if self.gradient_sync == "micro_batch" and self.parallel != "fsdp":
            raise ValueError(
                "train.gradient_sync: micro_batch saves memory with train.parallel: fsdp alone; "
                "ddp sums gradients once a step"
            )
        foreign = [key for key in self.launch if key.startswith(("use_", "fsdp_"))]
        if foreign:
            raise ValueError(
                f"train.launch.{foreign[0]} is a strategy of Accelerate's own, which this trainer "
                "does not use; to shard the model set train.parallel: fsdp"
            )
        return self

    @model_validator(mode="after")
    def _memory_combinations(self) -> TrainConfig:
        if self.activation_offload and not self.gradient_checkpointing:
            raise ValueError(
                "activation_offload needs gradient_checkpointing: true: without it every tensor of "
                "a layer, its weights included, would go to the CPU and back in each step"
            )
        shards = self.parallel == "fsdp"
        unsharded = {
            "lora: the frozen base lies whole on each GPU (quantization: nf4 shrinks it)": (
                self.lora is not None
            ),
            "adam_moments: bitsandbytes keeps moments of whole weights": (
                self.adam_moments != "float32"
            ),
            "reference_update: every process holds the moving reference whole": (
                self.reference_update is not None
            ),
        }
        why = next((why for why, is_set in unsharded.items() if is_set and shards), None)
        if why is not None:
            raise ValueError(f"parallel: fsdp does not go with {why}; set parallel: ddp")
        if self.lora is not None and self.reference_update is not None:
            raise ValueError(
                "reference_update and lora exclude each other: the frozen base holds one adapter, "
                "and a moving reference needs weights of its own; train all weights, or promote "
                "more often (reference.promote)"
            )
        if self.reference_update is not None:
            if not needs_reference(self.loss):
                raise ValueError("reference_update moves the reference, and the loss has none")
            if any(LOSS_FACTS[name].needs_mismatched for name in loss_weights(self.loss)):
                raise ValueError(
                    "reference_update: kto needs the reference's log-probs of responses after "
                    "other prompts, which are not scored in every step; take another loss"
                )
        return self


class ReferenceConfig(Section):
    """When the trained policy becomes the frozen reference."""

    promote: (
        Literal["every_round", "never"]
        | Annotated[dict[Literal["every"], Count], Field(min_length=1)]
    ) = "every_round"
    """every_round, never, or {every: k}."""
    logps: Literal["scored", "sampled"] = "scored"
    """Where its log-probs come from: scored by the trainer, or (faster by a forward pass, as exact
    as the sampler is) sampled with the responses; the difference is measured on some pairs."""


class EvaluationConfig(Section):
    """What is measured between rounds, on prompts that training never sees."""

    every: Count = 1
    """Rounds between evaluations; the last round is always evaluated."""
    max_prompts: Count | None = None
    """Held-out prompts to use; None is all."""
    temperature: NonNegative = 1.0
    """Temperature of the answers that are judged; KL is always estimated at temperature 1."""
    max_new_tokens: Count | None = None
    """Longest answer in tokens; None takes sampling.max_new_tokens."""
    judge: JudgeConfig | None = None
    """A judge other than the training judge; None is the same."""
    examples: Annotated[int, Field(ge=0)] = 3
    """Prompts shown with the answers of policy 0 and of the last policy."""


class AlarmsConfig(Section):
    """Which figures of a round raise an alarm, and what it does. A share of 1 never does."""

    order_conflicts: Share = 0.4
    """Alarm above this share of pairs whose two orders prefer different responses."""
    invalid: Share = 0.05
    """Alarm above this share of verdicts that could not be read."""
    prefers_longer: Share = 0.7
    """Alarm above this share of decided pairs won by the longer response."""
    constant_wins: Share = 0.5
    """Alarm above this share of judge.probes won by judge.constant, ties half."""
    min_count: Count = 20
    """Observations without which a share is no ground for an alarm."""
    actions: dict[AlarmName, Action] = {}
    """What an alarm does, by its name: warn, or stop, which ends the campaign with exit code 12
    before the round trains; warn where none is given."""


class ComputeConfig(Section):
    """Where the work runs."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where torch finds a GPU; cpu: no worker or judge process sees a GPU."""
    workers: Literal["auto", "inline", "processes"] = "auto"
    """inline: sampler and trainer share one process; auto: inline on CPU without vLLM."""
    layout: Literal["colocated", "separate", "exit"] = "colocated"
    """colocated: turns on one GPU; separate: own devices; exit: a worker ends to free all."""
    threads: Count | None = None
    """CPU threads of a worker; None is torch's default. Recorded: results depend on it."""


def _folder_name(name: str) -> str:
    """A name that makes one folder in the folder that it is put in, on any system."""
    if name.strip(". ") != name or not name.isprintable() or len(name.encode()) > 200:
        raise ValueError("should be printable, not begin or end with '.' or ' ', of 200 bytes")
    if set(name) & set('/\\:*?"<>|'):
        raise ValueError('should be a name, without any of / \\ : * ? " < > |')
    return name


class CampaignConfig(Section):
    """The loop."""

    name: Annotated[str, _NOT_EMPTY, AfterValidator(_folder_name)] | None = None
    """Name in reports; the config file's stem where unset."""
    rounds: Count = 3
    """Rounds after round 000."""
    prompts_per_round: Count = 512
    """Prompts sampled each round."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Every random choice derives from it."""
    run_dir: str | None = None
    """Where the run is written; runs/NAME where unset."""
    retention: (
        Literal["all", "promoted"] | Annotated[dict[Literal["last"], Count], Field(min_length=1)]
    ) = "all"
    """Which policies are kept: all, promoted, or {last: n}. Whatever is still needed stays."""
    save_policy_every: Count = 1
    """Of every so many rounds one policy stays; the others go once the next round is done."""


class Config(Section):
    """A campaign."""

    model: ModelConfig
    """Where policy 0 comes from."""
    prompts: PromptsConfig
    """What the policy is asked."""
    sft: SftConfig | None = None
    """Supervised fine-tuning before the first round."""
    sampling: SamplingConfig = SamplingConfig()
    """How responses are drawn."""
    judge: JudgeConfig
    """Who says which is better."""
    pairs: PairsConfig = PairsConfig()
    """From judged responses to preferences."""
    train: TrainConfig = TrainConfig()
    """A round of DPO."""
    reference: ReferenceConfig = ReferenceConfig()
    """When the reference changes."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is measured between rounds."""
    alarms: AlarmsConfig = AlarmsConfig()
    """Which figures raise an alarm."""
    compute: ComputeConfig = ComputeConfig()
    """Where the work runs."""
    campaign: CampaignConfig = CampaignConfig()
    """The loop."""

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        if self.model.init is not None and self.sft is None:
            raise ValueError(
                "model.init makes random weights and trains its tokenizer on the demonstrations; "
                "it needs an sft section"
            )
        if self.prompts.eval and self.prompts.holdout:
            raise ValueError("prompts.eval and prompts.holdout exclude each other")
        if not self.prompts.eval and not self.prompts.holdout:
            raise ValueError("name held-out prompts: prompts.eval, or prompts.holdout: N")
        if (self.train.listen is not None) != (int(self.train.launch.get("num_machines", 1)) > 1):
            raise ValueError(
                "train.listen and train.launch.num_machines above 1 go together: processes on "
                "other machines connect to it"
            )
        own = self.evaluation.judge
        if own is not None and (own.budget != BudgetConfig() or own.prices is not None):
            raise ValueError(
                "judge.budget and judge.prices hold for the whole campaign, evaluation and "
                "sampling.also included; evaluation.judge takes none of its own"
            )
        self._adapter_types()
        if self.train.launch and self.train.num_processes == 1:
            raise ValueError("train.launch is for several processes; set train.num_processes")
        if (
            self.compute.layout == "separate"
            and self.sampling.sampler != "openai_server"
            and None in (self.sampling.devices, self.train.devices)
        ):
            raise ValueError(
                "compute.layout: separate needs sampling.devices and train.devices, or both would "
                "take the first GPU"
            )
        answers = self.sampling.n + (self.sampling.also.n if self.sampling.also else 0)
        given = any(source.answer_field for source in self.prompts.train)
        if answers < 2 and not given and self.pairs.threshold is None:
            raise ValueError("sampling.n: 1 gives no two responses to compare; set n to 2 or more")
        return self

    @model_validator(mode="after")
    def _labels_fit_the_loss(self) -> Config:
        names = list(loss_weights(self.train.loss))
        if self.pairs.threshold is not None and names != ["kto"]:
            raise ValueError(
                f"pairs.threshold makes good and bad responses without a partner, and "
                f"{' and '.join(names)} compares two; set train.loss: kto, or leave it out"
            )
        hard = [name for name in names if not LOSS_FACTS[name].uses_probs]
        if self.pairs.labels == "soft" and hard:
            able = [name for name, facts in LOSS_FACTS.items() if facts.uses_probs]
            raise ValueError(
                f"pairs.labels: soft: {' and '.join(hard)} cannot use the judge's p; it goes with "
                f"train.loss {' or '.join(able)}"
            )
        return self

    @model_validator(mode="after")
    def _sampled_logps_are_the_references(self) -> Config:
        if self.reference.logps == "scored":
            return self
        sampling = self.sampling
        plain = (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
        reasons = {
            "the reference is the sampling policy only with reference.promote: every_round": (
                self.reference.promote != "every_round"
            ),
            "it needs sampling.temperature 1 without top_p and top_k": (not plain),
            "train.ld_alpha needs log-probs of parts of responses": self.train.ld_alpha != 1.0,
            "kto needs log-probs of responses after other prompts": any(
                LOSS_FACTS[name].needs_mismatched for name in loss_weights(self.train.loss)
            ),
            "the loss has no reference": not needs_reference(self.train.loss),
            "train.reference_update scores the reference anew in every step": (
                self.train.reference_update is not None
            ),
        }
        why = next((reason for reason, holds in reasons.items() if holds), None)
        if why is not None:
            raise ValueError(f"reference.logps: sampled: {why}; set it to scored")
        return self

    def _adapter_types(self) -> None:
        """The frozen base computes in the type that its folder, and so every sampler, has."""
        lora, precision, dtype = self.train.lora, self.train.precision, self.model.dtype
        if lora is None:
            if self.sampling.update == "adapter":
                raise ValueError("sampling.update: adapter is for train.lora, which is not set")
            return
        if dtype == "bfloat16" and precision == "float32":
            raise ValueError(
                "train.lora keeps policy 0 in memory in model.dtype, and train.precision: float32 "
                "cannot compute with bfloat16 weights; set train.precision: bfloat16, or "
                "model.dtype: float32"
            )
        if lora.quantization is not None and dtype != precision:
            raise ValueError(
                f"train.lora.quantization: the 4-bit layers compute in train.precision "
                f"({precision}) and what they amount to is stored in model.dtype ({dtype}); set "
                "both to the same"
            )

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Config:
        problem = next(in_config(self), None)
        if problem is not None:
            raise ValueError(problem)
        return self

    @property
    def eval_judge(self) -> JudgeConfig:
        """The judge of evaluations, under the campaign's budget and prices."""
        if self.evaluation.judge is None:
            return self.judge
        shared = {"budget": self.judge.budget, "prices": self.judge.prices}
        return self.evaluation.judge.model_copy(update=shared)

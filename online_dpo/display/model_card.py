"""The README.md of an exported policy: what it is, how it was made, and how it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from online_dpo.display.visible import visible
from online_dpo.display.wording import drift, estimate, figure, headline, number, percent, rate
from online_dpo.files import read_json
from online_dpo.loss_rules import describe_loss
from online_dpo.stages.context import read_prompts
from online_dpo.store import RunDir
from online_dpo.views import Campaign, RoundView, evaluated

_HUB = "hub:"


def model_card(campaign: Campaign, round_number: int) -> str:
    """The card of a round's policy.

    Places on this machine are not named, only the last part of a path.
    """
    rounds = [view for view in campaign.rounds() if view.round <= round_number]
    parts = [
        _front_matter(campaign),
        f"# {_code(campaign.config.campaign.name or campaign.path.name)}, round {round_number}\n",
        headline(rounds) + "\n",
        _made(campaign, rounds),
        _evaluation(campaign, rounds),
        _use(campaign),
        "## License\n\nNot stated yet: fill in `license` above. The terms of the base model, of "
        "the judge and of the prompts apply.\n",
    ]
    return "\n".join(part for part in parts if part)


def _front_matter(campaign: Campaign) -> str:
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "online-dpo", "preference-optimization"],
    }
    base = _base(campaign)
    if base is not None and base.startswith(_HUB):
        fields["base_model"] = base.removeprefix(_HUB).partition("@")[0]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}# license: fill in\n---\n"


def _base(campaign: Campaign) -> str | None:
    """Where the given model came from, as it was pinned; None for a model made on the spot."""
    pin = RunDir(campaign.path).round(0).path / "model" / "pin.json"
    return str(read_json(pin)["path"]) if pin.is_file() else None


def _base_name(campaign: Campaign) -> str:
    base = _base(campaign)
    if base is None:
        init = campaign.config.model.init
        assert init is not None
        return f"a {init.architecture} model with random weights ({init.num_layers} layers)"
    if base.startswith(_HUB):
        name, _, commit = base.removeprefix(_HUB).partition("@")
        return f"{_code(name)} at commit {_code(commit)}"
    return f"{_code(Path(base).name)}, a local model"


def _made(campaign: Campaign, rounds: list[RoundView]) -> str:
    config = campaign.config
    train = config.train
    promote = config.reference.promote
    promoted = promote if isinstance(promote, str) else f"every {promote['every']} rounds"
    unpaired = config.pairs.threshold is not None
    facts = {
        "Base model": _base_name(campaign),
        "Supervised fine-tuning": _file(config.sft.demonstrations) if config.sft else "none",
        "Method": (
            f"{rounds[-1].round} rounds of {'KTO' if unpaired else 'DPO'} on the policy's own "
            "responses "
            f"({describe_loss(train.loss)} loss, beta {train.beta:g}, "
            f"learning rate {train.learning_rate:g}, {train.batch_size} "
            f"{'responses' if unpaired else 'pairs'} a step)"
        ),
        "Trained weights": _trained_weights(campaign),
        "Reference promoted": promoted.replace("_", " "),
        "Judge": _code(_public(config.judge.name)),
        "Responses": f"{sum(v.samples for v in rounds):,}, {config.sampling.n} for each prompt",
        "Good and bad responses" if unpaired else "Training pairs": (
            f"{sum(v.unpaired or v.pairs for v in rounds):,}" + _offline(campaign)
        ),
        "Prompts": _prompts(campaign),
        "Seed": str(config.campaign.seed),
        "Policy sha256": f"`{(rounds[-1].policy or {}).get('sha256', '-')}`",
    }
    lines = [f"- {name}: {fact}" for name, fact in facts.items()]
    return "## How it was made\n\n" + "\n".join(lines) + "\n"


def _trained_weights(campaign: Campaign) -> str:
    lora = campaign.config.train.lora
    if lora is None:
        return "all"
    scale = f"alpha {lora.alpha:g}" + (", rank-stabilized" if lora.rslora else "")
    base = ", over a base in 4 bits (nf4)" if lora.quantization else ""
    return f"a LoRA adapter of rank {lora.rank} ({scale}){base}; merged here"


def _prompts(campaign: Campaign) -> str:
    table = read_prompts(RunDir(campaign.path))
    train = ", ".join(f"{_code(name)} ({len(ids):,})" for name, ids in table.train.items())
    held_out = ", ".join(f"{_code(name)} ({len(ids):,})" for name, ids in table.eval.items())
    return f"{train}; held out: {held_out}"


def _offline(campaign: Campaign) -> str:
    offline = campaign.config.pairs.offline
    if offline is None:
        return ""
    return f", {percent(offline.share)} of each round's from {_file(offline.path)}"


def _evaluation(campaign: Campaign, rounds: list[RoundView]) -> str:
    measured = evaluated(rounds)
    if not measured:
        return ""
    judge = _code(_public(campaign.config.eval_judge.name))
    columns = {
        "round": [str(view.round) for view in measured],
        "reward": [estimate(figure(view, "score")) for view in measured],
        "wins vs policy 0": [rate(figure(view, "win_rate_policy0")) for view in measured],
        "KL to policy 0": [drift(figure(view, "kl_policy0")) for view in measured],
        "tokens": [number(figure(view, "mean_tokens"), 1) for view in measured],
        "cut off": [percent(figure(view, "truncated")) for view in measured],
        "distinct-2": [number(figure(view, "distinct_2")) for view in measured],
    }
    filled = {title: cells for title, cells in columns.items() if set(cells) != {"-"}}
    rows = [list(filled), ["---:"] * len(filled), *map(list, zip(*filled.values(), strict=True))]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        f"## Evaluation\n\nOn {figure(measured[-1], 'prompts')} held-out prompts, judged by "
        f"{judge}. Rewards with their standard error, win rates with their 95% interval, "
        f"KL in nats per sequence.\n\n{table}\n"
    )


def _use(campaign: Campaign) -> str:
    prompts = read_prompts(RunDir(campaign.path)).by_id.values()
    chat = any(prompt.messages for prompt in prompts)
    form = (
        'ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], '
        'add_generation_prompt=True, return_dict=True, return_tensors="pt")'
        if chat
        else 'ids = tokenizer(prompt, return_tensors="pt")'
    )
    return (
        "## Use\n\n```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained("policy")\n'
        'model = AutoModelForCausalLM.from_pretrained("policy")\n'
        f"{form}\n"
        f"output = model.generate(**ids, do_sample=True, top_k=0, "
        f"max_new_tokens={campaign.config.sampling.max_new_tokens})\n"
        "```\n"
    )


def _file(path: str) -> str:
    return _code(Path(path).name)


def _code(text: str) -> str:
    """Text as it is, in Markdown: as code, on one line, with no way out of it."""
    return "`" + " ".join(visible(text).replace("`", "'").split()) + "`"


def _public(judge: str) -> str:
    """A judge's name without the folder of a file on this machine."""
    return Path(judge).name if ".py:" in judge else judge

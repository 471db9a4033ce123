"""The transformers sampler: seeds, batches, endings, log-probs, and what it takes from a model."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, AutoTokenizer

from online_dpo.errors import EngineError
from online_dpo.models.loading import load_model, load_tokenizer
from online_dpo.records import ModelRef, Prompt, Response, SamplingParams, SamplingRequest
from online_dpo.samplers.decode_attention import attention_forward
from online_dpo.samplers.transformers import TransformersSampler


def open_sampler(folder: Path, *, batch_size: int = 64) -> TransformersSampler:
    torch.set_num_threads(1)
    sampler = TransformersSampler(
        model_source=lambda policy, path: load_model(path),
        tokenizer_source=load_tokenizer,
        batch_size=batch_size,
    )
    sampler.load(ModelRef(str(folder), "0" * 64), folder)
    return sampler


@pytest.fixture(scope="module")
def sampler(tiny_llama: Path) -> TransformersSampler:
    return open_sampler(tiny_llama)


def params(**changes: object) -> SamplingParams:
    values: dict[str, object] = {
        "n": 2, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 12, "stop": ()
    }  # fmt: skip
    return SamplingParams(**{**values, **changes})  # type: ignore[arg-type]


def request(name: str, token_ids: tuple[int, ...], *seeds: int) -> SamplingRequest:
    return SamplingRequest(Prompt(name, "test", token_ids=token_ids), seeds)


def requests(num: int, *, n: int = 2) -> list[SamplingRequest]:
    return [
        request(f"p{i}", tuple(range(2 + i, 2 + i + 3 + i % 5)), *range(100 * i, 100 * i + n))
        for i in range(num)
    ]


def answer(
    sampler: TransformersSampler, asked: list[SamplingRequest], **changes: object
) -> list[Response]:
    return [r for group in sampler.generate(asked, params(**changes)) for r in group]


def test_responses_come_in_order_with_ids(sampler: TransformersSampler) -> None:
    asked = requests(5, n=3)
    groups = list(sampler.generate(asked, params()))
    assert [[r.id for r in group] for group in groups] == [
        [f"p{i}:{k:02d}" for k in range(3)] for i in range(5)
    ]
    assert all(r.prompt_id == f"p{i}" for i, group in enumerate(groups) for r in group)


def test_the_same_call_gives_the_same_bytes(sampler: TransformersSampler) -> None:
    assert answer(sampler, requests(20)) == answer(sampler, requests(20))


def test_a_prompt_is_read_once_for_all_its_responses(tiny_llama: Path) -> None:
    """By a model that counts tokens; the responses are those of prompts read one for one."""
    model, tokens = load_model(tiny_llama), 0
    forward = model.forward

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal tokens
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        assert isinstance(ids, torch.Tensor)
        tokens += ids.numel()
        return forward(*args, **kwargs)

    model.forward = counted
    sampler = TransformersSampler(
        model_source=lambda policy, path: model, tokenizer_source=load_tokenizer, batch_size=64
    )
    sampler.load(ModelRef("m", "0"), tiny_llama)
    prompt = tuple(range(2, 22))
    group = answer(sampler, [request("p", prompt, *range(8))], max_new_tokens=5)
    assert len({r.token_ids for r in group}) > 1
    assert tokens <= 19 + 8 * 5
    alone = [
        r
        for seed in range(8)
        for r in answer(sampler, [request("p", prompt, seed)], max_new_tokens=5)
    ]
    assert [r.token_ids for r in group] == [r.token_ids for r in alone]
    for one, other in zip(group, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_a_response_depends_on_its_seed_not_on_its_neighbours(tiny_llama: Path) -> None:
    together = answer(open_sampler(tiny_llama), requests(16))
    alone = [
        r for one in requests(16) for r in answer(open_sampler(tiny_llama, batch_size=1), [one])
    ]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    assert len({r.token_ids for r in together}) > 20
    again = answer(
        open_sampler(tiny_llama), [request("other", requests(1)[0].prompt.token_ids, 1, 0)]
    )
    assert [r.token_ids for r in again] == [together[1].token_ids, together[0].token_ids]


def test_a_longer_limit_continues_the_same_response(sampler: TransformersSampler) -> None:
    short = answer(sampler, requests(8), max_new_tokens=5)
    long = answer(sampler, requests(8), max_new_tokens=9)
    assert [r.token_ids for r in short] == [r.token_ids[:5] for r in long]


def test_greedy_equals_plain_generate(sampler: TransformersSampler, tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    asked = requests(6, n=1)
    for got, one in zip(answer(sampler, asked, temperature=0.0), asked, strict=True):
        ids = torch.tensor([one.prompt.token_ids])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12
        )
        assert list(got.token_ids) == expected[0, ids.shape[1] :].tolist()


def exact_logps(folder: Path, prompt: tuple[int, ...], response: tuple[int, ...]) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0].double()
    logps = logits.log_softmax(-1)
    return [logps[len(prompt) + t - 1, token].item() for t, token in enumerate(response)]


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.6, "top_k": 5, "top_p": 0.8}])
def test_logprobs_are_raw_whatever_the_sampling(
    sampler: TransformersSampler, tiny_llama: Path, changes: dict[str, object]
) -> None:
    asked = requests(4)
    prompts = {one.prompt.id: one.prompt.token_ids for one in asked}
    responses = answer(sampler, asked, **changes)
    sequences = [(prompts[r.prompt_id], r.token_ids) for r in responses]
    for r, scored, (prompt, ids) in zip(
        responses, sampler.score(sequences), sequences, strict=True
    ):
        expected = exact_logps(tiny_llama, prompt, ids)
        assert r.logprobs == pytest.approx(expected, abs=2e-5)
        assert scored == pytest.approx(expected, abs=2e-5)


def first_token_probs(folder: Path, prompt: tuple[int, ...]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0, -1].double().softmax(0)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.0, 8, 1.0), (1.0, 0, 0.7), (2.0, 20, 0.6)],
)
def test_tokens_are_drawn_from_the_distribution_asked_for(
    sampler: TransformersSampler, tiny_llama: Path, temperature: float, top_k: int, top_p: float
) -> None:
    """Chi-squared by hand: its mean is the degrees of freedom, its variance twice that."""
    prompt, num = (5, 6, 7), 4000
    probs = first_token_probs(tiny_llama, prompt) ** (1 / temperature)
    order = probs.argsort(descending=True)
    kept = order[: top_k or len(order)]
    mass = (probs[kept] / probs[kept].sum()).cumsum(0)
    kept = kept[: int((mass < top_p).sum()) + 1]
    expected = probs[kept] / probs[kept].sum() * num
    drawn = Counter(
        r.token_ids[0]
        for r in answer(
            sampler,
            [request("p", prompt, *range(num))],
            max_new_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p,
        )
    )  # fmt: skip
    assert set(drawn) <= set(kept.tolist())
    common = expected >= 5
    counts = torch.tensor([drawn[int(t)] for t in kept], dtype=torch.double)
    observed, wanted = counts[common], expected[common]
    if not common.all():
        observed = torch.cat([observed, counts[~common].sum()[None]])
        wanted = torch.cat([wanted, expected[~common].sum()[None]])
    freedom = len(wanted) - 1
    assert ((observed - wanted) ** 2 / wanted).sum() < freedom + 5 * math.sqrt(2 * freedom) + 5


def test_eos_is_kept_and_ends_a_response(sampler: TransformersSampler) -> None:
    responses = answer(sampler, requests(40, n=8), max_new_tokens=40)
    ended = [r for r in responses if r.finish_reason == "eos"]
    assert len(ended) > 5
    for r in responses:
        assert len(r.logprobs or ()) == len(r.token_ids)
        if r.finish_reason == "eos":
            assert r.token_ids[-1] == 0 and 0 not in r.token_ids[:-1]
            assert "<eos>" not in r.text
        else:
            assert r.truncated and len(r.token_ids) == 40 and 0 not in r.token_ids


def with_config(source: Path, target: Path, name: str, **changes: object) -> Path:
    shutil.copytree(source, target)
    path = target / name
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**config, **changes}))
    return target


def test_every_eos_of_the_model_counts(tiny_llama: Path, tmp_path: Path) -> None:
    folder = with_config(
        tiny_llama, tmp_path / "m", "generation_config.json", eos_token_id=list(range(0, 320, 8))
    )
    responses = answer(open_sampler(folder), requests(20))
    ended = [r for r in responses if r.finish_reason == "eos"]
    assert len(ended) > 10
    assert all(r.token_ids[-1] % 8 == 0 for r in ended)
    assert len({r.token_ids[-1] for r in ended}) > 3


def test_nothing_else_comes_from_the_generation_config(
    sampler: TransformersSampler, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = with_config(
        tiny_llama, tmp_path / "m", "generation_config.json",
        do_sample=True, top_k=1, temperature=0.1, repetition_penalty=5.0, max_length=6,
        min_length=40, suppress_tokens=list(range(100)),
    )  # fmt: skip
    other = open_sampler(folder)
    assert answer(other, requests(6)) == answer(sampler, requests(6))


def test_a_stop_string_ends_a_row_keeps_its_tokens_and_leaves_the_text(
    sampler: TransformersSampler, tiny_llama: Path
) -> None:
    asked = requests(24)
    free = answer(sampler, asked, max_new_tokens=20)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    target = next(r for r in free if len(r.text) > 12 and r.text[6:8].isascii())
    stop = (target.text[6:8], "never there")
    stopped = answer(sampler, asked, max_new_tokens=20, stop=stop)
    assert sum(r.finish_reason == "stop" for r in stopped) >= 1
    for before, after in zip(free, stopped, strict=True):
        whole = tokenizer.decode(after.token_ids, skip_special_tokens=True)
        if after.finish_reason != "stop":
            assert after == before and stop[0] not in whole
            continue
        assert after.token_ids == before.token_ids[: len(after.token_ids)]
        assert stop[0] in whole
        assert stop[0] not in tokenizer.decode(after.token_ids[:-1], skip_special_tokens=True)
        assert after.text == whole[: whole.index(stop[0])]


def test_a_response_stops_where_the_context_ends(sampler: TransformersSampler) -> None:
    long = request("long", tuple(2 + i % 300 for i in range(380)), 1)
    short = request("short", (4, 5), 2)
    first, second = answer(sampler, [long, short], max_new_tokens=10)
    assert len(first.token_ids) <= 4 and len(second.token_ids) <= 10
    with pytest.raises(EngineError, match=r"has 384 tokens.*holds 384"):
        answer(sampler, [request("full", (2,) * 384, 1)])


def test_a_prompt_without_tokens_is_refused(sampler: TransformersSampler) -> None:
    with pytest.raises(EngineError, match="p has no token ids"):
        answer(sampler, [request("p", (), 1)])


class HungryModel:
    """Makes a real model run out of memory above some number of sequences."""

    def __init__(self, folder: Path, most: int, error: Exception) -> None:
        self.sizes: list[int] = []
        self.model = load_model(folder)
        forward = self.model.forward

        def limited(*args: object, **kwargs: object) -> object:
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            assert isinstance(ids, torch.Tensor)
            if len(ids) > most:
                self.sizes.append(len(ids))
                raise error
            return forward(*args, **kwargs)

        self.model.forward = limited


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_the_batch_is_halved_when_memory_runs_out(
    sampler: TransformersSampler, tiny_llama: Path, error: Exception
) -> None:
    hungry = HungryModel(tiny_llama, most=10, error=error)
    limited = TransformersSampler(
        model_source=lambda policy, path: hungry.model,
        tokenizer_source=load_tokenizer,
        batch_size=64,
    )
    limited.load(ModelRef("m", "0"), tiny_llama)
    got = answer(limited, requests(40, n=1))
    assert hungry.sizes == [40, 20]
    assert limited.batch_size == 10
    assert [r.token_ids for r in got] == [r.token_ids for r in answer(sampler, requests(40, n=1))]
    answer(limited, requests(40, n=1))
    assert hungry.sizes == [40, 20]


def test_a_single_sequence_too_large_for_memory_is_an_engine_error(tiny_llama: Path) -> None:
    hungry = HungryModel(tiny_llama, most=0, error=MemoryError("no room"))
    sampler = TransformersSampler(
        model_source=lambda policy, path: hungry.model,
        tokenizer_source=load_tokenizer,
        batch_size=4,
    )
    sampler.load(ModelRef("m", "0"), tiny_llama)
    with pytest.raises(EngineError, match="single sequence"):
        answer(sampler, requests(4))


def test_a_model_that_gives_nan_is_an_engine_error(tiny_llama: Path) -> None:
    model = load_model(tiny_llama)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    sampler = TransformersSampler(
        model_source=lambda policy, path: model, tokenizer_source=load_tokenizer, batch_size=4
    )
    sampler.load(ModelRef("m", "0"), tiny_llama)
    with pytest.raises(EngineError, match="not finite"):
        answer(sampler, requests(2))


def test_a_shared_model_is_left_as_it_was(tiny_llama: Path) -> None:
    model = load_model(tiny_llama).train()
    model.config.use_cache = False
    own = model.generation_config
    sampler = TransformersSampler(
        model_source=lambda policy, path: model, tokenizer_source=load_tokenizer, batch_size=8
    )
    sampler.load(ModelRef("m", "0"), tiny_llama)
    answer(sampler, requests(3))
    sampler.score([((3, 4), (5, 6))])
    assert model.training and model.generation_config is own and not model.config.use_cache
    model(torch.tensor([[2, 3, 4]])).logits.sum().backward()


def test_progress_counts_every_response(tiny_llama: Path) -> None:
    sampler = open_sampler(tiny_llama, batch_size=6)
    seen: list[int] = []
    list(sampler.generate(requests(10), params(), progress=seen.append))
    assert seen == [6, 12, 18, 20]


def test_decoding_in_bfloat16_attends_as_torch_does() -> None:
    """By torch's own attention in float64, with a key head for two query heads and padding."""
    generator = torch.Generator().manual_seed(0)
    shape, length = (5, 4, 1, 8), 7
    query = torch.randn(shape, generator=generator).bfloat16()
    key, value = (torch.randn((5, 2, length, 8), generator=generator).bfloat16() for _ in range(2))
    sees = torch.arange(length) >= torch.tensor([0, 1, 2, 3, 4])[:, None]
    wide = [x.double() for x in (query, key, value)]
    for mask in (None, sees[:, None, None], torch.zeros(5, 1, 1, length).bfloat16()):
        expected = scaled_dot_product_attention(
            *wide,
            attn_mask=mask if mask is None or mask.dtype == torch.bool else mask.double(),
            scale=0.3,
            enable_gqa=True,
        ).transpose(1, 2)
        found, _ = attention_forward(torch.nn.Module(), query, key, value, mask, scaling=0.3)
        torch.testing.assert_close(found.double(), expected, atol=0.01, rtol=0.01)


def test_log_probs_of_a_bfloat16_policy_are_those_of_its_score(tiny_qwen2: Path) -> None:
    sampler = TransformersSampler(
        model_source=lambda policy, path: load_model(path).bfloat16(),
        tokenizer_source=load_tokenizer,
        batch_size=64,
    )
    sampler.load(ModelRef(str(tiny_qwen2), "0" * 64), tiny_qwen2)
    asked = requests(6)
    answers = answer(sampler, asked)
    prompts = {one.prompt.id: one.prompt.token_ids for one in asked}
    scored = sampler.score([(prompts[r.prompt_id], r.token_ids) for r in answers])
    for response, logprobs in zip(answers, scored, strict=True):
        assert response.logprobs == pytest.approx(logprobs, abs=0.1)

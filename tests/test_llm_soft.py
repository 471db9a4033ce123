"""Soft verdicts: p from the probabilities of the verdict's tokens, by hand and from a server."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from judge_cases import pair
from judge_server import JudgeServer, Say
from labellers import MakeLabeller, rows, serve
from vllm_processes import VllmServer

from judges.llm_replies import read_verdict
from judges.llm_soft import LITTLE_MASS, soft_p
from online_dpo.asking.unusable_replies import NO_LOGPROBS
from online_dpo.errors import ConfigError
from online_dpo.judging import ChatReply, TokenLogprobs

JSON = ['{"', "verdict", '":', ' "', "{}", '"}', "<|end|>"]
"""A reply's tokens, the verdict's own being the one left out, and an EOS that is no text."""


def tokens(parts: list[str], label: str, top: dict[str, float]) -> list[TokenLogprobs]:
    """Certain tokens around one that is drawn from `top`, which holds probabilities."""
    drawn = tuple((text, math.log(p)) for text, p in top.items())
    return [
        TokenLogprobs(label, math.log(top[label]), drawn)
        if part == "{}"
        else TokenLogprobs(part, 0.0, ((part, 0.0), ("other", -9.0)))
        for part in parts
    ]


def softened(
    parts: list[str], label: str, top: dict[str, float], *, min_mass: float = 0.5
) -> tuple[float | None, str | None]:
    said = tokens(parts, label, top)
    text = "".join(t.text for t in said).removesuffix("<|end|>")
    found = read_verdict(ChatReply(text, "stop", "m", 1, 1), "f")
    assert found.p is not None
    return soft_p(text, found.at, found.label, said, min_mass=min_mass)


def test_p_is_the_first_ones_share_and_a_tie_is_half() -> None:
    top = {"A": 0.5, "B": 0.2, "tie": 0.2, "C.": 0.05}
    # (0.5 + 0.2 / 2 + 0.05 / 2) / (0.5 + 0.2 + 0.2 + 0.05)
    assert softened(JSON, "A", top) == (pytest.approx(0.625 / 0.95), None)
    assert softened(JSON, "B", {"A": 0.75, "B": 0.25}) == (pytest.approx(0.75), None)


def test_a_verdict_within_a_token_is_found() -> None:
    joined = ['{"verdict": ', "{}", "}"]
    top = {'"A"': 0.6, '"B"': 0.2, '"': 0.1, "A": 0.05}
    assert softened(joined, '"A"', top) == (pytest.approx(0.75), None)
    spaced = ["Hm.\n", "Verdict", ":", "{}", "\n"]
    top = {" A": 0.5, "A": 0.1, " B": 0.2, " An": 0.1, " t": 0.1}
    assert softened(spaced, " A", top) == (pytest.approx(0.65 / 0.9), None)
    doubled = ["Both are fine. ", "[[", "{}", "]]", "<|end|>"]
    assert softened(doubled, "B", {"A": 0.1, "B": 0.9}) == (pytest.approx(0.1), None)


def test_little_mass_abstains() -> None:
    top = {"A": 0.2, "B": 0.1, "Neither": 0.6}
    assert softened(JSON, "A", top) == (None, LITTLE_MASS)
    assert softened(JSON, "A", top, min_mass=0.3) == (pytest.approx(2 / 3), None)


def test_a_token_outside_of_the_likeliest_counts_too() -> None:
    said = [TokenLogprobs("B", math.log(0.02), (("A", math.log(0.9)), ("x", math.log(0.05))))]
    assert soft_p("B", 0, "B", said, min_mass=0.5) == (pytest.approx(0.9 / 0.92), None)


def test_tokens_without_the_verdict_give_none() -> None:
    said = [TokenLogprobs("something", 0.0, ()), TokenLogprobs(" else", 0.0, ())]
    assert soft_p("Verdict: A", 9, "A", said, min_mass=0.5) == (None, NO_LOGPROBS)


@given(st.floats(0.01, 0.98), st.floats(0.0, 1.0), st.floats(0.0, 0.01))
def test_swapping_a_pair_turns_p_into_one_minus_p(mass: float, share: float, tie: float) -> None:
    a, b = mass * share + 1e-9, mass * (1.0 - share) + 1e-9
    one, reason = softened(JSON, "A", {"A": a, "B": b, "tie": tie + 1e-9}, min_mass=1e-6)
    other, _ = softened(JSON, "B", {"A": b, "B": a, "tie": tie + 1e-9}, min_mass=1e-6)
    assert reason is None and one is not None and other is not None
    assert one == pytest.approx(1.0 - other, abs=1e-12)


# --- through the door


def say(label: str, top: dict[str, float]) -> Say:
    said = tokens(JSON[:-1], label, top)
    whole = [(t.text, {t.text: t.logprob, **dict(t.top)}) for t in said]
    return Say("".join(t.text for t in said), logprobs=whole)


def test_soft_verdicts_are_asked_for_and_kept(make: MakeLabeller, tmp_path: Path) -> None:
    with JudgeServer(lambda request, number: say("A", {"A": 0.6, "B": 0.2, "x": 0.1})) as server:
        also = {"soft": True, "top_logprobs": 5}
        asked = [pair(0), pair(1)]
        found = make(server, orders="one", also=also).compare_pairs(asked, purpose="label")
        assert all(c.p in (pytest.approx(0.75), pytest.approx(0.25)) for c in found)
        assert (server.requests[0]["logprobs"], server.requests[0]["top_logprobs"]) == (True, 5)
        again = make(server, orders="one", also=also).compare_pairs(asked, purpose="label")
        assert (again, len(server.requests)) == (found, 2)
        strict = {**also, "min_mass": 0.9}
        (little, _) = make(server, orders="one", also=strict).compare_pairs(asked, purpose="x")
        assert (little.p, little.reason) == (None, LITTLE_MASS)
        assert len(server.requests) == 2, "the same answers, read more strictly"
    assert all('["A",' in row for (row,) in rows(tmp_path, "logprobs"))


def test_a_server_without_log_probs_is_named(make: MakeLabeller) -> None:
    with JudgeServer(lambda request, number: Say('{"verdict": "A"}')) as server:
        labeller = make(server, also={"soft": True})
        with pytest.raises(ConfigError, match=r"soft needs the log-probs.*'m' at http.*none"):
            labeller.compare_pairs([pair()], purpose="label")


# --- a real server

FORMS = (": ", " = ", ": **", ":\n", " -- ")
"""What stands between "Verdict" and the verdict; each makes other verdicts likely."""


def transformers_p(folder: Path, said: Sequence[str]) -> float:
    """p after what the server said, by transformers' own logits: A, B and tie alone may follow."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = tokenizer("<|user|>x\n<|assistant|>", add_special_tokens=False).input_ids
    # The grammar allows any tokens that spell the text: the server's own are scored.
    spelt = [token.replace(" ", "\u0120").replace("\n", "\u010a") for token in said]
    ids = torch.tensor([asked + tokenizer.convert_tokens_to_ids(spelt)])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(ids).logits[0, -1]
    a, b, tie = logits[tokenizer.convert_tokens_to_ids(["A", "B", "t"])].softmax(-1).tolist()
    return float(a + tie / 2)


def test_a_real_servers_log_probs_give_the_p_that_transformers_gives(
    vllm_server: VllmServer, make: MakeLabeller, tmp_path: Path
) -> None:
    template = tmp_path / "bare.jinja"
    template.write_text("{% block user %}x{% endblock %}")
    expected, found = [], []
    with serve() as unused:
        for form in FORMS:
            choices = [f"Verdict{form}{label}" for label in ("A", "B", "tie")]
            options = {
                "model": vllm_server.model,
                "base_url": vllm_server.base_url,
                "template": str(template),
                "structured": False,
                "max_tokens": 32,
                "soft": True,
                "extra_body": {"structured_outputs": {"choice": choices}},
            }
            labeller = make(unused, options=options, orders="one", timeout_s=120)
            (asked,) = labeller.compare_pairs([pair()], purpose="label")
            assert asked.raws[0] in choices and asked.p is not None
            swapped, kept = rows(tmp_path, "swapped, logprobs")[-1]
            found.append(1.0 - asked.p if swapped else asked.p)
            said = [token for token, _, _ in json.loads(kept)]
            before = [t for i, t in enumerate(said) if len("".join(said[:i])) < len(choices[0]) - 1]
            expected.append(transformers_p(vllm_server.folder, before))
    assert found == [pytest.approx(p, abs=1e-4) for p in expected]
    assert len({round(p, 2) for p in expected}) > 2, "the forms differ"

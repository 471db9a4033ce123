"""How long paid labelling takes against the ideal, ledger included, and what memory it needs.

    python benchmarks/judge_throughput.py [--requests 5000] [--concurrency 64] [--latency-s 0.2]

A server in a process of its own answers every chat completion after the same time. The LLM judge
compares pairs in both orders, as in a campaign: templates, keys, reservation, request, settlement
and verdict, each committed. The ideal is requests / concurrency x latency. Exits 1 where labelling
takes more than 1.5 times that, or where memory grows by more than 16 MiB between the first fifth of
the requests and the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import resource
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from turns import print_conditions, print_table

from online_dpo.config import JudgeConfig
from online_dpo.judging import Labeller
from online_dpo.paid.ledger import LEDGER, Ledger
from online_dpo.records import Comparison, Prompt, Response

BOUND = 1.5
MAX_GROWTH_MIB = 16.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--latency-s", type=float, default=0.2)
    args = parser.parse_args()
    print_conditions(threads=1, device="cpu")
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.Process(target=serve, args=(theirs, args.latency_s), daemon=True)
    server.start()
    with TemporaryDirectory() as folder:
        figures = measure(Path(folder), f"http://127.0.0.1:{ours.recv()}/v1", args)
    server.kill()
    ideal_s = args.requests / args.concurrency * args.latency_s
    ratio = figures["wall_s"] / ideal_s
    print_table(
        ["requests", "ideal, s", "wall, s", "ratio", "CPU, ms a request", "memory growth, MiB"],
        [
            [
                f"{args.requests}",
                f"{ideal_s:.2f}",
                f"{figures['wall_s']:.2f}",
                f"{ratio:.2f}",
                f"{figures['cpu_s'] / args.requests * 1e3:.2f}",
                f"{figures['growth_mib']:.1f}",
            ]
        ],
    )
    sys.exit(ratio > BOUND or figures["growth_mib"] > MAX_GROWTH_MIB)


def measure(folder: Path, url: str, args: argparse.Namespace) -> dict[str, float]:
    """Wall and CPU seconds of labelling, and the growth of memory over its last four fifths."""
    labeller = _labeller(folder, url, args.concurrency)
    warm_up = [_pair(-1 - i) for i in range(args.concurrency)]
    labeller.compare_pairs(warm_up, purpose="label")
    pairs = [_pair(i) for i in range(args.requests // 2)]
    early: list[float] = []

    def watch(share: float) -> None:
        if share > 0.2 and not early:
            early.append(_rss_mib())

    wall, cpu = time.perf_counter(), time.process_time()
    found = labeller.compare_pairs(pairs, purpose="label", on_share=watch)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    late = _rss_mib()
    labeller.close()
    _check(folder / LEDGER, found, len(warm_up) + len(pairs))
    return {"wall_s": wall, "cpu_s": cpu, "growth_mib": late - early[0]}


def _labeller(folder: Path, url: str, concurrency: int) -> Labeller:
    options = {"model": "judge", "base_url": url, "price_per_million": [0.15, 0.60]}
    config = JudgeConfig(
        name="llm_pairwise",
        options=options,
        concurrency=concurrency,
        budget={"max_usd": 1000.0},  # type: ignore[arg-type]
    )
    return Labeller(
        config,
        base=None,
        ledger_path=folder / LEDGER,
        seed=0,
        round=1,
        on_event=lambda event: None,
    )


def _check(ledger_path: Path, found: list[Comparison], num_pairs: int) -> None:
    """Every verdict must be there, and every call settled and paid for."""
    assert all(comparison.p == 0.5 for comparison in found), "always A: a tie in both orders"
    ledger = Ledger(ledger_path)
    totals = ledger.totals().result()
    ledger.close()
    assert totals.calls == totals.final == 2 * num_pairs, totals


def _pair(number: int) -> tuple[Prompt, Response, Response]:
    """A prompt of some 40 words, and two answers of some 120."""
    prompt = Prompt(f"p{number}", "benchmark", text=f"Question {number}. " + "What of it? " * 12)
    texts = ("One answer says this. " * 30, "Another answer says that. " * 30)
    one, other = (
        Response(f"{number}-{i}", prompt.id, text, (i,), "eos") for i, text in enumerate(texts)
    )
    return prompt, one, other


def _rss_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def serve(pipe: Connection, latency_s: float) -> None:
    """An HTTP server that answers everything alike, `latency_s` after the request has come."""
    usage = {"prompt_tokens": 400, "completion_tokens": 8, "total_tokens": 408}
    message = {"role": "assistant", "content": '{"verdict": "A"}'}
    body: dict[str, Any] = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "judge",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": usage,
    }
    text = json.dumps(body).encode()
    head = ("HTTP/1.1 200 OK", "Content-Type: application/json", f"Content-Length: {len(text)}")
    reply = "\r\n".join((*head, "", "")).encode() + text

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, ConnectionError):
                writer.close()
                return
            length = head.lower().split(b"content-length:")[1].split(b"\r\n")[0]
            await reader.readexactly(int(length))
            await asyncio.sleep(latency_s)
            writer.write(reply)

    async def run() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=1024)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


if __name__ == "__main__":
    main()

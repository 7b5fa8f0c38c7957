"""Stands in for `vllm serve`: the flags that `tinfer bench compare` passes, and nonsense streams.

`python fake_vllm.py serve MODEL ... --port PORT`. One request takes `--prefill-token-s` per prompt
token to its first token and `--step-s` for each one after, whatever else runs. Like vLLM's, its
engine is a process of its own (here a shell's sleep) that outlives a server which is killed.
`--start-fails` ends it with code 3; with `--die-after N` request N kills it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys

from aiohttp import web


class Fake:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.num_requests = 0

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def models(self, request: web.Request) -> web.Response:
        card = {
            "id": self.options.served_model_name,
            "object": "model",
            "owned_by": "vllm",
            "root": self.options.model,
            "max_model_len": self.options.max_model_len,
        }
        return web.json_response({"object": "list", "data": [card]})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        self.num_requests += 1
        if self.num_requests == self.options.die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        body = await request.json()
        response = web.StreamResponse()
        await response.prepare(request)
        await asyncio.sleep(self.options.prefill_token_s * len(body["prompt"]))
        num_tokens = body["max_tokens"]
        for number in range(num_tokens):
            last = number == num_tokens - 1
            choice = {"index": 0, "text": "x", "finish_reason": "length" if last else None}
            await response.write(_event({"choices": [choice]}))
            await asyncio.sleep(0 if last else self.options.step_s)
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": num_tokens}
        await response.write(_event({"choices": [], "usage": usage}))
        await response.write(b"data: [DONE]\n\n")
        return response


def _event(chunk: object) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("serve", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--max-model-len", type=int, default=None)
    parser.add_argument("--step-s", type=float, default=0.0)
    parser.add_argument("--prefill-token-s", type=float, default=0.0)
    parser.add_argument("--die-after", type=int, default=None)
    parser.add_argument("--start-fails", action="store_true")
    return parser.parse_known_args()[0]


def main() -> None:
    options = parsed()
    if options.start_fails:
        sys.stderr.write("the fake does not start\n")
        sys.exit(3)
    engine = subprocess.Popen(["sleep", "1000"])
    fake = Fake(options)
    app = web.Application(client_max_size=1 << 24)
    app.router.add_get("/health", fake.health)
    app.router.add_get("/v1/models", fake.models)
    app.router.add_post("/v1/completions", fake.complete)
    try:
        web.run_app(app, host="127.0.0.1", port=options.port, print=None)
    finally:
        engine.kill()
        engine.wait()


if __name__ == "__main__":
    main()

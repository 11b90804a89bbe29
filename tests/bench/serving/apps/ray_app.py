"""Ray Serve over HTTP with a raw body, without access log; one replica for each worker."""

from __future__ import annotations

import signal
import sys

import ray
from heads import WORKERS, Heads
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

QUIET = {"log_level": "ERROR", "enable_access_log": False}


class HeadsReplica:
    def __init__(self) -> None:
        self.heads = Heads()

    async def __call__(self, request: Request) -> Response:
        return Response(self.heads.answer(await request.body()), media_type="application/octet-stream")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    ray.init(num_cpus=WORKERS, include_dashboard=False, logging_level="error")
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])}, logging_config=QUIET)
    replicas = serve.deployment(num_replicas=WORKERS, ray_actor_options={"num_cpus": 0}, logging_config=QUIET)
    serve.run(replicas(HeadsReplica).bind(), logging_config=QUIET)
    signal.pause()

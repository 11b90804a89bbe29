"""LitServe with a raw body, which it reads faster than JSON with base64, and its ZeroMQ queue."""

import sys
from typing import Annotated

from fastapi import Body, Response
from heads import WORKERS, Heads
from litserve import LitAPI, LitServer


class HeadsAPI(LitAPI):
    def setup(self, device: str) -> None:
        self.heads = Heads()

    def decode_request(self, request: Annotated[bytes, Body(media_type="application/octet-stream")]) -> bytes:
        return request

    def predict(self, data: bytes) -> bytes:
        return self.heads.answer(data)

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type="application/octet-stream")


if __name__ == "__main__":
    server = LitServer(HeadsAPI(), accelerator="cpu", workers_per_device=WORKERS, fast_queue=True)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), log_level="error", generate_client_file=False)

"""mosec: its Rust front takes HTTP, its Python workers raw bytes."""

from __future__ import annotations

from heads import WORKERS, Heads
from mosec import Server, Worker


class HeadsWorker(Worker):
    def __init__(self) -> None:
        self.heads = Heads()

    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: bytes) -> bytes:
        return self.heads.answer(data)

    def serialize(self, data: bytes) -> bytes:
        return data


if __name__ == "__main__":
    server = Server()
    server.append_worker(HeadsWorker, num=WORKERS)
    server.run()

"""A client that asks now and then, judges each answer by its content, and keeps account of its attempts."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

from tests.integration.fire.clients import ROUTERS, Answers, content

from trivium.runtime import Client, ClientStatistics
from trivium.runtime.errors import TriviumError

PAUSE_SECONDS = 0.05
"""Between answer and question, on average."""


class Asker(threading.Thread):
    """Asks until `end` is set; `settings` are the Client's."""

    def __init__(self, seed: int, url: Any, answers: Answers, end: threading.Event, **settings: Any) -> None:
        super().__init__(daemon=True)
        self._rng = random.Random(seed)
        self._client = Client(url, "tiny", **settings)
        self._answers, self._end = answers, end
        self.answered = 0
        self.slowest = 0.0
        """Seconds."""
        self.wrong: list[str] = []
        self.lost: list[str] = []

    @property
    def statistics(self) -> ClientStatistics:
        return self._client.statistics

    def run(self) -> None:
        with self._client:
            while not self._end.wait(self._rng.expovariate(1 / PAUSE_SECONDS)):
                start = time.monotonic()
                self._ask()
                self.slowest = max(self.slowest, time.monotonic() - start)

    def _ask(self) -> None:
        chosen = self._rng.choices(range(len(self._answers.pictures)), k=self._rng.choice((1, 1, 2, 3)))
        encoded = self._rng.random() < 0.3
        pictures = [self._answers.encoded[i] if encoded else self._answers.pictures[i] for i in chosen]
        router = self._rng.choice(ROUTERS)
        try:
            found = self._client.predict(pictures, router=router)
        except TriviumError as error:
            self.lost.append(f"{type(error).__name__}: {error}")
            return
        self.answered += 1
        if [content(one) for one in found] != self._answers.right("tiny", "1", router, chosen, encoded):
            self.wrong.append(f"pictures {chosen}, router {router}, encoded {encoded}")

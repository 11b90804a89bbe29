"""BentoML with a raw body in and out."""

from typing import Annotated

import bentoml
from bentoml.validators import ContentType
from heads import WORKERS, Heads


@bentoml.service(workers=WORKERS, metrics={"enabled": False}, logging={"access": {"enabled": False}})
class HeadsService:
    def __init__(self) -> None:
        self.heads = Heads()

    @bentoml.api
    def predict(self, pixels: bytes, /) -> Annotated[bytes, ContentType("application/octet-stream")]:
        return self.heads.answer(pixels)

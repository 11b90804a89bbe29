"""tritonserver with its Python back end: the model.py of its repository."""

from __future__ import annotations

from typing import Any

import triton_python_backend_utils as pb_utils
from heads import OUTPUTS, Heads


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.heads = Heads()

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self.answer(pb_utils.get_input_tensor_by_name(request, "image").as_numpy()) for request in requests]

    def answer(self, image: Any) -> Any:
        values = self.heads.run(image)
        return pb_utils.InferenceResponse([pb_utils.Tensor(*pair) for pair in zip(OUTPUTS, values, strict=True)])

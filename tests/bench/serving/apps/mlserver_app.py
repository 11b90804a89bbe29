"""MLServer over V2 gRPC. The picture travels as BYTES: a UINT8 tensor would be turned into a list of integers."""

from __future__ import annotations

from heads import Heads
from mlserver import MLModel
from mlserver.types import Datatype, InferenceRequest, InferenceResponse, ResponseOutput, TensorData


class HeadsModel(MLModel):
    async def load(self) -> bool:
        self.heads = Heads()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        pixels = payload.inputs[0].data.root[0]
        output = ResponseOutput(
            name="outputs", datatype=Datatype.BYTES, shape=[1], data=TensorData([self.heads.answer(pixels)])
        )
        return InferenceResponse(model_name=self.name, outputs=[output])

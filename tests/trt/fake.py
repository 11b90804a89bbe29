"""A stand-in for the module tensorrt: its plans hold the ONNX graph, which ONNX Runtime computes on fake device memory.

Only what our code calls, as strict as TensorRT says of itself. test_interface.py holds names and parameters against the
real bindings.
"""

from __future__ import annotations

import base64
import ctypes
import enum
import json
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime

from .cuda import Machine


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class BuilderFlag(enum.IntEnum):
    TF32 = 7


class MemoryPoolType(enum.IntEnum):
    WORKSPACE = 0


class ExecutionContextAllocationStrategy(enum.IntEnum):
    USER_MANAGED = 2


class TensorIOMode(enum.IntEnum):
    NONE, INPUT, OUTPUT = range(3)


class DataType(enum.IntEnum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BF16, INT64 = range(9)


OF_ONNX = {
    onnx.TensorProto.FLOAT: DataType.FLOAT,
    onnx.TensorProto.UINT8: DataType.UINT8,
    onnx.TensorProto.INT64: DataType.INT64,
}


def nptype(trt_type: DataType) -> type:
    return {DataType.FLOAT: np.float32, DataType.UINT8: np.uint8, DataType.INT64: np.int64}[trt_type]


class Dims(tuple):  # type: ignore[type-arg]
    pass


class ILogger:
    class Severity(enum.IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class IHostMemory(bytearray):
    pass


class ITensor:
    def __init__(self, shape: Dims) -> None:
        self.shape = shape


def free_axes(value: onnx.ValueInfoProto) -> Dims:
    return Dims(d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim)


class INetworkDefinition:
    model: onnx.ModelProto

    def get_input(self, index: int) -> ITensor:
        return ITensor(free_axes(self.model.graph.input[index]))


class ParserError:
    def __init__(self, node: onnx.NodeProto) -> None:
        self._node = node

    def desc(self) -> str:
        return "this parser has no such importer"

    def node_name(self) -> str:
        return self._node.name

    def node_operator(self) -> str:
        return self._node.op_type


class OnnxParser:
    refused = ""
    """An operator to fail on."""

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network = network
        self._errors: list[ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def parse(self, model: bytes, path: str | None = None) -> bool:
        self._network.model = onnx.load_model_from_string(model)
        self._errors = [ParserError(n) for n in self._network.model.graph.node if n.op_type == self.refused]
        return not self._errors


class IOptimizationProfile:
    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def set_shape(self, input: str, min: Dims, opt: Dims, max: Dims) -> None:
        assert input == "image"
        assert min <= opt <= max
        self.shapes = [min, opt, max]


class ITimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> IHostMemory:
        return IHostMemory(self.content)


class IBuilderConfig:
    def __init__(self) -> None:
        self.flags = 1 << BuilderFlag.TF32
        self.pools: dict[MemoryPoolType, int] = {}
        self.profiles: list[IOptimizationProfile] = []
        self.cache: ITimingCache | None = None

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        self.pools[pool] = pool_size

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags &= ~(1 << flag)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        assert profile.shapes
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(bytes(serialized_timing_cache))

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if cache.content and not cache.content.startswith(b"measured"):
            return ignore_mismatch
        self.cache = cache
        return True


class Builder:
    fails = False
    configs: list[IBuilderConfig]
    flags: list[int]

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        self.flags.append(flags)
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        self.configs.append(IBuilderConfig())
        return self.configs[-1]

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
        if self.fails:
            self._logger.log(ILogger.Severity.ERROR, "no tactic found")
            return None
        if config.cache is not None:
            config.cache.content += b"measured "
        document = {
            "profiles": [profile.shapes for profile in config.profiles],
            "model": base64.b64encode(network.model.SerializeToString()).decode(),
        }
        return IHostMemory(json.dumps(document).encode())


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._scratch = (0, 0)
        self._profile: int | None = None
        self._shape: tuple[int, ...] = ()
        self._addresses: dict[str, int] = {}
        self._flushed = False
        self._changes = 0

    def set_device_memory(self, memory: int, size: int) -> None:
        self._changes += 1
        self._scratch = (memory, size)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._changes += 1
        self._profile = profile_index
        return profile_index < self._engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self._profile is not None
        self._changes += 1
        low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
        self._shape = tuple(shape)
        return all(a <= s <= b for a, s, b in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._changes += 1
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        machine = self._engine.machine
        need = self._engine.device_memory_size_v2
        if not self._engine.ready or self._scratch[1] < need or not machine.holds("device", *self._scratch):
            return False
        capturing = stream_handle in machine.captures
        if capturing and (not self._flushed or not self._engine.capturable):
            return False
        changes = self._changes

        def work() -> None:
            assert changes == self._changes, "a captured context was changed"
            self._flushed = True
            self._compute()

        machine.enqueue(stream_handle, work)
        self._flushed = True
        return True

    def _compute(self) -> None:
        size = int(np.prod(self._shape))
        machine = self._engine.machine
        assert machine.holds("device", self._addresses["image"], size)
        raw = ctypes.string_at(self._addresses["image"], size)
        images = np.frombuffer(raw, np.uint8).reshape(self._shape)
        names = [output.name for output in self._engine.session.get_outputs()]
        for name, value in zip(names, self._engine.session.run(names, {"image": images}), strict=True):
            assert machine.holds("device", self._addresses[name], value.nbytes)
            ctypes.memmove(self._addresses[name], np.ascontiguousarray(value).ctypes.data, value.nbytes)


class ICudaEngine:
    device_memory_size_v2 = 4096
    capturable = True
    ready = True

    def __init__(self, document: dict[str, Any], machine: Machine) -> None:
        self.machine = machine
        self._profiles = document["profiles"]
        content = base64.b64decode(document["model"])
        self._graph = onnx.load_model_from_string(content).graph
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self._values = {value.name: value for value in (*self._graph.input, *self._graph.output)}

    @property
    def num_io_tensors(self) -> int:
        return len(self._values)

    @property
    def num_optimization_profiles(self) -> int:
        return max(1, len(self._profiles))

    def get_tensor_name(self, index: int) -> str:
        return list(self._values)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name == self._graph.input[0].name else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return OF_ONNX[self._values[name].type.tensor_type.elem_type]

    def get_tensor_shape(self, name: str) -> Dims:
        return free_axes(self._values[name])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        if not self._profiles:
            return [self.get_tensor_shape(name)] * 3
        return [Dims(shape) for shape in self._profiles[profile_index]]

    def create_execution_context(
        self, strategy: ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy.USER_MANAGED
    ) -> IExecutionContext:
        assert strategy == ExecutionContextAllocationStrategy.USER_MANAGED
        return IExecutionContext(self)


class Runtime:
    machine: Machine

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        try:
            return self.engine(json.loads(serialized_engine), self.machine)
        except ValueError:
            self._logger.log(ILogger.Severity.ERROR, "not a plan")
            return None

    engine = ICudaEngine


def module(machine: Machine, version: str = "11.4.0.106") -> ModuleType:
    """It as the module tensorrt, on a machine of its own."""
    result = ModuleType("tensorrt")
    for name, value in globals().items():
        if isinstance(value, type) and value.__module__ == __name__:
            setattr(result, name, value)
    # what tests change is theirs alone
    for base, own in (
        (OnnxParser, {}),
        (Builder, {"configs": [], "flags": []}),
        (Runtime, {"machine": machine, "engine": type("ICudaEngine", (ICudaEngine,), {})}),
    ):
        setattr(result, base.__name__, type(base.__name__, (base,), dict(own)))
    result.nptype = nptype  # type: ignore[attr-defined]
    result.__version__ = version  # type: ignore[attr-defined]
    return result

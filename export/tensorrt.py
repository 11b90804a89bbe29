"""TensorRT plans: a bundle's graph made fit for TensorRT's parser, checked against its operators, and built.

A plan is built on the card that is to run it. Written against TensorRT 10.13 and 11.4 and type-checked against both;
no TensorRT library has ever run it.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, inliner, numpy_helper
from onnx.reference import ReferenceEvaluator

from trivium.runtime import device
from trivium.runtime.bundle import Bundle, Plan, open_bundle
from trivium.runtime.errors import ConfigError, EngineError
from trivium.runtime.tensorrt import library_version, logger, sizes_of

from .graph import DOMAIN, IMAGE, OP_TYPE
from .half import half_precision
from .operators import check_operators, constants_of

if TYPE_CHECKING:
    import tensorrt as trt

Precision = Literal["fp32", "fp16", "int8"]
PLAN = "model.plan"
WORKSPACE_BYTES = 4 << 30
MAX_BATCH = 64
SMALL = 64
"""Elements of an integer constant that is a shape or a list of axes."""
MASKS = 4
"""Which input of MCHeads holds the dropout masks."""


def prepare(model: onnx.ModelProto, precision: Precision = "fp32") -> onnx.ModelProto:
    """A bundle's graph as TensorRT's parser takes it, computing the same.

    It has no functions, no uint8 but the input, and axes that are constants where the parser wants constants.

    Args:
        model: of a bundle.
        precision: of the backbone, written into the graph, for TensorRT is strongly typed. "int8" is for a graph that
            was quantised already.

    Raises: UnsupportedOperator with operator and node; ConfigError for "int8" where the graph is not quantised.
    """
    if precision == "int8" and not any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        raise ConfigError("int8 for TensorRT needs a bundle whose graph is quantised: export it with --precision int8")
    if precision == "fp16":
        model = half_precision(model)
    flat = inliner.inline_local_functions(_with_float_masks(model))
    del flat.opset_import[:]
    flat.opset_import.extend(o for o in model.opset_import if o.domain != DOMAIN)
    _cast_first(flat.graph)
    _fold_integers(flat)
    check_operators(flat)
    onnx.checker.check_model(flat, full_check=True)
    return flat


def build_engine(
    bundle: Bundle | Path,
    target: Path,
    *,
    precision: Precision = "fp32",
    max_batch: int = MAX_BATCH,
    workspace_bytes: int = WORKSPACE_BYTES,
    timing_cache: Path | None = None,
) -> Plan:
    """Build a plan for this machine's card and write it to target.

    Args:
        bundle: whose graph is compiled.
        target: the plan's file; the record that comes back is for a manifest in the same directory.
        precision: as of prepare.
        max_batch: most pictures in a batch; a graph for one picture at a time allows only 1.
        workspace_bytes: most memory of the card that a layer may use while it runs.
        timing_cache: file that keeps what was measured, so that the next build for such a card is quick.

    Raises: UnsupportedOperator, before TensorRT is looked for; EngineMismatch without TensorRT or a card; ConfigError
        for a batch that cannot be; EngineError where TensorRT fails.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    graph = prepare(onnx.load(opened.model_path), precision)
    if not 1 <= max_batch <= 4096:
        raise ConfigError(f"max_batch must lie between 1 and 4096, not {max_batch}")
    batch = graph.graph.input[0].type.tensor_type.shape.dim[0]
    if batch.HasField("dim_value") and max_batch != batch.dim_value:
        raise ConfigError(f"this graph takes batches of {batch.dim_value} alone, so max_batch cannot be {max_batch}")
    version, card = library_version(), device.card()
    target.write_bytes(_build(graph, precision, max_batch, workspace_bytes, timing_cache))
    return Plan(
        path=target.name,
        tensorrt=version,
        card=card.name,
        compute_capability=card.compute_capability,
        driver=card.driver,
        precision=precision,
        max_batch=max_batch,
    )


def profiles(max_batch: int) -> list[tuple[int, int, int]]:
    """Smallest, typical and largest batch of each optimisation profile: one picture, and full batches."""
    return [(1, 1, 1)] if max_batch == 1 else [(1, 1, 1), (2, max_batch, max_batch)]


def _build(
    graph: onnx.ModelProto, precision: Precision, max_batch: int, workspace_bytes: int, timing_cache: Path | None
) -> bytes:
    import tensorrt as trt

    builder = trt.Builder(logger())
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(graph, network)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    if precision == "fp32":
        # otherwise products are of numbers rounded to 10 bits
        config.clear_flag(trt.BuilderFlag.TF32)
    shape = sizes_of(network.get_input(0).shape)
    if shape[0] == -1:
        for sizes in profiles(max_batch):
            profile = builder.create_optimization_profile()
            profile.set_shape(IMAGE, *(trt.Dims([size, *shape[1:]]) for size in sizes))
            config.add_optimization_profile(profile)
    cache = _timing_cache(config, timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError("TensorRT could not build the plan; the log says why")
    if cache is not None and timing_cache is not None:
        _replace(timing_cache, bytes(memoryview(cache.serialize())))
    return bytes(memoryview(plan))


def _parse(graph: onnx.ModelProto, network: trt.INetworkDefinition) -> None:
    import tensorrt as trt

    parser = trt.OnnxParser(network, logger())
    if parser.parse(graph.SerializeToString()):
        return
    if parser.num_errors == 0:
        raise EngineError("TensorRT could not parse the graph")
    error = parser.get_error(0)
    raise EngineError(
        f"TensorRT could not parse operator {error.node_operator()} of node {error.node_name()!r}: {error.desc()}"
    )


def _timing_cache(config: trt.IBuilderConfig, path: Path | None) -> trt.ITimingCache | None:
    """The file's measurements, or none where it does not exist yet or is of another card or TensorRT."""
    if path is None:
        return None
    try:
        known = path.read_bytes()
    except FileNotFoundError:
        known = b""
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    for content in (known, b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
    return None


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _with_float_masks(model: onnx.ModelProto) -> onnx.ModelProto:
    """The masks as float32, which MCHeads would make of them."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    names = {node.input[MASKS] for node in result.graph.node if (node.domain, node.op_type) == (DOMAIN, OP_TYPE)}
    for initializer in result.graph.initializer:
        if initializer.name in names:
            masks = numpy_helper.to_array(initializer).astype("float32")
            initializer.CopyFrom(numpy_helper.from_array(masks, initializer.name))
    return result


def _cast_first(graph: onnx.GraphProto) -> None:
    """Make floats of the pictures before anything else; what moves pixels about then moves floats."""
    pixels = f"{IMAGE}_float32"
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name == IMAGE:
                node.input[position] = pixels
    graph.node.insert(0, helper.make_node("Cast", [IMAGE], [pixels], name="cast_pixels", to=TensorProto.FLOAT))


def _fold_integers(model: onnx.ModelProto) -> None:
    """Compute the small integer constants that nodes make of constants, say the axes of a reduction."""
    graph = model.graph
    known = {
        name: value
        for name, value in constants_of(graph).items()
        if value.dtype == np.int64 and value.size <= SMALL  # shapes and axes, not weights
    }
    kept = []
    for node in graph.node:
        computed = node.op_type != "Constant" and node.input and all(name in known for name in node.input)
        if not computed or len(node.output) != 1:
            kept.append(node)
            continue
        inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, known[name].shape) for name in node.input]
        output = helper.make_empty_tensor_value_info(node.output[0])
        alone = helper.make_model(
            helper.make_graph([node], "constant", inputs, [output]), opset_imports=model.opset_import
        )
        answers = ReferenceEvaluator(alone).run(None, {name: known[name] for name in node.input})
        value = cast("list[NDArray[Any]]", answers)[0]
        graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
        if value.dtype == np.int64 and value.size <= SMALL:
            known[node.output[0]] = value
    del graph.node[:]
    graph.node.extend(kept)

"""The engine: a bundle's graph in ONNX Runtime, from uint8 pictures to the statistics of its heads."""

from __future__ import annotations

import zipfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from trivium.kernels import HeadStatistics, custom_ops_library, pays
from trivium.kernels.onnx_op import THREADS_ENTRY

from .bundle import Bundle
from .errors import EngineError, InvalidRequest, MissingExtra

if TYPE_CHECKING:
    import onnxruntime

INPUT = "image"
OUTPUTS = list(HeadStatistics._fields)
SELF_TEST_TOLERANCE = {
    "probabilities": 1e-4,
    "predictive_entropy": 1e-3,
    "mutual_information": 1e-3,
    "divergence": 1e-3,
    "energy": 1e-3,
}
"""Largest |difference| / max(1, |expected|) from the golden answers that a self-test takes for the same model. Kernels,
instruction sets and graph optimisations differ by 1e-6 at most; 1 % of noise in one weight tensor is more than this."""
COARSE = 20
"""How much more it takes where the same arithmetic differs by more: TF32 and half precision on a card, and 8-bit
integers, whose products saturate on some processors."""
TENSORRT_PROVIDER = "TensorrtExecutionProvider"
GOLDEN_LIMIT = 256 << 20
"""Bytes that the golden answers may take when unpacked."""


class Backend(ABC):
    """What answers pictures with a bundle's model. Any number of threads may call its methods at once."""

    bundle: Bundle
    device: Literal["cpu", "cuda"]
    kernels: Literal["fused", "function", "tensorrt"]
    """What computes the heads: the fused kernel, the graph's own function, or a TensorRT plan."""
    kernels_reason: str
    """Why that one, in a few words."""

    @abstractmethod
    def run(self, images: NDArray[np.uint8]) -> HeadStatistics:
        """Statistics, float32, of pictures uint8 [N, H, W, 3], N >= 1.

        Raises: InvalidRequest where the pictures do not fit the model; EngineError where it fails.
        """

    @abstractmethod
    def run_batch(self, images: NDArray[np.uint8], batch: int = 64) -> HeadStatistics:
        """As `run`, in real batches: for evaluation, where the last bits may depend on the batch."""

    def self_test(self) -> None:
        """Repeat the bundle's golden pictures, or where it has none see that the graph gives finite numbers.

        Raises: EngineError where an output differs by more than SELF_TEST_TOLERANCE, COARSE times as much where the
            model does not compute in float32.
        """
        path = self.bundle.golden_path
        if path is None:
            preprocessing = self.bundle.manifest.preprocessing
            found = self.run(np.zeros((1, preprocessing.height, preprocessing.width, 3), np.uint8))
            if not all(np.isfinite(values).all() for values in found):
                raise EngineError("self-test: the model's answer to a black picture is not finite")
            return
        golden = _read_golden(path)
        try:
            found = self.run(golden[INPUT])
        except InvalidRequest as error:
            raise EngineError(f"self-test: {path.name}: {error}") from None
        for name, values in found._asdict().items():
            expected = golden[name]
            if expected.shape != values.shape or not np.isfinite(expected).all():
                raise EngineError(f"self-test: {path.name}: {name} is not finite {list(values.shape)}")
            difference = float(np.max(np.abs(values - expected) / np.maximum(1, np.abs(expected))))
            tolerance = SELF_TEST_TOLERANCE[name]
            # written so that a NaN fails
            if not difference <= tolerance and self._coarse():
                tolerance *= COARSE
            if not difference <= tolerance:
                raise EngineError(
                    f"self-test: {name} differs by {difference:.2g} from the answer recorded at export, "
                    f"more than {tolerance:g} ({self.kernels} kernels)"
                )

    def _coarse(self) -> bool:
        # names of operators stand in the file as they are
        return self.device == "cuda" or b"QuantizeLinear" in self.bundle.model_path.read_bytes()

    def _check(self, images: NDArray[np.uint8]) -> None:
        preprocessing = self.bundle.manifest.preprocessing
        shape = (preprocessing.height, preprocessing.width, 3)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != shape or len(images) == 0:
            raise InvalidRequest(
                f"pictures must be uint8 [N, {shape[0]}, {shape[1]}, 3] with N >= 1, "
                f"got {images.dtype} {list(images.shape)}"
            )


class Engine(Backend):
    """One ONNX Runtime session over a bundle's graph.

    Args:
        bundle: opened and verified.
        kernels: "on" insists on the fused MCHeads kernel, "off" runs the graph's own function of standard ops, and
            "auto" takes the kernel where it can be registered and kernels.pays() says that it is faster.
        device: "cuda" needs onnxruntime-gpu and a card.
        provider: with "tensorrt" and a card, ONNX Runtime gives TensorRT what TensorRT takes of the graph, and compiles
            it when the first picture comes.
        cache: directory where that provider keeps what it compiled, for the next start.
        threads: of ONNX Runtime within one picture. Throughput is best with 1 and as many callers as cores.

    Raises: MissingExtra without onnxruntime; EngineError where the graph does not load, does not have the inputs and
        outputs of the manifest, or the kernel or device asked for is not to be had.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        kernels: Literal["auto", "on", "off"] = "auto",
        device: Literal["cpu", "cuda"] = "cpu",
        threads: int = 1,
        provider: Literal["plain", "tensorrt"] = "plain",
        cache: Path | None = None,
    ) -> None:
        self.bundle = bundle
        self.device = device
        ort = _onnxruntime(device)
        self.kernels, self.kernels_reason, options = _options(ort, kernels, device, threads)
        providers = _providers(ort, device, provider, cache)
        try:
            self._session = ort.InferenceSession(str(bundle.model_path), options, providers=providers)
        except Exception as error:  # onnxruntime's exceptions share no base class below Exception
            raise EngineError(f"{bundle.manifest.model}: ONNX Runtime cannot load it: {_first_line(error)}") from None
        if device == "cuda":
            _check_started(self._session.get_providers(), provider)
        self._batched = _check_signature(self._session, bundle)
        self._shrink = ort.RunOptions()
        self._shrink.add_run_config_entry(
            "memory.enable_memory_arena_shrinkage", "cpu:0" if device == "cpu" else "cpu:0;gpu:0"
        )

    def run(self, images: NDArray[np.uint8]) -> HeadStatistics:
        """Statistics, float32, of pictures uint8 [N, H, W, 3], N >= 1.

        On a CPU the pictures run one by one: a larger batch is slower there, and so an answer cannot depend on what
        shares its batch, bit for bit.

        Raises: InvalidRequest where the pictures do not fit the model; EngineError where the graph fails.
        """
        self._check(images)
        if self.device == "cuda" and self._batched:
            return self._run(images)
        if len(images) == 1:
            return self._run(images)
        rows = [self._run(images[i : i + 1]) for i in range(len(images))]
        return HeadStatistics(*(np.concatenate(column) for column in zip(*rows, strict=True)))

    def run_batch(self, images: NDArray[np.uint8], batch: int = 64) -> HeadStatistics:
        """As `run`, in real batches: for evaluation, where the last bits may depend on the batch.

        Gives the memory of the large batch back after each.
        """
        self._check(images)
        if not self._batched:
            return self.run(images)
        rows = [self._run(images[i : i + batch], self._shrink) for i in range(0, len(images), batch)]
        return HeadStatistics(*(np.concatenate(column) for column in zip(*rows, strict=True)))

    def _run(self, images: NDArray[np.uint8], options: Any = None) -> HeadStatistics:
        try:
            return HeadStatistics(*self._session.run(OUTPUTS, {INPUT: images}, options))
        except Exception as error:  # as above
            raise EngineError(f"{self.bundle.manifest.model}: ONNX Runtime failed: {_first_line(error)}") from None


def _onnxruntime(device: str) -> Any:
    try:
        import onnxruntime as ort
    except ModuleNotFoundError:
        extra = "cpu" if device == "cpu" else "gpu"
        raise MissingExtra(f"the package 'onnxruntime' is not installed; run: pip install 'trivium[{extra}]'") from None
    if device == "cuda" and "CUDAExecutionProvider" not in ort.get_available_providers():
        raise EngineError(
            "this ONNX Runtime has no CUDA provider; run: pip uninstall onnxruntime && pip install 'trivium[gpu]'"
        )
    return ort


def _providers(ort: Any, device: str, provider: str, cache: Path | None) -> list[str | tuple[str, dict[str, Any]]]:
    """Execution providers in the order of preference."""
    if device == "cpu":
        return ["CPUExecutionProvider"]
    plain: list[str | tuple[str, dict[str, Any]]] = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    if provider == "plain":
        return plain
    if TENSORRT_PROVIDER not in ort.get_available_providers():
        raise EngineError("this ONNX Runtime has no TensorRT provider")
    settings: dict[str, Any] = {}
    if cache is not None:
        settings |= {"trt_engine_cache_enable": True, "trt_engine_cache_path": str(cache)}
        settings |= {"trt_timing_cache_enable": True, "trt_timing_cache_path": str(cache)}
    return [(TENSORRT_PROVIDER, settings), *plain]


def _check_started(started: list[str], provider: str) -> None:
    """ONNX Runtime leaves out a provider that does not start; here that is an error."""
    if "CUDAExecutionProvider" not in started:
        raise EngineError("ONNX Runtime could not start its CUDA provider: no usable card, driver or cuDNN")
    if provider == "tensorrt" and TENSORRT_PROVIDER not in started:
        raise EngineError(
            "ONNX Runtime could not start its TensorRT provider: no TensorRT library that it was built for"
        )


def _options(
    ort: Any, kernels: Literal["auto", "on", "off"], device: str, threads: int
) -> tuple[Literal["fused", "function"], str, onnxruntime.SessionOptions]:
    def fresh() -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        # A spinning worker steals the core of the next session.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        return options

    if kernels == "off":
        return "function", "switched off", fresh()
    try:
        library = custom_ops_library()
        if kernels == "auto" and device == "cpu" and not pays():
            return "function", "the fused kernel does not pay with scalar instructions", fresh()
        options = fresh()
        options.add_session_config_entry(THREADS_ENTRY, str(threads))
        options.register_custom_ops_library(str(library))
    except Exception as error:  # onnxruntime's exceptions share no base class below Exception
        reason = f"the kernel cannot be registered: {_first_line(error)}"
        if kernels == "on":
            raise EngineError(reason) from None
        return "function", reason, fresh()
    return "fused", f"registered from {library.name}", options


def _check_signature(session: Any, bundle: Bundle) -> bool:
    """See that the graph is the manifest's; True where its batch axis is free."""
    manifest = bundle.manifest
    inputs = session.get_inputs()
    height, width = manifest.preprocessing.height, manifest.preprocessing.width
    if [i.name for i in inputs] != [INPUT] or inputs[0].type != "tensor(uint8)" or len(inputs[0].shape) != 4:
        raise EngineError(f"{manifest.model}: its one input must be {INPUT!r}, uint8 [N, {height}, {width}, 3]")
    batch = inputs[0].shape[0]
    if inputs[0].shape[1:] != [height, width, 3] or (isinstance(batch, int) and batch != 1):
        raise EngineError(f"{manifest.model}: its input is {inputs[0].shape}, not [N, {height}, {width}, 3]")
    k, c = len(manifest.heads), len(manifest.classes)
    expected = {"probabilities": [k, c], "divergence": [k, k]}
    found = {output.name: output for output in session.get_outputs()}
    for name in OUTPUTS:
        if name not in found:
            raise EngineError(f"{manifest.model}: it has no output {name!r}")
        axes = found[name].shape[1:]
        wanted = expected.get(name, [k])
        if found[name].type != "tensor(float)" or len(axes) != len(wanted):
            raise EngineError(f"{manifest.model}: its output {name} must be float32 {['N', *wanted]}")
        if any(isinstance(a, int) and a != w for a, w in zip(axes, wanted, strict=True)):
            raise EngineError(
                f"{manifest.model}: its output {name} is {found[name].shape}, the manifest says {['N', *wanted]}"
            )
    return bool(batch != 1)


def _read_golden(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > GOLDEN_LIMIT:
            raise ValueError(f"{size} bytes unpacked, more than {GOLDEN_LIMIT}")
        with np.load(path, allow_pickle=False) as arrays:
            golden = {name: arrays[name] for name in [INPUT, *OUTPUTS]}
        for name, values in golden.items():
            # np.load gives the bytes of a member that is no array
            if not isinstance(values, np.ndarray) or values.dtype.kind not in "fu":
                raise ValueError(f"{name} is no array of numbers")
        return golden
    except Exception as error:  # hostile bytes: zipfile, zlib and NumPy fail in more ways than they document
        raise EngineError(f"self-test: {path.name} cannot be read: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__)[:300]

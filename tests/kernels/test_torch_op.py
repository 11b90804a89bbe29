"""torch.ops.trivium.mc_heads: the definition's answers, and one node for torch.compile and torch.export."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from trivium.kernels import HeadStatistics, kernel_counts, mc_heads_ref

from .cases import Inputs, assert_close, make_inputs

torch = pytest.importorskip("torch", reason="pip install 'trivium[train]'")


@pytest.fixture(scope="module")
def op() -> Any:
    from trivium.kernels import torch_op

    return torch_op.mc_heads


def tensors(inputs: Inputs) -> list[Any]:
    return [torch.from_numpy(a) for a in inputs.arguments()[:5]] + [inputs.keep]


def statistics(out: Any) -> HeadStatistics:
    return HeadStatistics(*(t.numpy() for t in out))


@pytest.mark.parametrize("own_features", [False, True])
def test_cpu_runs_the_fused_kernel(op: Any, own_features: bool) -> None:
    inputs = make_inputs(5, 3, 40, 30, 32, own_features=own_features)
    inputs.features[2, ..., 3] = np.inf
    before = kernel_counts().runs
    assert_close(statistics(op(*tensors(inputs))), mc_heads_ref(*inputs.arguments()))
    assert kernel_counts().runs == before + 1


@pytest.mark.parametrize("own_features", [False, True])
def test_other_devices_run_the_same_equations(op: Any, own_features: bool) -> None:
    inputs = make_inputs(5, 3, 40, 30, 7, own_features=own_features)
    inputs.features[2, ..., 3] = np.nan
    # The implementation for every device but the CPU, called on CPU tensors.
    assert_close(statistics(op._init_fn(*tensors(inputs))), mc_heads_ref(*inputs.arguments()))


def test_heads_are_packed_again_only_when_written_to(op: Any) -> None:
    inputs = make_inputs(2, 2, 10, 16, 8)
    arguments = tensors(inputs)
    first = statistics(op(*arguments))
    arguments[1] *= 2
    second = statistics(op(*arguments))
    assert np.abs(first.probabilities - second.probabilities).max() > 1e-3
    assert_close(second, mc_heads_ref(*inputs.arguments()))
    with torch.inference_mode():
        assert_close(
            statistics(op(*(t * 1 if torch.is_tensor(t) else t for t in arguments))), mc_heads_ref(*inputs.arguments())
        )


def test_half_precision_features(op: Any) -> None:
    inputs = make_inputs(2, 2, 10, 16, 8)
    arguments = tensors(inputs)
    half = arguments[0].half()
    rounded = Inputs(half.float().numpy(), *inputs.arguments()[1:])
    assert_close(statistics(op(half, *arguments[1:])), mc_heads_ref(*rounded.arguments()))


def test_torch_says_the_op_is_sound(op: Any) -> None:
    arguments = tensors(make_inputs(2, 2, 10, 16, 8))
    torch.library.opcheck(op, tuple(arguments), test_utils=("test_schema", "test_faketensor"))


def test_shapes_that_do_not_fit_are_refused(op: Any) -> None:
    arguments = tensors(make_inputs(2, 2, 10, 16, 8))
    with pytest.raises(ValueError, match="features must be"):
        op(arguments[0][:, :3], *arguments[1:])


def test_compile_and_export_see_one_node(op: Any) -> None:
    inputs = make_inputs(3, 2, 10, 16, 8)

    class Heads(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            for name, value in zip(("w", "b", "tau", "m"), tensors(inputs)[1:5], strict=True):
                self.register_buffer(name, value)

        def forward(self, features: Any) -> Any:
            return torch.ops.trivium.mc_heads(features.relu(), self.w, self.b, self.tau, self.m, inputs.keep)

    heads = Heads()
    features = torch.from_numpy(inputs.features)
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(heads, fullgraph=True, backend=backend)
    for a, e in zip(compiled(features), heads(features), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)
    program = torch.export.export(heads, (features,), dynamic_shapes=({0: torch.export.Dim("N")},))
    for graph in (graphs[0].graph, program.graph):
        targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
        assert len([t for t in targets if "mc_heads" in t]) == 1
        assert len(targets) <= 7, "relu, MCHeads and the picking of its five outputs"
    for a, e in zip(program.module()(features[:1]), heads(features[:1]), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)

"""The parts of the kernel benchmark that need no backbone: its task, its check of what is timed, its ratios."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnx", reason="graphs are made with onnx: pip install 'trivium[export]'")
pytest.importorskip("onnxruntime", reason="pip install 'trivium[cpu]'")

from tests.bench import kernels, models


def test_the_task_is_a_trained_classifiers() -> None:
    task = models.task(64, 40, 3)
    assert task.features.shape == (3, 64)
    assert not (task.weights.view(np.uint32) & 0xFFFF).any(), "weights are bfloat16 numbers"
    assert 0.75 < models.softmax_top((models.task(64, 40, 32).features @ task.weights[0].T).astype(np.float64)) < 0.95


def test_every_form_of_the_heads_is_right_before_it_is_timed() -> None:
    task = models.task(64, 40, 2)
    sessions = kernels.head_sessions(task, [8], kernels.VARIANTS)
    outputs = {name: sessions[name, 8].run(None, {"features": task.features}) for name in kernels.VARIANTS}
    kernels.check(task, 8, outputs)
    outputs["fused float32"][0] = outputs["fused float32"][0] + np.float32(1e-4)
    with pytest.raises(RuntimeError, match="fused float32, T 8: a probability is off by"):
        kernels.check(task, 8, outputs)


def test_ratios() -> None:
    medians = {(kernels.PLAIN, 1): 1.0, (kernels.BODY, 32): 4.0, ("fused float32", 32): 2.0}
    rows = {row.variant: row for row in kernels.rows("ResNet-50", 1000, 1, 10.0, medians)}
    fused = rows["fused float32"]
    assert fused.ratio_to_backbone == pytest.approx(1.2)
    assert fused.ratio_to_plain_heads == pytest.approx(12 / 11)
    assert fused.speedup_over_body == pytest.approx(2.0)
    assert "fused float32    1.091, 2.0 times faster" in kernels.summary(rows.values())

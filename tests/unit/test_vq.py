"""The vector-quantised autoencoder: its codebook, its gradients, published files."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor

from trivium.runtime.errors import ConfigError
from trivium.train.models.autoencoder import VqShape
from trivium.train.models.vq import TAMING_F8, VQGAN, Quantiser, VqTraining, load_vq

SMALL = VqShape(channels=8, multipliers=(1, 2), blocks=1, attention=(1,), codes=16, dimension=4)


def taming_names(shape: VqShape) -> dict[str, tuple[int, ...]]:
    """Names and sizes of taming-transformers' VQModel, written down from its published configuration."""
    found: dict[str, tuple[int, ...]] = {}

    def conv(name: str, inputs: int, outputs: int, kernel: int = 3) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (outputs, inputs, kernel, kernel), (outputs,)

    def norm(name: str, width: int) -> None:
        found[f"{name}.weight"] = found[f"{name}.bias"] = (width,)

    def resnet(name: str, inputs: int, outputs: int) -> None:
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", inputs, outputs)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    def middle(name: str, width: int) -> None:
        resnet(f"{name}.block_1", width, width)
        attention(f"{name}.attn_1", width)
        resnet(f"{name}.block_2", width, width)

    widths = [shape.channels * times for times in shape.multipliers]
    conv("encoder.conv_in", 3, shape.channels)
    width = shape.channels
    for level, out in enumerate(widths):
        for block in range(shape.blocks):
            resnet(f"encoder.down.{level}.block.{block}", width, out)
            width = out
            if level in shape.attention:
                attention(f"encoder.down.{level}.attn.{block}", out)
        if level < len(widths) - 1:
            conv(f"encoder.down.{level}.downsample.conv", out, out)
    middle("encoder.mid", width)
    norm("encoder.norm_out", width)
    conv("encoder.conv_out", width, shape.dimension)
    conv("decoder.conv_in", shape.dimension, width)
    middle("decoder.mid", width)
    for level in reversed(range(len(widths))):
        for block in range(shape.blocks + 1):
            resnet(f"decoder.up.{level}.block.{block}", width, widths[level])
            width = widths[level]
            if level in shape.attention:
                attention(f"decoder.up.{level}.attn.{block}", width)
        if level:
            conv(f"decoder.up.{level}.upsample.conv", width, width)
    norm("decoder.norm_out", width)
    conv("decoder.conv_out", width, 3)
    found["quantize.embedding.weight"] = (shape.codes, shape.dimension)
    conv("quant_conv", shape.dimension, shape.dimension, 1)
    conv("post_quant_conv", shape.dimension, shape.dimension, 1)
    return found


def random_file(path: Path, shape: VqShape) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: 1 + 0.1 * torch.randn(size, generator=generator)
        if name.rpartition(".")[0].split(".")[-1].startswith("norm") and name.endswith("weight")
        else torch.randn(size, generator=generator) / math.sqrt(max(math.prod(size[1:]), 1))
        for name, size in taming_names(shape).items()
    }
    torch.save({"state_dict": tensors | {"loss.discriminator.main.0.weight": torch.zeros(1)}}, path)
    return tensors


def test_the_published_f8_network_has_these_names_and_sizes() -> None:
    with torch.device("meta"):
        model = VQGAN(TAMING_F8)
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    del own["quantize.count"], own["quantize.total"]
    assert own == taming_names(TAMING_F8)
    assert TAMING_F8.side == 8
    assert own["encoder.down.3.attn.1.proj_out.weight"] == (512, 512, 1, 1)


def test_a_published_file_loads_whatever_its_size(tmp_path: Path) -> None:
    shape = VqShape(channels=8, multipliers=(1, 2, 2, 4), blocks=2, attention=(3,), codes=64, dimension=4)
    tensors = random_file(tmp_path / "vq.ckpt", shape)
    model = load_vq(tmp_path / "vq.ckpt")
    assert model.shape == shape
    assert not model.training
    assert all(torch.equal(model.state_dict()[name], value) for name, value in tensors.items())
    x = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    codes = model.codes(x)
    again = model.reconstruct(x)
    assert codes.shape == (2, 2, 3)
    assert again.shape == x.shape
    assert again.min() == 0  # random weights leave [0, 1], which the clamp mends
    assert again.max() == 1
    save_file(tensors, tmp_path / "vq.safetensors")
    assert torch.equal(load_vq(tmp_path / "vq.safetensors").reconstruct(x), again)
    # The network sees [-1, 1]: black is -1.
    assert torch.equal(model.encode(torch.zeros_like(x)), model.quant_conv(model.encoder(-torch.ones_like(x))))


def test_files_that_are_no_such_autoencoder_are_one_line(tmp_path: Path) -> None:
    tensors = random_file(tmp_path / "whole.pt", SMALL)
    assert load_vq(tmp_path / "whole.pt").shape == SMALL
    for name, changed, message in (
        ("cut", {k: v for k, v in tensors.items() if k != "quant_conv.bias"}, r"1 tensors missing.*quant_conv\.bias"),
        ("more", tensors | {"encoder.more": torch.zeros(1)}, r"1 unknown.*encoder\.more"),
        ("other", tensors | {"quant_conv.bias": torch.zeros(9)}, r"1 of another shape.*quant_conv\.bias"),
        ("gumbel", tensors | {"quantize.embed.weight": torch.zeros(1)}, "Gumbel"),
        ("resnet", {"conv1.weight": torch.zeros(1)}, "no vector-quantised autoencoder"),
    ):
        save_file(changed, tmp_path / f"{name}.safetensors")
        with pytest.raises(ConfigError, match=message) as caught:
            load_vq(tmp_path / f"{name}.safetensors")
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="no such weights file"):
        load_vq(tmp_path / "absent.pt")
    with pytest.raises(ConfigError, match=r"multiples of 2, not 7 x 8"):
        VQGAN(SMALL).fits(7, 8)


def test_codes_are_the_nearest_and_the_average_of_what_chose_them() -> None:
    torch.manual_seed(0)
    quantiser = Quantiser(codes=6, dimension=3, decay=0.9, dead=0.0)
    z = torch.randn(2, 4, 3, 5, 3).permute(0, 1, 4, 2, 3)  # two steps of [4, 3, 3, 5]
    quantiser.begin(z[0])
    count = quantiser.count.double().numpy().copy()
    total = quantiser.total.double().numpy().copy()
    quantiser.train()
    for step in z:
        _, codes, distance = quantiser(step)
        rows = step.permute(0, 2, 3, 1).reshape(-1, 3).double().numpy()
        book = total / count[:, None]
        squares = ((rows[:, None] - book) ** 2).sum(-1)
        assert np.array_equal(codes.flatten().numpy(), squares.argmin(1))
        assert distance.item() == pytest.approx(squares.min(1).mean() / 3, rel=1e-5)
        chosen = np.eye(6)[squares.argmin(1)]
        count = 0.9 * count + 0.1 * chosen.sum(0)
        total = 0.9 * total + 0.1 * chosen.T @ rows
    quantiser.eval()
    np.testing.assert_allclose(quantiser.embedding.weight.numpy(), total / count[:, None], rtol=1e-5)


def test_the_codebook_begins_with_data_and_dead_codes_begin_anew() -> None:
    torch.manual_seed(0)
    quantiser = Quantiser(codes=8, dimension=2, decay=0.5)
    far = torch.randn(4, 2, 4, 4) + 100
    quantiser.begin(far)
    rows = {tuple(row) for row in far.permute(0, 2, 3, 1).reshape(-1, 2).tolist()}
    assert all(tuple(code) in rows for code in quantiser.embedding.weight.tolist())
    near = torch.randn(4, 2, 4, 4)
    quantiser.train()
    for _ in range(12):
        quantiser(near)
    quantiser.eval()
    assert len(quantiser(near)[1].unique()) == 8
    assert quantiser.embedding.weight.abs().max() < 10


def test_gradients_pass_the_codebook_unchanged() -> None:
    quantiser = Quantiser(codes=4, dimension=3)
    z = torch.randn(2, 3, 2, 2, requires_grad=True)
    quantised, codes, _ = quantiser(z)
    torch.testing.assert_close(quantised, quantiser.embedding(codes).permute(0, 3, 1, 2))
    weight = torch.randn_like(quantised)
    (quantised * weight).sum().backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad, weight)


def test_it_learns_digits_without_collapsing() -> None:
    torch.manual_seed(0)
    pictures = torch.from_numpy(load_digits().images[:512] / 16).float()[:, None].expand(-1, 3, -1, -1)
    shape = VqShape(colours=1, patch=2, channels=8, multipliers=(1,), codes=32, dimension=4)
    training = VqTraining(VQGAN(shape), adversarial=0.0)
    training.vq.quantize.begin(training.vq.encode(pictures[:128]))
    optimizer = torch.optim.AdamW(training.parameters(), lr=1e-2)
    training.train()
    for _ in range(80):
        x = pictures[torch.randint(len(pictures), (32,))]
        loss, _ = training(x, 0.25)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    training.eval()
    held_out = torch.from_numpy(load_digits().images[512:1024] / 16).float()[:, None].expand(-1, 3, -1, -1)
    again = training.vq.reconstruct(held_out)
    error = (again - held_out).square().mean()
    assert error < (held_out - pictures.mean(0)).square().mean() / 2
    assert len(training.vq.codes(held_out).unique()) > 16
    assert torch.equal(again[:, 0], again[:, 2])  # grey stays grey


def test_the_discriminator_and_the_decoder_have_a_loss_each() -> None:
    torch.manual_seed(0)
    training = VqTraining(VQGAN(SMALL), adversarial=0.5)
    plain = VqTraining(training.vq, adversarial=0.0)
    x = torch.rand(2, 3, 16, 16)
    training.eval()
    critic = training.discriminator
    assert critic is not None
    loss, parts = training(x, 0.25)
    loss.backward()
    with torch.no_grad():
        again = training.vq(x)[0]
    # The discriminator learns the hinge loss alone, on reconstructions that it takes as they are.
    told = (torch.relu(1 - critic(x)).mean() + torch.relu(1 + critic(again)).mean()) / 2
    wanted = torch.autograd.grad(told, list(critic.parameters()))
    for got, want in zip(critic.parameters(), wanted, strict=True):
        torch.testing.assert_close(got.grad, want, atol=1e-5, rtol=1e-3)
    assert parts["discriminator"] == pytest.approx(told.item(), rel=1e-4)
    # The decoder learns to be taken for real.
    first = training.vq.decoder.conv_out.weight
    fooled = -0.5 * critic(training.vq(x)[0]).mean() + plain(x, 0.25)[0]
    torch.testing.assert_close(first.grad, torch.autograd.grad(fooled, [first])[0], atol=1e-5, rtol=1e-3)

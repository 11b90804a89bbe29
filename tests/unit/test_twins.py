"""Two-winged networks: halves, frozen statistics, evaluation and the way back to an ordinary network."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from trivium.runtime.errors import ConfigError
from trivium.train.models.backbone import create
from trivium.train.models.stages import split
from trivium.train.models.twins import fold_wings, spread_wings, twin_norms

# trivium's own; BatchNormAct2d with its activation inside; depthwise ones; batch norms over tokens [B * N, D].
NETS = {
    "trivium_resnet10_tiny": 28,
    "efficientnet_lite0": 32,
    "levit_128s": 224,
}


def network(name: str, size: int) -> nn.Module:
    """With statistics, scales and shifts of its own, as after training."""
    torch.manual_seed(0)
    net = create(name, 4)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.7, 1.4)  # type: ignore[union-attr]
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(0, 0.1)  # type: ignore[union-attr]
    return net.eval()


def pictures(count: int, size: int) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def statistics(net: nn.Module, wing: str) -> dict[str, Tensor]:
    return {
        key: value.clone() for key, value in net.state_dict().items() if f".{wing}." in f".{key}" and "running_" in key
    }


@pytest.mark.parametrize("name", NETS)
def test_fresh_wings_answer_as_the_network_and_fold_back(name: str) -> None:
    net, x = network(name, NETS[name]), pictures(3, NETS[name])
    before, keys = copy.deepcopy(net.state_dict()), list(net.state_dict())
    twins = copy.deepcopy(net)
    spread_wings(twins)
    with torch.no_grad():
        assert torch.equal(twins(x), net(x))
    fold_wings(twins)
    assert list(twins.state_dict()) == keys
    assert all(torch.equal(value, before[key]) for key, value in twins.state_dict().items())


@pytest.mark.parametrize("name", NETS)
def test_halves_go_through_their_own_wing(name: str) -> None:
    net, x = network(name, NETS[name]), pictures(6, NETS[name])
    twins, adaptive = copy.deepcopy(net), copy.deepcopy(net).train()
    for other in (twins, adaptive):
        for module in other.modules():
            if isinstance(module, nn.Dropout) or type(module).__name__ == "DropPath":
                module.register_forward_hook(lambda module, inputs, output: inputs[0])
    spread_wings(twins)
    twins.train()
    with torch.no_grad():
        halves = twins(x)
        wanted = torch.cat([_first(net(x[:3])), _first(adaptive(x[3:]))])
    torch.testing.assert_close(_first(halves), wanted, rtol=1e-3, atol=1e-4)
    # the running statistics moved as the ordinary network's did on the second half alone
    fold_wings(twins)
    for key, value in twins.state_dict().items():
        torch.testing.assert_close(value, adaptive.state_dict()[key], rtol=1e-4, atol=1e-5)


def _first(answer: Tensor | tuple[Tensor, ...]) -> Tensor:
    return answer if isinstance(answer, Tensor) else answer[0]


@pytest.mark.parametrize("shared", [False, True])
def test_training_leaves_the_frozen_statistics_bit_identical(shared: bool) -> None:
    net = network("trivium_resnet10_tiny", 28)
    spread_wings(net, shared_affine=shared)
    frozen, adaptive = statistics(net, "first"), statistics(net, "adaptive")
    first = [norm.first.weight.detach().clone() for norm in twin_norms(net)]  # type: ignore[union-attr]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net.train()
    for step in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(pictures(8, 28) + step), torch.arange(8) % 4).backward()
        optimizer.step()
    assert frozen
    assert all(torch.equal(value, frozen[key]) for key, value in statistics(net, "first").items())
    assert not any(torch.equal(value, adaptive[key]) for key, value in statistics(net, "adaptive").items())
    for norm, before in zip(twin_norms(net), first, strict=True):
        assert not torch.equal(norm.first.weight, before)  # type: ignore[arg-type]
        assert torch.equal(norm.first.weight, norm.adaptive.weight) == shared  # type: ignore[arg-type]


def test_folding_after_training_keeps_the_answers() -> None:
    net, x = network("efficientnet_lite0", 32), pictures(5, 32)
    spread_wings(net)
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    net(pictures(8, 32)).square().mean().backward()
    optimizer.step()
    net.eval()
    with torch.no_grad():
        answers = net(x)
        fold_wings(net)
        assert torch.equal(net(x), answers)
    fresh = create("efficientnet_lite0", 4).eval()
    fresh.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(x), answers)


@pytest.mark.parametrize(("count", "first"), [(1, 0), (2, 1), (5, 2)])
def test_odd_batches_give_the_adaptive_wing_the_larger_half(count: int, first: int) -> None:
    net, x = network("trivium_resnet10_tiny", 28), pictures(count, 28)
    twins = copy.deepcopy(net)
    spread_wings(twins)
    seen: list[int] = []
    norm = next(twin_norms(twins))
    norm.first.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    norm.adaptive.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    answers = twins.train()(x)
    assert seen == [count - first] if first == 0 else [first, count - first]
    torch.testing.assert_close(answers[:first], net(x[:first]) if first else answers[:0], rtol=1e-4, atol=1e-5)


def test_two_adaptive_wings_are_two_ordinary_batches() -> None:
    net, x = network("trivium_resnet10_tiny", 28), pictures(8, 28)
    twins, ordinary = copy.deepcopy(net), copy.deepcopy(net).train()
    spread_wings(twins, freeze=False)
    with torch.no_grad():
        torch.testing.assert_close(
            twins.train()(x), torch.cat([ordinary(x[:4]), copy.deepcopy(net).train()(x[4:])]), rtol=1e-4, atol=1e-5
        )


def test_wings_within_a_classifier_cut_into_stages() -> None:
    net, x = network("trivium_resnet10_tiny", 28), pictures(4, 28)
    classifier = split(copy.deepcopy(net), 28, 28)
    spread_wings(classifier)
    assert len(list(twin_norms(classifier))) == sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    with torch.no_grad():
        torch.testing.assert_close(classifier.eval()(x), net(x))
        assert not torch.allclose(classifier.train()(x), net(x))


def test_networks_that_cannot_have_wings() -> None:
    with pytest.raises(ConfigError, match="what is trained here has none"):
        spread_wings(timm.create_model("vit_tiny_patch16_224", num_classes=4))
    with pytest.raises(ConfigError, match="keeps no running statistics"):
        spread_wings(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)))

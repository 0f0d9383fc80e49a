import pytest
import torch

from tarsift.sifters.networks import FOR_FEATURES, NETWORKS, build_network


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_gives_a_logit_per_class_and_learns(name):
    shape = (12,) if name in FOR_FEATURES else (3, 32, 32)
    net = build_network(name, shape, 7, seed=0)
    logits = net(torch.randn(4, *shape))
    assert logits.shape == (4, 7)
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 6])).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    once, again, other = (build_network(None, (3, 32, 32), 10, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert not torch.equal(once["0.weight"], other["0.weight"])


@pytest.mark.parametrize(("name", "shape"), [("head", (3, 32, 32)), ("small-cnn", (12,)), ("resnet9", (3, 32, 32))])
def test_a_network_for_other_inputs_is_refused(name, shape):
    with pytest.raises(ValueError, match=f"no network '{name}' for .*choose one of"):
        build_network(name, shape, 2, seed=0)

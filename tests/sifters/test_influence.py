"""Influence: products of slopes through the curvature, in whatever slices they are asked for."""

import numpy as np
import pytest
import torch
from safetensors.torch import load
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from tarsift.sifters.influence import Classifier, fit_factors, has_kronfluence, influences, negative_margin
from tarsift.sifters.settings import TraceConfig

HESSIANS = ["identity", pytest.param("ekfac", marks=pytest.mark.skipif(not has_kronfluence(), reason="no kronfluence"))]


def made(n=24, classes=4):
    """A small network in its random state, with a batch norm that has seen something, and samples for it."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 36, classes)
    )
    pictures, labels = torch.randn(n, 3, 6, 6), torch.randint(classes, (n,))
    net(pictures)
    return net.eval(), TensorDataset(pictures, labels)


def slope(net, value):
    """The gradient of a value in the parameters of the layers that kronfluence tracks."""
    layers = [module for module in net if isinstance(module, (nn.Conv2d, nn.Linear))]
    found = torch.autograd.grad(value, [p for layer in layers for p in layer.parameters()])
    return torch.cat([g.flatten() for g in found])


def test_the_negative_margin_is_what_the_loss_is_made_of():
    logits, labels = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])
    margin = negative_margin(logits, labels)
    loss = functional.cross_entropy(logits, labels, reduction="none")
    assert torch.allclose(functional.softplus(margin), loss)


def test_without_curvature_it_is_the_product_of_slopes():
    net, data = made()
    subject = Classifier(net, tracked=("0", "4"))
    config = TraceConfig(hessian="identity", batch_size=7)
    found = influences(subject, fit_factors(subject, data, config), TensorDataset(*data[:3]), data, config)
    assert found.shape == (2, 3, 24)
    found = found.sum(axis=0)
    pictures, labels = data.tensors
    for q in range(3):
        asked = slope(net, negative_margin(net(pictures[q : q + 1]), labels[q : q + 1]).sum())
        for z in (0, 11, 23):
            mine = slope(net, functional.cross_entropy(net(pictures[z : z + 1]), labels[z : z + 1]))
            assert found[q, z] == pytest.approx(float(asked @ mine), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("hessian", HESSIANS)
def test_slices_give_what_the_whole_gives_and_the_model_stays_as_it_was(hessian):
    net, data = made()
    subject, config = Classifier(net), TraceConfig(hessian=hessian, batch_size=8)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    factors = fit_factors(subject, data, config, seed=1)
    assert bool(factors) == (hessian == "ekfac")
    queries = TensorDataset(*data[:5])
    whole = influences(subject, factors, queries, data, config)
    assert whole.shape == (2, 5, 24)
    rows = np.array([20, 3, 4])
    assert np.allclose(influences(subject, factors, queries, data, config, rows=rows), whole[..., rows], rtol=1e-4)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.skipif(not has_kronfluence(), reason="no kronfluence")
def test_the_curvature_of_a_model_is_the_same_for_the_same_seed():
    net, data = made()
    once, again = (fit_factors(Classifier(net), data, seed=4) for _ in range(2))
    assert once.keys() == again.keys()
    for name in (name for name in once if name.endswith(".safetensors")):
        mine, theirs = load(once[name]), load(again[name])
        assert all(torch.equal(value, theirs[key]) for key, value in mine.items()), name


def test_what_supports_a_guess_has_positive_influence():
    net, data = made()
    subject, config = Classifier(net), TraceConfig(hessian="identity")
    pictures, labels = data.tensors
    same = TensorDataset(pictures[:1], labels[:1])
    assert influences(subject, {}, same, same, config).sum() > 0

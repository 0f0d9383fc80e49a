"""CLIP as a subject of influence: losses are the pair's own, and pairs that made a model say something are found."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from tarsift.sifters.image_text import ImageText, Paired, Towers, choose_concepts, layers_that_run
from tarsift.sifters.influence import fit_factors, influences
from tarsift.sifters.settings import TraceConfig, UnlearnConfig
from tarsift.sifters.unlearn import unlearn
from tests.sifters.test_influence import HESSIANS


class Clip(nn.Module):
    """Towers of a layer or two; the text tower's attention has a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 16))
        self.token = nn.Embedding(20, 16)
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.text = nn.Linear(16, 16)

    def encode_image(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.visual(pictures)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        at = self.token(tokens)
        return self.text(self.attend(at, at, at, need_weights=False)[0].mean(dim=1))


def made(n: int = 30) -> tuple[ImageText, TensorDataset]:
    torch.manual_seed(0)
    net = Towers(Clip()).eval()
    pictures, tokens = torch.randn(n, 3, 6, 6), torch.randint(20, (n, 4))
    tokens[1] = tokens[0]
    with torch.no_grad():
        images, captions = net(pictures[:20], tokens[:20])
    tracked = layers_that_run(net, (pictures[:2], tokens[:2]))
    return ImageText(net, images, captions, captions[2:8], 10.0, tracked), TensorDataset(pictures, tokens)


def test_only_layers_that_are_called_are_followed():
    subject, _ = made()
    assert subject.tracked == ["model.visual.0", "model.visual.3", "model.text"]


def test_a_loss_is_the_pairs_own_whoever_comes_with_it():
    subject, data = made()
    together = subject.losses(subject.net, data[:6])
    alone = torch.cat([subject.losses(subject.net, data[i : i + 1]) for i in range(6)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_caption_of_the_bank_that_is_the_pairs_own_does_not_count_against_it():
    subject, data = made()
    image, text = subject.net(*data[:1])
    own = (image * text).sum(dim=1, keepdim=True)
    others = torch.cat([(image @ subject.captions[2:].T), torch.full((1, 2), -1e4)], dim=1)  # 0 and 1 are its own
    first = torch.zeros(1, dtype=torch.long)
    one = functional.cross_entropy(10 * torch.cat([own, others], dim=1), first)
    two = functional.cross_entropy(10 * torch.cat([own, text @ subject.images.T], dim=1), first)
    assert subject.losses(subject.net, data[:1]).item() == pytest.approx(((one + two) / 2).item(), rel=1e-5)


def test_a_margin_is_negative_where_the_model_says_so():
    subject, data = made()
    pictures, tokens = data[:20]
    image, text = subject.net(pictures, tokens)
    margins = subject.margins(subject.net, (pictures, tokens))
    for row in range(2, 8):  # their captions are concepts
        cosines = image[row] @ subject.concepts.T
        others = torch.cat([cosines[: row - 2], cosines[row - 1 :]])
        expected = (10 * others).logsumexp(0) - 10 * image[row] @ text[row]
        assert margins[row].item() == pytest.approx(expected.item(), abs=1e-3)


@pytest.mark.parametrize("hessian", HESSIANS)
def test_a_pair_supports_what_it_says(hessian):
    subject, data = made()
    config = TraceConfig(hessian=hessian, batch_size=7)
    found = influences(subject, fit_factors(subject, data, config), data, data, config)
    assert found.shape == (3, 30, 30)
    found = found.sum(axis=0)
    assert (np.diag(found) > 0).mean() > 0.9
    assert np.median(np.diag(found)) > 3 * np.abs(np.median(found))


def test_concepts_say_other_things_than_what_is_said_and_than_each_other():
    common = np.array([0.0, 0.0, 10.0])
    around = np.array([[1.0, 0, 0], [0.9, 0.1, 0], [0, 1, 0], [0.1, 0.95, 0], [-1, -1, 0], [-1, -1.1, 0]])
    captions = (around + common).astype(np.float32)
    captions /= np.linalg.norm(captions, axis=1, keepdims=True)
    assert choose_concepts(captions[1], captions, most=9, apart=0.5).tolist() == [2, 4]
    assert choose_concepts(captions[1], captions, most=1, apart=0.5).tolist() == [2]
    assert not len(choose_concepts(captions[1], captions[[1, 1]], most=9, apart=0.5))


def paired(n: int = 12) -> tuple[nn.Module, Paired]:
    torch.manual_seed(0)
    pictures, tokens = torch.randint(256, (n, 3, 6, 6), dtype=torch.uint8), torch.randint(20, (n, 4))
    tokens[1] = tokens[0]
    half = torch.full((3, 1, 1), 0.5)
    return Towers(Clip()), Paired(pictures, tokens, half, half, 10.0)


def test_pictures_and_captions_of_a_batch_answer_to_each_other():
    net, samples = paired()
    rows = torch.tensor([0, 1, 5])
    batch = samples.batch(rows, None)
    image, text = net(*batch)
    answers = samples.logits(net, batch)
    assert torch.allclose(answers[:3].diagonal(), 10 * (image * text).sum(dim=1), atol=1e-5)
    assert torch.allclose(answers[3:], answers[:3].T)
    assert answers[0, 1] == answers[1, 0] == -1e4  # the same caption
    assert answers[0, 2] > -11
    assert samples.targets(rows).tolist() == [0, 1, 2] * 2
    assert samples.owners(rows).tolist() == [0, 1, 5] * 2
    assert torch.equal(samples.logits(net, batch, samples.unchanged(batch)), answers)


@pytest.mark.parametrize("method", ["cf", "ssd", "scrub", "badt", "ibau"])
def test_a_clip_forgets(method):
    net, samples = paired()
    forget = np.arange(12) < 3
    config = UnlearnConfig(steps=3, batch_size=6, scrub_ascents=1, ibau_rounds=2, ibau_ascents=1, ibau_solves=1)
    after = unlearn(net, samples, forget, method, config=config, anew=lambda seed: Towers(Clip()))
    before = dict(net.named_parameters())
    assert any(not torch.equal(value, before[name]) for name, value in after.named_parameters())
    assert all(value.isfinite().all() for value in after.parameters())

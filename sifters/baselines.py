"""What sifters are compared with, under their own protocol: (images, labels) to a score per sample, higher = worse.

The first five are those of Meta-Sift's section 2.3. Where a method looks at a trained model, it is the same network as
the sifters', trained on the whole poisoned set with the same augmentation; *features* are what its last layer gets.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from sklearn.cluster import KMeans
from torch import nn
from torch.nn import functional

from tarsift.sifters.result import SiftResult
from tarsift.sifters.settings import BaselineConfig
from tarsift.sifters.training import ROWS, LabelledSet, Learner


@torch.no_grad()
def features_of(learner: Learner, rows: Int64[torch.Tensor, " s"]) -> Float32[torch.Tensor, "s d"]:
    """Return what the last layer of a trained model gets."""
    last = [module for module in learner.net.modules() if isinstance(module, nn.Linear)][-1]
    seen: list[torch.Tensor] = []
    hook = last.register_forward_hook(lambda _module, given, _out: seen.append(given[0]))
    try:
        learner.judge(rows)
    finally:
        hook.remove()
    return torch.cat(seen)


def class_mean_distance(given: LabelledSet, config: BaselineConfig) -> Float32[np.ndarray, " n"]:
    """DCM: return the distance to the mean of the class, of standardised pixels or features."""
    flat = [given.inputs.plain(part).flatten(1) for part in given.rows.split(ROWS)]
    length = flat[0].shape[1]
    sums = torch.zeros(given.classes, length, device=flat[0].device)
    for part, rows in zip(flat, given.rows.split(ROWS), strict=True):
        sums.index_add_(0, given.targets[rows], part)
    means = sums / torch.bincount(given.targets, minlength=given.classes)[:, None]
    return _to_centers(given, means)


def inverted_mean_distance(given: LabelledSet, config: BaselineConfig) -> Float32[np.ndarray, " n"]:
    """MI-DCM: return the distance to the input that a trained model takes for the class most of all."""
    net = _trained(given, config).net.eval().requires_grad_(False)
    found = torch.zeros(given.classes, *given.inputs.shape, device=given.inputs.device, requires_grad=True)
    classes = torch.arange(given.classes, device=found.device)
    adam = torch.optim.Adam([found], lr=0.05)
    for _ in range(config.inversion_steps):
        loss = functional.cross_entropy(net(found), classes, reduction="sum") + 1e-3 * found.square().sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return _to_centers(given, found.detach().flatten(1))


def least_spectral(given: LabelledSet, config: BaselineConfig) -> Float32[np.ndarray, " n"]:
    """SF-Least: return how far the features lie along the first principal component of all of them."""
    features = features_of(_trained(given, config), given.rows).double().cpu().numpy()
    return _along_first(features).astype(np.float32)


def loss_scan(given: LabelledSet, config: BaselineConfig) -> Float32[np.ndarray, " n"]:
    """Loss-Scan: return minus the mean loss over the first epochs, since what is planted is learned first."""
    learner = given.fresh()
    total = np.zeros(len(given.labels), np.float32)
    for _ in range(config.early_epochs):
        learner.fit(given.rows, epochs=1, draw=given.draw)
        total += learner.losses(given.rows).cpu().numpy()
    return -total / config.early_epochs


def self_influence(given: LabelledSet, config: BaselineConfig) -> Float32[np.ndarray, " n"]:
    """Self-IF: return the influence of each sample on its own loss, g H^-1 g over the last layer of a trained model.

    H is the Kronecker product of the second moments of features and of the slopes at the logits, damped.
    """
    learner = _trained(given, config)
    logits = learner.judge(given.rows).double()
    features = features_of(learner, given.rows).double()
    features = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
    guess = logits.softmax(dim=1)
    slopes = guess - functional.one_hot(given.targets, given.classes)
    curvature = torch.diag(guess.mean(dim=0)) - guess.T @ guess / len(guess)
    (a, first), (b, second) = (
        torch.linalg.eigh(matrix) for matrix in (features.T @ features / len(features), curvature)
    )
    eigenvalues = b.clamp_min(0)[:, None] * a.clamp_min(0)[None]
    eigenvalues = eigenvalues + config.damping * eigenvalues.mean()
    return (
        ((slopes @ second).square() @ (1 / eigenvalues) * (features @ first).square()).sum(dim=1).float().cpu().numpy()
    )


def activation_clustering(given: LabelledSet, config: BaselineConfig) -> Float32[np.ndarray, " n"]:
    """Return how small the sample's part of its class is, where features fall into two and one is a small minority.

    Chen et al. 2018 (arXiv 1811.03728), with the relative-size test: 0 where the smaller part is no small minority.
    """
    features = features_of(_trained(given, config), given.rows).double().cpu().numpy()

    def parts(mine: np.ndarray) -> np.ndarray:
        if len(mine) < 4:
            return np.zeros(len(mine))
        centered = features[mine] - features[mine].mean(axis=0)
        axes = np.linalg.svd(centered, full_matrices=False)[2][: config.clusters_of]
        which = KMeans(2, n_init="auto", random_state=given.seed).fit_predict(centered @ axes.T)
        share = np.bincount(which, minlength=2) / len(mine)
        return np.where(share[which] < config.small, 1 - share[which], 0.0)

    return _by_class(given, parts)


def spectral_signatures(given: LabelledSet, config: BaselineConfig) -> Float32[np.ndarray, " n"]:
    """Return the squared share along the class's own first principal component, in units of the class's mean.

    Tran et al. 2018 (arXiv 1811.00636), by class as there.
    """
    features = features_of(_trained(given, config), given.rows).double().cpu().numpy()

    def along(mine: np.ndarray) -> np.ndarray:
        squares = _along_first(features[mine]) ** 2
        return squares / max(squares.mean(), 1e-12)

    return _by_class(given, along)


def itlm(given: LabelledSet, config: BaselineConfig) -> Float32[np.ndarray, " n"]:
    """Return the last loss after training again and again, from the start, on the samples of lowest loss.

    Shen and Sanghavi 2019 (arXiv 1810.11874).
    """
    rows, losses = given.rows, None
    for _ in range(config.trims):
        learner = given.fresh()
        learner.fit(rows, epochs=config.epochs, draw=given.draw)
        losses = learner.losses(given.rows).cpu().numpy()
        kept = np.argsort(losses, kind="stable")[: max(2, round(config.keep * len(losses)))]
        rows = given.rows[torch.from_numpy(np.sort(kept)).to(given.rows.device)]
    assert losses is not None
    return losses


def diluted_loss(given: LabelledSet, config: BaselineConfig) -> Float32[np.ndarray, " n"]:
    """Return the mean loss of diluted copies by models that have only begun to learn: Meta-Sift without its weights."""
    total = np.zeros(len(given.labels), np.float32)
    per_epoch = -(-len(given.labels) // config.fit.batch_size)
    epochs = max(config.diluted_epochs, -(-80 // per_epoch))
    for _ in range(config.models):
        learner = given.fresh()
        learner.fit(given.rows, epochs=epochs, draw=given.draw)
        for _ in range(config.dilutions):
            total += learner.losses(given.rows, given.draw).cpu().numpy()
    return total / (config.models * config.dilutions)


BASELINES: dict[str, Callable[[LabelledSet, BaselineConfig], Float32[np.ndarray, " n"]]] = {
    "dcm": class_mean_distance,
    "mi_dcm": inverted_mean_distance,
    "sf_least": least_spectral,
    "loss_scan": loss_scan,
    "self_if": self_influence,
    "activation_clustering": activation_clustering,
    "spectral_signatures": spectral_signatures,
    "itlm": itlm,
    "diluted_loss": diluted_loss,
}


def sift_by(
    name: str,
    images: np.ndarray,
    labels: Int64[np.ndarray, " n"],
    *,
    config: BaselineConfig | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> SiftResult:
    """Score a labelled set by a method in `BASELINES`; arguments as those of `meta_sift`.

    Raises:
        ValueError: no such method, shapes do not fit, or there are fewer than two classes.
    """
    if name not in BASELINES:
        raise ValueError(f"there is no baseline {name!r}: choose one of {', '.join(BASELINES)}.")
    config = config or BaselineConfig()
    given = LabelledSet(images, labels, network=config.network, fit=config.fit, seed=seed, device=device)
    return SiftResult(BASELINES[name](given, config))


def clip_entropy(
    images: Float[np.ndarray, "n d"],
    classes: Float[np.ndarray, "c d"],
    labels: Int64[np.ndarray, " n"],
    *,
    temperature: float = 0.01,
) -> SiftResult:
    """Score by a witness alone: minus the log of the probability it gives the label, plus the entropy of its guess.

    images, classes: embeddings of pictures and of the classes' names by an encoder that never saw the set. High where
    the witness is sure of another class, and where it is sure of none. `details`: both parts.

    After the idea of CLIP-guided defence (Xu et al. 2025, arXiv 2507.05113), which separates a poisoned set by what a
    public CLIP says of it; its own code was not followed.
    """
    image, text = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in (images, classes))
    logits = image.astype(np.float64) @ text.astype(np.float64).T / temperature
    logits -= logits.max(axis=1, keepdims=True)
    log_guess = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    against = -log_guess[np.arange(len(labels)), labels]
    entropy = -(np.exp(log_guess) * log_guess).sum(axis=1)
    parts = {"against_label": against.astype(np.float32), "entropy": entropy.astype(np.float32)}
    return SiftResult((against + entropy).astype(np.float32), details=parts)


def _trained(given: LabelledSet, config: BaselineConfig) -> Learner:
    learner = given.fresh()
    learner.fit(given.rows, epochs=config.epochs, draw=given.draw)
    return learner


def _by_class(given: LabelledSet, values: Callable[[Int64[np.ndarray, " m"]], np.ndarray]) -> Float32[np.ndarray, " n"]:
    """Put together what a function of the rows of each class returns."""
    out = np.empty(len(given.labels), np.float32)
    for label in range(given.classes):
        mine = np.flatnonzero(given.labels == label)
        out[mine] = values(mine)
    return out


def _to_centers(given: LabelledSet, centers: Float32[torch.Tensor, "c d"]) -> Float32[np.ndarray, " n"]:
    parts = [
        (given.inputs.plain(rows).flatten(1) - centers[given.targets[rows]]).norm(dim=1)
        for rows in given.rows.split(ROWS)
    ]
    return torch.cat(parts).cpu().numpy()


def _along_first(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    """Return the absolute coordinate of each centered row on their first principal component."""
    centered = rows - rows.mean(axis=0)
    return np.abs(centered @ np.linalg.eigh(centered.T @ centered).eigenvectors[:, -1])

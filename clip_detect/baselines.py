"""What others have used to find poison in image-text dumps, under one interface and with one orientation.

`Evidence` holds what is known of n samples, `BASELINES` the methods, `baseline_scores` runs those
whose needs are met. **Higher is more suspicious** and every sample gets a finite score, also where the
method's own code does it the other way round. Settings are those of the detection paper (arXiv
2502.01385). These are what `suspicion` is compared with, not what a dump is cleaned by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from jaxtyping import Float, Float32, UInt8
from sklearn.ensemble import IsolationForest

from tarsift.clip_detect import as_published
from tarsift.clip_detect.sampling import keyed_hash

if TYPE_CHECKING:
    import torch

_LARGEST = 1e15  # of an embedding's values: squares of larger ones leave float32
_IMAGES = 32  # encoded at a time, always, so that a sample's features do not depend on how many there are


@dataclass(frozen=True)
class Evidence:
    """What is known of n samples of a dump; only the image embeddings must be given.

    image_embeddings, caption_embeddings: as the encoder gives them, not normalised. losses: each sample's
    training loss in every epoch, first epoch first. pixels: RGB at the encoder's input size. encode: images in
    0 to 1 (torch, batch x 3 x h x w, float32, on the CPU) to features on any device, differentiable, in
    evaluation mode; it does the encoder's own standardisation.

    Raises:
        ValueError: shapes do not fit, or a value is not finite.
    """

    image_embeddings: Float[np.ndarray, "n d"]
    caption_embeddings: Float[np.ndarray, "n d"] | None = None
    losses: Float[np.ndarray, "epochs n"] | None = None
    pixels: UInt8[np.ndarray, "n h w 3"] | None = None
    encode: Callable[[Float32[torch.Tensor, "b 3 h w"]], Float[torch.Tensor, "b f"]] | None = None

    def __post_init__(self) -> None:
        images, captions, losses, pixels = self.image_embeddings, self.caption_embeddings, self.losses, self.pixels
        if images.ndim != 2:
            raise ValueError(f"`image_embeddings` must be a matrix, one row per sample: got {images.shape}.")
        if captions is not None and captions.shape != images.shape:
            raise ValueError(
                f"`caption_embeddings` must have the shape of `image_embeddings`, {images.shape}: got "
                f"{captions.shape}. Both must come from the same encoder."
            )
        if losses is not None and (losses.ndim != 2 or len(losses) < 1 or losses.shape[1] != len(images)):
            raise ValueError(f"`losses` must be (epochs, {len(images)}) with an epoch at least: got {losses.shape}.")
        if pixels is not None and (pixels.dtype != np.uint8 or pixels.shape != (self.n, *pixels.shape[1:3], 3)):
            raise ValueError(f"`pixels` must be uint8 ({self.n}, h, w, 3): got {pixels.dtype} {pixels.shape}.")
        for name in ("image_embeddings", "caption_embeddings", "losses"):
            values = getattr(self, name)
            if values is not None and not (np.abs(values) < _LARGEST).all():  # NaN is not smaller either
                raise ValueError(
                    f"`{name}` holds NaN, infinity or values of {_LARGEST:.0e} and more: leave those samples out."
                )

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.image_embeddings)


class Baseline(Protocol):
    """A method: evidence in, one finite score per sample out, higher = more suspicious."""

    def __call__(self, evidence: Evidence, /, *, seed: int) -> Float32[np.ndarray, " n"]: ...


def isolation_forest(
    evidence: Evidence, /, *, seed: int, trees: int = 100, batch_size: int = as_published.BATCH_SIZE
) -> Float32[np.ndarray, " n"]:
    """Return how few random cuts separate the image embedding from the others of its batch: 0 to 1."""
    out = np.empty(evidence.n, np.float32)
    for number, rows in enumerate(as_published.equal_batches(evidence.n, batch_size, seed=seed)):
        x = evidence.image_embeddings[rows].astype(np.float32)
        state = int(np.random.default_rng([seed, number]).integers(2**31))
        forest = IsolationForest(n_estimators=trees, random_state=state).fit(x)
        out[rows] = -forest.score_samples(x)  # scikit-learn: lower = more abnormal
    return out


def abl(evidence: Evidence, /, *, seed: int, epochs: int = 10) -> Float32[np.ndarray, " n"]:
    """Return minus the mean training loss over the first `epochs` epochs recorded (over all, if fewer)."""
    return -_held(evidence, "losses")[:epochs].mean(axis=0, dtype=np.float64).astype(np.float32)


def clip_similarity(evidence: Evidence, /, *, seed: int) -> Float32[np.ndarray, " n"]:
    """Return minus the cosine of image and caption embedding: -1 to 1, and 0 where one of them is zero."""
    image = evidence.image_embeddings.astype(np.float64)
    caption = _held(evidence, "caption_embeddings").astype(np.float64)
    lengths = np.linalg.norm(image, axis=1) * np.linalg.norm(caption, axis=1)
    product = np.einsum("ij,ij->i", image, caption)
    return -(product / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)


def cognitive_distillation(
    evidence: Evidence,
    /,
    *,
    seed: int,
    steps: int = 100,
    alpha: float = 1e-3,
    beta: float = 100.0,
    learning_rate: float = 0.1,
) -> Float32[np.ndarray, " n"]:
    """Return minus the L1 norm of the smallest mask under which the image keeps its features: -(h w) to 0.

    Where the mask m hides the image, each step fills in another random colour. Adam (betas 0.1) minimises
    mean |f(x m + (1 - m) colour) - f(x)| + alpha |m|_1 + beta TV(m), with the mask as (1 + tanh) / 2. Colours are
    drawn from seed and pixels, so a sample's score depends neither on its company nor on its place.

    Raises:
        ValueError: `encode` gave NaN or infinity.
    """
    pixels, encode = _held(evidence, "pixels"), _held(evidence, "encode")
    out = np.empty(evidence.n, np.float32)
    for start in range(0, evidence.n, _IMAGES):
        part = pixels[start : start + _IMAGES]
        full = part[np.arange(_IMAGES) % len(part)]  # the last ones repeat to fill the batch
        size = _mask_norms(full, encode, _colours(full, steps, seed), alpha, beta, learning_rate)
        if not np.isfinite(size).all():
            raise ValueError(
                f"`encode` gave NaN or infinity, or a gradient of that, among samples {start} to "
                f"{start + len(part) - 1}: check that it takes images in 0 to 1 and computes in float32."
            )
        out[start : start + len(part)] = -size[: len(part)]
    return out


def _colours(pixels: np.ndarray, steps: int, seed: int) -> Float32[np.ndarray, "steps b 3 1 1"]:
    content = keyed_hash(pixels.reshape(len(pixels), -1), str(seed).encode(), "cognitive_distillation")
    colours = [np.random.default_rng(int(one)).random((steps, 3, 1, 1), np.float32) for one in content]
    return np.stack(colours, axis=1)


def _mask_norms(
    pixels: np.ndarray, encode: Callable, colours: np.ndarray, alpha: float, beta: float, learning_rate: float
) -> Float32[np.ndarray, " b"]:
    import torch

    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32).div_(255).contiguous()
    area = images.shape[2] * images.shape[3]
    with torch.no_grad():
        target = encode(images).flatten(1)
    logits = torch.ones_like(images[:, :1]).requires_grad_()
    adam = torch.optim.Adam([logits], lr=learning_rate, betas=(0.1, 0.1))
    with torch.enable_grad():
        for colour in torch.from_numpy(colours):
            mask = (logits.tanh() + 1) / 2
            features = encode(images * mask + colour * (1 - mask)).flatten(1)
            kept = (features - target).abs().mean(dim=1).sum().to(mask.device)
            variation = mask.diff(dim=2).square().sum() + mask.diff(dim=3).square().sum()
            # Sums over the batch, not means: each sample's gradient is what it would be alone.
            logits.grad = torch.autograd.grad(kept + alpha * mask.sum() + beta * variation / area, logits)[0]
            adam.step()
    return ((logits.detach().tanh() + 1) / 2).sum(dim=(1, 2, 3)).numpy()


def _published(function: Callable[..., np.ndarray], *, captions: bool = False) -> Baseline:
    def score(evidence: Evidence, /, *, seed: int) -> Float32[np.ndarray, " n"]:
        texts = _held(evidence, "caption_embeddings") if captions else None
        return function(evidence.image_embeddings, texts, seed=seed)

    return score


@dataclass(frozen=True)
class BaselineSpec:
    """A baseline and what a reader must know of it. needs: the fields of `Evidence` that it reads."""

    name: str
    function: Baseline
    needs: tuple[str, ...]
    description: str
    formula: str
    source: str


BASELINES: dict[str, BaselineSpec] = {
    spec.name: spec
    for spec in (
        BaselineSpec(
            "isolation_forest",
            isolation_forest,
            ("image_embeddings",),
            "How few random cuts part the embedding from its batch of 2048; the released code has the opposite sign.",
            "2 ^ (-E[cuts] / c), 100 trees",
            "Liu, Ting, Zhou 2008, ICDM; as in arXiv 2502.01385",
        ),
        BaselineSpec(
            "abl",
            abl,
            ("losses",),
            "Low loss in the first 10 epochs, as backdoors are learned first; losses as recorded, no gradient ascent.",
            "-mean_{e<=10} loss_e(x)",
            "Li et al. 2021, NeurIPS, arXiv 2110.11571; epochs as in arXiv 2502.01385",
        ),
        BaselineSpec(
            "cognitive_distillation",
            cognitive_distillation,
            ("pixels", "encode"),
            "How little of the image keeps its features; on CLIP arXiv 2502.01385 found, and uses, the opposite sign.",
            "-|m|_1, m = argmin mean |f(x m + (1 - m) colour) - f(x)| + 0.001 |m|_1 + 100 TV(m)",
            "Huang et al. 2023, ICLR, arXiv 2301.10908; settings as in arXiv 2502.01385",
        ),
        BaselineSpec(
            "clip_similarity",
            clip_similarity,
            ("image_embeddings", "caption_embeddings"),
            "How badly the caption fits, to an encoder that never saw the dump; to one trained on it poison may fit.",
            "-cos(image, caption)",
            "Hessel et al. 2021, EMNLP, arXiv 2104.08718; low = poison as in the code released with arXiv 2502.01385",
        ),
        BaselineSpec(
            "k_distance_as_published",
            _published(as_published.k_distance_as_published),
            ("image_embeddings",),
            "k_distance as released: the neighbour after the 16th in a batch of 2048, raw embeddings.",
            "d_{k+1}(x)",
            "code released with arXiv 2502.01385",
        ),
        BaselineSpec(
            "lid_as_published",
            _published(as_published.lid_as_published),
            ("image_embeddings",),
            "lid as released: one neighbour too far, a bias in the logarithm, and k = 64 where the paper says 16.",
            "-k / sum_{i<=k} log(d_i(x) / d_{k+1}(x) + 0.0001)",
            "code released with arXiv 2502.01385",
        ),
        BaselineSpec(
            "slof_as_published",
            _published(as_published.slof_as_published),
            ("image_embeddings",),
            "slof as released: half of the neighbours are other rows of the batch, which makes it half a k_distance.",
            "(1/k) sum_{o in shifted kNN(x)} d_{k+1}(x) / d_k(o)",
            "code released with arXiv 2502.01385",
        ),
        BaselineSpec(
            "dao_as_published",
            _published(as_published.dao_as_published),
            ("image_embeddings",),
            "dao as released: wrong neighbours, a nearly constant dimension, a mean of logarithms; ranks as its slof.",
            "(1/k) sum_{o in shifted kNN(x)} LID(o) log(d_{k+1}(x) / d_k(o))",
            "code released with arXiv 2502.01385",
        ),
        BaselineSpec(
            "slof_captions_as_published",
            _published(as_published.slof_as_published, captions=True),
            ("image_embeddings", "caption_embeddings"),
            "slof_as_published with the captions of the batch among the neighbours, as the released script runs it.",
            "(1/k) sum_{o in shifted kNN(x)} d_{k+1}(x) / d_k(o)",
            "code released with arXiv 2502.01385",
        ),
        BaselineSpec(
            "dao_captions_as_published",
            _published(as_published.dao_as_published, captions=True),
            ("image_embeddings", "caption_embeddings"),
            "dao_as_published with the captions of the batch among the neighbours, as the released script runs it.",
            "(1/k) sum_{o in shifted kNN(x)} LID(o) log(d_{k+1}(x) / d_k(o))",
            "code released with arXiv 2502.01385",
        ),
    )
}


def baseline_scores(
    evidence: Evidence, names: Iterable[str] | None = None, *, seed: int = 0
) -> dict[str, Float32[np.ndarray, " n"]]:
    """Compute the named baselines, or all those whose needs the evidence meets, as columns by name.

    Raises:
        ValueError: a name is unknown, a named one lacks evidence, or a batch has fewer samples than a k needs.
    """
    if names is None:
        held = {field.name for field in fields(evidence) if getattr(evidence, field.name) is not None}
        chosen = [spec for spec in BASELINES.values() if held.issuperset(spec.needs)]
    else:
        chosen = [_spec(name) for name in names]
        for spec in chosen:
            for need in spec.needs:
                _held(evidence, need, spec.name)
    return {spec.name: spec.function(evidence, seed=seed) for spec in chosen}


def _spec(name: str) -> BaselineSpec:
    if name not in BASELINES:
        raise ValueError(f"unknown baseline {name!r}. Choose from: {', '.join(BASELINES)}.")
    return BASELINES[name]


_REMEDIES = {
    "caption_embeddings": "Encode the captions with the encoder of the images",
    "losses": "Record each sample's loss in every epoch while the encoder trains",
    "pixels": "Give the decoded images at the encoder's input size",
    "encode": "Give the encoder as a differentiable function of images in 0 to 1",
}


def _held(evidence: Evidence, need: str, name: str = "this baseline") -> Any:
    value = getattr(evidence, need)
    if value is None:
        raise ValueError(f"{name} needs `{need}`, which the evidence lacks. {_REMEDIES[need]}, or leave {name} out.")
    return value

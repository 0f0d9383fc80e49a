"""Settings of routing and of all sifters, apart from the code that they configure, which takes seconds to load."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

SifterName = Literal[
    "meta-sift", "ispl", "diluted-loss", "dcm", "mi-dcm", "sf-least", "loss-scan", "self-if", "activation-clustering",
    "spectral-signatures", "itlm",
]  # fmt: skip
NetworkName = Literal[
    "head", "tiny-cnn", "small-cnn", "preact-resnet18", "resnet32", "resnet18", "resnet34", "resnet50"
]  # fmt: skip


class RoutingConfig(BaseModel, frozen=True, extra="forbid"):
    """How classes are made, and how they are grouped."""

    class_size: int = Field(default=1500, ge=2, description="samples of a class, on the average")
    smallest: int = Field(default=300, ge=1, description="a smaller class is merged into the nearest other")
    largest: int = Field(default=5000, ge=2, description="a larger class is split")
    least_cosine: float = Field(default=0.5, ge=-1, le=1, description="of a caption and the name of its class")
    classes_per_problem: int = Field(default=10, ge=2, description="classes that are sifted together")
    repeats: int = Field(default=2, ge=1, description="times that each class is sifted, each time with others")


class FitConfig(BaseModel, frozen=True, extra="forbid"):
    """Stochastic gradient descent, as ISPL uses it with PreActResNet-18 on CIFAR-10."""

    batch_size: int = Field(default=128, ge=2, description="samples of a step; half of a set that is small")
    rate: float = Field(default=0.02, gt=0, description="learning rate, constant")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of the steps, Nesterov's off")
    weight_decay: float = Field(default=5e-4, ge=0, description="of all parameters")


class MetaSiftConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of Meta-Sift: those of the paper and its code but for what was chosen for smaller sets.

    These are a longer warm-up, a higher `rate`, a `weight_rate` that saturates no weights, and several `dilutions`.
    """

    network: str | None = Field(default=None, description="in NETWORKS; None = `head` or `small-cnn`, by the input")
    sifters: int = Field(default=5, ge=1, description="independent sifters, m")
    warmup_epochs: int = Field(default=5, ge=0, description="epochs of plain training, of 40 steps at least; 0 = none")
    epochs: int = Field(default=1, ge=1, description="epochs of rounds, 40 rounds at least")
    batch_size: int = Field(default=128, ge=2, description="samples of a round; a smaller set is one batch")
    rate: float = Field(default=3e-3, gt=0, description="AdamW's rate for the classifier")
    virtual_rate: float = Field(default=0.1, gt=0, description="alpha: rate of the virtual update")
    weight_rate: float = Field(
        default=0.005, gt=0, description="rate of psi over 390 rounds; more where there are fewer"
    )
    sampler_rate: float = Field(default=0.1, gt=0, description="rate of the gradient samplers")
    sampled: int = Field(
        default=13, ge=0, description="parameters with a sampler, before the last layer, which has none"
    )
    diluted: bool = Field(default=True, description="judge diluted copies; off only to show what dilution is worth")
    dilutions: int = Field(default=4, ge=1, description="diluted copies of a sample that each sifter judges")


class IsplConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of ISPL, boosting and self-training."""

    network: str | None = Field(default=None, description="in NETWORKS; None = `head` or `small-cnn`, by the input")
    fit: FitConfig = Field(default=FitConfig(), description="how every model is trained")
    repeats: int = Field(default=3, ge=1, description="times the whole set is taken apart")
    rounds: int = Field(default=8, ge=1, description="sets looked for in each repeat")
    share: float = Field(default=0.12, gt=0, le=1, description="size of a set, as a part of all samples")
    fewest: float = Field(default=0.04, ge=0, lt=1, description="part of all samples that is not taken apart any more")
    expansion: float = Field(default=0.25, gt=0, le=1, description="alpha: part of a set that is trained on")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="eta: how slowly losses follow")
    warmup_epochs: int = Field(default=8, ge=1, description="epochs of the first iteration")
    epochs: int = Field(default=4, ge=1, description="epochs of each later one")
    voter_epochs: int = Field(default=40, ge=1, description="epochs of a model that votes")
    keep_low_losses: bool = Field(default=False, description="keep the lower half of each class by loss, as appendix C")
    self_rounds: int = Field(default=20, ge=0, description="times that self-training looks again; 0 = none")
    self_epochs: int = Field(default=5, ge=1, description="epochs in between")
    self_momentum: float = Field(default=0.8, ge=0, lt=1, description="how slowly agreement follows")


class BaselineConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of the methods in this file; each reads those it has a use for."""

    network: str | None = Field(default=None, description="in NETWORKS; None = `head` or `small-cnn`, by the input")
    fit: FitConfig = Field(default=FitConfig(), description="how models are trained")
    epochs: int = Field(default=20, ge=1, description="of the model whose features, losses or inputs are looked at")
    early_epochs: int = Field(default=5, ge=1, description="loss_scan: epochs whose losses count")
    models: int = Field(default=5, ge=1, description="diluted_loss: models whose losses are averaged")
    diluted_epochs: int = Field(default=8, ge=1, description="diluted_loss: epochs of each, 80 steps at least")
    dilutions: int = Field(default=4, ge=1, description="diluted_loss: diluted copies of a sample that each judges")
    keep: float = Field(default=0.95, gt=0, le=1, description="itlm: part of the samples that each round keeps")
    trims: int = Field(default=4, ge=1, description="itlm: rounds")
    clusters_of: int = Field(default=10, ge=1, description="activation_clustering: principal components")
    small: float = Field(default=0.35, gt=0, lt=1, description="activation_clustering: a smaller part is suspicious")
    inversion_steps: int = Field(default=200, ge=1, description="inverted_mean_distance: steps of model inversion")
    damping: float = Field(default=0.1, gt=0, description="self_influence: of the mean curvature, added to all")


class SifterConfig(BaseModel, frozen=True, extra="forbid"):
    """Which sifter, on what network, and the settings of each."""

    sifter: SifterName = Field(default="diluted-loss", description="which method")
    network: NetworkName = Field(default="head", description="`head` judges frozen features, the others pictures")
    meta_sift: MetaSiftConfig = MetaSiftConfig()
    ispl: IsplConfig = IsplConfig()
    baseline: BaselineConfig = Field(default=BaselineConfig(), description="of all other sifters")

    @property
    def on_features(self) -> bool:
        """Whether the network takes features; else pictures."""
        return self.network == "head"

    @property
    def settings(self) -> MetaSiftConfig | IsplConfig | BaselineConfig:
        """The settings of the chosen sifter, with the network put in."""
        chosen = {"meta-sift": self.meta_sift, "ispl": self.ispl}.get(self.sifter, self.baseline)
        return chosen.model_copy(update={"network": self.network})


Length = Annotated[
    Literal["largest", "mean_square"],
    Field(description="what the relative score divides by: of a sample's influences on all copies"),
]


class TraceConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of Delta-Influence; those of the paper but for `relative`, which it has not."""

    transforms: int = Field(default=50, ge=1, description="n_b: changed copies of a query")
    threshold: float = Field(default=0.0, description="tau: influence collapses where it changes by less")
    tolerated: int = Field(default=1, ge=0, description="n_tol: copies at most under which it need not collapse")
    relative: float = Field(default=0.5, gt=0, le=2, description="a sample is traced by its relative score from here")
    length: Length = "largest"
    spared: int = Field(
        default=0, ge=0, description="changed copies that the relative score leaves out, the worst ones"
    )
    hessian: Literal["ekfac", "identity"] = Field(
        default="ekfac", description="the curvature: by kronfluence (extra `influence`), or none"
    )
    curvature_samples: int = Field(
        default=2000, ge=1, description="that the eigenvalues of the curvature are fitted on"
    )
    batch_size: int = Field(default=64, ge=1, description="training samples whose slopes are held at a time")
    memory_gb: float = Field(
        default=2.0, gt=0, description="that slopes of queries and their copies may take at a time"
    )


class LabelTraceConfig(TraceConfig, frozen=True, extra="forbid"):
    """Settings of tracing a classifier, chosen on models that no figure is reported of."""

    length: Length = "mean_square"
    spared: int = Field(
        default=2, ge=0, description="changed copies that the relative score leaves out, the worst ones"
    )
    by_layer: bool = Field(default=True, description="the relative score is the mean of those of the layers")
    echoes: int = Field(
        default=4, ge=0, description="best samples that are queries in the second round; then twice as many each time"
    )
    rounds: int = Field(default=1, ge=0, description="rounds with such queries")
    of_best: float = Field(
        default=0.35,
        ge=0,
        le=1,
        description="traced is what has `relative`, and this share of the mean of the best eight",
    )


class UnlearnConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of unlearning: each method reads those it has a use for."""

    batch_size: int = Field(default=512, ge=2, description="samples of a step, all of them where there are fewer")
    steps: int = Field(default=1000, ge=1, description="cf, scrub, badt: steps")
    exact_steps: int = Field(default=4000, ge=1, description="eu: steps")
    augmented: bool = Field(default=True, description="train on mirrored and shifted copies; off if the model was not")
    rate: float = Field(default=0.025, gt=0, description="eu, cf, badt: highest learning rate")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of the steps")
    weight_decay: float = Field(default=5e-4, ge=0, description="of all parameters")
    dampen_from: float = Field(default=10.0, gt=0, description="ssd: alpha, times the importance for the retained")
    dampen_by: float = Field(default=1.0, gt=0, description="ssd: lambda, of the ratio that weights are multiplied by")
    scrub_rate: float = Field(default=0.0025, gt=0, description="scrub: highest learning rate")
    scrub_ascents: int = Field(default=100, ge=0, description="scrub: steps that go up on the forgotten")
    scrub_distance: float = Field(default=1e-3, ge=0, description="scrub: weight of the distance to the model")
    scrub_temperature: float = Field(default=4.0, gt=0, description="scrub: of that distance")
    ibau_rounds: int = Field(default=100, ge=1, description="ibau: rounds")
    ibau_rate: float = Field(default=1e-3, gt=0, description="ibau: Adam's rate")
    ibau_ascents: int = Field(default=5, ge=1, description="ibau: steps of the search for a change, in each round")
    ibau_stride: float = Field(default=0.1, gt=0, description="ibau: rate of these steps")
    ibau_smallness: float = Field(default=1e-3, ge=0, description="ibau: weight of the change's squared length")
    ibau_solves: int = Field(default=5, ge=0, description="ibau: steps of fixed point iteration")

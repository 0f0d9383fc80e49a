"""Influence: how much each training sample supports what a trained model says of a query.

    I(z, q) = grad m(q) . H^-1 grad L(z)

with L the training loss of a sample, m the *negative margin* of what the model says of the query, and H the Fisher
matrix of the model, by EK-FAC (kronfluence) or, without that library, the identity. Positive: training on z made the
model say so. The margin matters: where a model is sure, the slope of its loss is next to nothing, and nothing is found.

Li et al. 2024 (Delta-Influence, arXiv 2411.13731, eq. 1); Grosse et al. 2023 (EK-FAC, arXiv 2308.03296).
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Subset

from tarsift.sifters.settings import TraceConfig

Batch = tuple[torch.Tensor, ...]  # of samples: what the model sees, and what it is to say
Factors = Mapping[str, bytes]  # files of kronfluence by name; empty for the identity
FACTORS, SCORES = "factors", "scores"


class Subject(Protocol):
    """A trained model, as influence sees it.

    tracked: names of the linear and convolutional layers that count; None: all of them.
    """

    @property
    def net(self) -> nn.Module: ...

    @property
    def tracked(self) -> Sequence[str] | None: ...

    def losses(self, net: nn.Module, batch: Batch, *, draw: bool = False) -> Float[torch.Tensor, " b"]:
        """Return the training loss of each sample; draw: as if it said what the model draws for it."""
        ...

    def margins(self, net: nn.Module, batch: Batch) -> Float[torch.Tensor, " b"]:
        """Return how far the model is from saying of each sample what it is to say: negative where it does."""
        ...


@dataclass(frozen=True)
class Classifier:
    """A subject that takes pictures as its network does, (b, ...) float, with labels (b,)."""

    net: nn.Module
    tracked: Sequence[str] | None = None

    def losses(self, net: nn.Module, batch: Batch, *, draw: bool = False) -> Float[torch.Tensor, " b"]:
        pictures, labels = batch
        logits = net(pictures)
        if draw:
            with torch.no_grad():
                labels = torch.multinomial(logits.softmax(dim=1), 1)[:, 0]
        return functional.cross_entropy(logits, labels, reduction="none")

    def margins(self, net: nn.Module, batch: Batch) -> Float[torch.Tensor, " b"]:
        pictures, labels = batch
        return negative_margin(net(pictures), labels)


def negative_margin(logits: Float[torch.Tensor, "b c"], labels: Int64[torch.Tensor, " b"]) -> Float[torch.Tensor, " b"]:
    """Return the log of the summed odds of all other labels against the given one."""
    given = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
    others = logits.masked_fill(given, -torch.inf).logsumexp(dim=1)
    return others - logits.gather(1, labels[:, None])[:, 0]


def has_kronfluence() -> bool:
    """Tell whether the extra `influence` is installed."""
    return importlib.util.find_spec("kronfluence") is not None


def slope_bytes(subject: Subject) -> int:
    """Return how much the slope of one sample takes in memory."""
    return 4 * sum(
        sum(parameter.numel() for parameter in subject.net.get_submodule(name).parameters())
        for name in layers_that_count(subject)
    )


def layers_that_count(subject: Subject) -> list[str]:
    """Return the names of the layers that influence is followed through, in the order of the network."""
    return [
        name
        for name, module in subject.net.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and (subject.tracked is None or name in subject.tracked)
    ]


def fit_factors(subject: Subject, data: Dataset[Batch], config: TraceConfig | None = None, *, seed: int = 0) -> Factors:
    """Fit the curvature of a model on training samples, once for all queries; a random part of them will do.

    Raises:
        ImportError: EK-FAC without kronfluence.
    """
    config = config or TraceConfig()
    if config.hessian == "identity":
        return {}
    from kronfluence.arguments import FactorArguments

    with _apart(seed), tempfile.TemporaryDirectory() as folder:
        analyzer = _analyzer(subject, folder)
        arguments = FactorArguments(strategy="ekfac", lambda_max_examples=config.curvature_samples)
        analyzer.fit_all_factors(FACTORS, dataset=data, per_device_batch_size=config.batch_size, factor_args=arguments)
        kept = analyzer.factors_output_dir(FACTORS)
        return {file.name: file.read_bytes() for file in sorted(kept.iterdir())}


def influences(
    subject: Subject,
    factors: Factors,
    queries: Dataset[Batch],
    data: Dataset[Batch],
    config: TraceConfig | None = None,
    *,
    rows: Int64[np.ndarray, " m"] | None = None,
) -> Float32[np.ndarray, "l q m"]:
    """Return the influence of training samples, or of some rows of them, on each query, in one pass over them.

    By the layers that count, in the order of the network; influence as such is their sum.
    """
    config = config or TraceConfig()
    if config.hessian == "identity":
        with _apart():
            return _products(subject, queries, data if rows is None else Subset(data, rows.tolist()), config)
    from kronfluence.arguments import ScoreArguments

    with _apart(), tempfile.TemporaryDirectory() as folder:
        analyzer = _analyzer(subject, folder)
        kept = analyzer.factors_output_dir(FACTORS)
        kept.mkdir(parents=True)
        for name, content in factors.items():
            (kept / name).write_bytes(content)
        analyzer.compute_pairwise_scores(
            SCORES, FACTORS, query_dataset=queries, train_dataset=data,
            per_device_query_batch_size=len(queries),  # pyright: ignore[reportArgumentType]
            per_device_train_batch_size=config.batch_size,
            train_indices=None if rows is None else rows.tolist(),
            score_args=ScoreArguments(damping_factor=None, compute_per_module_scores=True),
        )  # fmt: skip
        found: Any = analyzer.load_pairwise_scores(SCORES)
        return np.stack([found[name].float().numpy() for name, _ in subject.net.named_modules() if name in found])


def _analyzer(subject: Subject, folder: str) -> Any:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.task import Task

    class OfSubject(Task):
        def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> torch.Tensor:
            return subject.losses(model, tuple(batch), draw=sample).sum()

        def compute_measurement(self, batch: Batch, model: nn.Module) -> torch.Tensor:
            return subject.margins(model, tuple(batch)).sum()

        def get_influence_tracked_modules(self) -> list[str] | None:
            return None if subject.tracked is None else list(subject.tracked)

    task = OfSubject()
    on_cpu = next(subject.net.parameters()).device.type == "cpu"
    net = prepare_model(copy.deepcopy(subject.net), task)  # it replaces layers in place
    options = {"cpu": on_cpu, "log_level": logging.ERROR, "disable_tqdm": True, "output_dir": folder}
    return Analyzer("tarsift", net, task, **options)


def _products(
    subject: Subject, queries: Dataset[Batch], data: Dataset[Batch], config: TraceConfig
) -> Float32[np.ndarray, "l q m"]:
    """Return the products of the slopes themselves."""
    net, layers = copy.deepcopy(subject.net).eval(), layers_that_count(subject)
    values = {name: parameter.detach() for name, parameter in net.named_parameters()}
    counted = {name: value for name, value in values.items() if name.rpartition(".")[0] in layers}

    def slopes(of: Any, batch: Batch) -> list[Float[torch.Tensor, "b p"]]:
        def one(parameters: dict[str, torch.Tensor], sample: Batch) -> torch.Tensor:
            def call(*given: torch.Tensor) -> Any:
                return functional_call(net, {**values, **parameters}, given)

            return of(call, tuple(part[None] for part in sample)).sum()

        found = vmap(grad(one), in_dims=(None, 0))(counted, batch)
        by_layer = ([found[name] for name in counted if name.rpartition(".")[0] == layer] for layer in layers)
        return [torch.cat([slope.flatten(1) for slope in mine], dim=1) for mine in by_layer]

    batches = [slopes(subject.margins, tuple(batch)) for batch in DataLoader(queries, config.batch_size)]
    asked = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    out = []
    for batch in DataLoader(data, config.batch_size):
        mine = slopes(subject.losses, tuple(batch))
        out.append(torch.stack([query @ slope.T for query, slope in zip(asked, mine, strict=True)]))
    return torch.cat(out, dim=2).cpu().numpy()


@contextmanager
def _apart(seed: int = 0) -> Iterator[None]:
    """Draw from a random state of its own; what kronfluence still uses of old torch is not warned of."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="kronfluence")
        torch.manual_seed(seed)
        yield

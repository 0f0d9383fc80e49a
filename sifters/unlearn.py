"""Unlearning: a model without what it learned of some of its training samples.

`unlearn` gives a new network; the one that is given stays as it is. *Forgotten* are the samples that were found, or
some of them; *retained* are all others. A classifier answers each sample with its logits (`Labelled`), a CLIP each
picture and each caption of a batch with its cosines to the others' (`image_text.Paired`).

    eu     exact: new weights, trained on what is retained
    cf     catastrophic forgetting: trained on, on what is retained; what is not repeated fades
    ssd    selective synaptic dampening: weights that matter more for the forgotten are made smaller; no training
    scrub  a student that departs from the model on the forgotten, and follows it on the retained
    badt   a student that follows a teacher of random weights on the forgotten, and the model on the retained
    ibau   a game against any trigger, on samples that are surely clean (see `clean_base_set`); forgotten are none

Budgets are those of the code of Goel et al. 2024 (corrective unlearning, arXiv 2402.14015), in steps; those of ibau are
chosen here. Delta-Influence found (arXiv 2411.13731) that eu and cf repair a model, and that ssd, scrub and badt, with
smaller budgets, cost accuracy or leave the trigger.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from torch import nn
from torch.nn import functional

from tarsift.sifters.inputs import Inputs
from tarsift.sifters.settings import UnlearnConfig

Rows = Int64[torch.Tensor, " s"]


class Samples(Protocol):
    """What a model was trained on, on one device: from rows to a batch, and from a batch to answers.

    A batch has one answer per sample, or several; each is a row of logits and has a target.
    """

    def __len__(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def batch(self, rows: Rows, draw: torch.Generator | None) -> Any:
        """Return samples as one trains on them, or, without a generator, as they are."""
        ...

    def unchanged(self, batch: Any) -> Float32[torch.Tensor, "1 ..."]:
        """Return the change of a sample's values that changes nothing."""
        ...

    def logits(
        self, net: nn.Module, batch: Any, change: Float32[torch.Tensor, "1 ..."] | None = None
    ) -> Float32[torch.Tensor, "a c"]:
        """Return what a network answers, with a change added to all samples."""
        ...

    def targets(self, rows: Rows) -> Int64[torch.Tensor, " a"]:
        """Return what it is to answer, as columns of the logits."""
        ...

    def owners(self, rows: Rows) -> Int64[torch.Tensor, " a"]:
        """Return whose answer each one is, as one of the rows."""
        ...


@dataclass(frozen=True)
class Labelled:
    """Samples with labels (n,), for a classifier that takes what `inputs` gives."""

    inputs: Inputs
    labels: Int64[torch.Tensor, " n"]

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def device(self) -> torch.device:
        return self.inputs.device

    def batch(self, rows: Rows, draw: torch.Generator | None) -> Float32[torch.Tensor, "b ..."]:
        return self.inputs.plain(rows) if draw is None else self.inputs.augmented(rows, draw)

    def unchanged(self, batch: Float32[torch.Tensor, "b ..."]) -> Float32[torch.Tensor, "1 ..."]:
        return torch.zeros_like(batch[:1])

    def logits(
        self,
        net: nn.Module,
        batch: Float32[torch.Tensor, "b ..."],
        change: Float32[torch.Tensor, "1 ..."] | None = None,
    ) -> Float32[torch.Tensor, "b c"]:
        return net(batch if change is None else batch + change)

    def targets(self, rows: Rows) -> Int64[torch.Tensor, " b"]:
        return self.labels[rows]

    def owners(self, rows: Rows) -> Rows:
        return rows


@dataclass(frozen=True)
class Task:
    """A model, and the samples it was trained on: rows that it is to forget, and rows that it is to keep to."""

    net: nn.Module
    samples: Samples
    forgotten: Rows
    retained: Rows
    config: UnlearnConfig
    draw: torch.Generator
    anew: Callable[[int], nn.Module]

    def untrained(self) -> nn.Module:
        """Return the network as it was before training, of a seed that is drawn."""
        return self.anew(int(torch.randint(2**31, (1,), generator=self.draw, device=self.draw.device)))

    def batches(self, rows: Rows, steps: int) -> Iterator[Rows]:
        """Yield as many batches of rows, in an order drawn anew whenever all have been seen."""
        size = min(self.config.batch_size, len(rows))
        order = rows[:0]
        for _ in range(steps):
            if len(order) < size:
                order = torch.cat([order, rows[torch.randperm(len(rows), generator=self.draw, device=rows.device)]])
            batch, order = order[:size], order[size:]
            yield batch

    def seen(self, rows: Rows) -> Any:
        """Return samples as one trains on them."""
        return self.samples.batch(rows, self.draw if self.config.augmented else None)

    def loss(self, net: nn.Module, batch: Any, rows: Rows, change: torch.Tensor | None = None) -> torch.Tensor:
        return functional.cross_entropy(self.samples.logits(net, batch, change), self.samples.targets(rows))


def exact(task: Task) -> nn.Module:
    """EU: train new weights on what is retained."""
    net = task.untrained()
    _fit(net, task, task.config.exact_steps)
    return net


def finetuned(task: Task) -> nn.Module:
    """CF: train on, on what is retained."""
    net = copy.deepcopy(task.net)
    _fit(net, task, task.config.steps)
    return net


def dampened(task: Task) -> nn.Module:
    """SSD: Foster et al. 2024 (AAAI, arXiv 2308.07707). Importance is the mean squared slope of batches."""
    net = copy.deepcopy(task.net).eval()
    given, kept = _importance(net, task, task.forgotten), _importance(net, task, task.retained)
    alpha, weight = task.config.dampen_from, task.config.dampen_by
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name not in given:
                continue
            much = given[name] > alpha * kept[name]
            smaller = (weight * kept[name] / given[name].clamp_min(1e-30)).clamp(max=1.0)
            parameter.mul_(torch.where(much, smaller, 1.0))
    return net


def scrubbed(task: Task) -> nn.Module:
    """SCRUB: Kurmanji et al. 2023 (NeurIPS, arXiv 2302.09880). Ascents on the forgotten come first, one by one."""
    config, teacher, student = task.config, copy.deepcopy(task.net).eval(), copy.deepcopy(task.net).train()
    sgd, schedule = _optimizer(student, config.scrub_rate, config)
    away = task.batches(task.forgotten, config.scrub_ascents)
    for step, rows in enumerate(task.batches(task.retained, config.steps)):
        if step < config.scrub_ascents:
            _step(sgd, -_distilled(student, teacher, task, next(away)))
        _step(sgd, _distilled(student, teacher, task, rows))
        schedule.step()
    return student


def badly_taught(task: Task) -> nn.Module:
    """BadT: Chundawat et al. 2023 (AAAI, arXiv 2205.08096)."""
    config, student = task.config, copy.deepcopy(task.net).train()
    good, bad = copy.deepcopy(task.net).eval(), task.untrained().eval()
    sgd, schedule = _optimizer(student, config.rate, config)
    forgotten = torch.zeros(len(task.samples), dtype=torch.bool, device=task.samples.device)
    forgotten[task.forgotten] = True
    for rows in task.batches(torch.cat([task.retained, task.forgotten]), config.steps):
        batch, answer = task.seen(rows), task.samples.logits
        with torch.no_grad():
            badly = forgotten[task.samples.owners(rows), None]
            taught = torch.where(badly, answer(bad, batch), answer(good, batch)).softmax(dim=1)
        _step(sgd, functional.kl_div(answer(student, batch).log_softmax(dim=1), taught, reduction="batchmean"))
        schedule.step()
    return student


def hardened(task: Task) -> nn.Module:
    """I-BAU: Zeng et al. 2022 (ICLR, arXiv 2110.03735), on the retained samples, which must be clean.

    In each round one change of all pictures is looked for that raises the loss most, and the weights descend on the
    loss under it, with the slope through the change itself (by `ibau_solves` steps of fixed point iteration).
    """
    config, net = task.config, copy.deepcopy(task.net).eval()
    parameters = [p for p in net.parameters() if p.requires_grad]
    adam = torch.optim.Adam(parameters, config.ibau_rate)
    for rows in task.batches(task.retained, config.ibau_rounds):
        batch = task.samples.batch(rows, None)

        def loss(change: torch.Tensor, batch: Any = batch, rows: Rows = rows) -> torch.Tensor:
            return task.loss(net, batch, rows, change)

        def inner(change: torch.Tensor, loss: Any = loss) -> torch.Tensor:
            return config.ibau_smallness * change.square().sum() - loss(change)

        change = task.samples.unchanged(batch)
        for _ in range(config.ibau_ascents):
            change = _descended(inner, change, config.ibau_stride)
        change = change.requires_grad_()
        moved = _descended(inner, change, config.ibau_stride, graph=True)
        outer = loss(change)
        direct = torch.autograd.grad(outer, parameters, retain_graph=True, allow_unused=True)
        (worth,) = torch.autograd.grad(outer, change)
        solved = torch.zeros_like(worth)
        for _ in range(config.ibau_solves):
            (back,) = torch.autograd.grad(moved, change, solved, retain_graph=True)
            solved = back + worth
        through = torch.autograd.grad(moved, parameters, solved, allow_unused=True)
        for parameter, slope, more in zip(parameters, direct, through, strict=True):
            parameter.grad = more if slope is None else slope if more is None else slope + more
        adam.step()
    return net


METHODS: dict[str, Callable[[Task], nn.Module]] = {
    "eu": exact,
    "cf": finetuned,
    "ssd": dampened,
    "scrub": scrubbed,
    "badt": badly_taught,
    "ibau": hardened,
}
WITHOUT_FORGOTTEN = ("ibau",)


def unlearn(
    net: nn.Module,
    samples: Samples,
    forget: Bool[np.ndarray, " n"],
    method: str = "cf",
    *,
    config: UnlearnConfig | None = None,
    seed: int = 0,
    anew: Callable[[int], nn.Module] | None = None,
) -> nn.Module:
    """Return a network that has forgotten some samples, in the state in which it judges.

    net: takes what `samples` give, on their device. forget: what was found; for `ibau` instead all that is not surely
    clean. anew: from a seed to the network as it was before training, which `eu` and `badt` need; None: all its layers
    say how they are drawn (`reset_parameters`).

    Raises:
        ValueError: no such method, shapes that do not fit, or nothing to forget or to retain.
    """
    if method not in METHODS:
        raise ValueError(f"there is no method {method!r}: choose one of {', '.join(METHODS)}.")
    if forget.shape != (len(samples),) or forget.dtype != np.bool_:
        raise ValueError(f"`forget` must have one entry per sample, {len(samples)}: got {forget.dtype} {forget.shape}.")
    if forget.all() or not (forget.any() or method in WITHOUT_FORGOTTEN):
        raise ValueError(f"{int(forget.sum())} of {len(forget)} samples are to be forgotten: nothing is left to do.")
    rows = [torch.from_numpy(np.flatnonzero(mask)).to(samples.device) for mask in (forget, ~forget)]
    draw = torch.Generator(samples.device).manual_seed(seed)
    anew = anew or partial(_with_new_weights, net)
    return METHODS[method](Task(net, samples, *rows, config=config or UnlearnConfig(), draw=draw, anew=anew)).eval()


def labelled(inputs: Inputs, labels: Int64[np.ndarray, " n"]) -> Labelled:
    """Put labels beside samples.

    Raises:
        ValueError: if there is not one for each.
    """
    if labels.shape != (len(inputs),):
        raise ValueError(f"`labels` must have one entry per sample, {len(inputs)}: got {labels.shape}.")
    return Labelled(inputs, torch.from_numpy(labels.astype(np.int64)).to(inputs.device))


def _with_new_weights(net: nn.Module, seed: int) -> nn.Module:
    """Return the same network as it would be before training.

    Raises:
        ValueError: a layer with weights that does not say how to draw them.
    """
    out = copy.deepcopy(net)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, module in out.named_modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
            elif next(module.parameters(recurse=False), None) is not None:
                raise ValueError(f"layer {name!r} of the network has weights that cannot be drawn anew.")
    return out


def _optimizer(net: nn.Module, rate: float, config: UnlearnConfig) -> tuple[torch.optim.SGD, Any]:
    """Return stochastic gradient descent whose rate rises over a hundredth of the steps, and falls to a fifth."""
    sgd = torch.optim.SGD(net.parameters(), lr=rate, momentum=config.momentum, weight_decay=config.weight_decay)
    warm, whole = max(1, config.steps // 100), 1.25 * config.steps
    return sgd, torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: min((step + 1) / warm, max(0.0, 1 - step / whole)))


def _step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _fit(net: nn.Module, task: Task, steps: int) -> None:
    net.train()
    sgd, schedule = _optimizer(net, task.config.rate, task.config.model_copy(update={"steps": steps}))
    for rows in task.batches(task.retained, steps):
        _step(sgd, task.loss(net, task.seen(rows), rows))
        schedule.step()


def _distilled(student: nn.Module, teacher: nn.Module, task: Task, rows: Rows) -> torch.Tensor:
    """Return SCRUB's loss: of the labels, and of the distance to the teacher."""
    batch, heat = task.seen(rows), task.config.scrub_temperature
    logits = task.samples.logits(student, batch)
    with torch.no_grad():
        taught = (task.samples.logits(teacher, batch) / heat).softmax(dim=1)
    apart = functional.kl_div((logits / heat).log_softmax(dim=1), taught, reduction="batchmean") * heat**2
    return functional.cross_entropy(logits, task.samples.targets(rows)) + task.config.scrub_distance * apart


def _importance(net: nn.Module, task: Task, rows: Rows) -> dict[str, torch.Tensor]:
    """Return the mean over batches of the squared slope of the loss in every weight."""
    names, parameters = zip(*((name, p) for name, p in net.named_parameters() if p.requires_grad), strict=True)
    total = [torch.zeros_like(p) for p in parameters]
    parts = rows.split(task.config.batch_size)
    for part in parts:
        loss = task.loss(net, task.samples.batch(part, None), part)
        for sum_, slope in zip(total, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            sum_ += 0 if slope is None else slope.square() / len(parts)
    return dict(zip(names, total, strict=True))


def _descended(
    loss: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor, stride: float, *, graph: bool = False
) -> torch.Tensor:
    """Return where a step down a loss leads; graph: as a function of where it began and of the weights."""
    start = at if graph else at.detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss(start), start, create_graph=graph)
    moved = start - stride * slope
    return moved if graph else moved.detach()

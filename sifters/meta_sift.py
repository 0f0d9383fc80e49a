"""Meta-Sift: which samples of a labelled set are surely clean?

Zeng et al. 2023 (USENIX Security, arXiv 2302.06279). A classifier that is trained on a part of the set does worst on
what is left out when the part is clean and the rest is not. So a small network psi gives every sample a weight, from
its loss alone, and is trained to make the loss of what it weighs *down* as high as it can be after a step on what it
weighs up. With the parameters of the classifier theta, losses L_i(theta), and batches of n samples, each round does

    1. virtual update   theta' = theta - alpha G(sum_i v_i g_i),  v = normalised psi(L(theta)), g_i the gradient of L_i
    2. samplers         G passes or stops the gradient of each of the last parameters: a gate is drawn by a network of
                        that gradient through a hard Gumbel softmax, and trained by its straight-through slope of 3
    3. meta-update      psi descends on  -sum_i u_i L_i(theta'),  u = normalised 1 - psi(L(theta'))      (equation 11)
    4. actual update    theta descends on  sum_i v_i L_i(theta)  with the updated psi

Several *sifters* learn so, differing in weights, order of samples and dilution. Then every sifter judges diluted copies
of every sample; the mean rank decides. What is ranked cleanest is clean; of the other end the method says little.

Where this differs from the released code, whose second step's gates are never trained, and whose psi begins with
slopes of random sign and on small sets keeps them (it then prefers poison):

- psi begins as the same weight for every sample, as the paper says, so that the first step decides its slope; its step
  is scaled to the number of rounds; a sifter whose psi still rises with the loss is left out, and counted. Where all is
  learned by heart psi stays flat: that sifter was trained plainly, and its losses count.
- The virtual update has a rate of its own.
- 3 is not differentiated through 1: with h the gradient of 3's objective at theta', the derivative is
  -alpha sum_i (dv_i / dpsi) <G h, g_i>, and one product of derivatives gives <G h, g_i> of all samples at once.
- All sifters are trained side by side, as one stacked network.
- Losses are divided by log(classes), so that psi's input does not depend on how many there are.
- Of features all views are trained on, where there are several, not the plain one alone, as of pictures: a head that
  learns one view by heart learns the poison with it, and first.
- What is averaged are ranks by loss (the mean of several diluted copies), not weights: these saturate, each sifter's at
  other losses, so that their mean is the opinion of the one that is steepest where the others say the same of all.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, Shaped
from scipy.stats import rankdata
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, stack_module_state
from torch.nn import functional

from tarsift.sifters.inputs import Features, Inputs, as_inputs
from tarsift.sifters.networks import build_network
from tarsift.sifters.result import SiftResult, State, check_labels
from tarsift.sifters.settings import MetaSiftConfig

FULL_ROUNDS = 390  # of a published run (CIFAR-10, batches of 128), for which psi's rate is meant
FEWEST_STEPS = 40  # of warm-up and of rounds: a small set is gone through more often than `epochs` says
STEPS_KEPT = 100  # at least, from one state that is saved to the next
TOTAL_WEIGHT = 1e-4  # weights of a batch that sum to less are not normalised

Parameters = dict[str, torch.Tensor]


class Weigher(nn.Sequential):
    """psi: a sample's loss to its logit of being weighed up; at first the same for every loss."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1))
        last: Any = self[2]
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, 2.0)

    def forward(self, losses: Float[torch.Tensor, " n"]) -> Float[torch.Tensor, " n"]:
        return super().forward(losses[:, None])[:, 0]


class Sampler(nn.Sequential):
    """gamma: one parameter's gradient, its rows standardised, to the logits of stopping and of passing it."""

    def __init__(self, rows: int) -> None:
        super().__init__(nn.Linear(rows, 128), nn.PReLU(), nn.Linear(128, 2))


class Stacked:
    """The same module several times, with weights of its own each, called side by side.

    Convolutions on a CPU are called one after the other, with channels last: grouped ones take longer there.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.parameters, self.buffers = stack_module_state(modules)  # pyright: ignore[reportArgumentType]
        self._shape = copy.deepcopy(modules[0]).to("meta")

    def __call__(
        self, parameters: Parameters, buffers: Parameters, batch: Shaped[torch.Tensor, "m b ..."]
    ) -> Float[torch.Tensor, "m b ..."]:
        def one(parameters: Parameters, buffers: Parameters, batch: torch.Tensor) -> torch.Tensor:
            return functional_call(self._shape, (parameters, buffers), (batch,))

        if batch.ndim > 3 and batch.device.type == "cpu":
            last = [rows.contiguous(memory_format=torch.channels_last) for rows in batch]
            return torch.stack([one(_part(parameters, i), _part(buffers, i), rows) for i, rows in enumerate(last)])
        return torch.vmap(one, randomness="different")(parameters, buffers, batch)

    def train(self, training: bool) -> None:
        self._shape.train(training)


def meta_sift(
    images: np.ndarray,
    labels: Int64[np.ndarray, " n"],
    *,
    config: MetaSiftConfig | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    on_step: Callable[[int, int], None] = lambda step, steps: None,
    state: State | None = None,
    save: Callable[[State], None] = lambda state: None,
) -> SiftResult:
    """Score how far each sample is from being surely clean.

    images: pictures uint8 (n, h, w, 3), or features (n, d) or (views, n, d), the plain view first; of an encoder that
    never saw this set. labels: given classes, 0 and up; those that do not occur do not matter. on_step: told the steps
    done and their number. save: given what there is after an epoch, unless that is soon after another; state: the last
    of these, of a run with the same arguments that was broken off. On a CPU the result is the same, bit for bit, as
    that of a run that was not.

    Returns a result whose `score` is a sample's mean rank over sifters, 0 = clean to 1; select by `clean_base_set`,
    which ranks within classes. `details`: `doubt`, the mean over sifters of 1 - weight, which the paper ranks by;
    `diluted_loss`, the mean loss of the same diluted copies. `facts`: `sifters_left_out`, which came to prefer high
    losses, and `sifters_undecided`, which weigh all losses alike.

    Raises:
        ValueError: shapes do not fit, there are fewer than two classes, or all sifters came to prefer high losses.
    """
    config = config or MetaSiftConfig()
    inputs = as_inputs(images, device)
    labels, classes = check_labels(labels, len(inputs))
    targets = torch.from_numpy(labels).to(inputs.device)
    team = _Team(inputs, targets, classes, config, seed)
    batch = min(config.batch_size, len(inputs))
    warmup, rounds = (_steps(epochs, len(inputs), batch) for epochs in (config.warmup_epochs, config.epochs))
    kept = team.restore(state) if state is not None else 0
    for done, rows in enumerate(team.orders(batch, warmup + rounds, first=kept), kept + 1):
        team.learn(rows) if done <= warmup else team.sift(rows)
        if done % (len(inputs) // batch) == 0 and kept + STEPS_KEPT <= done < warmup + rounds:
            kept = done
            save(team.state(done))
        on_step(done, warmup + rounds)
    losses = team.judge()
    doubt, slopes = team.weigh(losses)
    counted = slopes <= 0
    if not counted.any():
        raise ValueError(
            f"all of {config.sifters} sifters came to prefer high losses in {rounds} rounds: raise "
            "`epochs` or `weight_rate`, or use diluted_loss, which needs no training of weights."
        )
    ranks = rankdata(losses[counted], axis=1) / len(labels)
    return SiftResult(
        score=ranks.mean(axis=0).astype(np.float32),
        details={"doubt": doubt[counted].mean(axis=0), "diluted_loss": losses.mean(axis=0)},
        facts={"sifters_left_out": int((~counted).sum()), "sifters_undecided": int((slopes == 0).sum())},
    )


class _Team:
    """Sifters at work, side by side: classifiers, psi and samplers, each stacked m times."""

    def __init__(
        self, inputs: Inputs, targets: Int64[torch.Tensor, " n"], classes: int, config: MetaSiftConfig, seed: int
    ) -> None:
        self.inputs, self.targets, self.config = inputs, targets, config
        self.unit = math.log(classes)
        m = config.sifters
        seeds = [int(s) for s in np.random.SeedSequence([seed, 2302]).generate_state(m)]
        nets = [build_network(config.network, inputs.shape, classes, seed=s).to(inputs.device) for s in seeds]
        names = [name for name, _ in nets[0].named_parameters()]
        self.sampled = names[:-2][-config.sampled :] if config.sampled else []
        rows = {name: len(parameter) for name, parameter in nets[0].named_parameters()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds[0])
            weighers = [Weigher().to(inputs.device) for _ in range(m)]
            samplers = {name: [Sampler(rows[name]).to(inputs.device) for _ in range(m)] for name in self.sampled}
        self.classifier, self.weigher = Stacked(nets), Stacked([*weighers])
        self.samplers = {name: Stacked([*each]) for name, each in samplers.items()}
        rounds = _steps(config.epochs, len(inputs), min(config.batch_size, len(inputs)))
        faster = max(1.0, FULL_ROUNDS / rounds)
        self.classifier_steps = torch.optim.AdamW(
            self.classifier.parameters.values(), lr=config.rate, betas=(0.9, 0.95), weight_decay=0.05, fused=True
        )
        self.weigher_steps = torch.optim.SGD(self.weigher.parameters.values(), lr=config.weight_rate * faster)
        gates = [p for sampler in self.samplers.values() for p in sampler.parameters.values()]
        self.sampler_steps = (
            torch.optim.SGD(gates, lr=config.sampler_rate, momentum=0.9, nesterov=True) if gates else None
        )
        self.draw = torch.Generator(inputs.device).manual_seed(seeds[-1])

    def orders(self, batch: int, steps: int, *, first: int = 0) -> Iterator[Int64[torch.Tensor, "m b"]]:
        """Yield the rows of each step, from the first of an epoch; every sifter goes through all samples in its order.

        The order of an epoch is drawn when it begins.
        """
        n, m = len(self.inputs), self.config.sifters
        per_epoch = n // batch
        for step in range(first, steps):
            if step % per_epoch == 0:
                order = torch.stack(
                    [torch.randperm(n, generator=self.draw, device=self.inputs.device) for _ in range(m)]
                )
            start = step % per_epoch * batch
            yield order[:, start : start + batch]  # pyright: ignore[reportPossiblyUnboundVariable]

    def learn(self, rows: Int64[torch.Tensor, "m b"]) -> None:
        """Train the classifiers plainly."""
        losses = self._losses(self.classifier.parameters, self._batch(rows), self.targets[rows])
        self._descend(self.classifier_steps, losses.mean(dim=1).sum())

    def sift(self, rows: Int64[torch.Tensor, "m b"]) -> None:
        """Do one round: virtual update, samplers, meta-update, actual update."""
        batch, targets, theta = self._batch(rows), self.targets[rows], self.classifier.parameters
        losses = self._losses(theta, batch, targets)
        weighed_up = normalised(self._weights(losses.detach()))
        step, product = self._step(theta, batch, targets, losses, weighed_up)
        gates = self._gates(step)
        alpha = self.config.virtual_rate
        ahead = {
            name: (value - alpha * _along(gates.get(name), step[name])).detach().requires_grad_()
            for name, value in theta.items()
        }
        losses_ahead = self._losses(ahead, batch, targets, keep=False)
        weighed_down = normalised(1 - self._weights(losses_ahead.detach()))
        objective = -(weighed_down.detach() * losses_ahead).sum()
        slope = dict(zip(ahead, torch.autograd.grad(objective, list(ahead.values())), strict=True))
        along = product({name: _along(gates.get(name), slope[name]).detach() for name in slope})
        direct = -(weighed_down * losses_ahead.detach()).sum()
        self._descend(self.weigher_steps, direct - alpha * (weighed_up * along).sum())
        if self.sampler_steps is not None:
            worth = [(gates[name] * _products(slope[name], step[name])).sum() for name in self.sampled]
            self._descend(self.sampler_steps, -alpha * torch.stack(worth).sum())
        with torch.no_grad():
            again = normalised(self._weights(losses))
        self._descend(self.classifier_steps, (again * losses).sum())

    def _step(
        self,
        theta: Parameters,
        batch: torch.Tensor,
        targets: Int64[torch.Tensor, "m b"],
        losses: Float32[torch.Tensor, "m b"],
        weights: Float32[torch.Tensor, "m b"],
    ) -> tuple[Parameters, Callable[[Parameters], Float32[torch.Tensor, "m b"]]]:
        """Return the gradient of the weighted losses, and what gives the product of a direction and each sample's.

        That product is a derivative forward, along the direction, or a second one backward, of the gradient by the
        weights. Both are exact. Backward takes a fifth less of a round for features, forward half for convolutions.
        """
        backward = batch.ndim == 3
        weights = weights.detach().requires_grad_(backward)
        total = (weights * losses).sum()
        found = torch.autograd.grad(total, list(theta.values()), retain_graph=True, create_graph=backward)

        def product(direction: Parameters) -> Float32[torch.Tensor, "m b"]:
            if backward:
                return torch.autograd.grad(found, weights, list(direction.values()), retain_graph=True)[0]
            with torch.no_grad(), forward_ad.dual_level():
                dual = {name: forward_ad.make_dual(theta[name].detach(), direction[name]) for name in theta}
                along: Any = forward_ad.unpack_dual(self._losses(dual, batch, targets, keep=False))
                return along.tangent

        return dict(zip(theta, (each.detach() for each in found), strict=True)), product

    @property
    def _tensors(self) -> list[Parameters]:
        stacked = [self.classifier, self.weigher, *self.samplers.values()]
        return [tensors for each in stacked for tensors in (each.parameters, each.buffers)]

    @property
    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [steps for steps in (self.classifier_steps, self.weigher_steps, self.sampler_steps) if steps is not None]

    def state(self, done: int) -> State:
        """Return all that a later run needs to go on after so many steps, at the end of an epoch."""
        sink = io.BytesIO()
        steps = [optimizer.state_dict() for optimizer in self._optimizers]
        torch.save({"tensors": self._tensors, "steps": steps, "draw": self.draw.get_state()}, sink)
        return {"done": np.array(done), "team": np.frombuffer(sink.getvalue(), np.uint8)}

    def restore(self, state: State) -> int:
        """Take up a state that `state` gave; return the steps that were done."""
        kept = torch.load(io.BytesIO(state["team"].tobytes()), map_location=self.inputs.device, weights_only=True)
        with torch.no_grad():
            for mine, theirs in zip(self._tensors, kept["tensors"], strict=True):
                for name, value in mine.items():
                    value.copy_(theirs[name])
        for optimizer, steps in zip(self._optimizers, kept["steps"], strict=True):
            optimizer.load_state_dict(steps)
        self.draw.set_state(kept["draw"].cpu())
        return int(state["done"])

    @torch.no_grad()
    def judge(self) -> Float32[np.ndarray, "m n"]:
        """Return every sifter's mean loss of its own diluted copies of each sample."""
        self.classifier.train(False)
        n, m = len(self.inputs), self.config.sifters
        copies = self.config.dilutions if self.config.diluted else 1
        out = np.zeros((m, n), np.float32)
        for start in range(0, n, 512):
            rows = torch.arange(start, min(n, start + 512), device=self.inputs.device).expand(m, -1)
            for _ in range(copies):
                batch = self._batch(rows, diluted=self.config.diluted)
                losses = self._losses(self.classifier.parameters, batch, self.targets[rows])
                out[:, start : start + rows.shape[1]] += losses.cpu().numpy() / copies
        self.classifier.train(True)
        return out

    @torch.no_grad()
    def weigh(self, losses: Float32[np.ndarray, "m n"]) -> tuple[Float32[np.ndarray, "m n"], np.ndarray]:
        """Return 1 - weight of every sample by every sifter, and (m,) by how much its logits rise with the loss."""
        device = self.inputs.device
        ends = torch.from_numpy(np.quantile(losses, (0.05, 0.95), axis=1).T.astype(np.float32)).to(device)
        low, high = self._logits(ends).T.cpu().numpy()  # of weights that saturate, too, these differ
        given = self._logits(torch.from_numpy(losses).to(device))
        return torch.sigmoid(-given).cpu().numpy(), high - low

    def _batch(self, rows: Int64[torch.Tensor, "m b"], *, diluted: bool = False) -> torch.Tensor:
        flat = rows.reshape(-1)
        if diluted:
            batch = self.inputs.diluted(flat, self.draw)
        elif isinstance(self.inputs, Features):
            batch = self.inputs.augmented(flat, self.draw)
        else:
            batch = self.inputs.plain(flat)
        return batch.reshape(*rows.shape, *batch.shape[1:])

    def _losses(
        self, parameters: Parameters, batch: torch.Tensor, targets: Int64[torch.Tensor, "m b"], *, keep: bool = True
    ) -> Float32[torch.Tensor, "m b"]:
        """Return the loss of each sample, in units of log(classes); keep: let running means of the network follow."""
        buffers = self.classifier.buffers
        if not keep:
            buffers = {name: value.clone() for name, value in buffers.items()}
        logits = self.classifier(parameters, buffers, batch)
        return functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none") / self.unit

    def _logits(self, losses: Float32[torch.Tensor, "m b"]) -> Float32[torch.Tensor, "m b"]:
        return self.weigher(self.weigher.parameters, {}, losses)

    def _weights(self, losses: Float32[torch.Tensor, "m b"]) -> Float32[torch.Tensor, "m b"]:
        return torch.sigmoid(self._logits(losses))

    def _gates(self, step: Mapping[str, torch.Tensor]) -> dict[str, Float32[torch.Tensor, " m"]]:
        """Draw for each sampled parameter of each sifter whether its gradient passes: 1 or 0, differentiable."""
        gates = {}
        for name, sampler in self.samplers.items():
            rows = step[name].reshape(*step[name].shape[:2], -1).sum(dim=2)
            rows = (rows - rows.mean(dim=1, keepdim=True)) / (rows.std(dim=1, keepdim=True) + 1e-8)
            logits = sampler(sampler.parameters, {}, rows)
            noise = -torch.log(torch.empty_like(logits).exponential_(generator=self.draw))
            soft = torch.softmax((logits + noise) / 5.0, dim=1)[:, 1]
            gates[name] = (soft > 0.5).float() + soft - soft.detach()
        return gates

    @staticmethod
    def _descend(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _part(stacked: Parameters, i: int) -> Parameters:
    return {name: value[i] for name, value in stacked.items()}


def _steps(epochs: int, n: int, batch: int) -> int:
    return max(FEWEST_STEPS, epochs * (n // batch)) if epochs else 0


def normalised(weights: Float[torch.Tensor, "m b"]) -> Float[torch.Tensor, "m b"]:
    """Divide each row by its sum, unless that is next to nothing."""
    total = weights.sum(dim=1, keepdim=True)
    return weights / torch.where(total > TOTAL_WEIGHT, total, torch.ones_like(total))


def _along(gate: Float32[torch.Tensor, " m"] | None, values: Float[torch.Tensor, "m ..."]) -> torch.Tensor:
    """Multiply each sifter's part by its gate, where there is one."""
    return values if gate is None else values * gate.view(-1, *[1] * (values.ndim - 1))


def _products(a: Float[torch.Tensor, "m ..."], b: Float[torch.Tensor, "m ..."]) -> Float[torch.Tensor, " m"]:
    return (a * b).flatten(1).sum(dim=1)

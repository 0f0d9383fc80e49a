"""How sifters train a classifier on some rows of their inputs, and what it then says of all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import nn
from torch.nn import functional

from tarsift.sifters.inputs import Inputs, as_inputs
from tarsift.sifters.networks import build_network
from tarsift.sifters.result import check_labels
from tarsift.sifters.settings import FitConfig

ROWS = 1024  # judged at a time


class Learner:
    """A network and its optimiser: trained on some rows, it judges all.

    Convolutions run with channels last, on a GPU in bfloat16; losses, and what is judged by, are float32 everywhere.
    """

    def __init__(self, net: nn.Module, inputs: Inputs, targets: Int64[torch.Tensor, " n"], config: FitConfig) -> None:
        self.on_gpu = inputs.device.type == "cuda"
        self.net = net.to(inputs.device)
        self.net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.inputs, self.targets, self.config = inputs, targets, config
        self.optimizer = torch.optim.SGD(
            net.parameters(), lr=config.rate, momentum=config.momentum, weight_decay=config.weight_decay
        )

    def fit(self, rows: Int64[torch.Tensor, " s"], *, epochs: int, draw: torch.Generator) -> None:
        """Train on rows, in an order drawn anew for every epoch, with augmentation."""
        self.net.train()
        for _ in range(epochs):
            for batch in batches_of(rows, self.config.batch_size, draw):
                logits = self(self.inputs.augmented(batch, draw))
                loss = functional.cross_entropy(logits, self.targets[batch])
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()

    def __call__(self, batch: Float32[torch.Tensor, "b ..."]) -> Float32[torch.Tensor, "b c"]:
        """Return the logits of a batch, in the state in which the network is."""
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=self.on_gpu):
            return self.net(batch).float()

    @torch.no_grad()
    def judge(
        self, rows: Int64[torch.Tensor, " s"], draw: torch.Generator | None = None
    ) -> Float32[torch.Tensor, "s c"]:
        """Return the logits of rows as they are, or of diluted copies drawn for them."""
        self.net.eval()
        parts = [
            self(self.inputs.plain(part) if draw is None else self.inputs.diluted(part, draw))
            for part in rows.split(ROWS)
        ]
        return torch.cat(parts) if parts else torch.empty(0, 0, device=rows.device)

    def losses(
        self, rows: Int64[torch.Tensor, " s"], draw: torch.Generator | None = None
    ) -> Float32[torch.Tensor, " s"]:
        """Return the loss of each of the rows, as they are or diluted."""
        return functional.cross_entropy(self.judge(rows, draw), self.targets[rows], reduction="none")


class LabelledSet:
    """A labelled set on a device, the learners that are trained on it, and the random state all of it draws from.

    labels: (n,) renumbered without gaps; targets: the same on the device; rows: 0 to n - 1 on the device.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: Int64[np.ndarray, " n"],
        *,
        network: str | None,
        fit: FitConfig,
        seed: int,
        device: str | torch.device,
    ) -> None:
        """Take what `as_inputs` takes; raises as that and `check_labels` do."""
        self.inputs: Inputs = as_inputs(images, device)
        self.labels, self.classes = check_labels(labels, len(self.inputs))
        self.targets = torch.from_numpy(self.labels).to(self.inputs.device)
        self.rows = torch.arange(len(self.inputs), device=self.inputs.device)
        self.draw = torch.Generator(self.inputs.device).manual_seed(seed)
        self.seed = seed
        self._network, self._fit, self._learners = network, fit, 0

    def state(self) -> dict[str, np.ndarray]:
        """Return the random state, and how many learners there have been."""
        return {"draw": self.draw.get_state().numpy(), "learners": np.array(self._learners)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take up a state that `state` gave."""
        self.draw.set_state(torch.from_numpy(state["draw"].copy()))
        self._learners = int(state["learners"])

    def fresh(self) -> Learner:
        """Return a learner whose network is seeded by the set's seed and the number of those before it."""
        seed = int(np.random.SeedSequence([self.seed, self._learners]).generate_state(1)[0])
        self._learners += 1
        net = build_network(self._network, self.inputs.shape, self.classes, seed=seed)
        return Learner(net, self.inputs, self.targets, self._fit)


def batches_of(
    rows: Int64[torch.Tensor, " s"], batch_size: int, draw: torch.Generator
) -> Iterator[Int64[torch.Tensor, " b"]]:
    """Yield all rows in random order, in batches as even as can be of at most `batch_size`, at least two of them.

    A set is never left out because it is smaller than a batch, and no batch has a single row, which normalisation by
    batch cannot take; of three rows or fewer there is one batch.
    """
    shuffled = rows[torch.randperm(len(rows), generator=draw, device=rows.device)]
    count = max(-(-len(rows) // batch_size), min(2, len(rows) // 2), 1)
    yield from (part for part in shuffled.tensor_split(count) if len(part))

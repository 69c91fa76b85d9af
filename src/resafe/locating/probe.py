"""NeuroStrike's and NeST's detector: the weights of linear probes that tell harmful prompts from harmless ones.

NeuroStrike, Wu et al., https://arxiv.org/abs/2509.11864, and NeST, Behrouzi et al.,
https://arxiv.org/abs/2602.16835. The raw outputs of gate and of up are two populations in each layer. For each,
with x the maximum over a prompt's tokens and y = 1 for a harmful one::

    w, b = argmin  BCE(σ(w·x + b), y)            Adam, 5,000 steps on all prompts at once, weight decay
    selected  =  { j : |z_j| > τ  and  w_j > 0 },   z = (w - mean w) / std w   over the layer's neurons

That is NeuroStrike's code. NeST's is not public; of the same group, it standardises the weights of such a probe
and clusters the selected neurons by the similarity of their activations. Standardised inputs, which make
weights of unlike neurons comparable, are our reading of it.
A routed expert has probes of its own, trained on the prompts that reach it.
Beware: a neuron that tells the prompts apart by a wide margin needs but a small weight, so that a probe on raw
outputs can rank it below neurons that hardly differ; standardised outputs suffer less from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from resafe.errors import UserError
from resafe.locating.base import Found, Locate, Values, score
from resafe.locating.observe import Observer, Rows
from resafe.model.parts import FeedForward
from resafe.neurons import NeuronScores, NeuronSet, Site
from resafe.registry import Badge, Need, method

Map = Literal["gate", "up"]
_ROWS: dict[Map, Rows] = {"gate": Rows("gate", "max"), "up": Rows("up", "max")}
_AT_ONCE = 1 << 27  # entries of probes' inputs that are trained on together
_FEWEST = 4  # neurons that are worth clusters


@dataclass(frozen=True)
class Task:
    """One probe to train.

    Attributes:
        part: the part whose neurons it reads.
        where: their gate's or up's outputs.
        expert: of which routed expert; None for a dense part.
        inputs: (prompts, width).
        labels: (prompts,), 1 for a harmful prompt.
    """

    part: str
    where: Map
    expert: int | None
    inputs: Tensor
    labels: Tensor


@method(
    "neurostrike",
    verb="locate",
    title="NeuroStrike: weights of a linear probe",
    badge=Badge.EXACT,
    paper="https://arxiv.org/abs/2509.11864",
    needs=frozenset({Need.HARMFUL, Need.BENIGN}),
)
@dataclass(frozen=True)
class NeuroStrike(Locate):
    """Choose neurons whose weight in a probe of their layer stands out, towards harmful.

    The score is ``|z|`` with the sign of the weight, of gate and up the larger one.

    Attributes:
        threshold: τ (paper: 3).
        site: ``gate``, ``up``, or ``both`` for neurons selected by either.
        standardise: give each input mean 0 and deviation 1 over the prompts before.
        steps: of Adam.
        rate: Adam's learning rate.
        decay: its weight decay.
        seed: of the order of the prompts and of the first weights.
        min_prompts: an expert that fewer prompts of either kind reach has no score.
    """

    resampled: ClassVar[bool] = False  # a half costs as much training as the whole

    threshold: float = 3.0
    site: Literal["gate", "up", "both"] = "both"
    standardise: bool = False
    steps: int = 5000
    rate: float = 1e-3
    decay: float = 1e-3
    seed: int = 1234
    min_prompts: int = 2

    def place(self) -> Site:
        """Return the chosen site."""
        return Site.FFN if self.site == "both" else Site(self.site)

    def observers(self) -> tuple[Observer, ...]:
        """Look at the largest output of each neuron over a prompt."""
        return tuple(_ROWS[where] for where in self.maps)

    @property
    def maps(self) -> tuple[Map, ...]:
        """Which outputs are probed."""
        return ("gate", "up") if self.site == "both" else (self.site,)

    def scores(self, found: Found) -> Values:
        """Return the signed ``|z|``."""
        values: Values = {}
        probes = self.probes(found)
        if not probes:
            raise UserError(f"no part of {found.bench.layout.architecture} has a gate; give site=up")
        for (name, where), weights in probes.items():
            z = zscores(weights).abs() * torch.where(weights > 0, 1.0, -1.0)
            values[name] = score(torch.maximum(values[name], z) if name in values else z)
            chosen = int((z > self.threshold).sum())
            found.details[where] = chosen + int(str(found.details.get(where, 0)))
        return values

    def probes(self, found: Found) -> dict[tuple[str, Map], Tensor]:
        """Train the probes; returns their weights, of the part's shape, NaN where prompts are too few."""
        places = [(p, w) for p in found.parts for w in self.maps if w == "up" or p.gated]
        weights = {(part.name, where): torch.full(part.shape, torch.nan) for part, where in places}
        tasks = (task for part, where in places for task in self.tasks(found, part, where))
        for _, same in groupby(tasks, lambda task: task.inputs.shape[1]):
            for some in _packed(same):
                for task, trained in zip(some, self._train(some, found.bench.loaded.device), strict=True):
                    whole = weights[task.part, task.where]
                    (whole if task.expert is None else whole[task.expert]).copy_(trained)
        return weights

    def tasks(self, found: Found, part: FeedForward, where: Map) -> Iterator[Task]:
        """Yield the probes of a part (one for each expert) that have enough prompts."""
        seen = [found.entry(_ROWS[where], group, part.name) for group in ("harmful", "benign")]
        rows, experts = (torch.cat([entry[key] for entry in seen]) for key in ("rows", "experts"))
        labels = torch.cat([torch.full((len(e["rows"]),), y) for e, y in zip(seen, (1.0, 0.0), strict=True)])
        for expert in range(part.experts or 1):
            mine = experts == (-1 if part.experts is None else expert)
            kinds = torch.unique(labels[mine], return_counts=True)[1].tolist()
            if len(kinds) == 2 and min(kinds) >= self.min_prompts:
                inputs = standardised(rows[mine]) if self.standardise else rows[mine]
                yield Task(part.name, where, None if part.experts is None else expert, inputs, labels[mine])

    def _train(self, tasks: Sequence[Task], device: torch.device) -> Tensor:
        """Train probes of one width side by side; returns their weights (tasks, width)."""
        most, width = max(len(task.labels) for task in tasks), tasks[0].inputs.shape[1]
        inputs = torch.zeros(len(tasks), most, width)
        labels, share = torch.zeros(2, len(tasks), most)  # a row of no prompt has no share in the loss
        weight, bias = torch.empty(len(tasks), width), torch.empty(len(tasks), 1)
        for place, task in enumerate(tasks):
            count = len(task.labels)
            # The draws of torch.manual_seed, torch.randperm and torch.nn.Linear, in this order.
            generator = torch.Generator().manual_seed(self.seed)
            order = torch.randperm(count, generator=generator)
            nn.init.kaiming_uniform_(weight[place : place + 1], a=5**0.5, generator=generator)
            bias[place].uniform_(-(width**-0.5), width**-0.5, generator=generator)
            inputs[place, :count], labels[place, :count] = task.inputs[order], task.labels[order]
            share[place, :count] = 1 / count
        inputs, labels, share = (tensor.to(device) for tensor in (inputs, labels, share))
        w, b = nn.Parameter(weight.to(device)), nn.Parameter(bias.to(device))
        adam = torch.optim.Adam([w, b], lr=self.rate, weight_decay=self.decay)
        with torch.no_grad():
            for _ in range(self.steps):
                error = ((inputs @ w[..., None])[..., 0].add_(b).sigmoid_() - labels) * share
                w.grad = (error[:, None] @ inputs)[:, 0]  # of the binary cross-entropy
                b.grad = error.sum(1, keepdim=True)
                adam.step()
        return w.detach().cpu()

    def choose(self, scores: NeuronScores) -> NeuronSet:
        """Choose the scores above the threshold."""
        return scores.above(self.threshold)


@method(
    "nest",
    verb="locate",
    title="NeST: a probe's neurons, in clusters",
    badge=Badge.RECONSTRUCTION,
    paper="https://arxiv.org/abs/2602.16835",
    needs=frozenset({Need.HARMFUL, Need.BENIGN}),
)
@dataclass(frozen=True)
class NeST(NeuroStrike):
    """Choose neurons by a probe on standardised outputs, and cluster those that are active on the same prompts.

    The clusters are in the scores' details: by part, the positions of each cluster's neurons in the flat part.

    Attributes:
        threshold: τ.
        site: ``gate``, ``up``, or ``both`` for neurons selected by either.
        standardise: give each input mean 0 and deviation 1 over the prompts before.
        steps: of Adam.
        rate: Adam's learning rate.
        decay: its weight decay.
        seed: of the order of the prompts, of the first weights and of k-means.
        min_prompts: an expert that fewer prompts of either kind reach has no score.
        clusters: the most clusters of a part (of an expert) that are tried; 1 makes one of all.
    """

    standardise: bool = True
    clusters: int = 8

    def scores(self, found: Found) -> Values:
        """Return the signed ``|z|``, and cluster what is above the threshold."""
        values = super().scores(found)
        masks = {name: numbers > self.threshold for name, numbers in values.items()}
        found.details["clusters"] = {
            name: [labels.flatten().eq(c).nonzero()[:, 0].tolist() for c in range(int(labels.max()) + 1)]
            for name, labels in self.clustered(found, masks).items()
        }
        return values

    def clustered(self, found: Found, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return each chosen neuron's cluster, int64 of the part's shape; -1 where none was chosen.

        Two neurons are alike whose outputs correlate over the prompts; those of two experts share no cluster.
        """
        found_clusters: dict[str, Tensor] = {}
        for part in found.parts:
            if part.name not in masks or not bool(masks[part.name].any()):
                continue
            labels = torch.full(part.shape, -1)
            tasks = [t for w in self.maps if w == "up" or part.gated for t in self.tasks(found, part, w)]
            for expert in dict.fromkeys(task.expert for task in tasks):
                at = masks[part.name] if expert is None else masks[part.name][expert]
                if bool(at.any()):
                    seen = [standardised(task.inputs)[:, at].T for task in tasks if task.expert == expert]
                    alike = cluster(torch.cat(seen, dim=1), self.clusters, self.seed)
                    (labels if expert is None else labels[expert])[at] = alike + labels.max() + 1
            found_clusters[part.name] = labels
        return found_clusters


def zscores(weights: Tensor) -> Tensor:
    """Return ``(w - mean) / std`` over the neurons of a probe, the standard deviation with n below it."""
    centred = weights - weights.mean(-1, keepdim=True)
    return centred / weights.std(-1, correction=0, keepdim=True)


def standardised(rows: Tensor) -> Tensor:
    """Give each column of (prompts, width) mean 0 and deviation 1; 0 where it does not vary."""
    centred = rows - rows.mean(0)
    deviation = rows.std(0, correction=0)
    return torch.where(deviation > 0, centred / deviation, 0.0)


def cluster(points: Tensor, most: int, seed: int) -> Tensor:
    """Cluster points (n, features) by k-means, as many clusters as have the best silhouette.

    Args:
        points: what to cluster; fewer than four are one cluster.
        most: the most clusters to try, from 2.
        seed: of the first centres.

    Raises:
        UserError: scikit-learn is not installed.
    """
    best, labels = -torch.inf, torch.zeros(len(points), dtype=torch.int64)
    distinct = len(torch.unique(points, dim=0))
    if len(points) < _FEWEST or most < 2 or distinct < 2:
        return labels
    try:
        from sklearn.cluster import KMeans
        from sklearn.metrics import silhouette_score
    except ImportError as error:
        raise UserError(
            "nest clusters neurons with scikit-learn: pip install 'resafe[learn]', or give clusters=1"
        ) from error
    for count in range(2, min(most, distinct, len(points) - 1) + 1):
        tried = KMeans(count, n_init=10, random_state=seed).fit_predict(points.numpy())
        silhouette = float(silhouette_score(points.numpy(), tried))
        if silhouette > best:
            best, labels = silhouette, torch.from_numpy(tried).long()
    return labels


def _packed(tasks: Iterator[Task]) -> Iterator[list[Task]]:
    """Yield as many tasks at a time as fit into memory side by side."""
    pack: list[Task] = []
    for task in tasks:
        most = max(len(t.labels) for t in (*pack, task))
        if pack and (len(pack) + 1) * most * task.inputs.shape[1] > _AT_ONCE:
            yield pack
            pack = []
        pack.append(task)
    if pack:
        yield pack

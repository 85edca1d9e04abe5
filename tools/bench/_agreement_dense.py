"""Influence estimators from dense per-sample gradients: short, slow, and independent of the package's own code.

Every preconditioner acts on the queries' gradients: `g_i^T H^-1 v = <g_i, H^-1 v>`. Gradients are those of summed token
losses. Formulas: Kwon et al. 2024 (DataInf), Martens and Grosse 2015 (K-FAC), George et al. 2018 (EK-FAC), Grosse et
al. 2023 (its use and damping here).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from cheapertraining.influence.losses import IGNORED, token_losses
from cheapertraining.influence.model_access import model_logits, unit_losses
from tools.bench._agreement_tasks import Batch

__all__ = [
    "Gradients",
    "Kronecker",
    "cosine",
    "datainf",
    "dot",
    "earlier_formula",
    "gauss_newton",
    "gradients",
    "kronecker",
    "layer_fisher",
    "layer_scale",
    "references",
    "sampled_labels",
]

Gradients = dict[str, Tensor]
"""By parameter name, `[N, *shape]`: of each sample's summed token loss."""


def gradients(model: nn.Module, batch: Batch) -> Gradients:
    """Of each row of the batch."""

    def loss(values: Gradients, row: Batch) -> Tensor:
        return unit_losses(model, {name: x[None] for name, x in row.items()}, "sample", values)[0].sum()

    values = {name: p.detach() for name, p in model.named_parameters()}
    found: Gradients = vmap(grad(loss), in_dims=(None, 0))(values, batch)
    return found


def flat(part: Gradients) -> Tensor:
    """`[N, P]`."""
    return torch.cat([value.flatten(1) for value in part.values()], dim=1)


def dot(train: Gradients, query: Gradients) -> Tensor:
    """Inner products, `[N, Q]`."""
    return flat(train) @ flat(query).T


def cosine(train: Gradients, query: Gradients) -> Tensor:
    """Cosines of the angles, `[N, Q]`."""
    return nn.functional.normalize(flat(train)) @ nn.functional.normalize(flat(query)).T


def earlier_formula(train: Gradients, query: Gradients, damping: float = 1e-4) -> Tensor:
    """What an earlier package called DataInf: the sample itself is all of the Fisher matrix, `[N, Q]`."""
    return dot(train, query) / (damping + flat(train).square().sum(dim=1, keepdim=True))


def lambdas(train: Gradients, scale: float = 0.1) -> dict[str, float]:
    """Damping of each tensor by DataInf's rule: a tenth of the mean square of its gradients' entries."""
    return {name: scale * float(value.square().mean()) for name, value in train.items()}


def layer_scale(train: Gradients, query: Gradients) -> Gradients:
    """Queries over DataInf's damping of each tensor."""
    return {name: query[name] / damping for name, damping in lambdas(train).items()}


def datainf(train: Gradients, query: Gradients, scale: float = 0.1) -> Gradients:
    """Mean over the samples of the inverse of each one's own damped Fisher matrix, times the queries."""
    result = {}
    for name, damping in lambdas(train, scale).items():
        g, v = train[name].flatten(1), query[name].flatten(1)
        share = (v @ g.T) / (damping + g.square().sum(dim=1))
        result[name] = ((v - share @ g / len(g)) / damping).view_as(query[name])
    return result


def layer_fisher(train: Gradients, query: Gradients, scale: float = 0.1) -> Gradients:
    """Inverse of each tensor's own damped empirical Fisher matrix (what DataInf approximates), by Woodbury."""
    result = {}
    for name, damping in lambdas(train, scale).items():
        g, v = train[name].flatten(1), query[name].flatten(1)
        small = len(g) * damping * torch.eye(len(g), dtype=g.dtype) + g @ g.T
        result[name] = ((v - torch.linalg.solve(small, g @ v.T).T @ g) / damping).view_as(query[name])
    return result


def gauss_newton(model: nn.Module, batch: Batch, damping: Callable[[Tensor], float], query: Gradients) -> Gradients:
    """Queries times the inverse of the exact damped Gauss-Newton matrix of the mean loss, `[P, P]`, of a classifier.

    Args:
        model: with one loss-counting token a row.
        batch: rows that the matrix is the mean over.
        damping: from the matrix, what is added to its diagonal.
        query: what to apply it to.
    """
    target = batch["labels"][:, 1]
    with torch.no_grad():
        chances = torch.softmax(model(batch).logits[:, 0], dim=-1)
    parts = []
    for label in range(chances.shape[1]):
        labels = torch.stack([torch.full_like(target, IGNORED), torch.full_like(target, label)], dim=1)
        parts.append(flat(gradients(model, {**batch, "labels": labels})) * chances[:, label, None].sqrt())
    factor = torch.cat(parts)
    matrix = factor.T @ factor / len(target)
    matrix.diagonal().add_(damping(matrix))
    solved = torch.linalg.solve(matrix, flat(query).T).T
    sizes = [value[0].numel() for value in query.values()]
    return {name: part.view_as(query[name]) for name, part in zip(query, solved.split(sizes, dim=1), strict=True)}


def sampled_labels(model: nn.Module, batch: Batch, seed: int) -> Batch:
    """The batch with labels drawn from the model's own predictions: their gradients make the true Fisher matrix."""
    with torch.no_grad():
        chances = torch.softmax(model_logits(model, batch)[:, :-1], dim=-1).flatten(0, 1)
    drawn = torch.multinomial(chances, 1, generator=torch.Generator().manual_seed(seed)).view_as(batch["labels"][:, 1:])
    labels = batch["labels"].clone()
    labels[:, 1:] = torch.where(labels[:, 1:] == IGNORED, labels[:, 1:], drawn)
    return {**batch, "labels": labels}


def references(model: nn.Module, train: Batch, query: Batch) -> dict[str, Tensor]:
    """Scores `[N, Q]` by the package's names of the same estimators, for models in float64."""
    of_train, of_query = gradients(model, train), gradients(model, query)
    drawn = sampled_labels(model, train, 0)
    fisher, given = kronecker(model, drawn, corrected=True), kronecker(model, train, corrected=True)
    preconditioned = {
        "layer_scale": layer_scale(of_train, of_query),
        "datainf": datainf(of_train, of_query),
        "kfac": kronecker(model, drawn, corrected=False).apply(of_query),
        "ekfac": fisher.apply(of_query),
        "ekfac, damping 0.01": fisher.apply(of_query, 0.01),
        "ekfac, given labels": given.apply(of_query),
    }
    return {
        "dot": dot(of_train, of_query),
        "cosine": cosine(of_train, of_query),
        "earlier formula": earlier_formula(of_train, of_query),
        **{name: dot(of_train, solved) for name, solved in preconditioned.items()},
    }


@dataclass(frozen=True)
class Kronecker:
    """Eigenbases and curvature of each weight; of a parameter of another kind, the mean square of its gradients.

    Attributes:
        bases: by weight name, eigenvectors of the output gradients' and of the inputs' second moment.
        curvature: by name, in those bases, of the parameter's shape.
    """

    bases: dict[str, tuple[Tensor, Tensor]]
    curvature: dict[str, Tensor]

    def apply(self, query: Gradients, damping: float = 0.1) -> Gradients:
        """Queries times the inverse, damped by a share of each parameter's mean curvature."""
        result = {}
        for name, value in query.items():
            scale = self.curvature[name] + damping * self.curvature[name].mean()
            if name in self.bases:
                left, right = self.bases[name]
                result[name] = left @ ((left.T @ value @ right) / scale) @ right.T
            else:
                result[name] = value / scale
        return result


def kronecker(model: nn.Module, batch: Batch, *, corrected: bool) -> Kronecker:
    """K-FAC, or (corrected) EK-FAC, from the labels that the batch has."""
    moments = {name: _moments(a, b) for name, (a, b) in _seen(model, batch).items()}
    per_sample = gradients(model, batch)
    tokens = batch["labels"][:, 1:].ne(IGNORED).sum().item() / len(batch["labels"])
    bases, curvature = {}, {}
    for name, value in per_sample.items():
        if name not in moments:
            curvature[name] = value.square().mean(dim=0)
            continue
        (left_values, left), (right_values, right) = moments[name]
        bases[name] = left, right
        exact = (left.T @ value @ right).square().mean(dim=0)
        curvature[name] = exact if corrected else tokens * left_values[:, None] * right_values
    return Kronecker(bases, curvature)


def _moments(a: Tensor, b: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    left = torch.linalg.eigh((b.T @ b / len(b)).double())
    right = torch.linalg.eigh((a.T @ a / len(a)).double())
    return tuple(left), tuple(right)


def _seen(model: nn.Module, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and output gradients of each matrix, over tokens with a loss, `[T, d]` and `[T, p]`."""
    matrices = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    caught: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            output.retain_grad()
            caught[name] = inputs[0].detach(), output

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in matrices.items()]
    losses, counted = token_losses(model_logits(model, batch), batch["labels"])
    losses.sum().backward()
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)
    result = {}
    for name, (a, output) in caught.items():
        module = matrices[name]
        wide = a if isinstance(module, nn.Linear) else nn.functional.one_hot(a, module.num_embeddings).to(output.dtype)
        left, right = output.grad[counted], wide[counted]
        # An embedding's weight is [inputs, outputs], a linear layer's the other way round.
        result[f"{name}.weight"] = (right, left) if isinstance(module, nn.Linear) else (left, right)
    return result

"""Sites: the places in a model where a selected parameter meets data, and what kind of place each is.

A parameter may have several sites (a tied embedding has two). Seen from a site, the gradient of a sample's loss is a
sum over the sample's tokens of a simple form in what goes in (``a``) and the gradient of what comes out (``b``):

    linear      weight [p, d]: sum_t b_t a_t^T        bias [p]: sum_t b_t
    conv1d      weight [d, p]: sum_t a_t b_t^T        bias [p]: sum_t b_t       (Hugging Face's, GPT-2)
    embedding   weight [V, d]: sum_t e(token_t) b_t^T
    elementwise any shape broadcast over tokens (norm weights and biases): sum_t db_t, from the expanded parameter
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from cheapertraining.errors import UserError
from cheapertraining.influence.parameters import canonical_name

__all__ = ["Kind", "Site", "find_sites"]

Kind = Literal["linear", "conv1d", "embedding", "elementwise"]


@dataclass(frozen=True)
class Site:
    """One module that uses selected parameters.

    Attributes:
        name: canonical name of the module.
        module: the module itself.
        kind: how it uses them.
        parameters: the module's own name of each selected parameter (``"weight"``) to its canonical name; of a tied
            parameter, the name under which it was selected.
    """

    name: str
    module: nn.Module
    kind: Kind
    parameters: dict[str, str]


def find_sites(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[Site]:
    """Every site of ``parameters``, in the order of ``model.named_modules()``.

    Raises:
        UserError: a parameter belongs to a module of a kind that is not known here.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    sites = []
    for raw, module in model.named_modules():
        own = {key: names[id(p)] for key, p in module.named_parameters(recurse=False) if id(p) in names}
        if own:
            sites.append(Site(canonical_name(raw), module, _kind(canonical_name(raw), module), own))
    return sites


def _kind(name: str, module: nn.Module) -> Kind:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        for setting in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(module, setting):
                raise UserError(
                    f"influence: expected an embedding without {setting}, with which gradients are no sums over "
                    f"tokens, found '{name}'. Leave it out with `layers`, or use the forward scorer."
                )
        return "embedding"
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers': told by name, not imported
        return "conv1d"
    over_tokens = (nn.GroupNorm, nn.modules.batchnorm._NormBase)  # statistics over more than a token
    flat = all(parameter.dim() == 1 for parameter in module.parameters(recurse=False))
    if flat and "Norm" in type(module).__name__ and not isinstance(module, over_tokens):
        return "elementwise"
    raise UserError(
        f"influence: expected Linear, Embedding, Conv1D or norm layers, found {type(module).__name__} at '{name}'. "
        "Leave it out with `layers`, or use the forward scorer, which takes any model."
    )

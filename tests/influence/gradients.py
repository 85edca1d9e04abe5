"""Small models of each kind, and gradients of their units by autograd alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from cheapertraining.influence.losses import token_losses
from cheapertraining.influence.parameters import Directions, select_parameters
from tests.influence.tiny_llama import LENGTH, VOCABULARY, Batch, random_batch, tiny_llama


def tiny_gpt2(seed: int = 0, dtype: torch.dtype = torch.float64, *, tied: bool = True) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=LENGTH,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config).to(dtype)


def build(kind: str, dtype: torch.dtype = torch.float64, *, tied: bool = False, lora: bool = False) -> nn.Module:
    model: PreTrainedModel = (tiny_llama if kind == "llama" else tiny_gpt2)(dtype=dtype, tied=tied)
    if not lora:
        return model.eval()
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "down_proj"] if kind == "llama" else ["c_attn", "mlp.c_proj"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, fan_in_fan_out=kind == "gpt2"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero at first, which would make A's gradients zero
            nn.init.normal_(parameter, std=0.3)
    return adapted.to(dtype).eval()


def plain_batch(count: int, seed: int) -> Batch:
    """One document a row, no padding, no positions."""
    tokens = torch.randint(0, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens, "labels": tokens.clone()}


def batch_of(packed: bool, count: int = 4, seed: int = 3) -> Batch:
    return random_batch(count, seed) if packed else plain_batch(count, seed)


def directions_for(model: nn.Module, count: int = 3, layers: str = "all") -> Directions:
    generator = torch.Generator().manual_seed(5)
    tensors = {
        name: torch.randn(count, *parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        for name, parameter in select_parameters(model, layers).items()
    }
    return Directions(tuple(str(k) for k in range(count)), tensors)


def losses_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Token losses ``[B, S]`` of a Hugging Face model."""
    inputs = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
    return token_losses(model(**inputs, use_cache=False).logits, batch["labels"])[0]


def unit_gradients(model: nn.Module, batch: Batch, names: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """``[B, *shape]`` by parameter: the Jacobian of the samples' losses, by ``torch.func``."""
    parameters = dict(model.named_parameters())
    canonical = {name: select_parameters(model)[name] for name in names}
    raw = {name: next(key for key, p in parameters.items() if p is canonical[name]) for name in names}

    def losses(values: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
        logits = torch.func.functional_call(
            model, {raw[name]: value for name, value in values.items()}, (), {**inputs, "use_cache": False}
        ).logits
        return token_losses(logits, batch["labels"])[0].sum(1)

    return torch.func.jacrev(losses)({name: parameter.detach() for name, parameter in canonical.items()})


def products(gradients: Mapping[str, torch.Tensor], directions: Directions) -> torch.Tensor:
    return sum(
        torch.einsum("n...,k...->nk", gradients[name].double(), tensor.double())
        if tensor.dim() > 1
        else gradients[name].double()[:, None] * tensor.double()[None]
        for name, tensor in directions.tensors.items()
    )


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())

"""The model: isolation of packed documents, loss by sample, loading, shapes, and its life inside Composer."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaForCausalLM, PreTrainedModel

from cheapertraining.config import ModelConfig
from cheapertraining.errors import UserError
from cheapertraining.models import CausalLM, TokenCrossEntropy, build_causal_lm
from cheapertraining.models.causal_lm import attention_for, isolation_of

PRESETS = Path(__file__).parents[2] / "yamls" / "model"


def _document(length: int, seed: int) -> list[int]:
    return torch.randint(1, 64, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def _gpt2(attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def _models(tiny: ModelConfig) -> dict[str, CausalLM]:
    return {
        "llama-sdpa": build_causal_lm(replace(tiny, attention="sdpa"), 64),
        "llama-eager": build_causal_lm(replace(tiny, attention="eager"), 64),
        "gpt2-sdpa": CausalLM(_gpt2("sdpa")),
        "gpt2-eager": CausalLM(_gpt2("eager")),
    }


@pytest.mark.parametrize("name", ["llama-sdpa", "llama-eager", "gpt2-sdpa", "gpt2-eager"])
def test_packed_documents_do_not_see_each_other(tiny: ModelConfig, pack: Any, name: str) -> None:
    model = _models(tiny)[name].eval()
    first, second, third = _document(7, 1), _document(5, 2), _document(1, 3)
    with torch.no_grad():
        packed = model(pack([[first, second, third]], 16))["logits"][0]
        other = model(pack([[_document(7, 9), second, third]], 16))["logits"][0]
        alone = [model(pack([[document]], len(document)))["logits"][0] for document in (first, second, third)]
    assert torch.equal(packed[7:], other[7:])
    assert not torch.equal(packed[:7], other[:7])
    for start, logits in zip((0, 7, 12), alone, strict=True):
        torch.testing.assert_close(packed[start : start + len(logits)], logits, atol=3e-6, rtol=0)


def test_a_mask_of_ones_in_the_batch_does_not_switch_isolation_off(tiny: ModelConfig, pack: Any) -> None:
    model = build_causal_lm(tiny, 64).eval()
    batch = pack([[_document(7, 1), _document(5, 2)]], 12)
    masked = batch | {"attention_mask": torch.ones(1, 12, dtype=torch.int64)}
    assert torch.equal(model(batch)["logits"], model(masked)["logits"])
    # The trap this guards against: transformers itself, given that mask, lets the second document see the first.
    plain = {name: masked[name] for name in ("input_ids", "position_ids", "attention_mask")}
    assert (model.model(**plain, use_cache=False).logits - model(batch)["logits"]).abs().max() > 1e-3


def test_padding_changes_neither_loss_nor_gradient(tiny: ModelConfig, pack: Any) -> None:
    documents = [_document(7, 1), _document(5, 2)]
    gradients, losses = [], []
    for length in (12, 20):
        model = build_causal_lm(tiny, 64)
        batch = pack([documents], length)
        losses.append(model.loss(model(batch), batch))
        losses[-1].backward()
        gradients.append(model.model.model.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(losses[0], losses[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)


def test_how_each_architecture_isolates() -> None:
    assert isolation_of(_gpt2("sdpa")) == "mask"
    torch.manual_seed(0)
    bloom = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(UserError, match=r"BloomForCausalLM lets documents .* \(it takes no position_ids\)"):
        CausalLM(bloom)


def test_a_model_that_ignores_the_mask_is_refused(tiny: ModelConfig) -> None:
    class Leaky(LlamaForCausalLM):
        def forward(self, input_ids: Any, position_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
            # What code written before packing does: one causal mask over the whole row.
            return super().forward(input_ids, torch.ones_like(input_ids), position_ids, **kwargs)

    with pytest.raises(UserError, match=r"Leaky lets .* logits change by .* with a 4-D attention mask, logits change"):
        CausalLM(Leaky(build_causal_lm(tiny, 64).model.config))


def test_loss_is_the_mean_over_tokens_and_comes_by_sample(tiny: ModelConfig, pack: Any) -> None:
    model = build_causal_lm(tiny, 64)
    rows = [[_document(9, 1), _document(7, 2)], [_document(4, 3)], []]
    batch = pack(rows, 16)
    outputs = model(batch)
    loss = model.loss(outputs, batch)
    expected = []
    for row in range(3):
        log_probs = outputs["logits"][row].double().log_softmax(-1)
        labels = batch["labels"][row]
        expected.append([-log_probs[t - 1, labels[t]] for t in range(16) if labels[t] != -100])
    assert outputs["sample_tokens"].tolist() == [14, 3, 0]
    assert outputs["sample_loss_sum"].dtype == torch.float32
    assert not outputs["sample_loss_sum"].requires_grad
    for row, losses in enumerate(expected):
        assert outputs["sample_loss_sum"][row].item() == pytest.approx(float(sum(losses)), rel=1e-6)
    assert loss.item() == pytest.approx(float(sum(sum(losses) for losses in expected)) / 17, rel=1e-6)
    assert loss.item() == pytest.approx(math.log(64), abs=0.2)


def test_loss_is_float32_under_half_precision_and_zero_without_tokens(tiny: ModelConfig, pack: Any) -> None:
    model = build_causal_lm(tiny, 64)
    batch, empty = pack([[_document(9, 1)]], 16), pack([[]], 16)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(batch)
        loss = model.loss(outputs, batch)
    assert outputs["logits"].dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    nothing = model.loss(model(empty), empty)
    nothing.backward()
    assert nothing.item() == 0.0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_rows_without_position_ids_are_one_document(tiny: ModelConfig, pack: Any) -> None:
    model = build_causal_lm(tiny, 64).eval()
    batch = pack([[_document(16, 1)], [_document(16, 2)]], 16)
    torch.testing.assert_close(model({"input_ids": batch["input_ids"]})["logits"], model(batch)["logits"])


def test_rows_longer_than_the_model_are_refused(tiny: ModelConfig, pack: Any) -> None:
    model = build_causal_lm(replace(tiny, max_position_embeddings=8), 64)
    with pytest.raises(UserError, match=r"rows of 16 tokens, but the model was built for 8: lower data.seq_len"):
        model(pack([[_document(16, 1)]], 16))


def test_weights_come_from_the_seed_alone(tiny: ModelConfig) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_causal_lm(tiny, 64, seed=1).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    again, other = (build_causal_lm(tiny, 64, seed=seed).state_dict() for seed in (1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert first["model.model.layers.0.mlp.up_proj.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert first["model.model.layers.0.mlp.down_proj.weight"].std().item() == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_load_from_a_local_folder(tiny: ModelConfig, pack: Any, tmp_path: Path, architecture: str) -> None:
    saved = build_causal_lm(tiny, 64, seed=3).model if architecture == "llama" else _gpt2("sdpa")
    saved.save_pretrained(tmp_path)
    model = build_causal_lm(ModelConfig(name_or_path=str(tmp_path)), 64).eval()
    batch = pack([[_document(12, 1)]], 12)
    with torch.no_grad():
        torch.testing.assert_close(model(batch)["logits"], saved.eval()(batch["input_ids"]).logits)
    assert next(model.parameters()).dtype == torch.float32
    assert model.model.config.use_cache is False
    with pytest.raises(UserError, match="embeddings for 64 tokens, but the tokenizer knows 100"):
        build_causal_lm(ModelConfig(name_or_path=str(tmp_path)), 100)


def test_folders_that_cannot_be_loaded(tiny: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.name_or_path: expected a local folder .*found '.*nowhere'"):
        build_causal_lm(ModelConfig(name_or_path=str(tmp_path / "nowhere")), 64)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="cannot be loaded as a causal language model"):
        build_causal_lm(ModelConfig(name_or_path=str(tmp_path)), 64)
    model = build_causal_lm(tiny, 64).model
    weights = {name: tensor for name, tensor in model.state_dict().items() if "layers.1" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(UserError, match=r"lack 9 that its config.json asks for, such as model\.layers\.1"):
        build_causal_lm(ModelConfig(name_or_path=str(tmp_path)), 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "model.hidden_size=32 is not divisible by model.num_heads=5"),
        ({"num_kv_heads": 3}, "model.num_heads=4 is not divisible by model.num_kv_heads=3"),
        ({"hidden_size": 36, "num_heads": 4}, "even head size"),
        ({"architecture": "mamba"}, "model.architecture: expected 'llama', found 'mamba'"),
        ({"attention": "flash"}, "model.attention: expected one of"),
        ({"vocab_size": 10}, "embeddings for 10 tokens, but the tokenizer knows 64"),
    ],
)
def test_contradictions_are_refused(tiny: ModelConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_causal_lm(replace(tiny, **changes), 64)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is refused is what this machine cannot do")
@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_attention_that_needs_cuda_is_refused_without(attention: str) -> None:
    assert attention_for("auto", "fp32") is None
    with pytest.raises(UserError, match=r"set model\.attention=auto"):
        attention_for(attention, "amp_bf16")


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_kernels_that_cannot_run_in_float32_on_the_cpu_make_way(tiny: ModelConfig, pack: Any, attention: str) -> None:
    model = build_causal_lm(tiny, 64).eval()
    batch = pack([[_document(7, 1), _document(5, 2)]], 12)
    expected = model(batch)["logits"]
    model.model.config._attn_implementation = attention
    assert torch.equal(model(batch)["logits"], expected)
    assert isolation_of(model.model) == "positions"
    assert model.model.config._attn_implementation == attention


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("attention", ["auto", "flex_attention"])
def test_isolation_on_cuda(tiny: ModelConfig, pack: Any, attention: str) -> None:
    config = replace(tiny, hidden_size=64, attention=attention)
    model = build_causal_lm(config, 64, precision="amp_bf16").cuda().eval()
    second = _document(5, 2)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        logits = []
        for seed in (1, 9):
            batch = {name: value.cuda() for name, value in pack([[_document(7, seed), second]], 12).items()}
            logits.append(model(batch)["logits"][0])
    assert torch.equal(logits[0][7:], logits[1][7:])


@pytest.mark.parametrize(
    ("preset", "vocab_size", "parameters"),
    [
        ("llama_tiny", 8_192, 1_836_160),
        # As published: 140,248,512 for the smallest; 359M and 949M.
        ("mobilellm_140m", 128_256, 140_248_512),
        ("mobilellm_360m", 128_256, 359_431_168),
        ("mobilellm_950m", 128_256, 949_685_760),
        ("llama_7b", 32_000, 6_738_415_616),
    ],
)
def test_presets_have_the_size_they_claim(preset: str, vocab_size: int, parameters: int) -> None:
    config = ModelConfig(**yaml.safe_load((PRESETS / f"{preset}.yaml").read_text())["model"])
    with torch.device("meta"):
        model = build_causal_lm(config, vocab_size)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len([module for module in model.modules() if getattr(module, "_fsdp_wrap", False)]) == config.num_layers


@pytest.mark.parametrize("tied", [True, False])
def test_flops_agree_with_counted_ones(tiny: ModelConfig, pack: Any, tied: bool) -> None:
    model = build_causal_lm(replace(tiny, tie_embeddings=tied, attention="eager"), 64)
    batch = pack([[_document(32, 1)], [_document(32, 2)]], 32)
    with FlopCounterMode(display=False) as counter:
        model.loss(model(batch), batch).backward()
    # Norms are counted as multiplying but are no matrix products: a few per mille here, nothing in a real model.
    assert model.flops_per_batch(batch) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_metric_weighs_tokens_not_batches() -> None:
    metric = TokenCrossEntropy()
    metric.update(torch.tensor([0.0]), torch.tensor([0]))
    assert torch.isnan(metric.compute())
    metric.update(torch.tensor([10.0, 0.0]), torch.tensor([5, 0]))
    metric.update(torch.tensor([1.0]), torch.tensor([15]))
    assert metric.compute().item() == 11.0 / 20.0
    assert metric.compute().dtype == torch.float64


def _metric_on_rank(rank: int, folder: str, values: torch.Tensor, counts: torch.Tensor) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    metric = TokenCrossEntropy()
    mine = slice(0, 3) if rank == 0 else slice(3, None)
    metric.update(values[mine], counts[mine])
    torch.save(metric.compute(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_metric_is_the_same_on_two_ranks(tmp_path: Path) -> None:
    values, counts = torch.rand(11, generator=torch.Generator().manual_seed(0)) * 1e3, torch.arange(1, 12)
    single = TokenCrossEntropy()
    single.update(values, counts)
    context = mp.get_context("fork")
    ranks = [context.Process(target=_metric_on_rank, args=(rank, str(tmp_path), values, counts)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert results[0] == results[1]
    assert results[0].item() == pytest.approx(single.compute().item(), rel=1e-15)

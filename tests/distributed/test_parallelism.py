"""Sizes of the mesh, what is refused together, and that building a large model cut into parts allocates nothing."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cheapertraining.builders import build_strategy
from cheapertraining.config import RunConfig, check_batch_size, load_run_config
from cheapertraining.data import get_loader
from cheapertraining.distributed.parallelism import Layout, build_mesh, data_rank, plan_layout
from cheapertraining.distributed.together import check_together
from cheapertraining.errors import UserError
from cheapertraining.models import build_causal_lm
from cheapertraining.models.sharded import spread_on_meta


def run_config(layout: str, *overrides: str) -> RunConfig:
    return load_run_config("mixed_pretrain", [f"compose.distributed={layout}", *overrides])


@pytest.mark.parametrize(
    ("name", "world", "sizes"),
    [
        ("single", 1, ("replicas", 1, 1, 1)),
        ("single", 2, ("replicas", 2, 1, 1)),
        ("ddp", 4, ("replicas", 4, 1, 1)),
        ("fsdp", 2, ("fsdp", 1, 2, 1)),
        ("fsdp2", 1, ("fsdp2", 1, 1, 1)),
        ("fsdp2", 4, ("fsdp2", 1, 4, 1)),
        ("hsdp", 4, ("fsdp2", 2, 2, 1)),
        ("tp", 4, ("fsdp2", 1, 1, 4)),
        ("fsdp2_tp", 4, ("fsdp2", 1, 2, 2)),
    ],
)
def test_a_name_is_all_that_chooses_a_layout(name: str, world: int, sizes: tuple[str, int, int, int]) -> None:
    layout = plan_layout(run_config(name).parallelism, world)
    assert (layout.engine, layout.replicate, layout.shard, layout.tensor) == sizes
    assert layout.world == world


@pytest.mark.parametrize(
    ("name", "world", "override", "message"),
    [
        ("hsdp", 3, "seed=1", "data_parallel_replicate_degree: expected a size that fits the 3 processes"),
        ("fsdp2_tp", 3, "seed=1", "tp.tensor_parallel_degree: expected a size that fits the 3 processes"),
        ("fsdp2", 4, "parallelism.fsdp2.data_parallel_shard_degree=3", r"fits the 4 processes it divides \(1, 2, 4\)"),
        ("tp", 4, "parallelism.tp.tensor_parallel_degree=2", "Add fsdp2"),
    ],
)
def test_a_world_that_does_not_fit_the_mesh_is_refused(name: str, world: int, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_layout(run_config(name, override).parallelism, world)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallelism.fdsp2={}"], r"parallelism\.fdsp2.*Did you mean 'fsdp2'"),
        (["parallelism.fsdp2.reshard=true"], r"parallelism\.fsdp2\.reshard .*unknown key.*reshard_after_forward"),
        (["parallelism.fsdp2.load_monolith_rank0_only=true"], "loads only rank 0's shards"),
        (["parallelism.fsdp={}", "parallelism.fsdp2={}"], "cannot be had beside fsdp2"),
        (["parallelism.tp={}", "parallelism.fsdp2.data_parallel_replicate_degree=2"], "cannot be had beside tp"),
        (["parallelism.async_save=true"], "needs parallelism.state_dict_type: sharded"),
    ],
)
def test_keys_that_mean_nothing_or_too_much_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_run_config("mixed_pretrain", overrides)


def test_a_dict_of_composers_trains_fsdp2() -> None:
    config = load_run_config("mixed_pretrain", ["parallelism.fsdp2={reshard_after_forward: false}"])
    assert plan_layout(config.parallelism, 2) == Layout("fsdp2", 1, 2, 1)


@pytest.mark.parametrize(
    ("layout", "precision", "overrides", "message"),
    [
        ("tp", "fp32", ["algorithms.online_mixing.influence.scorer=hook"], "scorer: hook.*tensor parallelism"),
        ("tp", "fp32", ["algorithms.online_mixing.influence.metric=ekfac"], "metric: ekfac.*tensor parallelism"),
        ("tp", "amp_bf16", [], "mixed_precision: FULL"),
        ("fsdp2", "fp32", ["algorithms.online_mixing.influence.scorer=loop"], "scorer: loop"),
        ("tp", "amp_bf16", ["algorithms.online_mixing.strategy=pike"], "'pike'.*mixed_precision: FULL"),
        ("fsdp2_tp", "fp32", ["algorithms.online_mixing=null", "algorithms.influence_scores={}"], "influence_scores"),
        ("tp", "fp32", ["algorithms.online_mixing=null", "data.seq_len=127"], "data.seq_len: expected a multiple"),
        ("fsdp2", "amp_bf16", [], "mixed_precision: FULL"),
        ("fsdp", "fp32", ["parallelism.state_dict_type=full"], "state_dict_type: FSDP1"),
        ("fsdp", "fp32", ["algorithms.distillation.teacher.path=t"], "distillation: needs the output head's weights"),
        (
            "fsdp2",
            "fp32",
            ["parallelism.activation_checkpointing=true", "algorithms.influence_scores={}"],
            "activation_checkpointing: algorithms.influence_scores watches",
        ),
    ],
)
def test_what_cannot_work_together_is_refused_at_the_start(
    layout: str, precision: str, overrides: list[str], message: str
) -> None:
    config = run_config(layout, *overrides)
    mixing = config.algorithms.online_mixing
    needs = () if mixing is None else build_strategy(mixing).needs
    with pytest.raises(UserError, match=message):
        check_together(config, plan_layout(config.parallelism, 4), precision, needs=needs)


def test_the_microbatch_of_a_cut_model_cannot_be_searched_for() -> None:
    config = run_config("fsdp2", "algorithms.online_mixing=null")
    with pytest.raises(UserError, match="device_microbatch_size: Composer finds it"):
        check_together(config, plan_layout(config.parallelism, 2), "fp32", on_gpu=True)


def test_ranks_that_share_layers_count_as_one_in_the_global_batch() -> None:
    check_batch_size(run_config("tp", "train_loader.global_batch_size=3"), 4)
    with pytest.raises(UserError, match="multiple of the number of processes"):
        check_batch_size(run_config("fsdp2", "train_loader.global_batch_size=3"), 4)


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize(
    "layout",
    [
        Layout("replicas", 2),
        Layout("replicas", 4),
        Layout("fsdp2", 2, 2),
        Layout("fsdp2", 1, 1, 2),
        Layout("fsdp2", 1, 2, 2),
        Layout("pipeline", stages=4),
    ],
    ids=lambda layout: f"{layout.engine}-{layout.data}x{layout.copies}",
)
def test_one_pass_reads_each_sample_once(layout: Layout, workers: int, tiny_sample: Path, tmp_path: Path) -> None:
    """Over the ranks that read samples of their own; those that share a model read the same."""
    text = (tiny_sample / "data.yaml").read_text()
    data = tmp_path / "one.yaml"
    one = text.replace("    docs: {weight: 1.0}\n    topics: {weight: 1.0}\n", "  on_exhaustion: stop\n")
    assert one != text
    data.write_text(one)
    seen: dict[int, list[int]] = {}
    for rank in range(layout.world):
        mine = {"rank": data_rank(layout, rank), "world_size": layout.data}
        with contextlib.closing(get_loader(data, batch_size=12, lag=12, num_workers=workers, **mine)) as loader:
            seen[rank] = [int(sample) for batch in loader for sample in batch["sample_id"]]
            size = int(loader.mixture.plan.sizes[0])
    groups = {data_rank(layout, rank): seen[rank] for rank in seen}
    assert all(seen[rank] == groups[data_rank(layout, rank)] for rank in seen)
    once = sorted(sample for samples in groups.values() for sample in samples)
    assert len(once) == len(set(once)) == size // 12 * 12 > 0


def test_seven_billion_parameters_cut_into_eight_allocate_nothing() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    overrides = ["compose.model=llama_7b", "parallelism.tp.tensor_parallel_degree=2"]
    config = load_run_config("mixed_pretrain", ["compose.distributed=fsdp2_tp", *overrides])
    layout = plan_layout(config.parallelism, 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        with torch.device("meta"):
            model = build_causal_lm(config.model, 32000)
        spread_on_meta(model, layout, build_mesh(layout, "cpu"), config.parallelism, "fp32")
    finally:
        dist.destroy_process_group()
    whole = sum(parameter.numel() for parameter in model.parameters())
    held = [parameter.to_local() for parameter in model.parameters()]  # type: ignore[operator]  # DTensors
    assert whole > 6.7e9
    assert all(part.is_meta for part in held)
    # A norm's weight is cut by data parallelism alone.
    assert whole / 8 <= sum(part.numel() for part in held) < whole / 8 * 1.001
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB

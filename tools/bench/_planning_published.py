"""Speeds that others have published, beside what tools/estimate.py says of the same runs."""

from __future__ import annotations

from dataclasses import dataclass

from cheapertraining.distributed.estimate import Plan, Shape
from cheapertraining.distributed.throughput import GPUS, estimate_speed

__all__ = ["PUBLISHED", "Published", "report_speed"]


@dataclass(frozen=True)
class Published:
    """A run of others.

    Attributes:
        name: for the table.
        shape, plan, gpu: of the run.
        tokens: a second and GPU.
    """

    name: str
    shape: Shape
    plan: Plan
    gpu: str
    tokens: float


def _mpt(hidden: int, layers: int, heads: int) -> Shape:
    """An MLP of two matrices [h, 4 h] has as many parameters as one of three [h, 8/3 h]."""
    return Shape(50368, hidden, 8 * hidden // 3, layers, heads, heads, hidden // heads, tied=True)


def _sharded(length: int, gpus: int, rows: int, batch: int, *, again: bool = False) -> Plan:
    return Plan(length, rows, batch, shard=gpus, fsdp=True, checkpointing=again)


LLAMA_8B = Shape(128256, 4096, 14336, 32, 32, 8, 128, tied=False)
LLAMA_70B = Shape(128256, 8192, 28672, 80, 64, 8, 128, tied=False)
LLAMA_405B = Shape(128256, 16384, 53248, 126, 128, 8, 128, tied=False)
MPT_7B, MPT_13B, MPT_30B, MPT_70B = _mpt(4096, 32, 32), _mpt(5120, 40, 40), _mpt(7168, 48, 64), _mpt(8192, 80, 64)

# torchtitan, benchmarks/llama3_h100_202412_torchtitan.md: H100 of 96 GB HBM2e at 500 W. Its selective checkpointing,
# which runs part of a layer again, is taken for none; the pipeline is taken to have a micro-batch a stage.
# llm-foundry, scripts/train/benchmarking/README.md: MPT, 2023.
PUBLISHED = [
    Published("Llama 3.1 8B, 8192, FSDP2 on 8", LLAMA_8B, _sharded(8192, 8, 2, 16), "h100", 5762),
    Published("... compiled", LLAMA_8B, _sharded(8192, 8, 2, 16), "h100", 6667),
    Published("... on 128", LLAMA_8B, _sharded(8192, 128, 2, 256), "h100", 5605),
    Published("... on 128, compiled", LLAMA_8B, _sharded(8192, 128, 2, 256), "h100", 6514),
    Published(
        "Llama 3.1 70B, 8192, FSDP2 32 x TP 8, again, compiled, float8", LLAMA_70B,
        Plan(8192, 16, 512, shard=32, tensor=8, fsdp=True, checkpointing=True), "h100", 829,
    ),
    Published(
        "Llama 3.1 405B, 8192, FSDP2 8 x TP 8 x PP 8 (1F1B), the same", LLAMA_405B,
        Plan(8192, 4, 256, shard=8, tensor=8, stages=8, fsdp=True, checkpointing=True), "h100", 100,
    ),
    Published("MPT 7B, 2048, FSDP on 8", MPT_7B, _sharded(2048, 8, 6, 48), "h100", 10643),
    Published("MPT 7B, 8192, on 8, again", MPT_7B, _sharded(8192, 8, 8, 128, again=True), "h100", 6935),
    Published("MPT 13B, 2048, on 8", MPT_13B, _sharded(2048, 8, 2, 16), "h100", 4792),
    Published("MPT 13B, 2048, on 64", MPT_13B, _sharded(2048, 64, 2, 128), "h100", 4800),
    Published("MPT 30B, 2048, on 8, again", MPT_30B, _sharded(2048, 8, 3, 504, again=True), "h100", 2002),
    Published("MPT 70B, 2048, on 64, again", MPT_70B, _sharded(2048, 64, 8, 2048, again=True), "h100", 1039),
    Published("MPT 7B, 2048, on 8", MPT_7B, _sharded(2048, 8, 6, 96), "a100", 4641),
    Published("MPT 13B, 2048, on 8", MPT_13B, _sharded(2048, 8, 2, 48), "a100", 2262),
    Published("MPT 30B, 2048, on 8, again", MPT_30B, _sharded(2048, 8, 3, 504, again=True), "a100", 916),
    Published("MPT 70B, 2048, on 64, again", MPT_70B, _sharded(2048, 64, 8, 2048, again=True), "a100", 410),
]  # fmt: skip


def report_speed() -> None:
    """Print a row of each run; the last column is the utilization at which its arithmetic alone would take so long."""
    print("| run | GPU | published, tokens/s a GPU | predicted | / published | utilization |")
    print("| --- | --- | --- | --- | --- | --- |")
    for run in PUBLISHED:
        gpu = GPUS[run.gpu]
        network = 50e9 if run.gpu == "h100" else 25e9  # 400 and 200 Gb/s a GPU
        speed = estimate_speed(run.shape, run.plan, gpu, network=network)
        predicted = speed.tokens_per_second / run.plan.ranks
        took = run.plan.batch * run.plan.length / (run.tokens * run.plan.ranks)
        reached = speed.compute * gpu.utilization / took
        bound = " (network)" if speed.communication > speed.compute else ""
        row = (run.name, run.gpu, f"{run.tokens:,.0f}", f"{predicted:,.0f}{bound}", f"{predicted / run.tokens:.2f}")
        print(f"| {' | '.join(row)} | {reached:.2f} |")

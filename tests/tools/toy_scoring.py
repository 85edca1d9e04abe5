"""Score shards with a model that needs torch alone, so that processes start fast: what is killed in tests.

python tests/tools/toy_scoring.py SHARDS PROBE OUT PROCESSES [resume]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from cheapertraining.errors import UserError
from cheapertraining.influence.offline import LoadedModel, ScoringJob, score_shards


class Toy(nn.Module):
    """A bigram model that takes its time."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding, self.output = nn.Embedding(512, 8), nn.Linear(8, 512)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        time.sleep(0.005)
        return {"logits": self.output(self.embedding(input_ids))}


def load_toy(path: Path, device: torch.device) -> LoadedModel:
    return LoadedModel(Toy().to(device), 512)


def toy_job(shards: Path, probe: Path, out: Path, processes: int, *, resume: bool = False) -> ScoringJob:
    """One row a batch, so 16 rows a part."""
    probes = {"probe": probe}
    return ScoringJob(
        [Path("toy")], [shards], probes, out, batch_size=1, processes=processes, resume=resume, device="cpu"
    )


if __name__ == "__main__":
    job = toy_job(*map(Path, sys.argv[1:4]), int(sys.argv[4]), resume=len(sys.argv) > 5)  # type: ignore[arg-type]
    try:
        score_shards(job, load_toy, progress=False)
    except UserError as error:
        sys.exit(str(error))

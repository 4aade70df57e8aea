"""Train on what a pipeline makes, on several processes: DistributedDataParallel fed by streaming_split.

    python examples/train.py                                                    one process
    python -m torch.distributed.run --nproc-per-node 2 examples/train.py        two: rank 0 runs the pipeline for both

The pipeline makes points and says which of them are above a parabola; the model learns that.
"""

from __future__ import annotations

import argparse
import os

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import headrace as hr


def points(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A point for each id, always the same one."""
    x = np.stack([batch["id"] * 0.618034 % 1, batch["id"] * 0.414214 % 1], axis=1) * 2 - 1
    return {"x": x.astype(np.float32), "y": (x[:, 1] > x[:, 0] ** 2 - 0.3).astype(np.float32)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=60_001)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    # All ranks make the same call. Equal shares: each rank has as many batches as the others, so no collective call waits.
    split = hr.range(args.rows).map_batches(points).streaming_split(world, equal=True)[rank]

    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1))
    if world > 1:
        dist.init_process_group("gloo")
        model = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for epoch in range(args.epochs):
        rows = right = 0
        for batch in split.iter_torch_batches(batch_size=128, local_shuffle_buffer_size=1024, local_shuffle_seed=epoch):
            said = model(batch["x"]).squeeze(1)
            loss = nn.functional.binary_cross_entropy_with_logits(said, batch["y"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rows += len(batch["y"])
            right += int(((said > 0) == (batch["y"] > 0.5)).sum())
        if rank == 0:
            print(f"epoch {epoch}: {rows:,} rows on each of {world} ranks, accuracy {right / rows:.3f}", flush=True)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

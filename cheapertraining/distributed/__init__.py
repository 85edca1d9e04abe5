"""One model over several processes: layouts, FSDP, tensor parallelism, and checkpoints that load under any of them."""

"""A plain PyTorch loop whose mixture adapts to a probe while it trains: no trainer, no Composer.

    python examples/plain_loop.py            the sample (first: make sample)
    python examples/plain_loop.py --rigged   a control: one source is the probe's kind of text, the others are noise
    python examples/plain_loop.py --null     a control: all sources are random parts of one corpus

The controls are made from the library of Python, in a temporary folder. On the rigged one weight moves to the source
that helps; on the null one, where no source is better than another, the weights stay near where they began.
"""

from __future__ import annotations

import argparse
import json
import random
import sysconfig
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM

from cheapertraining import InfluenceAwareOptimizer, MixtureWeightCalculator, get_loader
from cheapertraining.data import read_meta, train_bpe, write_split

SEQ_LEN = 64
CHARACTERS = 1200  # of a document


def main() -> None:
    """Read the command line, make the data, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    control = parser.add_mutually_exclusive_group()
    control.add_argument("--rigged", action="store_true", help="one source helps, the others are noise")
    control.add_argument("--null", action="store_true", help="no source is better than another")
    parser.add_argument("--data", default="mixed_pretrain", help="data config (default: %(default)s, the sample)")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--update-interval", type=int, default=10, help="steps between updates of the mixture")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = make_control(Path(folder), args.rigged, args.seed) if args.rigged or args.null else args.data
        train(data, args.steps, args.update_interval, args.seed)


def train(data: str | dict[str, Any], steps: int, update_interval: int, seed: int) -> None:
    """The loop: what makes the mixture adapt is the two lines that make the calculator and wrap the optimizer."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = get_loader(data, batch_size=16, seed=seed)
    torch.manual_seed(seed)
    vocab_size = read_meta(loader.mixture.store.folders[0].local).vocab_size
    model = make_model(vocab_size, loader.mixture.seq_len).to(device)

    calculator = MixtureWeightCalculator(model, probe_dataloaders=loader.probes)
    optimizer = InfluenceAwareOptimizer(
        torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1),
        calculator,
        loader.mixture,
        update_interval=update_interval,
        learning_rate=1.0,
    )
    scheduler = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20, max(0.1, 2 * (1 - step / steps))))

    for step, batch in enumerate(islice(loader, steps), start=1):
        inputs = {name: batch[name].to(device) for name in ("input_ids", "position_ids", "labels")}
        # Positions that begin anew, no mask and no cache: packed documents do not see each other.
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % update_interval == 0:
            weights = "  ".join(f"{name} {weight:.3f}" for name, weight in loader.mixture.get_current_weights().items())
            print(f"step {step:4d}  loss {loss.item():.3f}  weights: {weights}", flush=True)
    print("final weights:", json.dumps(loader.mixture.get_current_weights()))


def make_model(vocab_size: int, length: int) -> LlamaForCausalLM:
    """A new Llama that two CPU cores train in seconds."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=length,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def make_control(folder: Path, rigged: bool, seed: int) -> dict[str, Any]:
    """Write the shards of a control, and return its data config: three sources, and a probe of its own."""
    generator = random.Random(seed)
    documents = library_documents()
    generator.shuffle(documents)
    parts = [documents[start::4] for start in range(4)]
    texts = {"a": parts[0], "b": parts[1], "c": parts[2], "target": parts[3]}
    if rigged:
        texts |= {name: [scrambled(text, generator) for text in texts[name]] for name in ("b", "c")}
    tokenizer = train_bpe([text for part in parts for text in part[:100]], 512, folder / "tokenizer")
    for name, own in texts.items():
        split = "probe" if name == "target" else "train"
        origin = {"license": "PSF-2.0", "origin": "CPython standard library"}
        write_split(folder / name / split, own, tokenizer, seq_len=SEQ_LEN, source=name, split=split, **origin)
    probe = {"target": {"local": str(folder / "target")}}
    return {"local": str(folder), "seq_len": SEQ_LEN, "sources": {"a": {}, "b": {}, "c": {}}, "probes": probe}


def library_documents() -> list[str]:
    """Pieces of the source code of Python's library."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    return [text[start : start + CHARACTERS] for text in texts for start in range(0, len(text), CHARACTERS)]


def scrambled(text: str, generator: random.Random) -> str:
    """The same characters in random order: nothing can be learnt from it but how frequent they are."""
    return "".join(generator.sample(text, len(text)))


if __name__ == "__main__":
    main()

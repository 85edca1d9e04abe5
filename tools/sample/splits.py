"""Split a source into train, probe and held-out by parent document."""

from __future__ import annotations

from cheapertraining.errors import UserError
from tools.sample.documents import Document, hash_order, text_bytes

__all__ = ["SPLITS", "split_by_parent"]

SPLITS = ("train", "probe", "heldout")
_SHARE = 0.1  # of the bytes, for the probe and for the held-out split each


def split_by_parent(documents: list[Document], source: str) -> dict[str, list[Document]]:
    """Whole parents in hash order: a tenth of the bytes to ``heldout``, a tenth to ``probe``, the rest to ``train``.

    Filling by bytes instead of by hash value keeps the shares close to 80/10/10 for a source of few parents
    (85 templates, 100 articles). Each split keeps the documents' order.

    Raises:
        UserError: fewer than three parents, so that some split would be empty.
    """
    sizes: dict[str, int] = {}
    for document in documents:
        sizes[document.parent] = sizes.get(document.parent, 0) + text_bytes([document])
    if len(sizes) < len(SPLITS):
        raise UserError(
            f"source '{source}': {len(sizes)} parent documents cannot make three disjoint splits (at least 3). "
            "Raise --bytes-per-source."
        )
    goal = _SHARE * sum(sizes.values())
    parents = hash_order(sizes)
    split_of = dict.fromkeys(parents, "train")
    position = 0
    for split, left_over in (("heldout", 2), ("probe", 1)):
        filled = 0.0
        while filled < goal and position < len(parents) - left_over:
            split_of[parents[position]] = split
            filled += sizes[parents[position]]
            position += 1
    return {split: [d for d in documents if split_of[d.parent] == split] for split in SPLITS}

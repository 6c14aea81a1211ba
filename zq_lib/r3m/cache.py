"""What the reference model thinks of every completion, computed once for a data set and kept on disk if wanted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zq_lib.r3m.data import REFERENCE, PreferenceCollator, Row
from zq_lib.r3m.policy import policy_logps

TENSORS, FACTS = "r3m_reference.safetensors", "r3m_reference.json"


@dataclass(frozen=True)
class ReferenceCache:
    """Log-probabilities [n, 2] of the chosen and the rejected completion of each row, by the row's number.

    `rows` is a fingerprint of the tokens they belong to, and `average` says whether they are means over words.
    """

    logps: Tensor
    rows: str
    average: bool = False

    @classmethod
    @torch.no_grad()
    def of(
        cls, model: nn.Module, rows: Sequence[Row], *, size: int = 8, average: bool = False, pad_token_id: int = 0
    ) -> Self:
        """Run `model`, in eval mode, over the rows of `encode`, `size` pairs at a time, the longest together."""
        if not rows:
            raise ValueError("rows is empty; give the rows that encode made")
        mode, collate = model.training, PreferenceCollator(pad_token_id)
        device = next(model.parameters()).device
        found = torch.empty(len(rows), 2)
        order = sorted(range(len(rows)), key=lambda i: max(map(len, (rows[i]["chosen_ids"], rows[i]["rejected_ids"]))))
        model.eval()
        for part in _parts(order, size):
            batch = {name: x.to(device) for name, x in collate([rows[i] for i in part]).items()}
            found[part] = policy_logps(model, batch, average=average).float().view(2, -1).T.cpu()
        model.train(mode)
        if not bool(found.isfinite().all()):
            row = int((~found.isfinite().all(1)).nonzero()[0])
            raise ValueError(f"the reference gives row {row} a log-probability that is not finite; load it in fp32")
        return cls(found, fingerprint(rows), average)

    def join(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with what the reference gives them, as the collator and the trainer take them.

        Raises ValueError for rows that the cache was not made of.
        """
        if self.rows != fingerprint(rows):
            raise ValueError("the cache belongs to other rows, or to other tokens; make it anew with ReferenceCache.of")
        return [row | {REFERENCE: pair} for row, pair in zip(rows, self.logps.tolist(), strict=True)]

    def save(self, folder: str | Path) -> Path:
        """Write the cache as safetensors and JSON. Returns the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"logps": self.logps.contiguous()}, folder / TENSORS)
        (folder / FACTS).write_text(json.dumps({"rows": self.rows, "average": self.average}) + "\n")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote. Raises FileNotFoundError for a folder without it."""
        folder = Path(folder)
        if not (folder / FACTS).exists():
            raise FileNotFoundError(f"{folder.name!r} holds no reference cache; it needs {FACTS} and {TENSORS}")
        facts = json.loads((folder / FACTS).read_text())
        return cls(load_file(folder / TENSORS)["logps"], facts["rows"], facts["average"])


def fingerprint(rows: Sequence[Row]) -> str:
    """A hash of all tokens of the rows."""
    parts = [[row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]] for row in rows]
    return sha256(json.dumps(parts).encode()).hexdigest()


def _parts(order: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(order), size):
        yield order[start : start + size]

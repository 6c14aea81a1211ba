"""Make the shipped importance of the embedded model's layers: `python -m zq_lib.masformer.make_profile`.

Four selection prompts, one layer local at a time with a window of 32 and no sinks; two minutes on one core.
"""

from __future__ import annotations

import sys
from pathlib import Path

from zq_lib.core import models
from zq_lib.masformer import passkey
from zq_lib.masformer.profiling import profile


def main(folder: Path = Path(__file__).parent / "data") -> None:
    """Write `importance.json` into `folder`."""
    model, tokenizer = models.load("smollm2")

    def say(message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    profile(model, passkey.selection(tokenizer), say=say).save(folder / "importance.json")


if __name__ == "__main__":
    main()

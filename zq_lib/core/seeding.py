"""Seeds, and the one call with which every notebook begins."""

from __future__ import annotations

import difflib
import os
import platform
import random
import warnings
from importlib.metadata import version

from zq_lib import __version__
from zq_lib.registry import METHODS

OTHER_NOTEBOOKS = ("start_here", "together")  # notebooks that belong to no single method
_QUIET = r"(torch|transformers|triton|huggingface_hub|tokenizers|tqdm)(\.|$)"


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (all devices).

    Raises ValueError unless `seed` is an integer from 0 to 2**32 - 1, the range all three accept.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer from 0 to 4294967295, got {seed!r}")
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def setup(slug: str, *, threads: int = 1, seed: int = 0) -> None:
    """Make a notebook repeatable, and print one line that says on what it runs.

    `slug` is the method the notebook teaches. One thread is the default because sums differ in the seventh digit
    between one thread and two. The interpreter of Triton is switched on only where there is no GPU.
    Raises ValueError for an unknown slug or a thread count below one.
    """
    known = [*METHODS, *OTHER_NOTEBOOKS]
    if slug not in known:
        near = difflib.get_close_matches(str(slug), known, n=1)
        raise ValueError(f"slug {slug!r} is not a notebook; use {repr(near[0]) if near else ', '.join(known)}")
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads must be an integer of at least 1, got {threads!r}")

    # Read when the libraries are imported, hence set before torch below: what they print would be compared.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns when the default is left unsaid
    if "ZQ_MODEL" not in os.environ:  # a reader who names another model may want it fetched
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore", module=_QUIET)

    import torch

    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    torch.set_num_threads(threads)
    seed_everything(seed)
    parts = [f"zq_lib {_minor(__version__)}", f"Python {_minor(platform.python_version())}"]
    parts += [f"{name} {_minor(version(name))}" for name in ("torch", "transformers")]
    print(" · ".join([*parts, torch.cuda.get_device_name(0) if gpu else "cpu"]))


def _minor(text: str) -> str:
    """`2.13.0+cpu` -> `2.13`: a patch release does not change a committed output."""
    return ".".join(text.split(".")[:2])

from __future__ import annotations

import os
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from zq_lib.core.seeding import seed_everything, setup


def run(code: str, **extra: str) -> str:
    """What a fresh process prints to both streams."""
    dropped = ("TRITON_INTERPRET", "HF_HUB_OFFLINE", "ZQ_MODEL")
    env = {k: v for k, v in os.environ.items() if k not in dropped} | {"CUDA_VISIBLE_DEVICES": ""} | extra
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def test_setup_prints_one_line_without_patch_versions_and_prepares_the_process():
    shown = run(
        "import os\nfrom zq_lib.core import setup\nsetup('pasta')\nimport torch\n"
        "print(torch.get_num_threads(), os.environ['TRITON_INTERPRET'], os.environ['HF_HUB_OFFLINE'], torch.rand(1))\n"
        "torch.manual_seed(0)\nprint(torch.rand(1))"
    ).splitlines()
    line = r"zq_lib \d+\.\d+ · Python 3\.\d+ · torch \d+\.\d+ · transformers \d+\.\d+ · cpu"
    assert re.fullmatch(line, shown[0])
    assert shown[1] == f"1 1 1 {shown[2]}"
    assert len(shown) == 3


def test_setup_leaves_what_the_reader_has_chosen():
    code = "import os\nfrom zq_lib.core import setup\nsetup('pasta')\nprint(os.environ['TRITON_INTERPRET'], "
    assert run(code + "'HF_HUB_OFFLINE' in os.environ)", TRITON_INTERPRET="0", ZQ_MODEL="a/b").endswith("0 False\n")


def test_importing_core_loads_nothing_heavy():
    heavy = "torch matplotlib ipywidgets transformers triton gradio IPython"
    assert run(f"import sys, zq_lib.core\nprint([m for m in {heavy.split()} if m in sys.modules])") == "[]\n"


def test_core_offers_the_notebook_names_and_names_them_when_asked_for_another():
    import zq_lib.core

    assert [callable(getattr(zq_lib.core, name)) for name in zq_lib.core.__all__] == [True] * 5
    with pytest.raises(AttributeError, match="'shew'.*names:.*show"):
        _ = zq_lib.core.shew


def test_the_same_seed_gives_the_same_numbers_everywhere():
    def draw() -> tuple[float, float, float]:
        seed_everything(7)
        return random.random(), np.random.rand(), torch.rand(()).item()

    assert draw() == draw()


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, True, None])
def test_a_seed_that_not_all_libraries_accept_is_refused(seed):
    with pytest.raises(ValueError, match="seed must be an integer from 0"):
        seed_everything(seed)


def test_a_misspelled_slug_is_answered_with_the_nearest_one():
    with pytest.raises(ValueError, match="'psta' is not a notebook; use 'pasta'"):
        setup("psta")
    with pytest.raises(ValueError, match="use pasta, masformer"):
        setup("qqq")


@pytest.mark.parametrize("threads", [0, 1.5, True])
def test_a_thread_count_below_one_is_refused(threads):
    with pytest.raises(ValueError, match="threads must be an integer of at least 1"):
        setup("pasta", threads=threads)

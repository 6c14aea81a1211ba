from __future__ import annotations

import pytest

from zq_lib.core import backend
from zq_lib.core.backend import Launch, choose, last_launch, launches, record, requested, use


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZQ_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_auto_is_triton_on_a_gpu_that_can_and_torch_everywhere_else() -> None:
    assert choose("auto", "cuda") == choose(None, "cuda:1") == "triton"
    assert choose("auto", "cuda", supported=False, why="too wide") == "torch"
    assert choose("auto", "cpu") == "torch"


def test_auto_never_takes_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("auto", "cpu") == "torch"
    assert choose("triton", "cpu") == "triton"


def test_the_argument_beats_the_block_which_beats_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZQ_BACKEND", "torch")
    assert requested() == "torch"
    with use("triton"):
        assert requested() == requested("auto") == "triton"
        assert requested("torch") == "torch"
        with use("auto"):
            assert choose(None, "cuda") == "triton"
        assert requested() == "triton"
    assert choose(None, "cuda") == "torch"


def test_a_block_is_left_behind_even_when_it_fails() -> None:
    with pytest.raises(KeyError), use("torch"):
        raise KeyError
    assert requested() == "auto"


def test_triton_without_a_gpu_is_refused_and_names_who_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match='^backend is "triton" but the tensors are on "cpu".*use "torch".*TRITON_INTERPRET=1'
    ):
        choose("triton", "cpu")
    with pytest.raises(ValueError, match=r"^use\(\.\.\.\) is"), use("triton"):
        choose("auto", "cpu")
    monkeypatch.setenv("ZQ_BACKEND", "triton")
    with pytest.raises(ValueError, match="^ZQ_BACKEND is"):
        choose(None, "cpu")


def test_triton_on_a_case_it_cannot_do_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="head width 300 is above 256"):
        choose("triton", "cuda", supported=False, why="head width 300 is above 256")


@pytest.mark.parametrize("ask", [lambda: choose("cuda", "cpu"), lambda: use("cuda").__enter__()])
def test_an_unknown_backend_is_named_together_with_the_choices(ask) -> None:
    with pytest.raises(ValueError, match="'cuda'; use one of 'auto', 'torch', 'triton'"):
        ask()


def test_an_unknown_backend_in_the_variable_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZQ_BACKEND", "jax")
    with pytest.raises(ValueError, match="ZQ_BACKEND is 'jax'"):
        choose(None, "cpu")


def test_launches_are_collected_in_nested_blocks_and_the_last_is_kept() -> None:
    first, second = Launch("a", "torch"), Launch("b", "interpreter", (4,), {"BLOCK": 16})
    with launches() as outer:
        record(first)
        with launches() as inner:
            record(second)
    record(first)
    assert (outer, inner) == ([first, second], [second])
    assert last_launch() is first


def test_launches_of_another_thread_are_collected_because_autograd_uses_one() -> None:
    from threading import Thread

    with launches() as seen:
        thread = Thread(target=record, args=(Launch("backward", "triton"),))
        thread.start()
        thread.join()
    assert [launch.kernel for launch in seen] == ["backward"]


def test_two_collectors_with_equal_contents_are_told_apart() -> None:
    with launches() as outer:
        with launches():
            pass
        record(Launch("a", "torch"))
    assert len(outer) == 1 and not backend._collectors

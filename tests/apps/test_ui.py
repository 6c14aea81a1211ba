"""The shared frame: contrast, the gallery's cards and links, and the folder for Spaces."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from html import unescape

import gradio
import pytest
import yaml

from zq_lib.core.figures import Figure, style, subplots
from zq_lib.registry import METHODS, built
from zq_lib.ui import gallery, pieces, serve, space, theme


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_and_borders_have_enough_contrast(scheme):
    for pairs, least in ((theme.READABLE, 4.5), (theme.VISIBLE, 3.0)):
        for front, back in pairs:
            ratio = theme.contrast(theme.COLOURS[front][scheme], theme.COLOURS[back][scheme])
            assert ratio >= least, f"{front} on {back} is {ratio:.2f}"


def test_contrast_is_that_of_the_standard():
    assert theme.contrast("#000000", "#FFFFFF") == pytest.approx(21)
    assert theme.contrast("#777777", "#FFFFFF") == pytest.approx(4.48, abs=0.01)


def test_every_place_of_the_theme_exists_in_gradio():
    made = theme.theme()
    assert all(hasattr(made, place) and hasattr(made, f"{place}_dark") for place in theme._PLACES)


def test_cells_and_captions_are_escaped():
    html = pieces.table([("<b>x</b>", 0.5)], ("<i>", "n"), "<u>")
    assert "<b>" not in html and "<i>" not in html and "<u>" not in html and "0.500" in html
    with style():
        figure = Figure(subplots(width=1, height=1)[0], 'a "<script>" b')
    assert "<script>" not in pieces.picture(figure) and "<p>&lt;x" in pieces.paragraph("<x")


def test_the_gallery_has_a_card_and_a_page_for_every_built_method_only(address):
    config = json.loads(urllib.request.urlopen(f"{address}config").read())
    assert [page[0] for page in config["pages"]] == ["", *(m.slug for m in built())]
    home = unescape(json.dumps(config["components"]))
    for method in METHODS.values():
        assert (f"Open the {method.title} demo" in home) == method.built
    for method in built():
        with urllib.request.urlopen(f"{address}{method.slug}") as answer:
            assert answer.status == 200


def test_the_server_listens_on_this_machine_only(address):
    assert address.startswith("http://127.0.0.1:")


def test_analytics_are_off(address):
    assert json.loads(urllib.request.urlopen(f"{address}config").read())["analytics_enabled"] is False


def test_an_unknown_demo_is_refused_with_the_names_that_exist():
    with pytest.raises(ValueError, match="choose one of pasta, "):
        gallery.launch_demo("nonsense")


def test_model_events_share_one_place_in_the_queue():
    blocks = METHODS["pasta"].load("app").build()
    slow = [f for f in blocks.fns.values() if f.concurrency_id == serve.ONE_AT_A_TIME["concurrency_id"]]
    assert len(slow) == 2 and all(f.concurrency_limit == 1 for f in slow)


def test_a_space_folder_has_its_metadata_and_imports_without_work(tmp_path):
    out = space.write("pasta", tmp_path / "space")
    _, metadata, text = (out / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    data = yaml.safe_load(metadata)
    assert data["sdk"] == "gradio" and data["sdk_version"] == gradio.__version__
    assert (out / data["app_file"]).is_file() and data["title"].startswith("PASTA") and "# PASTA" in text
    wanted = (out / "requirements.txt").read_text(encoding="utf-8")
    assert "torch" in wanted and "extra" not in wanted and "jupyter" not in wanted
    code = (
        "import app, apps.pasta; from zq_lib.ui import serve; app.build()\n"
        "print(apps.pasta.__file__, serve.__file__, 'idle' if not serve._LOADED else 'busy')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=out, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(out)) == 2 and done.stdout.endswith("idle\n")


def test_a_space_is_not_written_over_something(tmp_path):
    (tmp_path / "mine").write_text("keep", encoding="utf-8")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        space.write("pasta", tmp_path)
    with pytest.raises(ValueError, match="choose one of pasta, "):
        space.write("ernie", tmp_path / "new")

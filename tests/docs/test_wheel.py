"""What is published: the wheel is whole, and serves the quickstart where nothing else is."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import time
import tomllib
import venv
from contextlib import closing
from email import message_from_bytes
from pathlib import Path
from zipfile import ZipFile

import httpx
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.postgres import free_port

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "context_async_sqlalchemy"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, GROUPS = PYPROJECT["project"], PYPROJECT["dependency-groups"]
# As pip does, in a fraction of its time; who has pip alone is a reader of test_commands.py.
INSTALL = [sys.executable, "-m", "uv", "pip", "install", "--quiet"]
# Without what would let the new environment see the packages of this one.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*command: str | Path, cwd: Path, **environment: str) -> None:
    """Run a command; fail with what it prints."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory with the build backend, which an installer would also fetch to build."""
    directory = tmp_path_factory.mktemp("backend")
    requires = PYPROJECT["build-system"]["requires"]
    run(*INSTALL, "--python", sys.executable, "--target", directory, *requires, cwd=directory)
    return directory


@pytest.fixture(scope="module")
def published(backend: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory with the sdist and the wheel of the source tree."""
    directory = tmp_path_factory.mktemp("published")
    build(backend, ROOT, directory)
    return directory


@pytest.fixture(scope="module")
def wheel(published: Path) -> Path:
    """Return the wheel."""
    (wheel,) = published.glob("*.whl")
    return wheel


def build(backend: Path, source: Path, target: Path) -> None:
    """Build the sdist and the wheel of a source tree."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(target)]
    run(*command, cwd=source, PYTHONPATH=str(backend))


def contents_of(wheel: Path) -> dict[str, bytes]:
    """Return the files of a wheel."""
    with ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_has_the_package_and_its_licence_and_nothing_else(wheel: Path) -> None:
    files = [path for path in PACKAGE.rglob("*") if path.is_file()]
    package = {
        path.relative_to(ROOT).as_posix(): path.read_bytes()
        for path in files
        if path.suffix in (".py", ".typed")
    }
    contents = contents_of(wheel)
    info = f"context_async_sqlalchemy-{PROJECT['version']}.dist-info/"
    rest = {name: contents[name] for name in contents.keys() - package.keys()}
    assert {name: contents[name] for name in contents.keys() - rest.keys()} == package
    assert "context_async_sqlalchemy/py.typed" in package
    assert rest.keys() == {
        f"{info}{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")
    }
    assert rest[f"{info}licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    metadata = message_from_bytes(rest[f"{info}METADATA"])
    assert (metadata["Name"], metadata["Version"]) == (PROJECT["name"], PROJECT["version"])
    assert set(metadata.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])


def test_the_sdist_builds_the_same_wheel(published: Path, backend: Path, tmp_path: Path) -> None:
    (sdist,) = published.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    build(backend, tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path / "again")
    (again,) = (tmp_path / "again").glob("*.whl")
    (wheel,) = published.glob("*.whl")
    assert contents_of(again) == contents_of(wheel)


def test_the_quickstart_is_served_from_the_wheel_in_an_empty_environment(
    wheel: Path, tmp_path: Path
) -> None:
    venv.create(tmp_path / "venv", symlinks=os.name != "nt")
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    page = (ROOT / "docs" / "getting-started.md").read_text()
    command = re.search(r"^pip install (\"\.\[.*)$", page, re.MULTILINE)
    assert command is not None
    package, *others = shlex.split(command[1])
    packages = [f"{wheel}{package.removeprefix('.')}", *others]
    run(*INSTALL, "--python", python, *packages, cwd=tmp_path)

    directory = tmp_path / "reader"
    directory.mkdir()
    shutil.copy(ROOT / "examples" / "quickstart.py", directory)
    port = free_port()
    log = tmp_path / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [python, "-m", "uvicorn", "quickstart:app", "--port", str(port)],
            cwd=directory,
            env=ENVIRONMENT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        url = f"http://127.0.0.1:{port}/notes/milk"
        with httpx.Client(timeout=30) as client:
            assert post_when_served(client, url, server, log).status_code == 201
            assert stored(directory) == ["milk"]
            assert client.post(url).status_code == 500
            assert stored(directory) == ["milk"]
    finally:
        server.terminate()
        server.wait(timeout=30)


def post_when_served(
    client: httpx.Client, url: str, server: subprocess.Popen[bytes], log: Path
) -> httpx.Response:
    """Send POST, as soon as the server accepts it."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return client.post(url)
        except httpx.ConnectError:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)


def stored(directory: Path) -> list[str]:
    """Return the notes that are committed."""
    with closing(sqlite3.connect(directory / "notes.db")) as database:
        return [body for (body,) in database.execute("SELECT body FROM note")]


def test_every_extra_is_tested_in_the_versions_that_it_admits() -> None:
    tested = {str(Requirement(line)) for line in requirements_of("test")}
    lines = (ROOT / "tests" / "oldest.txt").read_text().splitlines()
    oldest = {line for line in lines if line and not line.startswith("#")}
    frameworks = {"starlette"}  # FastAPI brings it
    for name, extra in PROJECT["optional-dependencies"].items():
        for requirement in map(Requirement, extra):
            (specifier,) = requirement.specifier
            assert specifier.operator == ">="
            assert name in frameworks or str(requirement) in tested
            version = specifier.version
            package = canonicalize_name(requirement.name)
            assert oldest & {f"{package}=={version}", f"{package}=={version}.0"}


def requirements_of(group: str) -> list[str]:
    """Return the requirements of a dependency group, with those of the groups in it."""
    found: list[str] = []
    for item in GROUPS[group]:
        found += requirements_of(item["include-group"]) if isinstance(item, dict) else [item]
    return found

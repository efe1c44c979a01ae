"""Do what a page tells its reader, where there is nothing yet but what the page says there is."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import URL

from tests.helpers.postgres import free_port
from tests.helpers.readers import INSTALLS_PROJECT, ROOT, SERVERS, Reader

FUNCTIONS = Path(__file__).with_name("reader.sh")
# Which run beside the next commands, until they are stopped, and serve nothing.
WORKERS = ["python -m examples.worker.queue"]
# Which the reader has.
FILES = {"monday.csv": "tea,300\n", "tuesday.csv": "milk,120\n"}

PUBLISHED = r"context-async-sqlalchemy"
VARIABLES = re.compile(r"((?:[A-Z_]+=(?:\"[^\"]*\"|\S+)\s+)*)(.*)")
POSTGRESQL = re.compile(r"=([\"']?)(postgresql(?:\+\w+)?)://[^\s\"']*\1")
# What the tests have, and a reader has not.
OURS = re.compile(r"PYTHON|PYTEST|TEST_|BENCH_|DATABASE_|COV_|VIRTUAL_ENV|ENVIRONMENT$")
SECONDS = 120


@dataclass(frozen=True)
class Place:
    """Where readers read, one after the other.

    Attributes:
        directory: What is theirs. What they install is at the same path for each of them, so that
            Python compiles it once.
        repository: A copy of the repository.
        wheel: What would be published.
        uv: Installs in place of pip.
    """

    directory: Path
    repository: Path
    wheel: Path
    uv: str

    def read(self, reader: Reader, database: URL | None, *, with_pip: bool = False) -> str:
        """Do what the reader does, and return what it prints; fail if a command does."""
        for name in ("venv", "here"):
            shutil.rmtree(self.directory / name, ignore_errors=True)
        here = self.directory / "here"
        if is_in_the_repository(reader):
            shutil.copytree(self.repository, here)
        else:
            here.mkdir()
        for name, content in FILES.items():
            (here / name).write_text(content)
        environment = {name: value for name, value in os.environ.items() if not OURS.match(name)}
        environment |= {
            "INSTALLER": "" if with_pip else self.uv,
            "PYTHONPYCACHEPREFIX": str(self.directory / "compiled"),
            "PORT": str(free_port()),
        }
        if database is not None and not may_use_sqlite(reader):
            environment["DATABASE_URL"] = shown(database, "postgresql")
            environment["DATABASE_HOSTS"] = f"{database.host}:{database.port or 5432}"
        venv = [sys.executable, "-m", "venv"]
        if not with_pip:
            venv = [self.uv, "venv", "--quiet", "--python", sys.executable]
            if any(re.match("pip (?!install)", command) for command in reader.commands):
                venv.append("--seed")  # with pip itself
        subprocess.run([*venv, self.directory / "venv"], env=environment, check=True)
        script = self.directory / "script.sh"
        script.write_text(self._script(reader, environment["PORT"], database, with_pip))
        return self._run(script, here, environment)

    def _script(self, reader: Reader, port: str, database: URL | None, with_pip: bool) -> str:
        lines = [f"source {FUNCTIONS}", "source ../venv/bin/activate"]
        for number, step in enumerate(reader.steps):
            is_elsewhere = Reader(reader.page, reader.steps[:number]).is_elsewhere
            if step.file:
                (self.directory / "saved").mkdir(exist_ok=True)
                saved = self.directory / "saved" / secrets.token_hex(4)
                saved.write_text(step.text)
                lines.append(f"mkdir -p $(dirname {step.file}) && cp {saved} {step.file}")
            else:
                command = step.text
                if not with_pip and not is_elsewhere:
                    command = self._from_wheel(command)
                lines += command_lines(command, port, database)
        return "\n".join([*lines, "stop_all", ""])

    def _from_wheel(self, command: str) -> str:
        if not INSTALLS_PROJECT.search(command):
            return command
        return re.sub(
            rf"(?<=[\s\"'])(?:\.|{PUBLISHED})(\[[\w,-]+\])?(?:[<>=~]+[\d.]+)?(?=[\s\"']|$)",
            lambda found: f"{self.wheel}{found[1] or ''}",
            command,
        )

    def _run(self, script: Path, here: Path, environment: dict[str, str]) -> str:
        log = script.with_suffix(".log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["bash", script],
                cwd=here,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status: int | str = process.wait(timeout=SECONDS)
            except subprocess.TimeoutExpired:
                status = f"nothing after {SECONDS} seconds"
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # what is left of its own group
                process.wait()
        printed = log.read_text(errors="replace")
        assert status == 0, f"{printed}\n{script.read_text()}"
        return printed


def command_lines(command: str, port: str, database: URL | None) -> list[str]:
    """Return a command as it is run: on a port and a database of the test's."""
    if database is not None:
        command = POSTGRESQL.sub(lambda found: f'="{shown(database, found[2])}"', command)
    command = re.sub(r"\b([A-Z_]+)=…", lambda found: f"{found[1]}={secrets.token_hex()}", command)
    command = re.sub(r"\b(localhost|127\.0\.0\.1):8\d\d\d\b", rf"\1:{port}", command)
    found = VARIABLES.fullmatch(command)
    assert found is not None
    variables, (name, *words) = found[1], found[2].split(" ")
    rest = " ".join(words).replace("--host 0.0.0.0", "--host 127.0.0.1")
    if name in SERVERS:
        rest = re.sub(r"--(port|bind) \S+", "", rest)
        where = (
            f"--bind 127.0.0.1:{port}" if name in ("gunicorn", "hypercorn") else f"--port {port}"
        )
        return [f"{variables}serve {name} {where} {rest}"]
    if command_of_worker := [worker for worker in WORKERS if found[2].startswith(worker)]:
        return [f"{variables}work {command_of_worker[0]}"]
    if name == "python" and words[0] == "-m" and takes_port(words[1]):
        return [f"{variables}serve python -m {words[1]} --port {port} {' '.join(words[2:])}"]
    return [command]


def takes_port(module: str) -> bool:
    """Return whether a module of the repository is a server that is told its port."""
    path = ROOT / module.replace(".", "/")
    files = [path.with_suffix(".py"), path / "__main__.py"]
    return any("--port" in file.read_text() for file in files if file.exists())


def shown(url: URL, driver: str) -> str:
    return url.set(drivername=driver).render_as_string(hide_password=False)


def is_in_the_repository(reader: Reader) -> bool:
    """Return whether the reader has a copy of the repository."""
    installs = [command for command in reader.commands if INSTALLS_PROJECT.search(command)]
    return not any(PUBLISHED in command for command in installs[:1])


def needs_postgresql(reader: Reader) -> bool:
    """Return whether the reader needs a PostgreSQL server."""
    return any(re.search("postgresql|psycopg", command) for command in reader.commands)


def may_use_sqlite(reader: Reader) -> bool:
    """Return whether what the reader installs and runs can do without a PostgreSQL server."""
    if not any(re.search(r"\[[\w,-]*sqlite", command) for command in reader.commands):
        return False
    modules = re.findall(r"\b(examples(?:\.\w+)+)", "\n".join(reader.commands))
    files = [ROOT / f"{module.replace('.', '/')}.py" for module in modules]
    sources = [file.read_text() for file in files if file.exists()]
    return not any("postgresql://" in source and "sqlite:" not in source for source in sources)

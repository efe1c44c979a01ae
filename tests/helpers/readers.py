"""What the pages tell their readers to do: for each reader, the commands in their order.

A page has a reader for each installation of the project that it shows. What is outside of tabs is
done by the readers of all tabs.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))),
    *sorted((ROOT / "examples").rglob("README.md")),
]

PROJECT = r"(?:\.|context-async-sqlalchemy)(?:\[[\w,-]+\])?(?:[<>=~][^\s\"']*)?"
INSTALLS_PROJECT = re.compile(rf"pip install (?:\S+ )*?[\"']?{PROJECT}[\"']?(?:\s|$)")
SERVERS = ("uvicorn", "gunicorn", "hypercorn", "granian")
# A name in prose, as "`pip`" or "`alembic -c …`", tells nobody to run it.
INLINE = re.compile(
    r"(?:[A-Z_]+=\S+ )*"
    r"(?:pip install \S.*|python -m \w.*|pytest \S.*|make \w.*|docker \w.*"
    rf"|(?:{'|'.join(SERVERS)}) [\w.]+:\w+.*"
    r"|curl .*(?:localhost|127\.0\.0\.1).*)"
)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
SAVE = re.compile(r"\b[Ss]ave\b[^.:`]*\bas `([\w./-]+)`")
FENCE = re.compile(r"^\s*(?:```|~~~)\s*(\w*)")
PROSE = "prose"
TAB = re.compile(r'^=== "(.+)"')


@dataclass(frozen=True)
class Block:
    """A paragraph or a fence of a page.

    Attributes:
        text: What is in it.
        kind: What a fence says that it is, if anything; PROSE for a paragraph.
        tab: The tab that it is in; empty outside of tabs.
    """

    text: str = ""
    kind: str = PROSE
    tab: str = ""


@dataclass(frozen=True)
class Step:
    """A command, or a file to save.

    Attributes:
        text: The command, or what is in the file.
        file: The file's name; empty for a command.
        tab: The tab that it is in; empty outside of tabs.
    """

    text: str
    file: str = ""
    tab: str = ""

    @property
    def begins(self) -> bool:
        """Return whether a new reader begins here."""
        return not self.file and INSTALLS_PROJECT.search(self.text) is not None


@dataclass(frozen=True)
class Reader:
    """Somebody who does what a page says.

    Attributes:
        page: The page.
        steps: What they do.
        tabs: The tabs that they read.
    """

    page: Path
    steps: list[Step] = field(default_factory=list)
    tabs: frozenset[str] = frozenset()

    @property
    def commands(self) -> list[str]:
        """Return the commands alone."""
        return [step.text for step in self.steps if not step.file]

    @property
    def is_installed(self) -> bool:
        """Return whether they have installed the project."""
        return any(step.begins for step in self.steps)

    @property
    def is_elsewhere(self) -> bool:
        """Return whether they have gone to a project of their own, which they install now."""
        return any(re.match(r"cd \.\./", command) for command in self.commands)

    def then(self, steps: list[Step], tab: str = "") -> Reader:
        """Return the reader after more steps."""
        tabs = self.tabs | {tab} if tab else self.tabs
        return Reader(self.page, [*self.steps, *steps], tabs)


def readers_of(page: Path) -> list[Reader]:
    """Return the readers of a page."""
    done: list[Reader] = []
    current = [Reader(page)]
    for in_tabs, group in groupby(steps_of(page.read_text()), key=lambda step: bool(step.tab)):
        current, ended = (_read_tabs if in_tabs else _read)(current, list(group))
        done += ended
    return [reader for reader in [*done, *current] if reader.commands]


def _read(
    before: list[Reader], steps: list[Step], tab: str = ""
) -> tuple[list[Reader], list[Reader]]:
    """Return who reads on after steps, and who ended before the end of them."""
    current, ended = before, []
    for step in steps:
        if step.begins and not current[0].is_elsewhere:
            ended += [reader for reader in current if reader.is_installed]
            # Who could install nothing yet does first what stands below.
            above = [] if current[0].is_installed else current[0].steps
            current = [Reader(current[0].page).then([step, *above], tab)]
        else:
            current = [reader.then([step], tab) for reader in current]
    return current, ended


def _read_tabs(before: list[Reader], steps: list[Step]) -> tuple[list[Reader], list[Reader]]:
    """Return who reads on after a group of tabs, and who ended before the end of it."""
    tabs = {tab: list(group) for tab, group in groupby(steps, key=lambda step: step.tab)}
    again = [reader for reader in before if reader.tabs & tabs.keys()]
    if again:  # who chose a tab of this name before chooses it again
        chosen = [min(reader.tabs & tabs.keys()) for reader in again]
        after = [reader.then(tabs[tab]) for reader, tab in zip(again, chosen, strict=True)]
        return after, [reader for reader in before if reader not in again]
    after, ended = [], []
    for tab, its in tabs.items():
        current, gone = _read(before, its, tab)
        after += current
        ended += [reader for reader in gone if reader not in ended]
    return after, ended


@dataclass
class Saving:
    """A file that the next code is saved as, or that of each of the next tabs.

    Attributes:
        file: Its name.
        tab: The tab that says so.
        then: What is done with it, which the same paragraph may say.
        saved: The tabs whose code was saved.
    """

    file: str
    tab: str
    then: list[Step]
    saved: set[str] = field(default_factory=set)


def steps_of(text: str) -> Iterator[Step]:
    """Yield what a page tells to do, in order."""
    saving: Saving | None = None
    for block in [*_blocks_of(text), Block()]:
        is_code = block.kind not in (PROSE, "sh")
        if saving and block.tab == saving.tab and not is_code:
            yield from [] if saving.saved else saving.then
            saving = None
        if block.kind == "sh":
            commands = block.text.replace("\\\n", " ").splitlines()
            yield from (Step(command, tab=block.tab) for command in commands if command.strip())
        elif block.kind == PROSE:
            steps = list(_steps_in_prose(block))
            if names := SAVE.findall(block.text):
                saving = Saving(names[-1], block.tab, steps)
            else:
                yield from steps
        elif saving and saving.tab in ("", block.tab) and block.tab not in saving.saved:
            yield Step(block.text, file=saving.file, tab=block.tab)
            yield from (replace(step, tab=block.tab) for step in saving.then)
            saving.saved.add(block.tab)
            saving = None if block.tab == saving.tab else saving


def _blocks_of(text: str) -> Iterator[Block]:
    """Yield the fences of a page, dedented, and the paragraphs between them."""
    tab, paragraph, lines = "", "", iter(text.splitlines())
    for line in lines:
        opened, tabbed = FENCE.match(line), TAB.match(line)
        leaves = bool(tab and line.strip() and not line.startswith("    "))
        if not line.strip() or opened or tabbed or leaves:
            if paragraph:
                yield Block(paragraph, tab=tab)
            paragraph = ""
            tab = tabbed[1] if tabbed else "" if leaves else tab
        if opened:
            code = textwrap.dedent("\n".join(_until_closed(lines)))
            yield Block(f"{code}\n", kind=opened[1], tab=tab)
        elif line.strip() and not tabbed:
            paragraph += f"{line}\n"
    if paragraph:
        yield Block(paragraph, tab=tab)


def _until_closed(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if line.strip() in ("```", "~~~"):
            return
        yield line


def _steps_in_prose(block: Block) -> Iterator[Step]:
    for span in SPAN.findall(block.text):
        command = " ".join(span.split())
        if INLINE.fullmatch(command) and not has_gap(command):
            yield Step(command, tab=block.tab)


def has_gap(command: str) -> bool:
    """Return whether a command has an ellipsis that is not the value of a variable."""
    return "…" in re.sub(r"\b[A-Z_]+=(\"[^\"]*\"|\S+)", "", command)

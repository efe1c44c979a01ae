"""The workflow that tests a proposed change gives it no more than it needs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

WORKFLOWS = sorted((Path(__file__).parents[2] / ".github" / "workflows").glob("*.y*ml"))
USES = r"^\s*-?\s*uses:\s*(.*)$"


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_an_action_is_named_by_its_commit(workflow: Path) -> None:
    used = re.findall(USES, workflow.read_text(), re.MULTILINE)
    assert used
    assert [u for u in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", u)] == []


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_job_may_read_and_keeps_no_credentials(workflow: Path) -> None:
    content: dict[Any, Any] = yaml.safe_load(workflow.read_text())
    assert content["permissions"] == {}
    # A workflow of `pull_request_target` runs a stranger's code with the rights of the repository.
    assert set(content[True]) <= {"push", "pull_request"}  # YAML 1.1 reads `on` as True
    for job in content["jobs"].values():
        assert job["permissions"] == {"contents": "read"}
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False
            assert "${{ github." not in step.get("run", "")  # a branch's name would be a command

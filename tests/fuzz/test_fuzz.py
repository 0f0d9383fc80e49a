"""What fuzzing has kept, and what it once found, through its targets again."""

import pytest

from tests.fuzz.targets import TARGETS, kept
from tests.traps import traps


@pytest.mark.parametrize("target", TARGETS)
def test_kept_inputs(target):
    inputs = list(kept(target))
    assert inputs
    for path in inputs:
        TARGETS[target](path.read_bytes())


@pytest.mark.parametrize("target", TARGETS)
def test_traps(target, tmp_path):
    for trap in traps(tmp_path / "canary"):
        TARGETS[target](trap.content)
    assert not (tmp_path / "canary").exists()

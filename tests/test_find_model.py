"""Which directory a model's name means."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.console.outputs import check_writable
from common.errors import CheckpointError, SettingsError
from common.weights.demo_model import DEMO_TEXT_MODEL, find_model


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a model of the demo model's name and another."""
    (tmp_path / DEMO_TEXT_MODEL).mkdir()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_demo_models_name_means_ours_wherever_one_is(here: Path) -> None:
    ours = find_model(None)
    assert ours.parent != here
    assert find_model(DEMO_TEXT_MODEL) == ours


@pytest.mark.usefixtures("here")
def test_other_names_and_paths_are_taken_as_they_are() -> None:
    assert find_model("other") == Path("other")
    assert find_model(f"./{DEMO_TEXT_MODEL}") == Path(DEMO_TEXT_MODEL)


@pytest.mark.parametrize("name", ["nothing", "n" * 5000])
def test_a_name_of_nothing_is_an_error_that_lists_ours(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"none that comes with midspan .*stories-llama"):
        find_model(name)


def test_an_output_whose_name_no_file_can_have_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be written: File name too long"):
        check_writable(tmp_path / ("n" * 5000))

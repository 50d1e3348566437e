"""`pytest --zoo-specs FOLDER`, run as a user would run it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

GOOD = """\
width: 64
stem: {type: token, vocab: 256}
body: {layers: {repeat: 2, of: {mixer: attention, channel: glu}}}
head: language_model
"""
SPACE = GOOD.replace("mixer: attention", "mixer: {choice: [mamba2, attention]}")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:cacheprovider")


def write(pytester: pytest.Pytester, **files: str) -> Path:
    folder = pytester.mkdir("specs")
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_good_specs_and_spaces_pass(pytester: pytest.Pytester) -> None:
    folder = write(pytester, good=GOOD, space=SPACE)
    (folder / "deeper").mkdir()
    (folder / "deeper/other.yml").write_text(GOOD)
    (folder / "notes.txt").write_text("no spec")
    pytester.runpytest_subprocess("--zoo-specs", "specs").assert_outcomes(passed=3)
    pytester.runpytest_subprocess("--zoo-specs=specs/good.yaml", "--zoo-specs=specs/deeper").assert_outcomes(passed=2)


def test_nothing_is_collected_unasked(pytester: pytest.Pytester) -> None:
    write(pytester, good=GOOD)
    pytester.makepyfile("def test_other(): pass")
    pytester.runpytest_subprocess().assert_outcomes(passed=1)
    pytester.runpytest_subprocess(".", "--zoo-specs", "specs").assert_outcomes(passed=2)


def test_a_wrong_published_figure_fails_with_both_numbers(pytester: pytest.Pytester) -> None:
    write(pytester, wrong=GOOD + "published:\n  total_parameters: 1000\n")
    result = pytester.runpytest_subprocess("--zoo-specs", "specs")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*wrong.yaml:6:21: published.total_parameters: 1,000 are published, * counted*"])
    result.stdout.no_fnmatch_line("*Traceback*")
    result.stdout.no_fnmatch_line("*pytest_plugin.py*")


def test_an_invalid_file_fails_with_all_its_places(pytester: pytest.Pytester) -> None:
    write(pytester, bad=GOOD.replace("width", "widht").replace("attention", "atention"), good=GOOD)
    result = pytester.runpytest_subprocess("--zoo-specs", "specs")
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(["*bad.yaml:1:1: widht: unknown key*", "    widht: 64", "    ^"])
    result.stdout.fnmatch_lines(["*bad.yaml:3:40: body.layers[[]0].mixer: unknown mixer 'atention'*"])


def test_an_option_of_a_space_that_is_wrong_fails(pytester: pytest.Pytester) -> None:
    write(pytester, space=SPACE.replace("attention", "atention"))
    result = pytester.runpytest_subprocess("--zoo-specs", "specs")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*space.yaml:3:*unknown mixer 'atention'*"])


def test_a_missing_folder_is_a_usage_error(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_subprocess("--zoo-specs", "nowhere")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--zoo-specs: no such file or folder: nowhere*"])


def test_an_empty_folder_is_no_success(pytester: pytest.Pytester) -> None:
    write(pytester)
    assert pytester.runpytest_subprocess("--zoo-specs", "specs").ret == pytest.ExitCode.NO_TESTS_COLLECTED

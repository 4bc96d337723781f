"""Which of the slow tests run (tests/conftest.py)."""

import types

import pytest


@pytest.fixture
def conftest(pytestconfig):
    """The suite's conftest.py."""
    (module,) = (one for one in pytestconfig.pluginmanager.get_plugins() if hasattr(one, "SLOW_SHARES"))
    return module


@pytest.fixture
def slow_share(pytestconfig, conftest):
    """What the suite's conftest.py makes of pytest's arguments: a part of the slow tests, or None for all."""

    def share(*arguments):
        option = pytestconfig._parser.parse_known_args(arguments)
        return conftest._slow_share(types.SimpleNamespace(option=option))

    return share


@pytest.mark.parametrize(
    "arguments",
    [["--all"], ["tests/x.py"], ["-k", "x"], ["-m", "slow"], ["--lf"], ["--ff"], ["--sw"], ["--sw-skip"]],
    ids=" ".join,
)
def test_all_slow_tests_run_where_tests_are_asked_for(arguments, slow_share):
    assert slow_share(*arguments) is None


def test_the_whole_suite_runs_a_share(slow_share, conftest):
    assert slow_share("-q") in range(conftest.SLOW_SHARES)


def test_the_files_that_are_begun_first_are_there(conftest):
    assert [name for name in conftest.LONG if not (conftest.ROOT / "tests" / name).is_file()] == []

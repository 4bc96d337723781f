"""The same answers on any number of devices, however the mesh is cut."""

import json
import pathlib

import pytest
import tiny

SCRIPT = pathlib.Path(__file__).parent / "generation_on_devices.py"


@pytest.mark.slow
def test_answers_do_not_depend_on_the_devices(run_script):
    done = run_script(SCRIPT, **tiny.fake_devices(4))
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["devices"] == 4
    results = outcome["results"]
    reference = {result["dtype"]: result for result in results if result["mesh"] is None}
    assert len(results) == 5
    for result in results:
        expected = reference[result["dtype"]]
        assert len({tuple(tokens) for tokens in expected["tokens"]}) > 8
        assert result["tokens"] == expected["tokens"], result["mesh"]
        assert result["likelihood"] == pytest.approx(expected["likelihood"], abs=1e-4), result["mesh"]

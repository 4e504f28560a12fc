"""Trials in a storage that processes share."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from adaptermix.errors import OutputError
from adaptermix.study.ledger import Ledger, Listed, _is_alive
from adaptermix.study.space import Candidate, Interval, Space
from adaptermix.study.trials import Trial

SPACE = Space(count=2)


def ledger(place, **more):
    given = {"name": "study", "searched": SPACE, "settings": {"rows": None}, "limit": 5} | more
    return Ledger(place, **given)


def run(found, value=lambda candidate: 1 - abs(candidate.weights[0] - 0.7)):
    done = []
    while asked := found.ask():
        number, candidate = asked
        found.tell(Trial(number=number, candidate=candidate, answers=("a", None), seconds=0.5), value(candidate))
        done.append(candidate)
    return done


def test_trials_are_kept_with_their_answers(tmp_path):
    found = ledger(tmp_path / "log")
    done = run(found)
    trials = found.trials()
    assert [trial.candidate for trial in trials] == done
    assert [trial.number for trial in trials] == list(range(5))
    assert all(trial.answers == ("a", None) and trial.seconds == 0.5 for trial in trials)
    assert found.known(done[3]) == ("a", None)
    assert found.known(Candidate(weights=(2.0, 0.0))) is None


def test_what_is_enqueued_comes_first_and_once(tmp_path):
    for _ in range(2):  # as after an interruption
        found = ledger(tmp_path / "log")
        found.enqueue([SPACE.point((0.9, 0.1), {}), SPACE.point((0.5, 0.5), {})])
    assert [candidate.weights for candidate in run(found)][:2] == [(0.9, 0.1), (0.5, 0.5)]
    weights = [trial.candidate.weights for trial in found.trials()]
    assert weights.count((0.9, 0.1)) == 1


def test_another_process_goes_on_where_the_first_stopped(tmp_path):
    first = ledger(tmp_path / "log")
    for _ in range(3):
        number, candidate = first.ask()
        first.tell(Trial(number=number, candidate=candidate, answers=("a",)), 0.0)
    assert len(run(ledger(tmp_path / "log"))) == 2
    assert len(first.trials()) == 5
    assert first.ask() is None


def test_other_settings_are_refused(tmp_path):
    ledger(tmp_path / "log")
    with pytest.raises(OutputError, match=r"begun with other settings \(rows\)"):
        ledger(tmp_path / "log", settings={"rows": ":9"})


def test_a_grid_is_tried_in_order(tmp_path):
    listed = Listed([Candidate(weights=(w, 1 - w)) for w in (0.75, 0.25, 0.5)])
    found = ledger(tmp_path / "log", searched=listed, limit=3)
    found.enqueue(listed.points())
    assert [candidate.weights[0] for candidate in run(found)] == [0.75, 0.25, 0.5]


@pytest.mark.parametrize("sampler", ["random", "tpe", "cmaes", "gp"])
def test_samplers_propose_within_the_space(tmp_path, sampler):
    searched = Space(count=3, simplex=False, reach=(0.0, 2.0), options={"density": Interval(0.1, 0.5)})
    found = ledger(tmp_path / "log", searched=searched, sampler=sampler, limit=9)
    for candidate in run(found):
        assert all(0 <= weight <= 2 for weight in candidate.weights)
        assert 0.1 <= candidate.options["density"] <= 0.5


def test_the_trial_of_a_dead_worker_is_given_again_and_counted_once(tmp_path):
    script = (
        "import os, sys; sys.path[:0] = [os.getcwd()]\n"
        "from tests.study.test_ledger import ledger\n"
        "found = ledger(sys.argv[1]); print(found.ask()[1].weights, flush=True); os.kill(os.getpid(), 9)"
    )
    lost = subprocess.run([sys.executable, "-c", script, tmp_path / "log"], capture_output=True, text=True, check=False)
    assert lost.returncode == -9, lost.stderr
    found = ledger(tmp_path / "log")
    done = run(found)
    assert len(done) == len(found.trials()) == 5
    assert str(done[0].weights) == lost.stdout.strip()


def test_a_worker_lives_by_its_process_here_and_by_its_signs_elsewhere():
    import socket
    import time

    here = socket.gethostname()
    assert _is_alive({"worker": [here, os.getpid()]}, begun=0.0)
    assert not _is_alive({"worker": [here, 2**22 + 1]}, begun=time.time())
    assert _is_alive({"worker": ["elsewhere", 1], "beat": time.time() - 5}, begun=0.0)
    assert not _is_alive({"worker": ["elsewhere", 1], "beat": time.time() - 500}, begun=0.0)
    assert not _is_alive({}, begun=time.time() - 500)

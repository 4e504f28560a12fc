"""Trials in a storage that processes share."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from adaptermix.weight_search.parameters import Choice, Interval
from adaptermix.weight_search.space import Candidate, CandidateList, Space
from adaptermix.weight_search.trial_store import TrialStore

from ..refusals import refuses

SPACE = Space(count=2)


def store(place, **more):
    given = {"searched": SPACE, "settings": {"rows": None}, "limit": 5} | more
    return TrialStore((place, "study"), **given)


def run(found, value=lambda candidate: 1 - abs(candidate.weights[0] - 0.7)):
    done = []
    while asked := found.ask():
        found.tell(replace(asked, answers=("a", None), seconds=0.5), value(asked.candidate))
        done.append(asked.candidate)
    return done


def test_trials_are_kept_with_their_answers(tmp_path):
    found = store(tmp_path / "log")
    done = run(found)
    trials = found.trials()
    assert [trial.candidate for trial in trials] == done
    assert [trial.number for trial in trials] == list(range(5))
    assert all(trial.answers == ("a", None) and trial.seconds == 0.5 for trial in trials)
    assert found.known(done[3]) == ("a", None)
    assert found.known(Candidate(weights=(2.0, 0.0))) is None


def test_what_is_enqueued_comes_first_and_once(tmp_path):
    for _ in range(2):  # as after an interruption
        found = store(tmp_path / "log")
        found.enqueue([SPACE.point((0.9, 0.1), {}), SPACE.point((0.5, 0.5), {})])
    assert [candidate.weights for candidate in run(found)][:2] == [(0.9, 0.1), (0.5, 0.5)]
    weights = [trial.candidate.weights for trial in found.trials()]
    assert weights.count((0.9, 0.1)) == 1


def test_another_process_goes_on_where_the_first_stopped(tmp_path):
    first = store(tmp_path / "log")
    for _ in range(3):
        first.tell(replace(first.ask(), answers=("a",)), 0.0)
    assert len(run(store(tmp_path / "log"))) == 2
    assert len(first.trials()) == 5
    assert first.ask() is None


def test_other_settings_are_refused(tmp_path):
    store(tmp_path / "log")
    with refuses("study.other-settings: rows"):
        store(tmp_path / "log", settings={"rows": ":9"})


def test_a_grid_is_tried_in_order(tmp_path):
    listed = CandidateList([Candidate(weights=(w, 1 - w)) for w in (0.75, 0.25, 0.5)])
    found = store(tmp_path / "log", searched=listed, limit=3)
    assert [candidate.weights[0] for candidate in run(found)] == [0.75, 0.25, 0.5]


@pytest.mark.parametrize("sampler", ["random", "tpe", "cmaes", "gp"])
def test_samplers_propose_within_the_space(tmp_path, sampler):
    searched = Space(count=3, simplex=False, reach=(0.0, 2.0), options={"density": Interval(0.1, 0.5)})
    found = store(tmp_path / "log", searched=searched, sampler=sampler, limit=9)
    for candidate in run(found):
        assert all(0 <= weight <= 2 for weight in candidate.weights)
        assert 0.1 <= candidate.options["density"] <= 0.5


def test_the_trial_of_a_dead_worker_is_given_again_and_counted_once(tmp_path):
    script = (
        "import os, sys; sys.path[:0] = [os.getcwd()]\n"
        "from tests.weight_search.test_trial_store import store\n"
        "found = store(sys.argv[1]); print(found.ask().candidate.weights, flush=True); os.kill(os.getpid(), 9)"
    )
    lost = subprocess.run([sys.executable, "-c", script, tmp_path / "log"], capture_output=True, text=True, check=False)
    assert lost.returncode == -9, lost.stderr
    found = store(tmp_path / "log")
    done = run(found)
    assert len(done) == len(found.trials()) == 5
    assert str(done[0].weights) == lost.stdout.strip()


def trials_of(found):
    from optuna.trial import TrialState

    return found._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def test_a_worker_lives_by_its_process_here_and_by_its_signs_elsewhere(tmp_path):
    import socket
    import time

    found = store(tmp_path / "log")
    found.ask()
    (trial,) = trials_of(found)
    assert found._lives(trial)
    here = socket.gethostname()
    for worker, beat, lives in (
        ([here, 2**22 + 1, "x"], time.time(), False),
        ([here, os.getppid(), "x"], 0.0, True),
        ([here, os.getpid(), "of another search"], time.time(), False),
        (["elsewhere", 1, "x"], time.time() - 5, True),
        (["elsewhere", 1, "x"], time.time() - 500, False),
    ):
        trial.user_attrs.update(worker=worker, beat=beat)
        assert found._lives(trial) is lives, worker


def test_a_search_that_was_given_up_in_this_process_does_not_hang(tmp_path):
    first = store(tmp_path / "log")
    first.ask()
    again = store(tmp_path / "log")
    assert len(run(again)) == 5
    assert not again.is_busy()


def test_a_trial_that_others_took_for_dead_is_not_kept(tmp_path):
    found = store(tmp_path / "log")
    asked = found.ask()
    other = store(tmp_path / "log")
    other._fail(asked.number)
    found.tell(replace(asked, answers=("late",)), 1.0)
    assert found.trials() == []
    assert len(run(found)) == 5


TENTHS = CandidateList([Candidate(weights=(w / 10, round(1 - w / 10, 1))) for w in range(10)])


def test_a_list_is_tried_once_each_by_any_number_of_processes(tmp_path):
    script = (
        "import os, sys; sys.path[:0] = [os.getcwd()]\n"
        "from tests.weight_search.test_trial_store import TENTHS, store, run\n"
        "print(len(run(store(sys.argv[1], searched=TENTHS, limit=10))))"
    )
    command = [sys.executable, "-c", script, tmp_path / "log"]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    done = [int(worker.communicate()[0]) for worker in workers]
    found = store(tmp_path / "log", searched=TENTHS, limit=10)
    assert sorted(trial.candidate.weights for trial in found.trials()) == [c.weights for c in TENTHS.candidates]
    assert sum(done) == 10
    assert not found.is_busy()


def test_a_sampler_that_goes_on_does_not_repeat_itself(tmp_path):
    for limit in (5, 10):
        run(store(tmp_path / "log", limit=limit))
    weights = [trial.candidate.weights for trial in store(tmp_path / "log", limit=10).trials()]
    assert len(set(weights)) == 10


def test_workers_propose_other_points(tmp_path):
    first = [store(tmp_path / worker, worker=worker).ask().candidate for worker in ("0", "1")]
    assert first[0] != first[1]


def test_what_is_no_storage_is_refused_and_no_password_is_shown(tmp_path):
    (tmp_path / "notes.txt").write_text("mine\n")
    with refuses("storage.unreachable"):
        store(tmp_path / "notes.txt")
    with refuses(r"storage.unreachable: nosuch://me:\*\*\*@host/db") as caught:
        store("nosuch://me:secret@host/db")
    assert "secret" not in str(caught.value)


def test_a_candidate_that_is_proposed_again_takes_no_place(tmp_path):
    """Three candidates in all: a random sampler repeats itself, and each is tried once all the same."""
    few = Space(count=1, options={"density": Choice((0.1, 0.5, 0.9))})
    found = store(tmp_path / "log", searched=few, limit=3, seed=1)
    done = run(found, value=lambda candidate: candidate.options["density"])
    tried = [trial.candidate.options["density"] for trial in found.trials()]
    assert len(done) >= len(tried)
    assert len(set(tried)) == len(tried)
    # a search for more than there is ends
    more = store(tmp_path / "more", searched=few, limit=40)
    run(more, value=lambda candidate: candidate.options["density"])
    assert sorted(trial.candidate.options["density"] for trial in more.trials()) == [0.1, 0.5, 0.9]


def test_the_task_adapter_alone_takes_no_place_where_it_was_asked(tmp_path):
    found = store(tmp_path / "log", limit=2)
    found.add_known_answers(Candidate(weights=(1.0, 0.0)), ["a", None])
    found.enqueue([{"w0": 1.0}])
    run(found)
    assert len(found.trials()) == 2
    assert all(trial.candidate.weights != (1.0, 0.0) for trial in found.trials())

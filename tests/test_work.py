"The ground floor: progress in each mode, times, the machine, a pool that says what died."
import os
import random
import signal
import sys
import types
from functools import partial

import pytest
import torch

from reinpp import work
from reinpp.files import BadFile
from reinpp.work import PROGRESS, Progress, cores, device_name, duration, each

# ---------------------------------------------------------------- progress

@pytest.fixture
def clock(monkeypatch):
    "Seconds that pass only when they are told to."
    now = types.SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(work.time, "monotonic", lambda: now.seconds)
    return now


def run(progress, clock, seconds=1.0, pieces=100):
    with progress:
        for i in range(pieces):
            clock.seconds += seconds
            progress.update(loss=i)


def test_lines_are_ten(clock, capsys):
    run(Progress(100, "iteration", show="lines"), clock)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and lines[0] == "iteration 10/100  loss 9.000  1 s each, 2 min left"
    assert lines[-1] == "iteration 100/100  loss 99.000  1 s each, 0 s left"


def test_slow_work_has_a_line_every_ten_minutes(clock, capsys):
    run(Progress(100, "", "image", show="lines"), clock, seconds=250.0)
    lines = capsys.readouterr().out.splitlines()
    assert 30 <= len(lines) <= 40 and lines[0] == "image 3/100  loss 2.000  2.5e+02 s each, 6.7 h left"


def test_what_was_there_before_counts_for_nothing(clock, capsys):
    run(Progress(100, "iteration", done=90, show="lines"), clock, pieces=10)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and lines[0] == "iteration 91/100  loss 0.000  1 s each, 9 s left"


def test_none_is_silent(clock, capsys):
    progress = Progress(100, show="none")
    run(progress, clock)
    progress.say("nothing")
    assert capsys.readouterr() == ("", "") and progress.done == 100


def test_a_bar_is_tqdms_and_is_closed_by_an_error(capsys):
    progress = Progress(4, "training", "step", done=1, show="bar")
    with pytest.raises(KeyError):
        with progress:
            progress.update(2, loss=1.5)
            progress.say("half way")
            raise KeyError
    out, err = capsys.readouterr()
    assert out == "" and "half way\n" in err and "training" in err and "3/4" in err and "loss=1.50" in err
    assert progress.bar.disable and progress.bar.n == 3, "tqdm's mark of a bar that is closed"


def test_a_notebook_has_one_output_that_is_written_over(clock, monkeypatch, capsys):
    shown = []

    class Handle:
        def update(self, data, raw):
            shown.append(("again", data["text/plain"]))

    def display(data, raw, display_id):
        shown.append(("first", data["text/plain"]))
        return Handle()

    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=display))
    progress = Progress(100, "iteration", show="notebook")
    run(progress, clock, seconds=0.1)
    assert [kind for kind, _ in shown] == ["first"] + ["again"] * (len(shown) - 1) and 10 <= len(shown) <= 20
    assert shown[-1][1] == "iteration 100/100  loss 99.000  0.1 s each, 0 s left" and capsys.readouterr().out == ""
    progress.say("a line of its own")
    assert capsys.readouterr().out == "a line of its own\n"


@pytest.mark.parametrize("kernel, terminal, expected", [
    (object(), True, "notebook"), (None, True, "bar"), (None, False, "lines"), ("no IPython", False, "lines")])
def test_auto_is_what_goes_with_the_place(kernel, terminal, expected, monkeypatch):
    shell = types.SimpleNamespace(kernel=kernel)
    ipython = None if kernel == "no IPython" else types.SimpleNamespace(get_ipython=lambda: shell)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert Progress(1).show == expected


def test_an_unknown_kind_of_progress_is_refused():
    with pytest.raises(ValueError, match="progress='loud' is unknown: use one of auto, bar, notebook, lines, none"):
        Progress(1, show="loud")
    assert PROGRESS[0] == "auto"


def test_times_and_the_machine():
    assert [duration(s) for s in (0, 89, 90, 5399, 5400, 360_000)] == ["0 s", "89 s", "2 min", "90 min", "1.5 h",
                                                                       "100.0 h"]
    assert 1 <= cores() <= (os.cpu_count() or 1)
    assert device_name("cpu") == f"CPU ({os.uname().machine}, {torch.get_num_threads()} threads)"


# ---------------------------------------------------------------- many processes

def square(number):
    return number * number


def process(number):
    return os.getpid()


def bad(number):
    if number == 5:
        raise BadFile("street.png: is rotated: turn it", "rotated")
    return number


def dies(number):
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


SEEN = []


def remember(*values):
    SEEN[:] = values


def recall(number):
    return tuple(SEEN), number, torch.get_num_threads()


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("ordered", [True, False])
def test_each_is_map(workers, ordered):
    numbers = list(range(20))
    random.Random(0).shuffle(numbers)
    found = list(each(square, numbers, workers, ordered=ordered))
    assert (found if ordered else sorted(found)) == [n * n for n in (numbers if ordered else sorted(numbers))]
    assert list(each(square, [], workers)) == []


def test_each_chooses_its_workers():
    assert set(each(process, range(63))) == {os.getpid()}, "few items are not worth a process"
    assert os.getpid() not in set(each(process, range(64)))


def test_each_starts_no_more_workers_than_there_are_items(monkeypatch):
    asked = []
    class Pool(work.ProcessPoolExecutor):
        def __init__(self, workers, *arguments):
            asked.append(workers)
            super().__init__(min(workers, 2), *arguments)
    monkeypatch.setattr(work, "ProcessPoolExecutor", Pool)
    assert list(each(abs, [-1, 2], workers=10**6)) == [1, 2] and asked == [2]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ordered", [True, False])
def test_an_error_keeps_its_kind_across_processes(workers, ordered):
    with pytest.raises(BadFile) as error:
        list(each(bad, range(20), workers, ordered=ordered))
    assert str(error.value) == "street.png: is rotated: turn it" and error.value.kind == "rotated"


@pytest.mark.parametrize("ordered", [True, False])
def test_a_killed_worker_ends_the_work_with_a_line(ordered):
    with pytest.raises(RuntimeError, match="a worker died: out of memory, killed"):
        list(each(dies, range(20), 2, ordered=ordered))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_are_set_up_once(start):
    found = list(each(recall, range(6), 2, start, remember, ("a", 1)))
    assert found == [(("a", 1), number, 1) for number in range(6)] and SEEN == []


def test_without_workers_it_is_set_up_here(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SEEN", [])
    assert [seen for seen, *_ in each(recall, range(2), 0, set_up=remember, set_up_arguments=("b",))] == [("b",)] * 2
    assert list(each(recall, [], 0, set_up=remember, set_up_arguments=("c",))) == [] and SEEN == ["b"]


def test_what_cannot_be_imported_is_refused_before_a_process_starts():
    with pytest.raises(ValueError, match="another process must be able to import .*: use workers=0"):
        list(each(lambda number: number, range(4), 2, "spawn"))
    assert list(each(partial(pow, 2), range(4), 2)) == [1, 2, 4, 8]


def test_one_may_stop_early():
    stream = each(square, range(1000), 2)
    assert [next(stream) for _ in range(3)] == [0, 1, 4]
    stream.close()

"""The policy against tables worked by hand from Algorithms 2, 3 and 4 (AAP §3.2 and A.1).

A line of a table is one round: what the policy must ask for (the round pruned from, T, λ), then what came of it (the
parameters left of 1,000, the outcome). Accuracy is what the outcome says: "a" accepted, "r" rolled back after training,
"o" rolled back untrained because it went too far beyond a limit on size or was tried before, "s" skipped.
"""

from dataclasses import replace

import pytest

from paamops.methods.objective import Objective
from paamops.methods.policy import Step, next_step, rolled_back_to, trained
from paamops.methods.result import Round

ACCURACY = Objective(max_accuracy_drop=0.01)
OUTCOMES = {"a": "accepted", "r": "rolled back", "o": "rolled back", "s": "skipped"}
START = Round(0, None, 0.0, 0.0, 1000, 1000, 100, 0.9, "start")


def follow(objective, first, table, end):
    """Play a table: each line is asked for and then recorded; `end` is what is asked for after the last one."""
    history = [START]
    for origin, threshold, step, size, outcome in table:
        asked = next_step(history, objective, first)
        assert asked == Step(origin, pytest.approx(threshold), pytest.approx(step)), f"round {len(history)}"
        accuracy = 0.9 if outcome in "ar" else None
        entry = Round(len(history), origin, asked.threshold, asked.step, size, size, 50, accuracy, OUTCOMES[outcome])
        history.append(replace(entry, base=entry.threshold))
    asked = next_step(history, objective, first)
    assert asked is None if end is None else asked == end
    return history


def test_algorithm_2_accepts_until_it_fails_then_halves():
    """λ[r+1] = λ[r] / 2^(C+1), T[r+1] = T[k] + λ[r+1]: from one k the steps are 1/2, 1/8 and 1/64 of the first.

    After an accepted round λ doubles again, where the paper keeps it.
    """
    table = [
        (0, 0.0, 0.0, 950, "a"),  # line 3: T = 0, only dead filters go
        (1, 0.01, 0.01, 900, "a"),  # line 14: T + λ
        (2, 0.02, 0.01, 700, "a"),
        (3, 0.03, 0.01, 300, "r"),  # rejected: k = 3, C = 0
        (3, 0.025, 0.005, 500, "r"),  # λ / 2; rejected: C = 1
        (3, 0.02125, 0.00125, 600, "a"),  # λ / 4
        (6, 0.02375, 0.0025, 550, "a"),  # 2 λ
        (7, 0.02875, 0.005, 500, "r"),  # 2 λ; k = 7, C = 0
    ]
    follow(ACCURACY, 0.01, table, Step(7, pytest.approx(0.02375 + 0.0025), pytest.approx(0.0025)))


def test_algorithm_2_marks_a_round_that_was_used_several_times_and_goes_further_back():
    table = [
        (0, 0.0, 0.0, 900, "a"),
        (1, 0.64, 0.64, 800, "a"),
        (2, 1.28, 0.64, 400, "r"),
        (2, 0.64 + 0.32, 0.32, 500, "r"),  # C = 0
        (2, 0.64 + 0.08, 0.08, 550, "r"),  # C = 1
        (2, 0.64 + 0.01, 0.01, 600, "r"),  # C = 2; k = 2 was used three times: marked
        (1, 0.32, 0.32, 790, "a"),  # k = 1, C = 0: half the step from 1 to 2
        (7, 0.96, 0.64, 600, "r"),
        (7, 0.32 + 0.32, 0.32, 610, "r"),
        (7, 0.32 + 0.08, 0.08, 620, "r"),
        (7, 0.32 + 0.01, 0.01, 630, "r"),  # k = 7 marked as well; 2 is marked, so 1, for which C = 1 now
    ]
    end = Step(1, pytest.approx(0.32 / 4), pytest.approx(0.32 / 4))
    history = follow(ACCURACY, 0.64, table, end)
    assert [rolled_back_to(history, number) for number in (1, 2, 7)] == [(1, 1), (3, 3), (3, 3)]


def test_algorithm_2_ends_when_no_round_is_left():
    table = [
        (0, 0.0, 0.0, 1000, "s"),
        (1, 0.64, 0.64, 400, "r"),
        (1, 0.32, 0.32, 410, "r"),
        (1, 0.08, 0.08, 410, "o"),  # the same network, known to fail, is not trained
        (1, 0.01, 0.01, 420, "r"),
        (1, 0.000625, 0.000625, 430, "r"),  # round 0 is the same network
    ]
    follow(ACCURACY, 0.64, table, None)


def test_algorithm_2_ends_when_the_size_stands_still_for_several_rounds():
    table = [
        (0, 0.0, 0.0, 1000, "s"),
        (1, 0.4, 0.4, 600, "a"),
        (2, 0.8, 0.4, 300, "r"),
        (2, 0.6, 0.2, 599, "a"),  # a change of 0.1 % is none
        (4, 1.0, 0.4, 599, "s"),
        (5, 1.8, 0.8, 500, "r"),  # what is rolled back in between does not count
        (5, 1.4, 0.4, 598, "a"),
    ]
    follow(ACCURACY, 0.4, table, None)


def test_a_change_above_the_tolerance_goes_on():
    table = [
        (0, 0.0, 0.0, 1000, "s"),
        (1, 0.4, 0.4, 600, "a"),
        (2, 0.8, 0.4, 300, "r"),
        (2, 0.6, 0.2, 599, "a"),
        (4, 1.0, 0.4, 597, "a"),
        (5, 1.4, 0.4, 596, "a"),  # λ doubles no further than the first that failed
        (6, 1.8, 0.4, 596, "s"),
    ]
    follow(ACCURACY, 0.4, table, Step(7, pytest.approx(2.6), 0.8))  # nothing higher was tried on this network yet


def test_skipped_rounds_double_the_step_up_to_half_of_the_way_to_what_was_tried():
    table = [
        (0, 0.0, 0.0, 1000, "s"),
        (1, 6.4, 6.4, 600, "a"),
        (2, 12.8, 6.4, 300, "r"),
        (2, 9.6, 3.2, 300, "r"),
        (2, 7.2, 0.8, 310, "r"),
        (2, 6.5, 0.1, 400, "r"),  # round 2 was used three times
        (1, 3.2, 3.2, 1000, "s"),  # half the step to round 2
        (7, 4.8, 1.6, 700, "a"),  # half of the way to it
        (8, 8.0, 3.2, 700, "s"),
        (9, 14.4, 6.4, 700, "s"),  # nothing higher was tried on this network: no end, and λ doubles
        (10, 27.2, 12.8, 400, "r"),
        (10, 20.8, 6.4, 700, "s"),
    ]
    follow(ACCURACY, 6.4, table, None)


def test_until_the_first_roll_back_skipped_rounds_double_the_step_and_do_not_end_the_run():
    table = [
        (0, 0.0, 0.0, 1000, "s"),  # nothing dead: T = 0 says nothing about λ
        (1, 0.1, 0.1, 1000, "s"),
        (2, 0.3, 0.2, 1000, "s"),
        (3, 0.7, 0.4, 1000, "s"),
        (4, 1.5, 0.8, 999, "a"),
        (5, 2.3, 0.8, 998, "a"),
        (6, 3.1, 0.8, 997, "a"),
        (7, 3.9, 0.8, 500, "r"),
        (7, 3.5, 0.4, 997, "s"),  # now the target is near
        (9, 3.7, 0.2, 997, "s"),  # half of the way
        (10, 3.8, 0.1, 997, "s"),
    ]
    history = follow(ACCURACY, 0.1, table, None)
    assert trained(history, 11) == 7
    assert trained(history, 4) == 0


@pytest.mark.parametrize(
    "objective", [Objective(params=0.5), Objective(flops=0.5)], ids=["algorithm 3: memory", "algorithm 4: FLOPs"]
)
def test_algorithms_3_and_4_step_back_from_beyond_the_limit_and_land_on_it(objective):
    table = [
        (0, 0.0, 0.0, 1000, "s"),
        (1, 0.8, 0.8, 900, "a"),  # short of the target: acceptable, lines 9 to 14
        (2, 1.6, 0.8, 400, "o"),  # beyond it: back to round 2, line 22
        (2, 0.8 + 0.4, 0.4, 600, "a"),
        (4, 1.2 + 0.8, 0.8, 300, "o"),
        (4, 1.2 + 0.4, 0.4, 350, "o"),
        (4, 1.2 + 0.1, 0.1, 400, "o"),
        (4, 1.2 + 0.0125, 0.0125, 450, "o"),  # round 4 was used three times
    ]
    follow(objective, 0.8, table, Step(4, pytest.approx(1.2), pytest.approx(0.0125), land=True))


def test_a_size_that_stands_still_below_the_limit_lands_too():
    table = [
        (0, 0.0, 0.0, 1000, "s"),
        (1, 0.8, 0.8, 400, "o"),
        (1, 0.4, 0.4, 1000, "s"),
        (3, 0.6, 0.2, 1000, "s"),
        (4, 0.7, 0.1, 1000, "s"),
    ]
    follow(Objective(params=0.5), 0.8, table, Step(0, 0.0, pytest.approx(0.1), land=True))


def test_landing_is_tried_once_from_a_network_then_the_search_goes_further_back():
    objective = Objective(params=0.5, max_accuracy_drop=0.01)
    history = [
        START,
        Round(1, 0, 0.0, 0.0, 1000, 1000, 100, None, "skipped"),
        Round(2, 1, 0.64, 0.64, 600, 600, 60, 0.9, "accepted", base=0.64),
        Round(3, 2, 1.28, 0.64, 300, 300, 30, None, "rolled back"),
        Round(4, 2, 0.96, 0.32, 400, 400, 40, None, "rolled back"),
        Round(5, 2, 0.72, 0.08, 450, 450, 45, None, "rolled back"),
        Round(6, 2, 0.65, 0.01, 470, 470, 47, None, "rolled back"),
    ]
    assert next_step(history, objective, 0.64) == Step(2, 0.64, 0.01, land=True)
    history.append(Round(7, 2, 0.645, 0.005, 499, 499, 49, 0.8, "rolled back"))
    assert next_step(history, objective, 0.64) == Step(1, 0.32, 0.32)


def test_no_landing_where_the_size_is_to_be_minimised_or_accuracy_alone_failed():
    failed = [START, *(Round(n, 0, 0.1, 0.1, 600 - n, 600, 60, 0.5, "rolled back") for n in range(1, 5))]
    assert next_step(failed, Objective(params=0.5, max_accuracy_drop=0.01), 0.1) is None
    assert next_step(failed, ACCURACY, 0.1) is None


def test_sizes_follow_the_objective():
    """A round that changes FLOPs alone has changed nothing for an objective on parameters, and the other way round."""
    history = [
        START,
        Round(1, 0, 0.0, 0.0, 1000, 1000, 100, None, "skipped"),
        Round(2, 1, 0.4, 0.4, 300, 300, 30, 0.1, "rolled back"),
        *(Round(n, n - 1 if n > 3 else 1, 0.1 * n, 0.1, 1000, 1000 - 50 * n, 9, 0.9, "accepted") for n in (3, 4, 5)),
    ]
    assert next_step(history, ACCURACY, 0.4) is None
    assert next_step(history, Objective(max_accuracy_drop=0.01, minimise="flops"), 0.4).origin == 5
    assert next_step(history, Objective(max_accuracy_drop=0.01, minimise="both"), 0.4).origin == 5


def test_a_step_is_added_to_the_base_of_its_origin():
    """A network that was pruned at T = 0.4 may lose filters from 0.1 on when its filters have been trained again."""
    history = [
        START,
        Round(1, 0, 0.0, 0.0, 1000, 1000, 100, None, "skipped"),
        Round(2, 1, 0.4, 0.4, 600, 600, 60, 0.9, "accepted", base=0.1),
    ]
    assert next_step(history, ACCURACY, 0.4) == Step(2, pytest.approx(0.5), 0.4)
    history.append(Round(3, 2, 0.5, 0.4, 100, 100, 10, 0.5, "rolled back", base=0.5))
    assert next_step(history, ACCURACY, 0.4) == Step(2, pytest.approx(0.3), 0.2)


def test_the_first_round_prunes_at_zero_and_the_first_step_follows_even_a_roll_back():
    assert next_step([START], ACCURACY, None) == Step(0, 0.0, 0.0)
    dead = Round(1, 0, 0.0, 0.0, 900, 900, 90, 0.5, "rolled back")
    assert next_step([START, dead], ACCURACY, 0.4) == Step(0, 0.2, 0.2)


def test_a_network_whose_smallest_step_is_known_to_fail_is_left_after_twice_several_rounds():
    table = [
        (0, 0.0, 0.0, 900, "a"),
        (1, 0.64, 0.64, 400, "r"),
        (1, 0.32, 0.32, 400, "o"),
        (1, 0.08, 0.08, 400, "o"),
        (1, 0.01, 0.01, 400, "o"),
        (1, 0.01 / 2**4, 0.01 / 2**4, 400, "o"),
        (1, 0.01 / 2**9, 0.01 / 2**9, 400, "o"),
        (1, 0.01 / 2**15, 0.01 / 2**15, 400, "o"),
    ]
    follow(ACCURACY, 0.64, table, Step(0, pytest.approx(0.32), pytest.approx(0.32)))


def test_the_search_ends_when_several_networks_are_used_up():
    table = [(0, 0.0, 0.0, 1000, "s"), *((n, 0.64 * n, 0.64, 1000 - 100 * n, "a") for n in (1, 2, 3))]
    history = follow(ACCURACY, 0.64, table, Step(4, pytest.approx(0.64 * 4), 0.64))
    for origin in (4, 3, 2):
        assert next_step(history, ACCURACY, 0.64).origin == origin
        history += [
            Round(len(history) + n, origin, 2.0, 0.64, 500 - len(history) - n, 1, 1, 0.1, "rolled back")
            for n in range(4 if origin == 4 else 3)
        ]
    assert next_step(history, ACCURACY, 0.64) is None  # though round 1 is left

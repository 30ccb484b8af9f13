"""The adaptive policy of AAP (Algorithms 2, 3 and 4): what the next round is, as a pure function of the history."""

import itertools
from dataclasses import dataclass

SEVERAL = 3  # how many roll-backs a round is good for, and how many rounds without change end the run
TOLERANCE = 1e-3  # a change of the size by at most this share of the unpruned network is none


@dataclass(frozen=True)
class Step:
    """The next round: prune the network of round `origin` at the threshold T; λ is `step`.

    With `land`, T is not known yet: it is the lowest at which all limits on size are kept.
    """

    origin: int
    threshold: float
    step: float
    land: bool = False


def next_step(history, objective, first):
    """The next Step, or None when the search has ended.

    The three algorithms differ only in what makes a round acceptable, which its `outcome` tells; from there they are
    one. Round 1 prunes at T = 0, where only dead filters go; the first λ comes after it. After an acceptable round r:
    T[r+1] = T[r] + λ[r]; the search ends when the size has changed by at most 0.1 % for several rounds. After another:
    back to the last acceptable round k that is not marked, λ[r+1] = λ[r] / 2^(C+1), T[r+1] = T[k] + λ[r+1], C = how
    often the search was rolled back to k already; a k that has been used several times is marked unacceptable. When no
    round is left, the search ends.

    What we chose:
    - T[k] is the round's `base`. The paper adds λ to T[k] itself, and counts on a small λ removing no filter; but the
      network that was pruned at T[k] has been retrained and its layers have other weights, so that T[k] alone can
      remove most of it.
    - Several is 3; the change is measured against the unpruned network, over the last acceptable rounds, whatever was
      rolled back in between.
    - Until the first roll-back nothing shows that the search is near its target: a skipped round then doubles λ (T
      stands in the units of the scores, and only scores tell what is a large step), and the size's standing still is no
      reason to end.
    - After it an accepted round doubles λ, up to that of the first round that was rolled back. The paper keeps λ, so
      that one unlucky training early on makes all later steps small; the search still ends, where several steps from
      one round all fail.
    - Where limits on size are to be met and no more, the end of the search is a round that lands on them exactly: a
      size is known before training, so the halvings of λ need not come close.

    Args:
        history: sequence of Round, the first of them the unpruned network's.
        objective: Objective.
        first: the first λ; not looked at for round 1.
    """
    last = history[-1]
    if len(history) == 1:
        return Step(0, 0.0, 0.0)
    if last.outcome == "rolled back":
        return _after_roll_back(history, objective, first)
    if _converged(history, objective):
        return _landing(history, objective, last.number)
    failed = next((each for each in history if each.outcome == "rolled back"), None)
    step = last.step or first
    if failed is None and last.outcome == "skipped" and last.threshold > 0:
        step *= 2
    elif failed is not None and last.outcome == "accepted":
        step = max(step, min(2 * step, failed.step))
    return Step(last.number, last.base + step, step)


def _after_roll_back(history, objective, first):
    """Lines 17 to 24 of Algorithm 2."""
    marked = False
    for candidate in reversed(history):
        if candidate.outcome == "rolled back":
            continue
        count = rolled_back_to(history, candidate.number)
        if count < SEVERAL:
            step = (history[-1].step or first) / 2 ** (count + 1)
            return Step(candidate.number, candidate.base + step, step)
        if not marked:  # the nearest to the target: what its small steps miss, a landing meets
            marked = True
            landing = _landing(history, objective, candidate.number)
            if landing:
                return landing
    return None


def rolled_back_to(history, number):
    """How often the search went back to the round `number`: the rounds that start from it and follow a rejected one."""
    pairs = itertools.pairwise(history)
    return sum(after.origin == number and before.outcome == "rolled back" for before, after in pairs)


def _converged(history, objective):
    """Whether the size changed by no more than the tolerance in the last several acceptable rounds."""
    seen = [each.number for each in history if each.outcome == "rolled back"]
    if not seen:
        return False
    recent = [each for each in history[seen[0] :] if each.outcome in ("accepted", "skipped")][-SEVERAL:]
    changes = [_size(history[each.origin], history, objective) - _size(each, history, objective) for each in recent]
    return len(recent) == SEVERAL and all(abs(change) <= TOLERANCE + 1e-12 for change in changes)


def _landing(history, objective, origin):
    """A Step from `origin` onto the limits on size, where a step went too far for them and this was not tried yet."""
    overshot = any(each.outcome == "rolled back" and each.accuracy is None for each in history)
    if not overshot:
        return None
    origin = trained(history, origin)
    start = history[0]
    tried = any(
        trained(history, each.origin) == origin and each.accuracy is not None and objective.sizes_met(each, start)
        for each in history[1:]
    )
    return None if tried else Step(origin, history[origin].base, history[-1].step, land=True)


def trained(history, number):
    """The round whose network round `number` has: itself, or what it was to be pruned from if it was skipped."""
    while history[number].outcome == "skipped":
        number = history[number].origin
    return number


def _size(entry, history, objective):
    return objective.size(entry, history[0])

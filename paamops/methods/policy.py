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
    - While no higher T has been tried on a network, nothing shows that the search is near its target: a skipped round
      then doubles λ (T stands in the units of the scores, and only scores tell what is a large step), and the size's
      standing still is no reason to end. Once one has been, a skipped round goes at most half of the way to it.
    - Rounds that are skipped leave the same network, so roll-backs are counted by network. A smaller λ can remove the
      same filters again, which is not trained again: a network has been used several times when several networks came
      of it, or twice as many rounds. The search then goes further back, and λ[r] is the step of the last round pruned
      from there: the small last one says nothing about another network. It ends when several networks are used up.
    - After the first roll-back an accepted round doubles λ, up to that of the first round that was rolled back. The
      paper keeps λ, so that one unlucky training early on makes all later steps small; the search still ends, where
      several steps from one round all fail.
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
    if last.outcome == "skipped" and last.threshold > 0:
        beyond = _beyond(history, last)
        step = 2 * step if beyond is None else min(step, (beyond - last.threshold) / 2)
    elif failed is not None and last.outcome == "accepted":
        step = max(step, min(2 * step, failed.step))
    return Step(last.number, last.base + step, step)


def _after_roll_back(history, objective, first):
    """Lines 17 to 24 of Algorithm 2."""
    spent = set()
    for candidate in reversed(history):
        network = trained(history, candidate.number)
        if candidate.outcome == "rolled back" or network in spent:
            continue
        count, networks = rolled_back_to(history, network)
        if networks < SEVERAL and count < 2 * SEVERAL:
            step = (_pruned_from(history, network)[-1].step or first) / 2 ** (count + 1)
            return Step(candidate.number, candidate.base + step, step)
        if not spent:  # the nearest to the target: what its small steps miss, a landing meets
            landing = _landing(history, objective, candidate.number)
            if landing:
                return landing
        spent.add(network)
        if len(spent) == SEVERAL:
            break
    return None


def rolled_back_to(history, network):
    """How many rounds start from a network and follow a rejected one, and how many networks came of them."""
    pairs = itertools.pairwise(history)
    after = [b for a, b in pairs if a.outcome == "rolled back" and trained(history, b.origin) == network]
    return len(after), len({(each.params, each.flops, each.filters) for each in after})


def _beyond(history, entry):
    """The lowest T above a skipped round's at which its network was pruned, whatever came of it, or None."""
    tried = [each.threshold for each in _pruned_from(history, trained(history, entry.number))]
    return min((threshold for threshold in tried if threshold > entry.threshold), default=None)


def _pruned_from(history, network):
    """The rounds that pruned the network of a trained round, but for the skipped ones."""
    return [each for each in history[1:] if each.outcome != "skipped" and trained(history, each.origin) == network]


def _converged(history, objective):
    """Whether the size changed by no more than the tolerance in the last several acceptable rounds."""
    seen = [each.number for each in history if each.outcome == "rolled back"]
    if not seen or (history[-1].outcome == "skipped" and _beyond(history, history[-1]) is None):
        return False
    recent = [each for each in history[seen[0] :] if each.outcome in ("accepted", "skipped")][-SEVERAL:]
    changes = [_size(history[each.origin], history, objective) - _size(each, history, objective) for each in recent]
    return len(recent) == SEVERAL and all(abs(change) <= TOLERANCE + 1e-12 for change in changes)


def _landing(history, objective, origin):
    """A Step from `origin` onto the limits on size, where a step went too far for them and this was not tried yet."""
    start = history[0]
    overshot = (each for each in history if each.outcome == "rolled back" and each.accuracy is None)
    if not objective.sizes or not any(objective.sizes_met(each, start) for each in overshot):
        return None
    origin = trained(history, origin)
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

"""The order of an endless run: which data set a slot takes from, and which of its bins.

Both are pure functions of the slot's number, so nothing has to be stored or replayed to resume: a keyed permutation of each
epoch (a Feistel network, walked in cycles until it lands inside; Black and Rogaway 2002), and a mixture that deals
slots in exact integer shares, evenly spread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import gcd

ROUNDS = 8


def permuted(index: int, size: int, *, key: int) -> int:
    """Where the permutation `key` of `range(size)` sends `index`. Time and memory do not grow with `size`."""
    assert 0 <= index < size
    half = (max(size - 1, 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    secret = key.to_bytes(8, "big")
    while True:
        left, right = index >> half, index & mask
        for turn in range(ROUNDS):
            digest = hashlib.blake2b(right.to_bytes(8, "big"), digest_size=8, key=secret, salt=bytes([turn])).digest()
            left, right = right, left ^ (int.from_bytes(digest, "big") & mask)
        index = left << half | right
        if index < size:
            return index


class Mixture:
    """Deals slots 0, 1, 2, ... to sources in proportion to integer `rates`.

    Turn k of source s comes at time (2k + 1) / (2 rates[s]), earlier sources first where times are equal; slots count
    turns in that order. At every slot each source is within half its number of rivals of its share.
    """

    def __init__(self, rates: Sequence[int]):
        assert rates and all(rate > 0 for rate in rates)
        divisor = gcd(*rates)
        self.rates = [rate // divisor for rate in rates]
        self.total = sum(self.rates)

    def turn(self, slot: int) -> tuple[int, int]:
        """The source of a slot, and which turn of that source it is, from 0."""
        reach = len(self.rates)
        for source, rate in enumerate(self.rates):
            near = slot * rate // self.total
            for turn in range(max(0, near - reach), near + reach + 1):
                if self._slot(source, turn) == slot:
                    return source, turn
        raise AssertionError(f"slot {slot} was dealt to nobody")

    def turns(self, slots: int) -> list[int]:
        """How many of the first `slots` each source is dealt."""
        found = []
        for source, rate in enumerate(self.rates):
            count = max(0, slots * rate // self.total - len(self.rates))
            while self._slot(source, count) < slots:
                count += 1
            found.append(count)
        return found

    def _slot(self, source: int, turn: int) -> int:
        """How many turns of all sources come before this one."""
        before, own = turn, self.rates[source]
        for rival, rate in enumerate(self.rates):
            if rival != source:
                ticks = (2 * turn + 1) * rate  # twice this turn's time, in units of 1 / (own rate x rival's rate)
                before += (ticks + own - (rival > source)) // (2 * own)
        return before

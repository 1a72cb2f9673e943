"""Buffers that several texts hold, and who of them may write where.

A text that was forked and its fork hold the same memory until one of them goes on. A `Lease` is one
holder's part in a buffer: the slots from 0 up to an end that it has filled or claimed. Whoever wants to write
claims the slots first, and gets them where no other holder's part reaches; else it takes a copy of its own.
So several texts share what they have in common and one of them goes on behind it in place, nobody reads what
another writes, and what nobody else holds any longer is written to again. Holders may be in different
threads.
What this does not know: what a slot is.
"""

from __future__ import annotations

import threading
import weakref

__all__ = ["Lease"]


class _Holders:
    """Everybody who holds one buffer."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.leases: list[weakref.ref[Lease]] = []


class Lease:
    """A holder's part in a buffer; gone when nobody holds the lease any longer."""

    __slots__ = ("__weakref__", "_end", "_holders")

    def __init__(self) -> None:
        """Of a new buffer, which nobody else holds."""
        self._end = 0
        self._holders = _Holders()
        self._holders.leases.append(weakref.ref(self))

    def fork(self, end: int) -> Lease:
        """Another holder's; both have a part in slots 0 .. end - 1."""
        other = Lease.__new__(Lease)
        other._end, other._holders = end, self._holders
        with self._holders.lock:
            self._others()  # forgets who is gone: one that is only forked would remember all of its forks
            self._end = max(self._end, end)
            self._holders.leases.append(weakref.ref(other))
        return other

    def claim(self, first: int, end: int) -> bool:
        """Take slots first .. end - 1 to write there; False where another's part reaches beyond `first`.

        Then the buffer has to be copied, and this lease is held until that is done: it keeps others from
        writing there.
        """
        holders = self._holders
        if len(holders.leases) > 1:  # a single holder is joined by nobody but through its own `fork`
            with holders.lock:
                if any(other._end > first for other in self._others()):
                    return False
                self._end = max(self._end, end)
                return True
        self._end = max(self._end, end)
        return True

    @property
    def alone(self) -> bool:
        """Whether nobody else holds the buffer."""
        with self._holders.lock:
            return not self._others()

    def _others(self) -> list[Lease]:
        holders = self._holders
        alive = [(there, lease) for there in holders.leases if (lease := there()) is not None]
        holders.leases = [there for there, _ in alive]
        return [lease for _, lease in alive if lease is not self]

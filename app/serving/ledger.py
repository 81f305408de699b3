"""One ledger of core tokens for all models: a batch takes as many as it has threads, and models take turns by the CPU time they use.

Start-time fair queuing (Goyal, Vin, Cheng 1996) over CPU seconds: of those that wait, the one that has used least is next; one that
returns from idleness starts at the current virtual time, so nobody saves up credit. Pure bookkeeping on one event loop: no tasks, timers.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Final

RECENT_S: Final = 1.0
"""A model that ran or waited this recently has a claim on the cores."""
_USAGE_S: Final = 0.5
"""Time constant of the decayed CPU usage by which a light model is told from a heavy one."""


class Account:
    """One engine's account. `wake` is called when its turn has come; it should call take() again at once."""

    __slots__ = ("_ledger", "_used", "_used_at", "name", "running", "seen_at", "tokens_wanted", "vtime", "waiting_since", "wake", "weight")

    def __init__(self, ledger: CoreLedger, name: str, wake: Callable[[], None], weight: float) -> None:
        self._ledger = ledger
        self.name = name
        self.wake = wake
        self.weight = weight
        self.running = 0
        self.tokens_wanted = 0
        self.waiting_since = 0.0
        self.vtime = 0.0
        self.seen_at = -RECENT_S
        self._used = 0.0
        self._used_at = 0.0

    def take(self, threads: int, expected_s: float) -> int:
        """Tokens for one batch of `threads` threads that will use about `expected_s` CPU seconds; 0: wait, wake() will be called."""
        return self._ledger.take(self, threads, expected_s)

    def give(self, tokens: int, expected_s: float, cpu_s: float) -> None:
        """The batch is done: return its tokens and pay what it really used."""
        self._ledger.give(self, tokens, expected_s, cpu_s)

    def withdraw(self) -> None:
        """Nothing is queued any more: stop waiting."""
        self.tokens_wanted = 0

    def close(self) -> None:
        """The engine is gone."""
        self._ledger.close(self)

    def usage(self, now: float) -> float:
        """Cores used lately: CPU seconds per second, decayed."""
        return self._used * max(0.0, 1 - (now - self._used_at) / (4 * _USAGE_S)) / _USAGE_S if self._used else 0.0

    def pay(self, cpu_s: float, now: float) -> None:
        past = max(0.0, 1 - (now - self._used_at) / _USAGE_S)
        self._used = self._used * past + cpu_s
        self._used_at = now


class CoreLedger:
    """`cores` tokens. While one model alone is active it may run as many batches as it has instances: tuning decided that."""

    def __init__(self, cores: int) -> None:
        if cores < 1:
            raise ValueError(f"a ledger needs at least one core, got {cores}")
        self.cores = cores
        self._free = cores
        self._accounts: list[Account] = []
        self._vtime = 0.0
        self._last: Account | None = None
        self._others_at = -RECENT_S

    def join(self, name: str, wake: Callable[[], None], weight: float = 1.0) -> Account:
        account = Account(self, name, wake, weight)
        self._accounts.append(account)
        return account

    def close(self, account: Account) -> None:
        account.tokens_wanted = 0
        if account in self._accounts:
            self._accounts.remove(account)
        self._free += account.running
        account.running = 0
        if self._last is account:
            self._last = None
        self._next()

    def busy_others(self, account: Account) -> bool:
        """True where some other model ran or waited lately: then long batches of this one would be felt."""
        now = monotonic()
        return any(other is not account and self._active(other, now) for other in self._accounts)

    def take(self, account: Account, threads: int, expected_s: float) -> int:
        tokens = min(max(1, threads), self.cores)
        now = monotonic()
        if not self._may(account, tokens, now):
            if not account.tokens_wanted:
                account.waiting_since = now
            account.tokens_wanted = tokens
            account.seen_at = now
            return 0
        if account.running == 0 and not account.tokens_wanted:
            account.vtime = max(account.vtime, self._vtime)
        account.tokens_wanted = 0
        account.running += tokens
        account.seen_at = now
        account.vtime += expected_s / account.weight
        self._free -= tokens
        return tokens

    def give(self, account: Account, tokens: int, expected_s: float, cpu_s: float) -> None:
        if account.running < tokens:  # closed meanwhile: its tokens are back already
            return
        now = monotonic()
        account.running -= tokens
        account.vtime += (cpu_s - expected_s) / account.weight
        account.seen_at = now
        account.pay(cpu_s, now)
        self._free += tokens
        self._next()

    def _may(self, account: Account, tokens: int, now: float) -> bool:
        others = [other for other in self._accounts if other is not account and self._active(other, now)]
        if not others:
            return True
        ahead = any(other.tokens_wanted and other.vtime < account.vtime for other in others)
        if tokens <= self._free and not ahead:
            return True
        return self._is_light(account, tokens, len(others) + 1, now)

    def _is_light(self, account: Account, tokens: int, active: int, now: float) -> bool:
        """A model well below its share need not wait for a heavy one's batch to end: the kernel lets both run, and the sleeper first.

        Each such model has at most one batch beyond the tokens, and all of them together no more than there are cores.
        """
        if account.running or self._free - tokens < -self.cores:
            return False
        return account.usage(now) < self.cores / active

    def _active(self, account: Account, now: float) -> bool:
        return account.running > 0 or account.tokens_wanted > 0 or now - account.seen_at < RECENT_S

    def _next(self) -> None:
        """Wake those that wait, least CPU time first, until one must go on waiting: its tokens are kept for it, so it cannot starve."""
        waiting = sorted((a for a in self._accounts if a.tokens_wanted), key=lambda a: a.vtime)
        for account in waiting:
            wanted = account.tokens_wanted
            if self._free < wanted and not (self._sole(account)):
                return
            self._vtime = max(self._vtime, account.vtime)
            account.wake()
            if account.tokens_wanted:
                return

    def _sole(self, account: Account) -> bool:
        now = monotonic()
        return not any(other is not account and self._active(other, now) for other in self._accounts)

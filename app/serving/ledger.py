"""One ledger of core tokens for all models: a batch takes as many as it has threads, and models take turns by the CPU time they use.

Start-time fair queuing (Goyal, Vin and Cheng, SIGCOMM 1996) over CPU seconds: of those that wait, the one that has used least is next; one
that returns from idleness starts at the current virtual time, so nobody saves up credit. A model that lately used less than its share need
not wait for a heavy one's batch to end: it may run beside it, and the kernel's scheduler favours the thread that slept.
Bookkeeping on one event loop, without tasks or timers; it knows nothing of requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from time import monotonic
from typing import Final

RECENT_S: Final = 1.0
"""A model that ran or waited this recently has a claim on the cores."""
USAGE_S: Final = 1.0
"""Time constant of the decayed CPU usage by which a light model is told from a heavy one."""
PATIENCE_S: Final = 0.1
"""A batch that is next, but wants more tokens than ever come free together, goes after this long all the same."""
IDLE_S: Final = 0.1
"""Between two batches of a busy model less than this passes; one that paused longer starts at the current virtual time."""
LIGHT: Final = 0.9
"""Of its share of the cores: who lately used less need not wait for a heavy one's batch to end."""
CREDIT_S: Final = 0.1
"""The most CPU time that a model may be behind its share and still get it back."""
_RECOUNT_S: Final = 0.05


class Account:
    """One engine's account, `name` being MODEL:VERSION. `wake` is called when its turn has come; it should call take() again at once."""

    __slots__ = (
        "_ledger", "_used", "_used_at", "late", "model", "overrun", "running", "seen_at", "vtime", "waits_since", "wake", "wanted", "weight", "yields",
    )  # fmt: skip

    def __init__(self, ledger: CoreLedger, name: str, wake: Callable[[], None], weight: float) -> None:
        self.model = name.partition(":")[0]
        self.wake = wake
        self.weight = weight
        self.running = 0
        self.wanted = 0
        self.overrun = False
        """It is asked for more than it can answer: not content, whatever it uses."""
        self.yields = False
        """Its calls run only where nobody else wants the core, so the cores that they are on are free for others."""
        self.late = False
        """All that waits for it is too late for what was promised: those in time go first."""
        self.waits_since = 0.0
        self.vtime = 0.0
        self.seen_at = -math.inf
        self._ledger = ledger
        self._used = 0.0
        self._used_at = 0.0

    def take(self, threads: int, expected_s: float) -> int:
        """Tokens for one batch of `threads` threads that will use about `expected_s` CPU seconds; 0: wait, wake() will be called."""
        return self._ledger.take(self, threads, expected_s, monotonic())

    def give(self, tokens: int, expected_s: float, cpu_s: float, wants: int = 0) -> None:
        """The batch is done: return its tokens, pay what it really used, and compete for `wants` more threads at once."""
        self._ledger.give(self, tokens, expected_s, cpu_s, monotonic(), wants)

    def withdraw(self) -> None:
        """Nothing is queued any more: stop waiting, and let the next one by."""
        self._ledger.withdraw(self, monotonic())

    def has_company(self) -> bool:
        """True where another model ran or waited lately: it would feel long batches of this one."""
        return self._ledger.has_company(self, monotonic())

    def of_share(self) -> float:
        """CPU time that it lately used ÷ its fair share of the cores."""
        now = monotonic()
        return self.cores_used(now) / self._ledger.share(self, now)

    def has_lighter_company(self) -> bool:
        """True where another model that is content with less than its share ran or waited lately."""
        return self._ledger.has_lighter_company(self, monotonic())

    def close(self) -> None:
        """The engine is gone."""
        self._ledger.close(self, monotonic())

    @property
    def turn(self) -> tuple[bool, float]:
        """Of those that wait the smallest is next."""
        return self.late, self.vtime

    def cores_used(self, now: float) -> float:
        """CPU seconds per second over about the last USAGE_S."""
        return self._used * math.exp((self._used_at - now) / USAGE_S) / USAGE_S

    def pay(self, cpu_s: float, now: float) -> None:
        self._used = self._used * math.exp((self._used_at - now) / USAGE_S) + cpu_s
        self._used_at = now


class CoreLedger:
    """`cores` tokens. While one model alone is active it runs as many batches as it has instances: that is what tuning decided."""

    def __init__(self, cores: int) -> None:
        if cores < 1:
            raise ValueError(f"a ledger needs at least one core, got {cores}")
        self.cores = cores
        self.running = 0
        self._accounts: list[Account] = []
        self._recent: list[Account] = []
        self._recount_at = 0.0
        self._vtime = 0.0

    def join(self, name: str, wake: Callable[[], None], weight: float = 1.0) -> Account:
        """A new account; twice the weight is twice the CPU time when both want all of it."""
        account = Account(self, name, wake, weight)
        self._accounts.append(account)
        return account

    def take(self, account: Account, threads: int, expected_s: float, now: float) -> int:
        tokens = min(max(1, threads), self.cores)
        was_idle = not account.running and not account.wanted and now - account.seen_at > IDLE_S
        account.vtime = max(account.vtime, self._vtime - (0.0 if was_idle else CREDIT_S))
        self._see(account, now)
        if not self._may(account, tokens, now):
            if not account.wanted:
                account.waits_since = now
            account.wanted = tokens
            return 0
        account.wanted = 0
        account.running += tokens
        self.running += tokens
        self._vtime = max(self._vtime, account.vtime)
        account.vtime += expected_s / account.weight
        return tokens

    def give(self, account: Account, tokens: int, expected_s: float, cpu_s: float, now: float, wants: int = 0) -> None:
        if account.running < tokens:  # closed meanwhile: its tokens are back already
            return
        account.running -= tokens
        self.running -= tokens
        account.vtime += (cpu_s - expected_s) / account.weight
        account.pay(cpu_s, now)
        self._see(account, now)
        if wants and not account.wanted:
            account.wanted, account.waits_since = min(wants, self.cores), now
        self._wake_next(now)

    def withdraw(self, account: Account, now: float) -> None:
        if account.wanted:
            account.wanted = 0
            self._wake_next(now)

    def close(self, account: Account, now: float) -> None:
        if account in self._accounts:
            self._accounts.remove(account)
        if account in self._recent:
            self._recent.remove(account)
        self.running -= account.running
        account.running = account.wanted = 0
        self._wake_next(now)

    def has_company(self, account: Account, now: float) -> bool:
        recent = self._recent_accounts(now)
        return len(recent) > 1 or (len(recent) == 1 and recent[0] is not account)

    def share(self, account: Account, now: float) -> float:
        """Cores that are its own while all that were active lately want them."""
        others = [other.weight for other in self._recent_accounts(now) if other is not account]
        return self.cores * account.weight / (account.weight + sum(others))

    def has_lighter_company(self, account: Account, now: float) -> bool:
        recent = [other for other in self._recent_accounts(now) if other.model != account.model]
        return any(not other.overrun and other.cores_used(now) < LIGHT * self.share(other, now) for other in recent)

    def _may(self, account: Account, tokens: int, now: float) -> bool:
        recent = self._recent
        if len(recent) == 1:
            return True
        if account.wanted and now - account.waits_since > PATIENCE_S and self.running + tokens <= 2 * self.cores:
            return self._first_waiting() is account
        if self.running - self._yielding(account) + tokens <= self.cores:
            return not any(other.wanted and other.turn < account.turn for other in recent if other is not account)
        share = self.share(account, now)
        return (
            account.running + tokens <= max(1.0, share)
            and self.running + tokens <= 2 * self.cores
            and account.cores_used(now) < LIGHT * share
        )

    def _yielding(self, account: Account) -> int:
        """Tokens of others whose calls give way."""
        return sum([other.running for other in self._recent if other.yields and other is not account])

    def _wake_next(self, now: float) -> None:
        """Wake those that wait, least CPU time first, until one must go on waiting: free tokens are kept for it, so it cannot starve."""
        tried: set[Account] = set()
        while (account := self._first_waiting(tried)) is not None:
            tried.add(account)
            patience_is_over = now - account.waits_since > PATIENCE_S
            if self.running + account.wanted > self.cores and not patience_is_over and self.has_company(account, now):
                return
            account.wake()
            if account.wanted:
                return

    def _first_waiting(self, tried: set[Account] | None = None) -> Account | None:
        waiting = [account for account in self._recent if account.wanted and not (tried and account in tried)]
        return min(waiting, key=lambda account: account.turn) if waiting else None

    def _see(self, account: Account, now: float) -> None:
        account.seen_at = now
        if account not in self._recent_accounts(now):
            self._recent.append(account)

    def _recent_accounts(self, now: float) -> list[Account]:
        if now >= self._recount_at:
            self._recount_at = now + _RECOUNT_S
            self._recent = [a for a in self._accounts if a.running or a.wanted or now - a.seen_at < RECENT_S]
        return self._recent

"""Which rank is lost, when the connection to the others breaks.

The ranks that are left notice at once: a dead process's sockets close (gloo), or torchrun sends them SIGTERM. That
does not say who died, for a rank that gave up for the same reason closes its sockets as well. So each leaves a word in
the store that torchrun keeps, and reads the others': a rank without one whose process is gone has died.
"""

import contextlib
import os
import re
import socket
import time

import torch.distributed as dist

TIMEOUT = 20.0  # seconds; torchrun kills what is left 30 s after a rank has died


class RankFailure(Exception):
    """Another rank is gone or has failed. `print_it` is set on one of the ranks that are left."""

    def __init__(self, text: str, print_it: bool):
        super().__init__(text)
        self.print_it = print_it


def is_lost_connection(error: Exception) -> bool:
    """Whether an exception came from a collective that another rank did not join to the end."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and bool(re.search("gloo|nccl|connection|broken pipe", str(error), re.I))


class FailureDetector:
    """One rank's part in finding out who is lost. `store` is shared by all ranks, None for a rank alone, which is never
    called; `addresses`: (host name, process id) of each."""

    def __init__(self, store: dist.Store | None, rank: int, addresses: list[tuple[str, int]]):
        self.store, self.rank, self.addresses = store, rank, addresses

    def report(self, text: str) -> None:
        """Let the others know that this rank lives, and what went wrong on it if anything did."""
        with contextlib.suppress(RuntimeError):
            self.store.set(f"word/{self.rank}", text)

    def diagnose(self) -> RankFailure:
        """Wait until every other rank has answered or is dead; returns what happened."""
        self.report("")
        deadline, words = time.monotonic() + TIMEOUT, {}  # rank → what it has said
        silent, dead = set(range(len(self.addresses))) - {self.rank}, set()
        try:
            while silent != dead and time.monotonic() < deadline:
                dead = {rank for rank in silent if self._is_gone(rank)}
                for rank in sorted(silent):
                    if self.store.check([f"word/{rank}"]):
                        words[rank] = self.store.get(f"word/{rank}").decode()
                silent, dead = silent - words.keys(), dead - words.keys()
                time.sleep(0.1)
        except RuntimeError:
            return RankFailure("rank 0, which kept the store, has died", True)
        failed = {rank: word for rank, word in words.items() if word}
        if silent:
            text = _has(silent) + (" died" if silent == dead else f" died, or not answered for {TIMEOUT:g} s")
        elif failed:
            text = "; ".join(f"{_has({rank})} failed: {word}" for rank, word in failed.items())
        else:
            text = f"rank {self.rank} has lost its connection to the others"
        return RankFailure(text, self.rank == min({self.rank, *words} - failed.keys()))

    def _is_gone(self, rank: int) -> bool:
        host, process = self.addresses[rank]
        if host == socket.gethostname():
            try:
                os.kill(process, 0)
            except ProcessLookupError:
                return True
        return False


def _has(ranks: set[int]) -> str:
    numbers = ", ".join(map(str, sorted(ranks)))
    return f"rank {numbers} has" if len(ranks) == 1 else f"ranks {numbers} have"

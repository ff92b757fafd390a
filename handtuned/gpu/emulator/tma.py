"""TMA, mbarriers and fences."""

from .fault import Unsupported


def bulk(m, pc, i):
    raise Unsupported(i)


mbarrier = tensormap = try_wait = bulk


def fence(m, pc, i):
    """fence.proxy.async: what threads wrote to shared memory becomes visible to wgmma and TMA."""
    if "async" not in [part.split("::")[0] for part in i.parts]:
        return lambda b: None

    def run(b):
        b.shared.fence(None if b.mask is None else b.here().reshape(b.programs, -1, 32).any(-1))

    return run

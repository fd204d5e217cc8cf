"""Named ranges around the engine's stages, for profilers that read nvtx; nothing where nvtx is not installed."""

from contextlib import AbstractContextManager, nullcontext

try:
    import nvtx
except ImportError:
    nvtx = None


def stage(name: str) -> AbstractContextManager[object]:
    """A context that profilers show as `name`."""
    return nvtx.annotate(name, domain="ttt") if nvtx is not None else nullcontext()

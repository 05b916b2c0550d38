"""What goes wrong with the CPU engine itself; with its jobs, see `muxserve.engine.errors`."""

from __future__ import annotations


class NativeLibraryError(RuntimeError):
    """The package was installed without the library, or the library does not load."""

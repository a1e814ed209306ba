"""The base model of the pages that draw, kept open between two drawings: opening one can take a minute."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spf_kit.errors import Interrupted
from spf_kit.studio.folders import Folders

if TYPE_CHECKING:
    from spf_kit.families.base import Family

IDLE = 600.0  # seconds after which a base that nobody uses makes room


class KeptBase:
    """At most one base model, lent to one drawing at a time: LoRAs are attached to it meanwhile."""

    def __init__(self, folders: Folders) -> None:
        self._folders = folders
        self._lock = threading.Lock()
        self._of: tuple[Any, ...] = ()
        self._family: Family | None = None
        self._timer: threading.Timer | None = None

    @contextmanager
    def lent(self) -> Iterator[Callable[..., Family]]:
        """Yield a function to be used in place of `workflow.load_base`."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            try:
                yield self._load
            except Interrupted:  # between two steps, and tidied up: the next drawing need not open it again
                raise
            except BaseException:
                self._release()  # who knows what a drawing left behind
                raise
            finally:
                self._timer = threading.Timer(IDLE, self._give_up)
                self._timer.daemon = True  # the studio need not wait for it
                self._timer.start()

    def _load(self, model: str | None, **chosen: Any) -> Family:
        """Raises UserError for a base outside the studio's folders, also for one that a LoRA names."""
        from spf_kit import families
        from spf_kit.training.machine import device
        from spf_kit.workflow.base import choose_base

        base = choose_base(model, **chosen)
        path = Path(self._folders.model(base.model))
        wanted = (base.model_dump_json(), path.stat().st_mtime_ns if path.exists() else 0)
        if self._family is None or wanted != self._of:
            self._release()  # first: two may not fit
            self._family, self._of = families.load(base, device=device()), wanted
        return self._family

    def _give_up(self) -> None:
        if self._lock.acquire(blocking=False):  # else it is in use, and another timer will come
            try:
                self._release()
            finally:
                self._lock.release()

    def _release(self) -> None:
        import gc
        import sys

        self._family, self._of = None, ()
        gc.collect()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()

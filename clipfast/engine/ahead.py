"""Work done ahead of whoever wants its results, in threads, in order and within bounds."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")


def ahead(items: Iterable[Given], make: Callable[[Given], Made], workers: int, most: int) -> Generator[Made]:
    """What `make` makes of the items, in their order, by several threads; at most `most` before they are asked for.

    The items are listed in a thread, too: to find the next one may mean to read a file. What listing or making raises
    is raised in its place. Closing the generator ends the threads, once they have made what they are at.
    """
    arriving: queue.SimpleQueue[Future[Made] | BaseException | None] = queue.SimpleQueue()
    room, left = threading.Semaphore(most), threading.Event()

    def listing() -> None:
        try:
            for item in items:
                room.acquire()
                if left.is_set():
                    break
                arriving.put(pool.submit(make, item))
            arriving.put(None)
        except BaseException as error:
            arriving.put(error)

    with ThreadPoolExecutor(workers, "decode") as pool:
        lister = threading.Thread(target=listing, name="list", daemon=True)
        lister.start()
        try:
            while (found := arriving.get()) is not None:
                if isinstance(found, BaseException):
                    raise found
                made = found.result()
                room.release()
                yield made
        finally:
            left.set()
            room.release()
            lister.join()
            pool.shutdown(cancel_futures=True)

"""Names that are unique, whatever they are made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable


class Numbering:
    """Makes one name after the other unique: each that was there before is numbered from ~2, and order alone decides.

    same: names are equal where this is, such as `str.lower` for file systems that take "A" for "a".
    """

    def __init__(self, same: Callable[[str], str] = str):
        self._same = same
        self._taken: set[str] = set()
        self._counts: dict[str, int] = {}

    def __call__(self, name: str) -> str:
        key, same = name, self._same
        if same(key) in self._taken:
            count = self._counts.get(same(name), 1)
            while same(key) in self._taken:
                count += 1
                key = f"{name}~{count}"
            self._counts[same(name)] = count
        self._taken.add(same(key))
        return key


def numbered(names: Iterable[str], same: Callable[[str], str] = str) -> list[str]:
    """The names made unique, as `Numbering` does.

    >>> numbered(["a", "b", "a", "a~2", "a"])
    ['a', 'b', 'a~2', 'a~2~2', 'a~3']
    """
    return list(map(Numbering(same), names))

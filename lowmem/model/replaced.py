"""Replace a function for a while, in one context only: coroutines of a thread may each replace it by another."""

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

_functions: ContextVar[dict["_Dispatcher", Callable]] = ContextVar("functions")
_dispatchers: dict[tuple[int, str], "_Dispatcher"] = {}  # by the owner's id and the name


@contextmanager
def replaced(owner: object, name: str, function: Callable) -> Iterator[None]:
    """Within this block, `owner.name(...)` is `function(original, ...)` in the current context (see `contextvars`).

    Of a mapping, replaces `owner[name]`. Other contexts call the original or their own replacement, and their blocks
    may overlap with this one.
    """
    place = (id(owner), name)
    dispatcher = _dispatchers.get(place) or _dispatchers.setdefault(place, _Dispatcher(owner, name))
    dispatcher.blocks += 1
    token = _functions.set(_functions.get({}) | {dispatcher: function})
    try:
        yield
    finally:
        _functions.reset(token)
        dispatcher.blocks -= 1
        if not dispatcher.blocks:
            _dispatchers.pop(place).remove()


class _Dispatcher:
    """Is called instead of a function while at least one block replaces it."""

    def __init__(self, owner: object, name: str):
        self.blocks = 0
        is_mapping = isinstance(owner, MutableMapping)
        self._original = owner[name] if is_mapping else getattr(owner, name)
        self._put = owner.__setitem__ if is_mapping else partial(setattr, owner)
        self._owner, self._name, self._is_inherited = owner, name, not is_mapping and name not in vars(owner)
        self._own = self._original if is_mapping or self._is_inherited else vars(owner)[name]
        self._put(name, lambda *args, **kwargs: self(*args, **kwargs))  # a function, so that a class makes it a method

    def __call__(self, *args, **kwargs):
        function = _functions.get({}).get(self)
        return function(self._original, *args, **kwargs) if function else self._original(*args, **kwargs)

    def remove(self) -> None:
        if self._is_inherited:
            delattr(self._owner, self._name)
        else:
            self._put(self._name, self._own)

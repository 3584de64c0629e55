"""A module that can be called like the function it is named after."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def make_callable(module_name: str, function: Callable[..., Any]) -> None:
    """Let ``module_name`` be called as ``function``: the last line of a module whose name is also a public function.

    Importing ``instant_reward.train`` binds that module as the package's attribute ``train``, over any function of the
    name. Since the module is callable, ``instant_reward.train(...)`` works whichever came first, and tools that look
    modules up by attribute (``unittest.mock.patch("instant_reward.train.name")``) find what they look for.

    Raises:
        KeyError: the module has not been imported.
    """

    class CallableModule(ModuleType):
        __signature__ = inspect.signature(function)

        def __call__(self, *arguments: Any, **options: Any) -> Any:
            return function(*arguments, **options)

    sys.modules[module_name].__class__ = CallableModule

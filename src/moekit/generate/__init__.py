"""Continue text: sampling, generation with a cache, and text in, text out.

`moekit.generate` is a function to users and this package to Python, whichever is imported first; so the package can
be called.
"""

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        """See `moekit.generate.generate.generate`."""
        from moekit.generate.generate import generate  # noqa: PLC0415 - torch only when it is needed

        return generate(*args, **options)


sys.modules[__name__].__class__ = _CallablePackage

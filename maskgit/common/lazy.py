"""Packages whose public names are imported on first use, so that help loads no torch."""

import sys
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any


def lazy(package: str, exports: Mapping[str, str]) -> None:
    """Give `package` the public names `exports`: name -> the submodule that defines it.

    A public name wins over a submodule called the same: `maskgit.decode` stays the function when
    something imports `maskgit/decode.py`, which makes Python bind that module to the package.
    """

    class LazyPackage(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name not in exports:
                raise AttributeError(f"module {package!r} has no attribute {name!r}")
            value = getattr(import_module(f"{package}.{exports[name]}"), name)
            setattr(self, name, value)
            return value

        def __setattr__(self, name: str, value: Any) -> None:
            if name in exports and isinstance(value, ModuleType):
                value = getattr(value, name)
            super().__setattr__(name, value)

        def __dir__(self) -> list[str]:
            return sorted({*super().__dir__(), *exports})

    sys.modules[package].__class__ = LazyPackage

"""Rein++: Rein-G and Rein-A on frozen vision foundation models.

The public names, each loaded from its module on first use. This is the one file here that no notebook exports;
nbdev_export keeps the next line equal to settings.ini and leaves the rest alone.
"""

__version__ = "0.1.0"

import importlib as _importlib
import sys as _sys
import types as _types

_HOME = {  # public name -> its module, in the order of the notebooks
    "CLASSES": "labels",
    "draw_scene": "scenes",
    "open_dataset": "datasets",
    "create_backbone": "backbones",
    "BACKBONES": "backbones",
    "ReinG": "rein_g",
    "create_segmenter": "segmenter",
    "load_segmenter": "segmenter",
    "push_adapter": "segmenter",
    "pull_adapter": "segmenter",
    "load_official": "official",
    "ReinA": "rein_a",
    "Generalize": "train",
    "fit": "train",
    "evaluate": "evaluate",
}
__all__ = list(_HOME)


class _Package(_types.ModuleType):
    """Holds the public names: a function with its module's name (`evaluate`) must win over the module, whichever is imported first."""

    def __getattr__(self, name):
        if name not in _HOME:
            raise AttributeError(f"module 'reinpp' has no attribute {name!r}")
        value = getattr(_importlib.import_module(f"reinpp.{_HOME[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name, value):
        # Python sets a submodule as an attribute of its package once it is loaded: put the public name in its place.
        if name in _HOME and isinstance(value, _types.ModuleType):
            value = getattr(value, name, value)
        super().__setattr__(name, value)

    def __dir__(self):
        return sorted({*super().__dir__(), *_HOME})


_sys.modules[__name__].__class__ = _Package

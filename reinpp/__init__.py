"""Rein++: Rein-G and Rein-A on frozen vision foundation models.

The public names, each loaded from its module on first use (PEP 562). This is the one file here that no notebook
exports; nbdev_export keeps the next line equal to settings.ini and leaves the rest alone.
"""

__version__ = "0.1.0"

from importlib import import_module as _import_module

_HOME = {  # public name -> its module, in the order of the notebooks
    "CLASSES": "labels",
    "draw_scene": "data.scenes",
    "open_dataset": "data.catalog",
    "create_backbone": "models.backbones",
    "BACKBONES": "models.backbones",
    "ReinG": "models.rein_g",
    "push_adapter": "models.adapter_files",
    "pull_adapter": "models.adapter_files",
    "create_segmenter": "models.segmenter",
    "load_segmenter": "models.segmenter",
    "load_official": "models.official",
    "fit": "training.train",
    "Generalize": "training.generalize",
    "evaluate": "training.evaluation",
    "Adaptation": "adaptation.rein_a",
    "ReinA": "adaptation.rein_a",
}
__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'reinpp' has no attribute {name!r}")
    value = getattr(_import_module(f"reinpp.{_HOME[name]}"), name)
    if callable(value) and _PARAMETERS not in (value.__doc__ or ""): value.__doc__ = _explained(value)
    return value


_PARAMETERS = "\n\nParameters:\n"


def _explained(value):
    "The docstring with what the comments say of parameters and of what comes back, so that `help` shows them."
    from fastcore.docments import docments
    said = docments(value, full=True)
    lines = [f"    {'returns' if name == 'return' else name}: {' '.join(part.docment.split())}"
             for name, part in said.items() if part.docment]
    return (value.__doc__ or "") + (_PARAMETERS + "\n".join(lines) if lines else "")


def __dir__():
    return sorted({*globals(), *_HOME})

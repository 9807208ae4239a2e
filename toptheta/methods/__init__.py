"""What is kept: a file for each method, compensation, and the parameters of sparse attention.

Every file here that registers a method is found by itself: adding one is adding a file.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

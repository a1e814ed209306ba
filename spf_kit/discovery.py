"""Where plugins come from: the ones shipped, installed packages' entry points, a file named by the user."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pkgutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from spf_kit.errors import UserError
from spf_kit.losses import Plugin, registered

ENTRY_POINTS = "spf_kit.losses"
FILE_MODULE = "spf_kit_plugin_file."


def available(files: Iterable[Path] = ()) -> Mapping[str, type[Plugin]]:
    """All plugins by name: shipped, installed (entry point group `spf_kit.losses`), then `files`.

    Raises UserError if an installed plugin or a file cannot be imported, or two share a name.
    """
    package = importlib.import_module("spf_kit.plugins")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    for entry in sorted(importlib.metadata.entry_points(group=ENTRY_POINTS), key=lambda e: e.value):
        _load_entry_point(entry)
    for file in files:
        load_file(file)
    return dict(registered())


def _load_entry_point(entry: importlib.metadata.EntryPoint) -> None:
    package = entry.dist.name if entry.dist else "an unknown package"
    try:
        entry.load()
    except UserError:
        raise
    except Exception as error:  # an ImportError is never swallowed: the user believes the plugin is there
        raise UserError(
            f"the loss plugin {entry.name!r} of the installed package {package!r} ({entry.value}) cannot be "
            f"imported: {type(error).__name__}: {error}; mend or uninstall {package!r}"
        ) from error


def load_file(file: Path) -> list[type[Plugin]]:
    """Import a Python file that registers plugins (`--plugin FILE`) and return those it added.

    Raises UserError if the file is missing, cannot be imported, or registers nothing.
    """
    file = Path(file)
    if not file.is_file():
        raise UserError(f"the plugin file {str(file)!r} does not exist")
    before = dict(registered())
    name = f"{FILE_MODULE}{file.resolve().as_posix().replace('.', '_')}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"the plugin file {str(file)!r} is not a Python file (its name must end in .py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the plugin file {str(file)!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    added = [cls for key, cls in registered().items() if before.get(key) is not cls]
    if not added:
        raise UserError(
            f"the plugin file {str(file)!r} registers no plugin: decorate a class with @register(...)"
        )
    return added


def files_of(plugins: Iterable[Plugin]) -> list[Path]:
    """The files that these plugins were loaded from with `load_file`, in order, each once."""
    modules = dict.fromkeys(type(plugin).__module__ for plugin in plugins)
    named = (sys.modules[m].__file__ for m in modules if m.startswith(FILE_MODULE))
    return [Path(file) for file in named if file]

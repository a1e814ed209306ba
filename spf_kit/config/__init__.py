"""TOML to one typed configuration: layers, the origin of every value, errors that suggest.

Layers, later wins: package defaults (`spf_kit.schema`), `presets/bases/<family>.toml` and its profile for a
card (`base.profile`), what the preset extends, the preset, the command line.
"""

from spf_kit.config.editor import json_schema, json_schema_text
from spf_kit.config.options import set_option
from spf_kit.config.parameters import Parameter, describe, model_parameters, parameters
from spf_kit.config.problems import ConfigError, Origin
from spf_kit.config.resolve import Resolved, Row, load
from spf_kit.config.shipped import ShippedPreset, find_preset, presets_folder, shipped_files, shipped_presets

__all__ = [
    "ConfigError",
    "Origin",
    "Parameter",
    "Resolved",
    "Row",
    "ShippedPreset",
    "describe",
    "find_preset",
    "json_schema",
    "json_schema_text",
    "load",
    "model_parameters",
    "parameters",
    "presets_folder",
    "set_option",
    "shipped_files",
    "shipped_presets",
]

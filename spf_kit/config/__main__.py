"""`python -m spf_kit.config`: write `presets/preset.schema.json` anew after a key or plugin changed."""

from spf_kit.config import json_schema_text, presets_folder
from spf_kit.config.editor import FILE

if __name__ == "__main__":
    (presets_folder() / FILE).write_text(json_schema_text(), encoding="utf-8", newline="\n")

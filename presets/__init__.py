"""Presets in TOML: attributes here, `recipes/` of losses, `bases/` of settings that suit a model family."""

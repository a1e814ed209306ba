"""The losses and masks that come with spf-kit, each alone in its file; `spf_kit.discovery` finds them."""

"""Modules behind the commands in `scripts/`; the model never imports them."""

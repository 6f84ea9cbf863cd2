"""What the commands in `scripts/` are made of; the model never imports it."""

"""The rows of the attention table that a machine can run, and where it runs them."""

import os

import torch

from mosaicbert.bert_layers import ATTENTION_BACKENDS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

# Each row on its own device if the table names one, else on this machine's; in the interpreter, only Triton's row.
DEVICES = {name: row.devices[0] if row.devices else DEVICE for name, row in ATTENTION_BACKENDS.items()}
ROWS = {"triton": "cpu"} if INTERPRETED else {name: at for name, at in DEVICES.items() if at in ("cpu", DEVICE)}

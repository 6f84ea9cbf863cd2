"""Fill the [MASK] of a sentence with the checkpoint in a folder.

python scripts/fill_mask.py "The capital of France is [MASK]."
"""

import argparse
from pathlib import Path

from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

REPOSITORY = Path(__file__).resolve().parent.parent


def main() -> None:
    """Parse the command line and print the five likeliest words with their probabilities."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="a sentence with one [MASK]")
    parser.add_argument("--model", default=str(REPOSITORY), help="folder or Hub id (default: this repository)")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    if arguments.text.count(tokenizer.mask_token) != 1:
        parser.error(f"text must hold {tokenizer.mask_token} once, got {arguments.text!r}")
    model = AutoModelForMaskedLM.from_pretrained(arguments.model, trust_remote_code=True)
    fill = pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu")
    for answer in fill(arguments.text):
        print(f"{answer['score']:6.3f}  {answer['sequence']}")


if __name__ == "__main__":
    main()

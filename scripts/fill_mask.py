"""Fill the [MASK] of a sentence with the checkpoint in a folder.

python scripts/fill_mask.py "The capital of France is [MASK]."
"""

from pathlib import Path

from lib import cli
from lib.common import REPOSITORY, check_special, check_whole, count_tokens, load_model, load_words, read_json


def check_text(text: str, mask: str) -> None:
    """Raise ValueError if a text does not hold the mask once."""
    if text.count(mask) != 1:
        raise ValueError(f"text must contain {mask} once, got {text!r}")


def main() -> None:
    """Parse the command line and print the five most likely words with their probabilities."""
    parser = cli.Parser(__doc__)
    parser.add_argument("text", help="a sentence with one [MASK]")
    parser.option("--model", "folder or Hub id (default: this repository)", default=str(REPOSITORY))
    parser.option("--trust_remote_code", **cli.TRUST)
    options = parser.parse_args()
    check_whole(options.model, options.trust_remote_code, "ForMaskedLM")
    settings = Path(options.model, "tokenizer_config.json")
    mask = read_json(settings).get("mask_token") if settings.is_file() else None
    if isinstance(mask, str):
        check_text(options.text, mask)
    from transformers import pipeline

    tokenizer = load_words(options.model, trust_remote_code=options.trust_remote_code)
    check_special(tokenizer, "mask_token")
    check_text(options.text, tokenizer.mask_token)
    model = load_model("ForMaskedLM", options.model, options.trust_remote_code)
    count_tokens(tokenizer, model.config.vocab_size)
    fill = pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu")
    for answer in fill(options.text):
        print(f"{answer['score']:6.3f}  {answer['sequence']}")


if __name__ == "__main__":
    cli.run(main)

"""Fill the [MASK] of a sentence with the checkpoint in a folder.

python scripts/fill_mask.py "The capital of France is [MASK]."
"""

from lib import cli
from lib.common import REPOSITORY, check_special, count_tokens, load_model, load_words


def main() -> None:
    """Parse the command line and print the five likeliest words with their probabilities."""
    parser = cli.Parser(__doc__)
    parser.add_argument("text", help="a sentence with one [MASK]")
    parser.add_argument("--model", default=str(REPOSITORY), help="folder or Hub id (default: this repository)")
    parser.add_argument("--trust_remote_code", **cli.TRUST)
    options = parser.parse_args()
    from transformers import pipeline

    tokenizer = load_words(options.model, trust_remote_code=options.trust_remote_code)
    check_special(tokenizer, "mask_token")
    if options.text.count(tokenizer.mask_token) != 1:
        raise ValueError(f"text must contain {tokenizer.mask_token} once, got {options.text!r}")
    model = load_model("ForMaskedLM", options.model, options.trust_remote_code)
    count_tokens(tokenizer, model.config.vocab_size)
    fill = pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu")
    for answer in fill(options.text):
        print(f"{answer['score']:6.3f}  {answer['sequence']}")


if __name__ == "__main__":
    cli.run(main)

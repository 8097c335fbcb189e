"""
Save a small untrained byte-level model with its tokenizer, to try recipes with:

    python -m trl_ext.playground DIRECTORY
"""

import argparse

from .model import save_byte_level_model


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a small untrained byte-level model, for trying recipes.")
    parser.add_argument("directory", help="where to save it")
    parser.add_argument("--hidden_size", type=int, default=128, help="a multiple of 32 (default 128)")
    parser.add_argument("--num_layers", type=int, default=3, help="default 3")
    parser.add_argument("--max_position_embeddings", type=int, default=4096, help="longest sequence (default 4096)")
    parser.add_argument("--seed", type=int, default=42, help="of the weights (default 42)")
    options = vars(parser.parse_args())
    directory = save_byte_level_model(options.pop("directory"), **options)
    print(f"Saved a byte-level model and its tokenizer to {directory}")


if __name__ == "__main__":
    main()

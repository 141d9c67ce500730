"""Fine-tune a causal language model under differential privacy.

    accelerate launch recipes/llama_dp.py
    accelerate launch recipes/llama_dp.py --config recipes/configs/llama_3.2_1b_16k.yaml --dataset my_records.jsonl

Without arguments: the small Llama kept beside this file, the docstrings of Python's standard library as private
records, epsilon 8, a few minutes on two cores, no network. --dry-run says what a run would do and stops.
"""

from finetune.run import main as run  # first of all: what it imports sets what torch reads when it is imported

# isort: split
from finetune.recipe import Recipe


def main(argv: list[str] | None = None) -> int:
    """Read the options and run."""
    return run(Recipe(), __doc__ or "", argv)


if __name__ == "__main__":
    raise SystemExit(main())

"""The parts of the recipes: options, texts, data, loop, evaluation and report."""

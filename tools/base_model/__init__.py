"""The small public Llama that the recipes start from, for ``train_base_model.py``.

``text`` has the public documents and their tokens, ``training`` makes the model of them, ``card`` says how.
"""

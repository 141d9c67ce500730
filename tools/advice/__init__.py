"""How good the advice of `dpft.advise` is: private trainings on a grid of settings.

`training.py` is one training, `grids.py` the settings, `command.py` the command line.
"""

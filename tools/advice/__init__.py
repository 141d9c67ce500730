"""How good the advice of `dpft.advise` is: private trainings on a grid of settings.

`training.py` is one training, `grids.py` the settings, `command.py` the command line.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))  # its parts train

"""From a mechanism and a number of releases to epsilon, and back to a noise multiplier."""

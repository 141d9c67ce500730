"""Which mechanism to take: private trainings at equal epsilon, and the exact noise in the sum of the releases."""

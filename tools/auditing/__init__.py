"""Audits of dpft as it is, and of dpft broken on purpose.

``campaign.run`` takes the mechanisms to audit; ``plants`` puts a defect into dpft while one audit runs; ``subject``
has the small model and the random records that are trained on, and calls ``dpft.audit.white_box``, which knows
nothing of plants. Each result becomes a row of the JSON file and of the table as soon as it is there.
"""

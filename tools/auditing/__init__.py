"""Audits of dpft as it is, and of dpft broken on purpose.

``catalogue`` lists what is audited (``subject``: step by step; ``whole_runs``: whole trainings, of canaries that
``trainings`` makes and ``likelihood`` looks for; ``queries``: what is no training) and the defects that ``plants`` and
``plants_of_mechanisms`` put into dpft while one audit runs. ``campaign.run`` runs them. The audits themselves are
``dpft.audit.white_box`` and ``dpft.audit.two_worlds``, which know nothing of plants. Each result becomes a row of the
JSON file and of the table as soon as it is there.
"""

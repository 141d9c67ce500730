"""Private training whose ranks are killed at random instants and resumed, for ``kill_ranks.py``.

``command`` draws kills; ``campaign`` starts ``worker`` under an engine, kills it at the instant, and reads what each
rank wrote about itself. ``invariants`` judges these records; it shares no code with dpft, whose ledger it judges.
"""

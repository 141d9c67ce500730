"""Every family of transformers, built small, against one example at a time.

``shrink``, ``exceptions`` and ``building`` make models and batches, ``checking`` runs the strategies beside the
``oracle``, ``report`` writes the table.
"""
